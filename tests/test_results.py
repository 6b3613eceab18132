"""Results that are written as they come, in parts, by one process or by several."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import Detections, RetinaNet
from focaldet.errors import FocaldetError
from focaldet.results import _parts as parts_module
from focaldet.results import model_fingerprint, predict_to_folder, write_results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from focaldet import RetinaNetConfig
    from focaldet.results import ResultsFormat

NAMES = ("cat", "owl")
PATHS = [Path(f"photos/{name}.jpg") for name in "abcdefghij"]
SETTINGS = {"score_threshold": 0.5}


def found(path: Path) -> Detections:
    """Return detections that differ from path to path; those of some paths are empty."""
    count = (ord(path.stem) - ord("a")) % 3
    corner = torch.arange(count)[:, None] + torch.tensor([[1.1, 2.2, 9.3, 8.4]])
    return Detections(
        corner,
        torch.full((count,), 0.7),
        torch.arange(count) % 2,
        (20, 30),
        class_names=NAMES,
        source=str(path),
    )


def predict(paths: Sequence[Path]) -> list[Detections | None]:
    """Skip photo ``e``."""
    return [None if path.stem == "e" else found(path) for path in paths]


EXPECTED = [one.to_dict() for one in predict(PATHS) if one is not None]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Ends a process as SIGKILL would, without a part of its own."""


def killed_after(count: int) -> Any:
    """Return a function that predicts some images, and is then killed."""
    left = iter(range(count))

    def predict_some(paths: Sequence[Path]) -> Iterator[Detections | None]:
        for path in paths:
            if next(left, None) is None:
                raise Killed
            yield None if path.stem == "e" else found(path)

    return predict_some


def run(folder: Path, predict: Any = predict, paths: list[Path] = PATHS, **options: Any) -> Any:
    options = {"settings": SETTINGS, "class_names": NAMES, "part_size": 3, **options}
    return predict_to_folder(predict, paths, folder, **options)


def test_json_lines_have_a_line_per_image_in_order(tmp_path: Path) -> None:
    summary = run(tmp_path / "new" / "out")
    assert lines(tmp_path / "new" / "out" / "detections.jsonl") == EXPECTED
    assert (summary.num_images, summary.num_skipped) == (9, 1)
    assert summary.num_detections == sum(len(one["scores"]) for one in EXPECTED)
    assert summary.files == (tmp_path / "new" / "out" / "detections.jsonl",)
    assert names_in(tmp_path / "new" / "out") == ["detections.jsonl"]


def test_a_json_file_is_what_json_would_write_at_once(tmp_path: Path) -> None:
    run(tmp_path, format="json")
    expected = json.dumps(EXPECTED, indent=1) + "\n"
    assert (tmp_path / "detections.json").read_text() == expected


@pytest.mark.parametrize("given", [False, True], ids=["ids from 1", "ids of a dataset"])
def test_coco_results_are_those_of_to_coco(tmp_path: Path, given: bool) -> None:
    image_ids = list(range(100, 110)) if given else None
    run(tmp_path, format="coco", image_ids=image_ids, category_ids=[7, 9])
    expected = [
        entry
        for image_id, one in enumerate(predict(PATHS), start=100 if given else 1)
        if one is not None
        for entry in one.to_coco(image_id, [7, 9])
    ]
    text = (tmp_path / "results.json").read_text()
    assert text == json.dumps(expected) + "\n"
    assert (tmp_path / "images.json").exists() is not given
    if not given:
        content = json.loads((tmp_path / "images.json").read_text())
        first, *_, last = content["images"]
        assert len(content["images"]) == 9
        assert first == {"id": 1, "file_name": "photos/a.jpg", "height": 20, "width": 30}
        assert (last["id"], last["file_name"]) == (10, "photos/j.jpg")
        categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "owl"}]
        assert (content["categories"], content["annotations"]) == (categories, [])


def test_images_without_any_detection_give_empty_coco_results(tmp_path: Path) -> None:
    summary = write_results([found(Path("a.jpg"))], tmp_path / "r.json", "coco")
    assert (summary.num_images, summary.num_detections) == (1, 0)
    assert json.loads((tmp_path / "r.json").read_text()) == []


