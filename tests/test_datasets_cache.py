from __future__ import annotations

import json
import os
import random
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from focaldet._coco_json import InstanceColumns, read_instances
from focaldet.datasets import AnnotationTable, read_annotations, read_coco
from focaldet.datasets._cache import cache_path, load_cache
from tests.fuzz.mutations import mutate_bytes
from tests.helpers.coco_files import coco_content, coco_file, names_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def assert_equal_tables(first: AnnotationTable, second: AnnotationTable) -> None:
    for name in AnnotationTable.__dataclass_fields__:
        ours, theirs = getattr(first, name), getattr(second, name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        elif name == "file_names":
            assert list(ours) == list(theirs)
        else:
            assert ours == theirs, name


@pytest.fixture(autouse=True)
def small_files_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focaldet.datasets.readers._coco._CACHED_FROM", 0)


def test_a_small_file_gets_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco_file(tmp_path)
    monkeypatch.setattr("focaldet.datasets.readers._coco._CACHED_FROM", path.stat().st_size + 1)
    read_coco(path)
    assert names_in(tmp_path) == ["instances_some.json"]


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: object) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("focaldet.datasets.readers._coco.read_instances", fail)


def test_the_second_reading_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco_file(tmp_path)
    first = read_coco(path)
    assert cache_path(path).is_file()
    forbid_parsing(monkeypatch)
    assert_equal_tables(read_coco(path), first)
    assert read_coco(path, tmp_path.parent).image_folder == tmp_path.parent


def test_the_cache_is_optional(tmp_path: Path) -> None:
    read_coco(coco_file(tmp_path), cache=False)
    read_annotations(coco_file(tmp_path), cache=False)
    assert names_in(tmp_path) == ["instances_some.json"]


