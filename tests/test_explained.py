"""The page RetinaNet explained, in English and Korean, and the script that draws its figures."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.boxes import scale_boxes
from focaldet.datasets import DetectionDataset, read_annotations
from tests.helpers.annotation_files import write_photo
from tests.helpers.coco_files import annotation, coco_file

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "retinanet_explained.md", DOCS / "ko" / "retinanet_explained.md"]
PAIRS = [PAGES, [DOCS.parent / "README.md", DOCS / "ko" / "README.md"]]
ONLY_IN_A_FIGURE = {
    "anchors that learn",
    "positive, anchors",
    "hard, anchors",
    *(f"{group}, {loss}" for group in ("positive", "hard") for loss in ("balanced", "focal")),
    "hard, cross_entropy",
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the script, whose settings of matplotlib and torch last for one test only."""
    mpl = pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    monkeypatch.syspath_prepend(DOCS / "figures")
    threads = torch.get_num_threads()
    with mpl.rc_context():
        yield importlib.import_module("draw_explained")
    torch.set_num_threads(threads)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 90, "width": 120} for i in (1, 2)]
    for image in images:
        write_photo(tmp_path / str(image["file_name"]), (120, 90))
    boxes = [
        annotation(1, 1, bbox=[20, 15, 50, 60], category_id=1),
        annotation(2, 2, bbox=[60, 10, 30, 30], category_id=3),
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "owl"), 1)]
    return coco_file(tmp_path, images=images, annotations=boxes, categories=categories)


def test_the_script_draws_every_figure_of_the_page_and_writes_its_numbers(
    script: Any,
    truth: Path,
    tiny_model: RetinaNet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pycocotools", reason="the AP needs pycocotools")

    def save(figure: Any, folder: Path, name: str) -> None:  # to write the SVG files takes seconds
        assert figure.axes
        (folder / f"explained_{name}.svg").touch()
        importlib.import_module("matplotlib.pyplot").close(figure)

    monkeypatch.setattr(script, "save", save)
    tiny_model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "figures"
    folder.mkdir()
    places = [str(tmp_path / "model"), str(truth), str(tmp_path)]

    script.main([*places, "--photo", "2.jpg", "--output", str(folder)])

    committed = {path.name for path in (DOCS / "figures").glob("explained*")}
    assert {path.name for path in folder.iterdir()} == committed
    text = (folder / "explained.json").read_text()
    assert capsys.readouterr().out == text
    assert json.loads(text).keys() == _numbers().keys()
    with pytest.raises(SystemExit):
        script.main([*places, "--photo", "missing.jpg", "--output", str(folder)])
    assert "no photo is called 'missing.jpg'" in capsys.readouterr().err


def test_the_steps_of_inference_in_the_script_give_the_detections_of_the_model(
    script: Any, truth: Path, tiny_model: RetinaNet
) -> None:
    dataset = DetectionDataset(read_annotations(truth, truth.parent))
    with torch.no_grad():
        photo, anchors = script.run(tiny_model, dataset, 0)
        steps = script.infer(tiny_model, photo)
    assert len(photo.found) > 0
    assert [min(count, 1000) for count in steps.above] == steps.kept
    torch.testing.assert_close(
        scale_boxes(steps.best, photo.size, photo.found.image_size), photo.found.boxes
    )
    assert sum(int(mask.sum()) for mask in anchors.groups) == len(anchors.logits)


def test_an_anchor_is_easy_if_it_is_background_and_all_of_its_scores_are_low(script: Any) -> None:
    logits = torch.tensor([[0.05, 0.05], [0.05, 0.2], [0.05, 0.05]]).logit()
    targets = torch.tensor([[1.0, 0], [0, 0], [0, 0]])
    anchors = script.Anchors(logits, targets)
    positive, hard, easy = (mask.tolist() for mask in anchors.groups)
    assert positive == [True, False, False]
    assert hard == [False, True, False]
    assert easy == [False, False, True]
    expected = -torch.tensor([0.05, 0.95, 0.95]).log() - torch.tensor([0.95, 0.8, 0.95]).log()
    torch.testing.assert_close(anchors.losses(None, 0.0), expected)


def test_the_shapes_in_the_diagram_are_those_of_the_network(script: Any) -> None:
    config = RetinaNetConfig.paper().replace(backbone_norm="batch")
    with torch.device("meta"):
        model = RetinaNet.from_config(config)
        maps = model.backbone(torch.empty(1, 3, 800, 1344))
        levels = model.fpn(maps)
    channels = dict(zip((3, 4, 5), (level.shape[1] for level in maps), strict=True))
    assert channels == script.CHANNELS
    assert [tuple(level.shape[2:]) for level in levels] == [*script.MAPS.values()]


def _numbers() -> dict[str, str]:
    numbers: dict[str, str] = json.loads((DOCS / "figures" / "explained.json").read_text())
    return numbers


@pytest.mark.parametrize("page", PAGES, ids=["en", "ko"])
def test_the_page_states_the_numbers_that_the_script_wrote(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace(" and 0 ", ", 0 ")  # the end of a list
    missing = {
        name: value
        for name, value in _numbers().items()
        if name not in ONLY_IN_A_FIGURE
        and not re.search(rf"(?<![\d.,]){re.escape(value)}(?![\d%])", text)
    }
    assert missing == {}


def test_the_shares_of_each_loss_add_up() -> None:
    numbers = _numbers()
    for loss in ("anchors", "cross_entropy", "balanced", "focal"):
        shares = [float(numbers[f"{name}, {loss}"][:-1]) for name in ("positive", "hard", "easy")]
        assert sum(shares) == pytest.approx(100, abs=0.15), loss


def _pictures(page: Path) -> list[str]:
    return re.findall(
        r"^```\{figure\} \S*?([^/\s]+)\n:alt: \S", page.read_text("utf-8"), re.MULTILINE
    )


def test_both_languages_have_the_same_pictures_in_the_same_order() -> None:
    english, korean = map(_pictures, PAGES)
    assert english == korean
    drawn = {path.name for path in (DOCS / "figures").glob("explained*.[sj][vp]g")}
    assert {*english} == drawn | {"losses_bccd.svg"}


def _programs(page: Path) -> list[str]:
    """Return the code blocks of a page without comments, strings and the order within f-strings."""
    programs = []
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for code in blocks:
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                values = [value for value in node.values if isinstance(value, ast.FormattedValue)]
                node.values = sorted(values, key=ast.dump)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        programs.append(ast.dump(tree))
    return programs


@pytest.mark.parametrize("pair", PAIRS, ids=["explained", "README"])
def test_the_code_of_a_korean_page_is_that_of_the_english_page(pair: list[Path]) -> None:
    english, korean = map(_programs, pair)
    assert korean
    assert [program for program in english if program in korean] == korean
    if pair == PAGES:
        assert english == korean