def test_parquet_has_a_row_per_image(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run(tmp_path, format="parquet")
    rows = parquet.read_table(tmp_path / "detections.parquet").to_pylist()
    expected = [
        {**{k: v for k, v in one.items() if k != "image_size"}, "height": 20, "width": 30}
        for one in EXPECTED
    ]
    assert rows == expected


def test_parquet_without_pyarrow_is_an_error_before_anything_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="Writing Parquet requires pyarrow.*pip install"):
        run(tmp_path, killed_after(0), format="parquet")


def test_write_results_reads_its_iterator_one_by_one(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[Detections | None]:
        for path in PATHS:
            alive.append(1)
            yield found(path)

    summary = write_results(stream(), tmp_path / "all.jsonl", "jsonl")
    assert len(alive) == summary.num_images == 10
    assert lines(tmp_path / "all.jsonl") == [found(path).to_dict() for path in PATHS]


def test_an_iterator_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "all.jsonl"
    target.write_text("old")
    with pytest.raises(Killed):
        write_results(killed_after(2)(PATHS), target, "jsonl")
    assert (target.read_text(), names_in(tmp_path)) == ("old", ["all.jsonl"])


@pytest.mark.parametrize("name", ["json", "jsonl", "coco"])
def test_two_ranks_write_what_one_process_writes(tmp_path: Path, name: ResultsFormat) -> None:
    run(tmp_path / "one", format=name)
    both = tmp_path / "both"
    other = threading.Thread(
        target=run, args=(both,), kwargs={"format": name, "rank": 1, "world_size": 2}
    )
    other.start()
    summary = run(both, format=name, rank=0, world_size=2)
    other.join()
    assert summary.num_images == 9
    for path in (tmp_path / "one").iterdir():
        assert (both / path.name).read_bytes() == path.read_bytes()
    assert names_in(both / "parts") == ["manifest.json"]


def test_a_killed_run_continues_with_the_next_part(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(7))
    assert not (tmp_path / "detections.jsonl").exists()
    asked: list[str] = []

    def watched(paths: Sequence[Path]) -> list[Detections | None]:
        asked.extend(path.stem for path in paths)
        return predict(paths)

    run(tmp_path, watched, resume=True, part_size=None)
    assert asked == list("ghij")  # the parts abc and def were done
    assert lines(tmp_path / "detections.jsonl") == EXPECTED
    assert names_in(tmp_path) == ["detections.jsonl"]


def test_a_killed_run_of_two_ranks_continues_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(4), rank=0, world_size=2)
    with pytest.raises(Killed):
        run(tmp_path, killed_after(3), rank=1, world_size=2)
    assert names_in(tmp_path / "parts") == [
        *("manifest.json", "part-000000.jsonl", "part-000001.jsonl", "rank-1.failed")
    ]
    run(tmp_path, resume=True)
    assert lines(tmp_path / "detections.jsonl") == EXPECTED


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(4))
    with pytest.raises(FileExistsError, match="holds an unfinished run. Continue it with resume"):
        run(tmp_path)


def test_a_finished_run_is_replaced_by_one_process_but_not_by_several(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, paths=PATHS[:2])
    assert len(lines(tmp_path / "detections.jsonl")) == 2
    run(tmp_path, world_size=2, paths=PATHS[:3])  # a single part, which belongs to rank 0
    with pytest.raises(
        FileExistsError, match="holds the results of a finished run. Choose another"
    ):
        run(tmp_path, world_size=2, paths=PATHS[:3])
    again = run(tmp_path, killed_after(0), world_size=2, paths=PATHS[:3], resume=True)
    assert again.num_images == 3
    assert run(tmp_path, killed_after(0), rank=1, world_size=2, paths=PATHS[:3]) is None
    with pytest.raises(
        FileExistsError, match="was written as 'jsonl'.*cannot be written as 'coco'"
    ):
        run(tmp_path, world_size=2, paths=PATHS[:3], resume=True, format="coco")
    (tmp_path / "detections.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has finished, but .*detections.jsonl' is gone"):
        run(tmp_path, world_size=2, paths=PATHS[:3], resume=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"paths": PATHS[:9]}, "it has 10 images instead of 9"),
        ({"paths": PATHS[::-1]}, "other image files, or the same in a different order"),
        ({"settings": {"score_threshold": 0.3}}, "its score_threshold is 0.5 instead of 0.3"),
        ({"settings": {**SETTINGS, "tile": [8, 8]}}, r"its tile is None instead of \[8, 8\]"),
        ({"part_size": 4}, "part_size is 4, but the run in .* was started with 3"),
    ],
)
def test_a_run_does_not_continue_with_other_options(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(4))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, **changed)