def test_different_content_of_the_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    read_coco(path)
    path.write_text(path.read_text(encoding="utf-8").replace("dog", "cow"), encoding="utf-8")
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1]
    assert read_coco(path).class_names == ("cow", "cat")
    assert read_coco(path).class_names == ("cow", "cat")


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_file_whose_time_or_size_changed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = coco_file(tmp_path)
    read_coco(path)
    if change == "time":
        os.utime(path, ns=(1, 1))
    else:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        forbid_parsing(patch)
        with pytest.raises(AssertionError, match="was read"):
            read_coco(path)
    read_coco(path)
    forbid_parsing(monkeypatch)
    read_coco(path)


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "bit flip", "text", "other", "pickle", "shorter"]
)
def test_a_damaged_cache_is_ignored_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = coco_file(tmp_path)
    first = read_coco(path)
    cache = cache_path(path)
    content = cache.read_bytes()
    with np.load(cache) as file:
        arrays = dict(file)
    if damage == "empty":
        cache.write_bytes(b"")
    elif damage == "truncated":
        cache.write_bytes(content[: len(content) // 2])
    elif damage == "bit flip":  # in a box
        place = content.index(np.float64(14.5).tobytes())
        cache.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    elif damage == "text":
        cache.write_text("not an archive", encoding="utf-8")
    elif damage == "other":
        np.savez(cache, other=np.zeros(3))
    elif damage == "pickle":
        np.savez(cache, **{**arrays, "boxes": np.array([{}], object)})
    else:
        np.savez(cache, **{**arrays, "labels": arrays["labels"][:1]})
    assert_equal_tables(read_coco(path), first)
    forbid_parsing(monkeypatch)
    assert_equal_tables(read_coco(path), first)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_no_damage_of_a_cache_stops_reading_or_changes_the_table(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    path = coco_file(tmp_path)
    first = read_coco(path)
    cache = cache_path(path)
    content = cache.read_bytes()
    for _ in range(300):
        cache.write_bytes(mutate_bytes(content, rng))
        assert_equal_tables(read_coco(path), first)


Arrays = dict[str, np.ndarray[Any, Any]]


def with_metadata(**changes: Any) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        metadata = json.loads(arrays["metadata"].tobytes()) | changes
        return {"metadata": np.frombuffer(json.dumps(metadata).encode(), np.uint8)}

    return change


WRONG_VALUES: dict[str, Callable[[Arrays], Arrays]] = {
    "index of no image": lambda a: {"image_indices": a["image_indices"] + 1},
    "negative index of an image": lambda a: {"image_indices": a["image_indices"] - 1},
    "indices in descending order": lambda a: {"image_indices": a["image_indices"][::-1]},
    "label of no class": lambda a: {"labels": a["labels"] + 1},
    "label -2": lambda a: {"labels": a["labels"] - 2},
    "image ids that are equal": lambda a: {"image_ids": a["image_ids"] * 0},
    "negative size": lambda a: {"image_sizes": -a["image_sizes"]},
    "sizes as floats with NaN": lambda a: {"image_sizes": a["image_sizes"] * np.nan},
    "crowd other than 0 and 1": lambda a: {"crowd": (a["labels"] + 2).astype(np.uint8).view(bool)},
    "other byte order": lambda a: {"boxes": a["boxes"].astype(">f8")},
    "boxes of three numbers": lambda a: {"boxes": a["boxes"][:, :3]},
    "one box less": lambda a: {"boxes": a["boxes"][1:]},
    "arrays swapped": lambda a: {"boxes": a["areas"], "areas": a["boxes"]},
    "names beyond their bytes": lambda a: {"file_name_ends": a["file_name_ends"] + 1},
    "names in descending order": lambda a: {"file_name_ends": a["file_name_ends"][::-1]},
    "names that start before the first byte": lambda a: {
        "file_name_ends": np.array([-3, len(a["file_names"])])
    },
    "names that are not text": lambda a: {"file_names": a["file_names"] | 0x80},
    "names that split a character": lambda _: {
        "file_names": np.frombuffer("é".encode(), np.uint8),
        "file_name_ends": np.array([1, 2]),
    },
    "names as numbers": lambda a: {"file_names": a["file_names"].astype(np.int64)},
    "one class name less": with_metadata(class_names=["dog"]),
    "a class name as a number": with_metadata(class_names=["dog", 3]),
    "class names as a string": with_metadata(class_names="ab"),
    "a category id as a float": with_metadata(category_ids=[2, 9.0]),
    "a category id twice": with_metadata(category_ids=[9, 9]),
    "a huge category id": with_metadata(category_ids=[2, 10**30]),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_cache_with_wrong_values_is_ignored(
    tmp_path: Path, wrong: Callable[[Arrays], Arrays]
) -> None:
    path = coco_file(tmp_path)
    first = read_coco(path)
    with np.load(cache_path(path)) as file:
        arrays = dict(file)
    with cache_path(path).open("wb") as file:
        np.savez(file, **arrays)
    assert load_cache(path, tmp_path) is not None  # what is written here is not what is wrong
    with cache_path(path).open("wb") as file:
        np.savez(file, **{**arrays, **wrong(arrays)})
    assert load_cache(path, tmp_path) is None
    assert_equal_tables(read_coco(path), first)


def test_a_compressed_cache_is_ignored_because_it_could_be_far_larger_than_its_file(
    tmp_path: Path,
) -> None:
    path = coco_file(tmp_path)
    read_coco(path)
    with np.load(cache_path(path)) as file:
        arrays = dict(file)
    with cache_path(path).open("wb") as file:
        np.savez_compressed(file, **arrays)
    assert zipfile.is_zipfile(cache_path(path))
    assert load_cache(path, tmp_path) is None


def test_a_folder_or_a_pipe_in_place_of_the_cache_is_ignored(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    os.mkfifo(cache_path(path))
    assert len(read_coco(path)) == 2
    cache_path(path).unlink()
    cache_path(path).mkdir()
    assert len(read_coco(path)) == 2
    assert sorted(names_in(tmp_path)) == ["instances_some.json", cache_path(path).name]


def test_a_read_only_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: Path) -> None:
        raise PermissionError(13, "read-only", str(target))

    path = coco_file(tmp_path)
    monkeypatch.setattr("focaldet.datasets._cache.atomic_write", refuse)
    assert len(read_coco(path)) == 2
    assert names_in(tmp_path) == ["instances_some.json"]


def test_a_file_that_changes_while_it_is_read_gets_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focaldet.datasets.readers import _coco

    def change_after_reading(path: Path, **_: object) -> InstanceColumns:
        columns = read_instances(path)
        path.write_text("{}", encoding="utf-8")
        return columns

    path = coco_file(tmp_path)
    monkeypatch.setattr(_coco, "read_instances", change_after_reading)
    read_coco(path)
    assert not cache_path(path).exists()


def test_a_file_that_causes_a_warning_gets_no_cache_and_warns_again(tmp_path: Path) -> None:
    path = coco_file(tmp_path, images=coco_content()["images"] * 2)
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 entries of images repeat") as caught:
            read_coco(path)
        assert caught[0].filename == __file__
    assert not cache_path(path).exists()
