"""One table of odd COCO files, which read_coco and evaluate_coco must treat alike."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet._coco_json import InstanceColumns, read_detections, read_instances
from focaldet.datasets import read_coco
from focaldet.errors import AnnotationError
from focaldet.evaluation import evaluate_coco
from tests.helpers.coco_files import annotation, coco_content

if TYPE_CHECKING:
    from pathlib import Path

REMOVED = object()


def changed(section: str, index: int = 1, **values: Any) -> dict[str, Any]:
    """Change fields of one item of the usual file."""
    content = copy.deepcopy(coco_content())
    content[section][index].update(values)
    item = content[section][index]
    content[section][index] = {key: value for key, value in item.items() if value is not REMOVED}
    return content


def with_image(**values: Any) -> dict[str, Any]:
    """Add an image to the usual file that repeats the second one, with some fields changed."""
    content = coco_content()
    return content | {"images": [*content["images"], {**content["images"][1], **values}]}


ACCEPTED: dict[str, dict[str, Any]] = {
    "the usual file": coco_content(),
    "iscrowd 0.0": changed("annotations", iscrowd=0.0),
    "iscrowd 1.0": changed("annotations", iscrowd=1.0),
    "iscrowd true": changed("annotations", iscrowd=True),
    "iscrowd null": changed("annotations", iscrowd=None),
    "iscrowd missing": changed("annotations", iscrowd=REMOVED),
    "area null": changed("annotations", area=None),
    "area missing": changed("annotations", area=REMOVED),
    "area -1": changed("annotations", area=-1),
    "area NaN": changed("annotations", area=math.nan),
    "annotation id missing": changed("annotations", id=REMOVED),
    "annotation id null": changed("annotations", id=None),
    "annotation id 5.0": changed("annotations", id=5.0),
    "annotation id twice": changed("annotations", id=7),
    "image_id 10.0": changed("annotations", index=0, image_id=10.0),
    "category_id 9.0": changed("annotations", category_id=9.0),
    "image id 10.0": changed("images", id=10.0),
    "category id 2.0": changed("categories", id=2.0),
    "negative ids": changed("annotations", id=-3),
    "width 30.0": changed("images", width=30.0),
    "width missing": changed("images", width=REMOVED),
    "height null": changed("images", height=None),
    "size 0": changed("images", width=0, height=0),
    "size -1": changed("images", width=-1, height=-1),
    "category name missing": changed("categories", name=REMOVED),
    "category name null": changed("categories", name=None),
    "category name 5": changed("categories", name=5),
    "unknown fields": changed("annotations", attributes={"difficult": [True]}),
    "outlines as run lengths": changed(
        "annotations", segmentation={"counts": "a1", "size": [2, 3]}
    ),
    "box of integers and floats": changed("annotations", bbox=[1, 2.5, 3, 4.25]),
    "box without size": changed("annotations", bbox=[1, 2, 0, 0]),
    "box outside the image": changed("annotations", bbox=[-5, 900, 3, 4]),
    "nothing at all": coco_content(images=[], annotations=[], categories=[]),
}

WARNED: dict[
    str, tuple[dict[str, Any], str | None, str]
] = {  # what read_coco and evaluate_coco say
    "image listed twice": (
        with_image(),
        r"listed twice is kept once: images\[2\] \(id 10\) in .*some.json' repeats",
        r"listed twice is kept once: images\[2\] \(id 10\) in .*some.json' repeats",
    ),
    "image listed twice, once with width 30.0": (
        with_image(width=30.0),
        r"images\[2\] \(id 10\)",
        r"images\[2\] \(id 10\)",
    ),
    "all images listed twice": (
        coco_content(images=coco_content()["images"] * 2),
        r"2 entries of images repeat an earlier one .* images\[2\] \(id 30\)",
        r"2 entries of images repeat an earlier one .* images\[2\] \(id 30\)",
    ),
    "box with NaN": (
        changed("annotations", bbox=[1, math.nan, 3, 4]),
        None,
        r"1 annotation is left out .* annotations\[1\] \(id 5\) in .*some.json', whose bbox .*nan",
    ),
    "infinite box": (
        changed("annotations", bbox=[1, 2, math.inf, 4]),
        None,
        r"1 annotation is left out .* annotations\[1\] \(id 5\) .*inf",
    ),
    "box of negative width": (
        changed("annotations", bbox=[5, 5, -3, 4]),
        None,
        r"1 annotation is left out .* annotations\[1\] \(id 5\) .*-3",
    ),
    "category not declared": (
        changed("annotations", category_id=77),
        None,
        r"1 annotation is left out .* annotations\[1\] \(id 5\) .*category_id 77 is not declared",
    ),
    "several faults": (
        coco_content(
            annotations=[
                annotation(7, 10),
                annotation(8, 10, category_id=77),
                annotation(9, 10, bbox=[0, 0, -1, 3]),
                annotation(10, 10, bbox=[0, 0, 1, 3], category_id=78),
            ]
        ),
        None,
        r"3 annotations are left out .* first is annotations\[1\] \(id 8\) .*category_id 77",
    ),
    "several faults, ids missing": (
        coco_content(
            annotations=[
                {"image_id": 10, "category_id": 77, "bbox": [1, 2, 3, 4]},
                {"image_id": 10, "category_id": 77, "bbox": [1, 2, 3, 4]},
            ]
        ),
        r"None of 2 objects in \d+ images? can be learned from \(2 of an undeclared category",
        r"2 annotations are left out .* first is annotations\[0\] in .*category_id 77",
    ),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "annotation id as text": (
        changed("annotations", id="5"),
        r"annotations\[1\] in '.*some.json': id must be an integer, got '5'",
    ),
    "image_id as text": (
        changed("annotations", image_id="30"),
        r"annotations\[1\] \(id 5\) in '.*some.json': image_id must be an integer, got '30'",
    ),
    "category_id as text": (
        changed("annotations", category_id="9"),
        r"annotations\[1\] \(id 5\) .*category_id must be an integer, got '9'",
    ),
    "image id as text": (changed("images", id="10"), r"images\[1\] .*id must be an integer.*'10'"),
    "category id as text": (changed("categories", id="2"), r"categories\[1\] .*id must.*'2'"),
    "width as text": (
        changed("images", width="30"),
        r"images\[1\] \(id 10\) .*width must be a whole number of pixels, or 0 .*'30'",
    ),
    "width 30.5": (changed("images", width=30.5), r"images\[1\] .*width must .*30\.5"),
    "width -2": (changed("images", width=-2), r"images\[1\] .*width must .*-2"),
    "height 2**31": (changed("images", height=2**31), r"images\[1\] .*height must .*2147483648"),
    "width true": (changed("images", width=True), r"images\[1\] .*width must .*True"),
    "area as text": (
        changed("annotations", area="12"),
        r"annotations\[1\] \(id 5\) .*area must be a finite number, got '12'",
    ),
    "area infinite": (changed("annotations", area=math.inf), r"annotations\[1\] .*area .*inf"),
    "iscrowd as text": (
        changed("annotations", iscrowd="0"),
        r"annotations\[1\] \(id 5\) .*iscrowd must be 0 or 1, got '0'",
    ),
    "iscrowd 2": (changed("annotations", iscrowd=2), r"annotations\[1\] .*iscrowd .*2"),
    "iscrowd 0.5": (changed("annotations", iscrowd=0.5), r"annotations\[1\] .*iscrowd .*0\.5"),
    "iscrowd a list": (changed("annotations", iscrowd=[0]), r"annotations\[1\] .*iscrowd .*\[0\]"),
    "image_id 30.5": (
        changed("annotations", image_id=30.5),
        r"annotations\[1\] .*image_id .*30\.5",
    ),
    "image_id true": (changed("annotations", image_id=True), r"annotations\[1\] .*image_id .*True"),
    "image_id missing": (
        changed("annotations", image_id=REMOVED),
        r"annotations\[1\] \(id 5\) .*image_id is missing",
    ),
    "image_id null": (changed("annotations", image_id=None), r"image_id is missing"),
    "image_id 2**53 as a float": (
        changed("annotations", image_id=float(2**53)),
        r"annotations\[1\] .*image_id .*9007199254740992\.0",
    ),
    "category_id missing": (changed("annotations", category_id=REMOVED), r"category_id is missing"),
    "image id missing": (changed("images", id=REMOVED), r"images\[1\] in .*: id is missing"),
    "category id missing": (changed("categories", id=REMOVED), r"categories\[1\] .*id is missing"),
    "id of more than 64 bits": (
        changed("annotations", id=2**63),
        r"annotations\[1\] in .*id must fit into 64 bits, got 9223372036854775808",
    ),
    "image_id of more than 64 bits": (
        changed("annotations", image_id=-(2**63) - 1),
        r"annotations\[1\] \(id 5\) .*image_id must fit into 64 bits",
    ),
    "box missing": (changed("annotations", bbox=REMOVED), r"annotations\[1\] .*bbox is missing"),
    "box of three numbers": (
        changed("annotations", bbox=[1, 2, 3]),
        r"annotations\[1\] \(id 5\) .*bbox must be four numbers \(x, y, width, height\), got \[1, 2, 3\]",
    ),
    "box with text": (changed("annotations", bbox=[1, 2, "3", 4]), r"annotations\[1\] .*'3', 4\]"),
    "box with true": (changed("annotations", bbox=[1, 2, True, 4]), r"annotations\[1\] .*True"),
    "box as text": (changed("annotations", bbox="1 2 3 4"), r"annotations\[1\] .*'1 2 3 4'"),
    "box as an object": (changed("annotations", bbox={"x": 1}), r"annotations\[1\] .*four numbers"),
    "box beyond a float": (
        changed("annotations", bbox=[10**400, 2, 3, 4]),
        r"annotations\[1\] .*four",
    ),
    "image not listed": (
        changed("annotations", image_id=99),
        r"annotations\[1\] \(id 5\) in '.*some.json': image_id 99 is not the id of an image. Add",
    ),
    "image not listed, annotation without id": (
        changed("annotations", id=None, image_id=99),
        r"annotations\[1\] in '.*some.json': image_id 99",
    ),
    "image id twice with different files": (
        with_image(file_name="c.png"),
        r"images\[2\] \(id 10\) in .* has the same id as images\[1\], but a different file name or size",
    ),
    "image id twice with different sizes": (with_image(width=31), r"images\[2\] \(id 10\)"),
    "category id twice": (
        changed("categories", id=9),
        r"categories\[1\] \(id 9\) in .* has the same id as categories\[0\]\. Give",
    ),
    "file_name a number": (
        changed("images", file_name=3),
        r"images\[1\] .*file_name must be a string",
    ),
    "category name a list": (
        changed("categories", name=["a"]),
        r"categories\[1\] .*name .*\['a'\]",
    ),
    "category name true": (changed("categories", name=True), r"categories\[1\] .*name .*True"),
    "an image that is a number": (
        coco_content(images=[3]),
        r"images\[0\] in .*some.json' must be an object with named fields, got 3",
    ),
    "no images": (coco_content(images=None), r"some.json' has no list 'images'. .* with the lists"),
    "annotations an object": (coco_content(annotations={}), r"'annotations' is not a list"),
    "a results file": ([{"image_id": 1}], r"some.json' is a list, as results files are"),
    "a number": (3, r"some.json' is not an object, but 3"),
}


def outcome(function: Any, *arguments: Any) -> str:
    """Call a function, and return "accepted" or the message of its AnnotationError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*arguments)
        except AnnotationError as error:
            return str(error)
    return "accepted"