def test_resuming_without_a_run_starts_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "focaldet"):
        run(tmp_path, resume=True)
    assert "No unfinished run in" in caplog.text
    assert lines(tmp_path / "detections.jsonl") == EXPECTED


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", killed_after(2))
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(Killed):
        run(tmp_path / "mine", killed_after(2))
    assert names_in(tmp_path / "mine") == []


def test_a_later_failure_says_what_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(8))
    [message] = caplog.messages
    assert message.startswith("2 of 4 parts are done and kept in ")


def test_rank_0_reports_the_failure_of_another_rank(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(0), rank=0, world_size=2)

    def fails(paths: Sequence[Path]) -> list[Detections | None]:
        raise ValueError(f"Cannot read {str(paths[0])!r}.")

    with pytest.raises(ValueError, match="Cannot read"):
        run(tmp_path, fails, rank=1, world_size=2)
    state = parts_module._Run(tmp_path, PATHS, SETTINGS, rank=0, world_size=2, timeout=9)
    state._part_size = 3
    with pytest.raises(FocaldetError, match="Rank 1 has failed: Cannot read 'photos/d.jpg'. Start"):
        state.wait_for_parts()


def test_waiting_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="Waited 0.01 s for rank 0 to start the run"):
        run(tmp_path, rank=1, world_size=2, timeout=0.01)
    with pytest.raises(TimeoutError, match="Waited 0.01 s for the parts of other ranks"):
        run(tmp_path, rank=0, world_size=2, timeout=0.01)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, killed_after(4))
    part = tmp_path / "parts" / "part-000000.jsonl"
    whole = part.read_text()
    part.write_text("null\n")
    with pytest.raises(
        FocaldetError, match="part-000000.jsonl' is damaged: it has 1 lines instead"
    ):
        run(tmp_path, resume=True)
    part.write_text(whole[:-5])
    with pytest.raises(FocaldetError, match="damaged: line 3 is not JSON.*Remove the file"):
        run(tmp_path, resume=True)
    part.unlink()
    run(tmp_path, resume=True)
    assert lines(tmp_path / "detections.jsonl") == EXPECTED
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "manifest.json").write_text("[]")
    with pytest.raises(FocaldetError, match="manifest.json': it is damaged"):
        run(tmp_path)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"paths": []}, "paths is empty"),
        ({"rank": 2, "world_size": 2}, "rank is 2, but world_size is 2"),
        ({"format": "xml"}, "Unknown format 'xml'"),
        ({"part_size": 0}, "part_size must be at least 1"),
        ({"image_ids": [1]}, "image_ids has 1 entries, but there are 10 paths"),
        ({"predict": lambda _: []}, "predict returned 0 results for 3 images"),
        ({"predict": lambda paths: [None] * len(paths)}, "No photo could be read"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / message, **options)
    with pytest.raises(ValueError, match="There are no images to write"):
        write_results([], tmp_path / "a.json", "json")


def test_callbacks_get_every_image(tmp_path: Path) -> None:
    seen: dict[int, Detections | None] = {}
    read: list[Any] = []
    run(
        tmp_path,
        on_result=seen.__setitem__,
        before_cleanup=read.extend,
    )
    assert [None if one is None else one.source for one in seen.values()] == [
        None if one is None else one.source for one in predict(PATHS)
    ]
    assert list(seen) == list(range(10))
    assert [one.to_dict() for one in read if one is not None] == EXPECTED
    assert read[4] is None


def test_parts_are_small_enough_for_every_rank(tmp_path: Path) -> None:
    sizes = {}
    for world_size in (1, 2, 8):
        state = parts_module._Run(
            tmp_path, PATHS * 20, {}, rank=0, world_size=world_size, timeout=1
        )
        sizes[world_size] = state._default_part_size()
    assert sizes == {1: 100, 2: 13, 8: 4}


def test_the_fingerprint_changes_with_weights_and_configuration(
    tiny_config: RetinaNetConfig,
) -> None:
    model = RetinaNet.from_config(tiny_config)
    first = model_fingerprint(model)
    model.to(memory_format=torch.channels_last)
    assert model_fingerprint(model) == first
    other = RetinaNet.from_config(tiny_config.replace(score_threshold=0.1))
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(other) != first
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1
    assert model_fingerprint(model) != first
