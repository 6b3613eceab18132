from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

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


def test_the_representation_escapes_control_characters_of_names() -> None:
    found = Detections(
        torch.zeros(1, 4), torch.ones(1), torch.tensor([0]), (5, 5), class_names=("a\x1b[2J",)
    )
    assert repr(found) == r"Detections(1 in 5x5: a\x1b[2J 1.00)"


def assert_same(found: Detections, expected: Detections) -> None:
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)
    assert found.image_size == expected.image_size
    assert found.class_names == expected.class_names
    assert found.source == expected.source


def test_empty_detections_have_the_description_of_their_image() -> None:
    empty = Detections.empty((4, 6), class_names=["cat"], source="a.jpg")
    assert (empty.boxes.shape, empty.scores.shape, empty.labels.shape) == ((0, 4), (0,), (0,))
    assert (empty.image_size, empty.class_names, empty.source) == ((4, 6), ("cat",), "a.jpg")
    assert empty.to_coco(1) == []
    with pytest.raises(TypeError, match="image_size"):
        Detections.empty(5)  # type: ignore[arg-type]


def test_merged_detections_are_sorted_by_score_and_ties_keep_their_order(found: Detections) -> None:
    other = Detections(
        torch.tensor([[0.0, 0, 1, 1], [1, 1, 2, 2]]),
        torch.tensor([0.5, 0.95]),
        torch.tensor([1, 1]),
        (50, 60),
        class_names=("cat", "dog", "owl"),
    )
    merged = Detections.merge(part for part in (found, other, found[[]]))
    assert merged.label_names == ["dog", "owl", "cat", "dog", "owl"]
    assert merged.boxes[3].tolist() == [0, 0, 1, 1]
    assert_same(Detections.merge([found]), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (60, 50)}, r"parts\[1\] has the image_size \(60, 50\).*\(50, 60\)"),
        ({"source": "b.jpg"}, r"parts\[1\] has the source 'b.jpg'.*None.*with_source"),
        ({"class_names": None}, r"parts\[1\] has the class_names None.*'owl'"),
    ],
)
def test_detections_of_different_images_cannot_be_merged(
    found: Detections, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Detections.merge([found, replace(found, **change)])


def test_merging_nothing_or_something_else_is_an_error(found: Detections) -> None:
    with pytest.raises(ValueError, match="parts is empty"):
        Detections.merge([])
    with pytest.raises(TypeError, match=r"parts\[1\].*dict"):
        Detections.merge([found, {}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"parts\[1\] is on meta, but parts\[0\] is on cpu"):
        Detections.merge([found[[]], found[[]].to("meta")])


def uneven(count: int = 40) -> Detections:
    """Return detections whose numbers are not short decimals."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator) * 300
    sizes = torch.rand(count, 2, generator=generator) * 200
    return Detections(
        torch.cat([corners, corners + sizes], dim=1),
        torch.rand(count, generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
        (500, 510),
        class_names=("cat", "dog", "owl"),
        source="photos/a.jpg",
    )


@pytest.mark.parametrize("count", [40, 1, 0])
def test_a_dictionary_gives_the_same_detections_back(count: int) -> None:
    found = uneven(count)
    data = json.loads(json.dumps(found.to_dict()))
    assert_same(Detections.from_dict(data, class_names=found.class_names), found)
    numbered = replace(found, class_names=None)
    assert_same(Detections.from_dict(numbered.to_dict()), numbered)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"boxes": [[1, 2, 3]] * 3}, ValueError, r"boxes must have shape \[N, 4\].*\[3, 3\]"),
        ({"boxes": [[1, 2], [3]]}, TypeError, r"data\['boxes'\] must be numbers of shape \[D, 4\]"),
        ({"scores": ["a", "b", "c"]}, TypeError, r"data\['scores'\] must be numbers"),
        ({"scores": [0.5, 2, 0.5]}, ValueError, r"scores\[1\] is 2"),
        ({"labels": [2, 0, 1.5]}, TypeError, r"data\['labels'\]\[2\] must be an integer, got 1.5"),
        (
            {"label_names": ["owl", "dog", "owl"]},
            ValueError,
            r"\[1\] is 'dog', but label 0 is 'cat'",
        ),
        ({"label_names": ["owl"]}, ValueError, "1 names for 3 detections"),
    ],
)
def test_a_wrong_dictionary_is_named(
    found: Detections, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Detections.from_dict({**found.to_dict(), **changes}, class_names=found.class_names)


def test_an_incomplete_dictionary_is_named(found: Detections) -> None:
    data = found.to_dict()
    with pytest.raises(ValueError, match=r"\['label_names'\]\[0\] is 'owl', so class_names"):
        Detections.from_dict(data)
    del data["scores"]
    with pytest.raises(ValueError, match="data has no 'scores', only .*'boxes'"):
        Detections.from_dict(data, class_names=found.class_names)


@pytest.mark.parametrize("category_ids", [None, [3, 5, 8]])
@pytest.mark.parametrize("count", [40, 0])
def test_coco_entries_give_the_same_detections_back(
    category_ids: list[int] | None, count: int
) -> None:
    found = uneven(count)
    entries = [
        *found[:2].to_coco(6, category_ids),
        *json.loads(json.dumps(found.to_coco(7, category_ids))),
    ]
    back = Detections.from_coco(
        entries, 7, (500, 510), category_ids, class_names=found.class_names, source=found.source
    )
    assert_close(back.boxes, found.boxes, rtol=2**-22, atol=0)
    assert_same(replace(back, boxes=found.boxes), found)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"category_id": 4}, ValueError, r"entries\[1\].*category_id 4.*\[3, 5\]"),
        ({"bbox": [1, 2, 3]}, ValueError, r"bbox of entries\[1\].*\[1, 2, 3\]"),
        ({"bbox": [1, 2, -3, 4]}, ValueError, r"bbox of entries\[1\].*at least 0.*-3"),
        ({"bbox": [1, 2, "3", 4]}, ValueError, r"bbox of entries\[1\].*'3'"),
        ({"score": 1.5}, ValueError, r"scores\[1\] is 1.5"),
    ],
)
def test_a_wrong_coco_entry_is_named(
    changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    good = {"image_id": 7, "category_id": 3, "bbox": [0, 1, 5, 6], "score": 0.5}
    with pytest.raises(kind, match=message):
        Detections.from_coco([good, {**good, **changes}], 7, (9, 9), [3, 5])
    with pytest.raises(ValueError, match=r"entries\[0\] has no 'image_id'"):
        Detections.from_coco([{"score": 1}], 7, (9, 9))


@pytest.mark.parametrize("count", [40, 0])
def test_supervision_gives_the_same_detections_back(count: int) -> None:
    pytest.importorskip("supervision")
    found = uneven(count)
    back = Detections.from_supervision(
        found.to_supervision(), (500, 510), class_names=found.class_names, source=found.source
    )
    assert_same(back, found)


def test_what_is_left_out_of_supervision_is_logged(
    found: Detections, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("supervision")
    theirs = found.to_supervision()
    theirs.tracker_id = theirs.class_id + 5
    theirs.data["speed"] = theirs.confidence
    Detections.from_supervision(theirs, (50, 60), class_names=found.class_names)
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        "Detections.from_supervision left out tracker_id, data['speed'] of 3 detections."
    )


def test_detections_of_supervision_need_scores_and_names(found: Detections) -> None:
    pytest.importorskip("supervision")
    theirs = found.to_supervision()
    with pytest.raises(ValueError, match=r"class_name'\]\[0\] is 'owl', so class_names"):
        Detections.from_supervision(theirs, (50, 60))
    theirs.confidence = None
    with pytest.raises(ValueError, match="detections.confidence is None"):
        Detections.from_supervision(theirs, (50, 60), class_names=found.class_names)


@pytest.mark.parametrize("count", [40, 1, 0])
def test_a_dataframe_gives_the_same_detections_back(count: int) -> None:
    pytest.importorskip("pandas")
    found = uneven(count)
    frame = found.to_dataframe()
    assert list(frame.columns) == [
        *("source", "image_height", "image_width", "x1", "y1", "x2", "y2"),
        *("score", "label", "label_name"),
    ]
    assert len(frame) == count
    back = Detections.from_dataframe(
        frame,
        None if count else (500, 510),
        class_names=found.class_names,
        source=None if count else found.source,
    )
    assert_same(back, found)


def test_tables_of_several_images_are_read_image_by_image(found: Detections) -> None:
    pandas = pytest.importorskip("pandas")
    parts = [found.with_source("a.jpg"), found[:1].with_source("b.jpg")]
    frame = pandas.concat([part.to_dataframe() for part in parts], ignore_index=True)
    for part in parts:
        rows = frame[frame["source"] == part.source]
        assert_same(Detections.from_dataframe(rows, class_names=found.class_names), part)
    with pytest.raises(ValueError, match="more than one image.*'a.jpg'.*'b.jpg'"):
        Detections.from_dataframe(frame, class_names=found.class_names)


def test_a_wrong_table_is_named(found: Detections) -> None:
    pytest.importorskip("pandas")
    frame, names = found.to_dataframe(), found.class_names
    with pytest.raises(ValueError, match="frame has no column 'x2', only .*'x1'"):
        Detections.from_dataframe(frame.drop(columns="x2"))
    with pytest.raises(ValueError, match=r"image_size is \(5, 5\), but frame has \(50, 60\)"):
        Detections.from_dataframe(frame, (5, 5), class_names=names)
    with pytest.raises(ValueError, match="so image_size is required"):
        Detections.from_dataframe(frame.drop(columns="image_width"), class_names=names)
    with pytest.raises(TypeError, match=r"frame\['label'\]\[0\].*2.5"):
        Detections.from_dataframe(frame.assign(label=2.5), class_names=names)
    with pytest.raises(ValueError, match=r"frame\['label_name'\]\[0\] is 'owl', so class_names"):
        Detections.from_dataframe(frame)


def test_without_pandas_the_error_says_what_to_install(
    found: Detections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe requires pandas.*pip install 'pandas'"):
        found.to_dataframe()


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
