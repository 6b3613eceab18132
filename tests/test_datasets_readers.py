"""The registry of annotation formats, and what all formats have in common."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focaldet.cli import main
from focaldet.datasets import AnnotationTable, check_dataset, read_annotations, readers
from focaldet.datasets.readers import READERS, Reader, ReadOptions, find_reader
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import (
    VOC_SIZE,
    voc_object,
    write_photo,
    write_text,
    write_voc_folder,
    write_yolo_folder,
)
from tests.helpers.annotation_tables import GOOD_ROWS, table_of_rows

EMPTY_COCO = '{"images": [], "annotations": [], "categories": []}'

BOXES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        *[st.floats(0, 1, allow_subnormal=False)] * 4,
        st.sampled_from(["cat", "dog"]),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=BOXES)
@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_all_formats_give_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    root = tmp_path_factory.mktemp("formats")
    names = ["cat", "dog"]
    voc: dict[str, str] = dict.fromkeys("abc", VOC_SIZE)
    yolo: dict[str, list[str]] = {name: [] for name in voc}
    csv = [f"images/{name}.png,,,,," for name in voc]
    for image, x1, y1, x2, y2, name in rows:
        box = (x1 * 40, y1 * 20, x2 * 40, y2 * 20)
        voc[image] += voc_object(name, box)
        sides = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        yolo[image].append(" ".join(map(repr, (names.index(name), *sides))))
        csv.append(f"images/{image}.png,{','.join(map(repr, box))},{name}")
    write_voc_folder(root / "voc", **voc)
    for image, lines in yolo.items():
        write_photo(root / "images" / f"{image}.png")
        write_text(root / "labels" / f"{image}.txt", "\n".join(lines))
    write_text(root / "data.yaml", "train: images\nnames: [cat, dog]")
    tables = [
        read_annotations(root / "voc", split="all", class_names=names),
        read_annotations(root / "data.yaml", split="train"),
        read_annotations(write_text(root / "train.csv", "\n".join(csv)), class_names=names),
    ]
    for table in tables[1:]:
        assert [Path(name).stem for name in table.file_names] == ["a", "b", "c"]
        np.testing.assert_allclose(table.boxes, tables[0].boxes, atol=1e-9)
        for key in ("labels", "image_indices", "image_ids", "annotation_ids", "category_ids"):
            np.testing.assert_array_equal(getattr(table, key), getattr(tables[0], key))


@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_the_format_is_recognised_by_the_path(tmp_path: Path) -> None:
    yolo = write_yolo_folder(tmp_path / "yolo", "0 0.5 0.5 1 1")
    assert len(read_annotations(yolo.parent, split="train")) == 1
    write_text(tmp_path / "coco" / "annotations" / "instances_val2017.json", EMPTY_COCO)
    assert len(read_annotations(tmp_path / "coco", split="val2017")) == 0
    path = write_text(tmp_path / "some.json", EMPTY_COCO)
    assert read_annotations(path, tmp_path / "coco").image_folder == tmp_path / "coco"
    voc = write_voc_folder(tmp_path / "voc", a="")
    assert len(read_annotations(voc, split="all")) == 1
    table = write_text(tmp_path / "T.CSV", "a.png,,,,,")
    found = [find_reader(p).NAME for p in (yolo, yolo.parent, tmp_path / "coco", path, voc, table)]
    assert found == ["YOLO", "YOLO", "COCO", "COCO", "Pascal VOC", "CSV"]


def test_a_folder_with_the_suffix_of_a_file_is_not_recognised(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv", "a.yaml"):
        (tmp_path / name).mkdir()
        with pytest.raises(AnnotationError, match="Looked for"):
            find_reader(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", ""])
def test_an_unrecognised_path_says_what_each_format_looks_for(tmp_path: Path, name: str) -> None:
    if name:
        write_text(tmp_path / name, "")
    with pytest.raises(AnnotationError) as caught:
        read_annotations(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{str(tmp_path / name)!r} is not in a supported")
    for reader in READERS:
        assert f"{reader.NAME} ({reader.LAYOUT})" in message


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.json", {"split": "train"}, r"split='train' .*'.*a.json'.*Leave it out"),
        ("a.json", {"class_names": ["x"]}, r"class_names=\['x'\] .*COCO.*name the classes"),
        ("a.yml", {"images": "x", "split": "train"}, "images='x' .*YOLO.*where the images are"),
        ("a.yml", {"images": Path("x"), "split": "train"}, "images='x' "),
        ("a.yml", {"class_names": ["x"], "split": "train"}, r"class_names=\['x'\] .*YOLO"),
        ("a.csv", {"split": "train"}, "split='train' .*'.*a.csv'"),
    ],
)
def test_options_that_the_format_does_not_take_are_errors(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    write_text(tmp_path / name, "")
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / name, **options)


def test_images_are_not_an_option_for_pascal_voc(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images='x' .*Pascal VOC"):
        read_annotations(write_voc_folder(tmp_path, a=""), "x", split="all")


def test_annotations_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*no' \(path\)"):
        read_annotations(tmp_path / "no")


def datasets_with_splits(root: Path) -> list[Path]:
    """Write a dataset with the splits "train" and "val" in every format that has splits."""
    voc = write_voc_folder(root / "voc", a="")
    (voc / "ImageSets" / "Main" / "all.txt").unlink()
    for split in ("train", "val", "cat_train", "cat_val"):
        write_text(voc / "ImageSets" / "Main" / f"{split}.txt", "a")
        write_text(root / "coco" / "annotations" / f"instances_{split}.json", EMPTY_COCO)
    for split in ("cat_train", "cat_val"):
        (root / "coco" / "annotations" / f"instances_{split}.json").unlink()
    write_text(root / "coco" / "annotations" / "captions_test.json", "")
    yolo = write_yolo_folder(
        root / "yolo", "", "train: images/train\nval: images/train\ntest:\nnames: [a]"
    )
    return [voc, root / "coco", yolo, yolo.parent]


@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_a_missing_or_unknown_split_names_those_that_exist(tmp_path: Path) -> None:
    for path in datasets_with_splits(tmp_path):
        assert find_reader(path).splits(path) == ("train", "val")
        known = "'train' and 'val'"
        with pytest.raises(ValueError, match=f"split is required for {str(path)!r}.*{known}"):
            read_annotations(path)
        with pytest.raises((FileNotFoundError, ValueError), match=f"split 'dev' in '.*{known}"):
            read_annotations(path, split="dev")
        read_annotations(path, split="val")


def test_many_splits_are_listed_in_part_and_none_are_said_to_be_none(tmp_path: Path) -> None:
    voc = write_voc_folder(tmp_path, a="")
    for number in range(20):
        write_text(voc / "ImageSets" / "Main" / f"fold{number:02}.txt", "a")
    with pytest.raises(FileNotFoundError, match="'fold08' and 11 more"):
        read_annotations(voc, split="dev")
    for file in (voc / "ImageSets" / "Main").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no splits"):
        read_annotations(voc, split="dev")


def made_up_format() -> Reader:
    """A format whose files have the suffix ``.boxes`` and hold the GOOD_ROWS whatever they say."""

    def read(path: Path, options: ReadOptions) -> AnnotationTable:
        return table_of_rows(*GOOD_ROWS, source=path, image_folder=Path(options.images or ""))

    module: Any = ModuleType("made_up")
    module.NAME = "made-up"
    module.LAYOUT = "a .boxes file"
    module.OPTIONS = frozenset({"images"})
    module.recognises = lambda path: path.suffix == ".boxes"
    module.splits = lambda _: None
    module.read = read
    reader: Reader = module
    return reader


def test_a_format_added_to_the_registry_is_read_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_text(tmp_path / "train.boxes", "")
    with pytest.raises(AnnotationError, match="not in a supported"):
        read_annotations(path)
    monkeypatch.setattr(readers, "READERS", (*READERS, made_up_format()))
    table = read_annotations(path, "photos")
    assert (table.source, table.image_folder) == (path, Path("photos"))
    assert check_dataset(table, images="none").ok
    assert main(["check", str(path), "--no-images"]) == 0
    assert "2 images, 2 boxes" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"class_names=\['x'\] .*made-up"):
        read_annotations(path, class_names=["x"])
    with pytest.raises(AnnotationError, match=r"made-up \(a .boxes file\)"):
        read_annotations(write_text(tmp_path / "a.txt", ""))
