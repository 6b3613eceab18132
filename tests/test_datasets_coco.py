from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from focaldet.datasets import DetectionDataset, read_coco
from focaldet.evaluation import evaluate_coco

SHARED = Path(__file__).parents[2] / "shared"
COCO_SAMPLE = SHARED / "data" / "coco_sample"

real = pytest.mark.skipif(
    not COCO_SAMPLE.is_dir(), reason="real COCO files are not beside this checkout"
)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def coco_file(folder: Path, **changes: Any) -> Path:
    """Write a COCO file of two images and three boxes, with some of its lists changed."""
    content: dict[str, Any] = {
        "images": [
            {"id": 30, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 10, "file_name": "a.png", "height": 20, "width": 30},
        ],
        "annotations": [
            annotation(7, 10),
            annotation(5, 30, bbox=[10.5, 0, 4, 8], category_id=2, segmentation=[[1, 2, 3, 4.5]]),
            annotation(6, 10, bbox=[0, 0, 30, 20], iscrowd=1, area=12.5),
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path = folder / "instances_some.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def annotation(annotation_id: int, image_id: int, **changes: Any) -> dict[str, Any]:
    usual = {"bbox": [1, 2, 3, 4], "category_id": 9, "iscrowd": 0}
    return {"id": annotation_id, "image_id": image_id, **usual, **changes}


@pytest.fixture(params=["msgspec", "standard library"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read with msgspec, and as if it were not installed."""
    if request.param == "msgspec":
        pytest.importorskip("msgspec")
    else:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_file_by_hand(tmp_path: Path) -> None:
    table = read_coco(coco_file(tmp_path), cache=False)
    assert list(table.file_names) == ["b.png", "a.png"]
    assert table.image_ids.tolist() == [30, 10]
    assert table.image_sizes.tolist() == [[40, 60], [20, 30]]
    assert (table.class_names, table.category_ids) == (("dog", "cat"), (2, 9))
    assert table.image_indices.tolist() == [0, 1, 1]
    assert table.annotation_ids.tolist() == [5, 7, 6]
    assert table.boxes.tolist() == [[10.5, 0, 14.5, 8], [1, 2, 4, 6], [0, 0, 30, 20]]
    assert table.labels.tolist() == [0, 1, 1]
    assert table.areas.tolist() == [32, 12, 12.5]
    assert table.crowd.tolist() == [False, False, True]
    assert table.boxes_of(1) == slice(1, 3)
    assert table.image_path(1) == tmp_path / "a.png"


@pytest.mark.usefixtures("way")
def test_nothing_is_dropped_or_mended(tmp_path: Path) -> None:
    boxes = [[math.nan, 0, 1, 1], [-5, 3, 0, 900], [0, 0, -2, math.inf]]
    annotations = [annotation(i, 10, bbox=box) for i, box in enumerate(boxes)]
    annotations[1]["category_id"] = 77
    table = read_coco(coco_file(tmp_path, annotations=annotations), cache=False)
    expected = [[math.nan, 0, math.nan, 1], [-5, 3, -5, 903], [0, 0, -2, math.inf]]
    np.testing.assert_array_equal(table.boxes, expected)
    assert table.labels.tolist() == [1, -1, 1]


@pytest.mark.usefixtures("way")
def test_optional_fields_may_be_left_out_or_null(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b", "height": None, "width": 4}]
    bare = {"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4]}
    null = {**bare, "area": None, "iscrowd": None}
    true = {**bare, "iscrowd": True}
    path = coco_file(tmp_path, images=images, annotations=[bare, null, true])
    table = read_coco(path, cache=False)
    assert table.image_sizes.tolist() == [[0, 0], [0, 4]]
    assert table.areas.tolist() == [12, 12, 12]
    assert table.crowd.tolist() == [False, False, True]


@pytest.mark.usefixtures("way")
def test_a_file_without_images_and_boxes_is_a_table_of_nothing(tmp_path: Path) -> None:
    table = read_coco(coco_file(tmp_path, images=[], annotations=[], categories=[]), cache=False)
    assert len(table) == 0
    assert table.boxes.shape == (0, 4)
    assert len(DetectionDataset(table)) == 0


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SEGMENTATIONS = st.one_of(
    st.lists(st.lists(st.floats(-1e3, 1e3) | st.integers(-9, 999), max_size=6), max_size=3),
    st.fixed_dictionaries({"counts": TEXT | st.lists(st.integers(0, 9)), "size": st.just([4, 5])}),
    st.none(),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), indent=st.sampled_from([None, 0, 2]))
@pytest.mark.usefixtures("way")
def test_random_files_are_read_as_json_reads_them(
    tmp_path: Path, data: st.DataObject, indent: int | None
) -> None:
    numbers = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6)
    rows = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "bbox": st.lists(numbers, min_size=4, max_size=4),
                    "image_id": st.sampled_from([3, 8]),
                },
                optional={
                    "segmentation": SEGMENTATIONS,
                    "note": TEXT,
                    '\\"segmentation': SEGMENTATIONS,
                },
            ),
            max_size=5,
        )
    )
    annotations: list[dict[str, Any]] = [
        {**row, "id": i, "category_id": 1} for i, row in enumerate(rows)
    ]
    names = data.draw(st.lists(TEXT, min_size=2, max_size=2))
    images = [{"id": i, "file_name": name} for i, name in zip((8, 3), names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    path = tmp_path / "random.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    table = read_coco(path, cache=False)
    assert list(table.file_names) == names
    wanted = sorted(annotations, key=lambda row: row["image_id"] == 3)
    assert table.annotation_ids.tolist() == [row["id"] for row in wanted]
    for box, row in zip(table.boxes, wanted, strict=True):
        x, y, width, height = map(float, row["bbox"])
        assert box.tolist() == [x, y, x + width, y + height]


@real
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_is_read_as_pycocotools_reads_it(
    split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = COCO_SAMPLE / "annotations" / f"instances_{split}.json"
    table = read_coco(path, cache=False)
    assert table.image_folder == COCO_SAMPLE / split
    peer = COCO(str(path))
    capsys.readouterr()
    assert table.category_ids == tuple(sorted(peer.cats))
    for index, image_id in enumerate(table.image_ids.tolist()):
        rows = table.boxes_of(index)
        annotations = peer.imgToAnns[image_id]
        assert table.annotation_ids[rows].tolist() == [one["id"] for one in annotations]
        assert table.areas[rows].tolist() == [one["area"] for one in annotations]
        assert table.crowd[rows].tolist() == [one["iscrowd"] == 1 for one in annotations]
        assert [table.category_ids[label] for label in table.labels[rows]] == [
            one["category_id"] for one in annotations
        ]
        assert table.image_path(index).is_file()


@real
def test_the_truth_in_cocos_form_is_judged_like_the_file() -> None:
    path = COCO_SAMPLE / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    found = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "score": score,
            "bbox": box,
        }
        for score, one in zip(
            np.linspace(0.1, 0.9, 517).tolist(), content["annotations"], strict=True
        )
        for box in ([one["bbox"][0] + 3, *one["bbox"][1:]], [0, 0, 50, 50])
    ]
    table = read_coco(path, cache=False)
    assert evaluate_coco(table.to_coco(), found).stats == evaluate_coco(path, found).stats


def test_the_truth_leaves_out_what_cannot_be_judged_and_numbers_anew_where_it_must(
    tmp_path: Path,
) -> None:
    boxes = [[0, 0, 5, 5], [0, 0, 0, 5], [math.nan, 0, 1, 1], [1, 1, 2, 2]]
    annotations = [annotation(i, 10, bbox=box) for i, box in enumerate(boxes)]
    table = read_coco(coco_file(tmp_path, annotations=annotations), cache=False)
    truth = table.to_coco()
    assert [(one["id"], one["bbox"]) for one in truth["annotations"]] == [
        (1, [0, 0, 5, 5]),  # 0 is no id for pycocotools
        (2, [1, 1, 2, 2]),
    ]
    assert truth["images"][1] == {"id": 10, "file_name": "a.png", "height": 20, "width": 30}
    assert truth["categories"] == [{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}]
    kept = read_coco(coco_file(tmp_path), cache=False).to_coco()["annotations"]
    assert [one["id"] for one in kept] == [5, 7, 6]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": None},
            "`annotations` must be a file in COCO's form.*without the list 'images'",
        ),
        ({"annotations": {}}, "without the list 'annotations'.*COCO file has the lists"),
        ({"categories": [3]}, r"`categories\[0\]` must be an object; got 3 in '.*some.json'"),
        (
            {"images": [{"id": 1}]},
            r"`images\[0\]\['file_name'\]` must be a string; got nothing \(id 1\)",
        ),
        ({"images": [{"id": "x", "file_name": "a"}]}, r"\['id'\]` must be an integer; got 'x' in"),
        (
            {"images": [{"id": 1, "file_name": "a", "width": 1.5}]},
            r"\['width'\]` must be an integer",
        ),
        (
            {"annotations": [annotation(5, 10), annotation(17, 10, bbox=[1, 2, 3])]},
            (
                r"`annotations\[1\]\['bbox'\]` must be four numbers \(x, y, width, height\); "
                r"got \[1, 2, 3\] \(id 17\) in '.*instances_some.json'"
            ),
        ),
        (
            {"annotations": [annotation(5, 10, bbox=[1, 2, "3", 4])]},
            r"four numbers .*'3', 4\] \(id 5\)",
        ),
        ({"annotations": [annotation(5, 10, bbox=None)]}, r"four numbers .*got None \(id 5\)"),
        (
            {"annotations": [annotation(5, 10, area="big")]},
            r"'area'\]` must be a number; got 'big'",
        ),
        (
            {"annotations": [annotation(5, 10, iscrowd="no")]},
            r"'iscrowd'\]` must be 0 or 1; got 'no'",
        ),
        (
            {"annotations": [annotation(5, 10, category_id=1.0)]},
            r"'category_id'\]` must be an integer",
        ),
        (
            {"annotations": [annotation(5, 10), annotation(6, 99)]},
            r"`annotations\[1\]\['image_id'\]` must be the id of an image; got 99 \(annotation id 6\)",
        ),
        ({"annotations": [annotation(2**70, 10)]}, "must be made of 64-bit numbers"),
        (
            {
                "images": [{"id": 4, "file_name": "a"}, {"id": 4, "file_name": "b"}],
                "annotations": [],
            },
            "`images` must be of different ids; got 2 with id 4 in",
        ),
        (
            {"categories": [{"id": 9, "name": "a"}, {"id": 9, "name": "b"}]},
            "`categories` must be of different ids; got 2 with id 9 in",
        ),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_coco(coco_file(tmp_path, **changes), cache=False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("text", ["", "{", "[1, 2", '{"images": [}', "\x00\x01", "[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="`annotations` must be a JSON file; got '.*broken.json'"):
        read_coco(path)
    assert names_in(tmp_path) == ["broken.json"]


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    path = coco_file(tmp_path, annotations=[annotation(5, 10, bbox=list(range(1000)))])
    with pytest.raises(ValueError, match="…") as caught:
        read_coco(path)
    assert len(str(caught.value)) < 500


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="`annotations` must be an existing file; got '.*no.json'"
    ):
        read_coco(tmp_path / "no.json")
    with pytest.raises(
        FileNotFoundError, match="`images` must be an existing folder; got '.*nowhere'"
    ):
        read_coco(coco_file(tmp_path), tmp_path / "nowhere")


def test_images_are_looked_for_as_coco_lies(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    path = coco_file(tmp_path / "annotations")
    assert read_coco(path, cache=False).image_folder == path.parent
    (tmp_path / "images").mkdir()
    assert read_coco(path, cache=False).image_folder == tmp_path / "images"
    (tmp_path / "some").mkdir()
    assert read_coco(path, cache=False).image_folder == tmp_path / "some"
    assert read_coco(path, tmp_path, cache=False).image_folder == tmp_path


def test_file_names_are_packed_and_index_like_a_list(tmp_path: Path) -> None:
    names = ["ä/ö.jpg", "", "c", "日本.png"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    packed = read_coco(coco_file(tmp_path, images=images, annotations=[])).file_names
    assert list(packed) == names
    assert (packed[-1], packed[1:3]) == (names[-1], names[1:3])
    with pytest.raises(IndexError):
        packed[4]
