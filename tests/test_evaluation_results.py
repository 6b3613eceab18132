"""Running a detector on a dataset for its evaluation."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from PIL import Image

from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.datasets import read_coco
from focaldet.evaluation import coco_results, evaluate_coco, write_coco_results
from tests.helpers.coco_files import coco_file

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets import AnnotationTable


class Oracle:
    """A detector that finds one object of its first class in each image."""

    def __init__(self, *class_names: str, num_classes: int = 2) -> None:
        names = class_names or None
        self.config = RetinaNetConfig(
            num_classes=len(class_names) or num_classes, class_names=names
        )
        self.options: dict[str, Any] = {}

    def predict(self, sources: Any, **options: Any) -> list[Detections]:
        self.options = options
        box, score, label = torch.tensor([[1.0, 2, 4, 6]]), torch.tensor([0.5]), torch.tensor([0])
        return [Detections(box, score, label, (20, 30), source=str(path)) for path in sources]


@pytest.fixture
def table(tmp_path: Path) -> AnnotationTable:
    for name, size in (("a.png", (30, 20)), ("b.png", (60, 40))):
        Image.new("RGB", size).save(tmp_path / name)
    return read_coco(coco_file(tmp_path), tmp_path)


def test_labels_become_the_category_ids_of_their_names(table: AnnotationTable) -> None:
    assert dict(zip(table.class_names, table.category_ids, strict=True)) == {"cat": 9, "dog": 2}
    model = Oracle("cat", "dog")
    entries = coco_results(model, table, batch_size=3, progress=False)
    assert entries == [
        {"image_id": image, "category_id": 9, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
        for image in table.image_ids.tolist()
    ]
    assert model.options == {"batch_size": 3, "progress": False}
    assert [entry["category_id"] for entry in coco_results(Oracle("dog", "cat"), table)] == [2, 2]


def test_classes_that_the_data_lack_are_an_error(table: AnnotationTable) -> None:
    with pytest.raises(ValueError, match="missing from the annotations: emu, owl"):
        coco_results(Oracle("owl", "cat", "emu"), table)


def test_classes_that_the_model_lacks_are_logged(
    table: AnnotationTable, caplog: pytest.LogCaptureFixture
) -> None:
    coco_results(Oracle("cat"), table)
    [message] = caplog.messages
    assert message.startswith("1 of the 2 classes of the dataset are unknown to the model")
    assert message.endswith("count as missed: dog.")


def test_labels_without_names_are_those_of_the_data_which_is_logged(
    table: AnnotationTable, caplog: pytest.LogCaptureFixture
) -> None:
    entries = coco_results(Oracle(num_classes=2), table)
    assert {entry["category_id"] for entry in entries} == {table.category_ids[0]}
    assert "no class names" in caplog.text
    with pytest.raises(ValueError, match="3 classes without names, but the dataset has 2"):
        coco_results(Oracle(num_classes=3), table)


def test_a_retinanet_is_evaluated_in_two_calls(
    table: AnnotationTable, tiny_config: RetinaNetConfig
) -> None:
    names = ("cat", "dog")
    config = tiny_config.replace(num_classes=2, class_names=names, score_threshold=0.0)
    entries = coco_results(RetinaNet.from_config(config), table)
    assert entries
    result = evaluate_coco(cast("Any", table), entries)
    assert result.num_images == 2
    assert sum(one.detections for one in result.classes) == len(entries)


def test_results_written_as_they_come_are_the_entries(
    table: AnnotationTable, tmp_path: Path
) -> None:
    model = Oracle("dog", "cat")
    path = write_coco_results(model, table, tmp_path / "out", batch_size=3, part_size=1)
    assert path == tmp_path / "out" / "results.json"
    assert path.read_text() == json.dumps(coco_results(model, table)) + "\n"
    assert model.options == {"batch_size": None, "progress": None}  # of the second call
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_limit_reaches_the_model(table: AnnotationTable, tmp_path: Path) -> None:
    model = Oracle("cat", "dog")
    coco_results(model, table, max_detections=300)
    assert model.options["max_detections"] == 300
    write_coco_results(model, table, tmp_path, max_detections=400)
    assert model.options["max_detections"] == 400


def test_a_bar_counts_the_images_of_all_parts(
    table: AnnotationTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    model = Oracle("cat", "dog")
    write_coco_results(model, table, tmp_path, part_size=1, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "3/2" not in shown
    write_coco_results(model, table, tmp_path, part_size=1)  # the output is not a terminal
    assert capsys.readouterr().err == ""


def test_a_bar_passes_over_the_parts_of_an_earlier_run(
    table: AnnotationTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")

    class Failing(Oracle):
        def predict(self, sources: Any, **options: Any) -> list[Detections]:
            if sources[0] == table.image_path(1):
                raise KeyboardInterrupt
            return super().predict(sources, **options)

    with pytest.raises(KeyboardInterrupt):
        write_coco_results(Failing("cat", "dog"), table, tmp_path, part_size=1)
    capsys.readouterr()
    write_coco_results(Oracle("cat", "dog"), table, tmp_path, resume=True, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_two_ranks_share_the_images_of_a_dataset(table: AnnotationTable, tmp_path: Path) -> None:
    model = Oracle("cat", "dog")
    asked: list[str] = []
    both: dict[str, Any] = {"world_size": 2, "part_size": 1}

    class Counting(Oracle):
        def predict(self, sources: Any, **options: Any) -> list[Detections]:
            asked.extend(path.name for path in sources)
            return super().predict(sources, **options)

    first = threading.Thread(
        target=write_coco_results, args=(model, table, tmp_path), kwargs={"rank": 0, **both}
    )
    first.start()
    assert write_coco_results(Counting("cat", "dog"), table, tmp_path, rank=1, **both) is None
    first.join()
    assert asked == [table.image_path(1).name]
    assert json.loads((tmp_path / "results.json").read_text()) == coco_results(model, table)


def test_a_dataset_and_model_that_do_not_fit_write_nothing(
    table: AnnotationTable, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="missing from the annotations: emu"):
        write_coco_results(Oracle("cat", "emu"), table, tmp_path / "out")
    assert not (tmp_path / "out").exists()
