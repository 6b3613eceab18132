from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from focaldet import Detections

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def found() -> Detections:
    return Detections(
        boxes=torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 20], [0, 0, 60, 50]]),
        scores=torch.tensor([0.9, 0.5, 0.1]),
        labels=torch.tensor([2, 0, 2]),
        image_size=(50, 60),
        class_names=("cat", "dog", "owl"),
    )


def test_selection_by_index_slice_mask_and_list(found: Detections) -> None:
    assert len(found) == 3
    assert found[-1].scores.tolist() == pytest.approx([0.1])
    assert found[1:].labels.tolist() == [0, 2]
    assert found[found.scores > 0.3].label_names == ["owl", "cat"]
    assert found[[2, 0]].scores.tolist() == pytest.approx([0.1, 0.9])
    assert [len(one) for one in found] == [1, 1, 1]
    assert len(found[[]]) == 0
    with pytest.raises(IndexError, match="Index 3.*3 detections"):
        found[3]


def test_filtering_by_score_and_by_class(found: Detections) -> None:
    assert found.filter(score_threshold=0.5).label_names == ["owl"]  # greater, not equal
    assert found.filter(labels=["owl"]).labels.tolist() == [2, 2]
    assert found.filter(labels=[0], score_threshold=0.2).label_names == ["cat"]
    assert len(found.filter(labels=[])) == 0
    assert len(found.filter()) == 3
    with pytest.raises(ValueError, match="labels contains 'cow'.*'dog'"):
        found.filter(labels=["cow"])


def test_conversion_to_dictionaries_and_coco_results(found: Detections) -> None:
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["label_names"] == ["owl", "cat", "owl"]
    assert plain["image_size"] == [50, 60]
    entry = found.to_coco(7, category_ids=[3, 5, 8])[0]
    assert entry == {
        "image_id": 7,
        "category_id": 8,
        "bbox": [1.0, 2.0, 29.0, 38.0],
        "score": pytest.approx(0.9),
    }
    assert [e["category_id"] for e in found.to_coco(7)] == [2, 0, 2]


def test_conversion_to_supervision(found: Detections) -> None:
    pytest.importorskip("supervision")
    theirs = found.to_supervision()
    assert theirs.xyxy.tolist() == found.boxes.tolist()
    assert list(theirs.data["class_name"]) == ["owl", "cat", "owl"]
    assert len(found[[]].to_supervision()) == 0


def test_without_supervision_the_error_says_what_to_install(
    found: Detections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'focaldet\[plot\]'"):
        found.to_supervision()


def test_without_names_the_label_name_is_its_number() -> None:
    found = Detections(torch.zeros(1, 4), torch.ones(1), torch.tensor([4]), (5, 5))
    assert found.label_names == ["4"]
    assert repr(found) == "Detections(1 in 5x5: 4 1.00)"


def test_drawing_reads_the_source_again(found: Detections, tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (60, 50), 128).save(path)
    picture = found.with_source(str(path)).draw()
    assert picture.size == (60, 50)
    assert picture.mode == "RGB"
    assert picture.getextrema() != ((128, 128),) * 3


def test_drawing_needs_the_image_of_the_detections(found: Detections) -> None:
    with pytest.raises(ValueError, match="no source.*image is required"):
        found.draw()
    with pytest.raises(ValueError, match="50x60 image.*60x50"):
        found.draw(Image.new("RGB", (50, 60)))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"boxes": torch.zeros(2, 5)}, ValueError, r"boxes must have shape \[N, 4\]"),
        ({"boxes": torch.full((2, 4), torch.nan)}, ValueError, r"boxes\[0\] is not finite.*nan"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores must have shape \[2\].*got \[3\]"),
        ({"scores": torch.tensor([0.5, 1.5])}, ValueError, r"scores\[1\] is 1.5"),
        ({"scores": torch.tensor([0.5, torch.nan])}, ValueError, r"scores\[1\] is nan"),
        (
            {"scores": torch.tensor([0, 1])},
            TypeError,
            "scores must be a floating-point tensor.*int64",
        ),
        ({"labels": torch.zeros(2)}, TypeError, "labels must have dtype torch.int64.*float32"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "labels.* -1"),
        ({"labels": torch.tensor([0, 3])}, ValueError, "labels contains 3.*0 to 1"),
        ({"boxes": None}, TypeError, "boxes must be a tensor.*NoneType"),
        ({"scores": None}, TypeError, "scores must be a tensor.*NoneType"),
        ({"labels": [0, 1]}, TypeError, "labels must be a tensor.*list"),
        ({"image_size": None}, TypeError, r"image_size.*\(height, width\).*None"),
        ({"image_size": (5.5, 5)}, TypeError, r"image_size.*integers.*\(5.5, 5\)"),
        ({"image_size": (3, 5, 5)}, TypeError, r"image_size.*two.*\(3, 5, 5\)"),
        ({"class_names": "ab"}, TypeError, r"class_names.*'ab'.*one name as \('ab',\)"),
        ({"class_names": 2}, TypeError, "class_names.*sequence.* 2"),
        ({"class_names": ("a", None)}, TypeError, r"class_names\[1\].*string.*None"),
        ({"source": 3}, TypeError, "source.*path.* 3"),
    ],
)
def test_errors_name_wrong_detections(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {
        "boxes": torch.zeros(2, 4),
        "scores": torch.zeros(2),
        "labels": torch.zeros(2, dtype=torch.int64),
        "image_size": (5, 5),
        "class_names": ("a", "b"),
    }
    with pytest.raises(kind, match=message):
        Detections(**{**good, **changes})