def both(path: Path, content: Any) -> set[str]:
    """Return what both readers say about a file, after checking it with its content in memory."""
    path.write_text(json.dumps(content), encoding="utf-8")
    said = {outcome(read_coco, path), outcome(evaluate_coco, path, [])}
    if isinstance(content, dict):
        in_memory = outcome(evaluate_coco, content, [])
        anonymous = {one.replace(f" in {str(path)!r}", "") for one in said}
        assert {in_memory} == {one.replace(repr(str(path)), "annotations") for one in anonymous}
    return said


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED)
def test_both_accept_what_changes_no_result(tmp_path: Path, content: dict[str, Any]) -> None:
    assert both(tmp_path / "instances_some.json", content) == {"accepted"}


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_both_refuse_what_changes_a_result_in_the_same_words(
    tmp_path: Path, content: Any, message: str
) -> None:
    [said] = both(tmp_path / "instances_some.json", content)
    assert re.search(message, said), said


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize(("content", "read", "evaluated"), WARNED.values(), ids=WARNED)
def test_what_is_left_out_is_counted_in_a_warning(
    tmp_path: Path, content: dict[str, Any], read: str | None, evaluated: str
) -> None:
    path = tmp_path / "instances_some.json"
    assert both(path, content) == {"accepted"}
    for function, message in ((read_coco, read), (lambda file: evaluate_coco(file, []), evaluated)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(path)
        if message is None:
            assert not caught
        else:
            [warning] = caught
            assert re.search(message, str(warning.message)), warning.message
            assert issubclass(warning.category, UserWarning)


@pytest.mark.parametrize(
    "content",
    [*ACCEPTED.values(), *(row[0] for row in WARNED.values())],
    ids=[*ACCEPTED, *WARNED],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_parsers_read_the_same_values(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("msgspec")
    path = tmp_path / "instances_some.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with_msgspec = read_instances(path)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    for other in (read_instances(path), read_instances(content)):
        for name in InstanceColumns.__dataclass_fields__:
            first, second = getattr(with_msgspec, name), getattr(other, name)
            if isinstance(first, np.ndarray):
                assert first.dtype == second.dtype
                np.testing.assert_array_equal(first, second, err_msg=name)
            elif name == "repetitions":
                without_source = first.replace(f" in {str(path)!r}", "")
                assert second.replace(f" in {str(path)!r}", "") == without_source
            elif name != "source":
                assert first == second, name


@pytest.mark.usefixtures("json_parser")
def test_lenient_values_mean_what_they_should(tmp_path: Path) -> None:
    content = coco_content()
    rows = content["annotations"]
    rows[0].update(id=None, iscrowd=1.0, area=math.nan, image_id=10.0)
    rows[1].update(id=41.0, iscrowd=False, category_id=2.0)
    del rows[2]["id"]
    content["images"][0].update(height=-1, width=60.0)
    del content["categories"][0]["name"]
    content["categories"][1]["name"] = 5
    path = tmp_path / "instances_some.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    columns = read_instances(path)
    assert columns.annotation_ids.tolist() == [1, 41, 2]
    assert columns.crowd.tolist() == [True, False, True]
    assert columns.areas.tolist() == [12, 32, 12.5]
    assert columns.image_indices.tolist() == [1, 0, 1]
    assert columns.labels.tolist() == [1, 0, 1]
    assert columns.image_sizes.tolist() == [[0, 60], [20, 30]]
    assert columns.category_names == ("5", "9")


def test_images_listed_twice_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "instances_some.json"
    path.write_text(json.dumps(with_image()), encoding="utf-8")
    with pytest.warns(UserWarning, match="kept once"):
        table = read_coco(path)
    assert table.image_ids.tolist() == [30, 10]
    assert table.image_indices.tolist() == [0, 1, 1]
    with pytest.warns(UserWarning, match="kept once") as caught:
        assert evaluate_coco(path, []).num_images == 2
    assert caught[0].filename == __file__


def test_numpy_and_torch_values_are_accepted_in_memory() -> None:
    content = changed("annotations", id=np.int64(5), bbox=np.array([1, 2, 3, 4], np.float32))
    content["annotations"][0]["bbox"] = torch.tensor([1.0, 2, 3, 4])
    content["annotations"][2].update(area=np.float32(12.5), iscrowd=np.bool_(True))
    content["annotations"][1]["area"] = np.float32(math.nan)
    content["images"] = tuple(content["images"])
    columns = read_instances(content)
    assert columns.boxes[:2].tolist() == [[1, 2, 3, 4]] * 2
    assert columns.areas.tolist() == [12, 12, 12.5]
    assert columns.crowd.tolist() == [False, False, True]


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_accepted(tmp_path: Path, encoding: str) -> None:
    path, results = tmp_path / "instances_some.json", tmp_path / "results.json"
    content = changed("categories", name="猫")
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    results.write_text(
        json.dumps([{"image_id": 10, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 1}]),
        encoding=encoding,
    )
    assert read_coco(path).class_names == ("猫", "cat")
    assert evaluate_coco(path, results).of_class("cat").detections == 1


@pytest.mark.usefixtures("json_parser")
def test_text_that_is_not_utf_8_matters_only_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "instances_some.json"
    content = json.dumps(changed("annotations", note="é"), ensure_ascii=False)
    path.write_bytes(content.encode("latin-1"))
    assert {outcome(read_coco, path), outcome(evaluate_coco, path, [])} == {"accepted"}
    content = json.dumps(changed("images", file_name="é.png"), ensure_ascii=False)
    path.write_bytes(content.encode("latin-1"))
    [said] = {outcome(read_coco, path), outcome(evaluate_coco, path, [])}
    assert re.search(r"images\[1\] \(id 10\) .*file_name is not valid UTF-8.* Save the file", said)


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("file_name", [REMOVED, None])
def test_only_read_coco_needs_file_names(tmp_path: Path, file_name: object) -> None:
    path = tmp_path / "instances_some.json"
    path.write_text(json.dumps(changed("images", file_name=file_name)), encoding="utf-8")
    assert outcome(evaluate_coco, path, []) == "accepted"
    message = r"images\[1\] \(id 10\) in '.*some.json': file_name is missing"
    with pytest.raises(AnnotationError, match=message):
        read_coco(path)


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2", '{"images": [}', "\x00\x01", "\x89PNG\xff", '{"a": 01}', "{} {}"]
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    for function in (read_coco, read_instances, read_detections):
        message = r"Cannot read '.*broken.json': it is not valid JSON \(.+\)\."
        with pytest.raises(AnnotationError, match=message):
            function(path)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.json"]


@pytest.mark.usefixtures("json_parser")
def test_a_file_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    for function in (read_coco, read_instances, read_detections):
        with pytest.raises(AnnotationError, match=r"deep.json': it is nested too deeply"):
            function(path)


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("depth", [100, 5000, 100_000])
def test_a_field_that_is_not_read_may_be_nested_but_not_too_deeply(
    tmp_path: Path, depth: int
) -> None:
    deep = "[" * depth + "]" * depth
    content = json.dumps(changed("annotations", attributes="DEEP")).replace('"DEEP"', deep)
    row = f'{{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 1, "x": {deep}}}'
    path, results = tmp_path / "some.json", tmp_path / "results.json"
    path.write_text(content, encoding="utf-8")
    results.write_text(f"[{row}]", encoding="utf-8")
    for file, function in ((path, read_coco), (path, read_instances), (results, read_detections)):
        if depth == 100:
            function(file)
        else:
            with pytest.raises(AnnotationError, match=rf"{file.name}': it is nested too deeply"):
                function(file)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for name, function in (("annotations", read_instances), ("results", read_detections)):
        with pytest.raises(FileNotFoundError, match=rf"No such file: '.*no.json' \({name}\)"):
            function(tmp_path / "no.json")
        with pytest.raises(FileNotFoundError, match=r"a folder, not a file"):
            function(tmp_path)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(AnnotationError, match="…") as caught:
        read_instances(changed("annotations", bbox=list(range(1000))))
    assert len(str(caught.value)) < 400
    with pytest.raises(AnnotationError, match="…") as caught:
        read_instances(changed("annotations", id="x" * 1000, bbox=None))
    assert len(str(caught.value)) < 400
