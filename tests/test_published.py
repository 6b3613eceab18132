"""The table of published weights, its page in the documentation, and finding a source by name.

After changing the table, update the page:

    python -m tests.test_published
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch

import focaldet.pretrained
from focaldet import RetinaNet
from focaldet.pretrained import DownloadError, PublishedTable, _sources, cache_folder
from focaldet.pretrained._published import PUBLISHED

if TYPE_CHECKING:
    from focaldet.pretrained import PublishedWeights

PAGE = Path(__file__).parents[1] / "docs" / "pretrained.md"
MMDET = "https://download.openmmlab.com/mmdetection/v2.0/"
BEGIN, END = "<!-- table: python -m tests.test_published -->\n", "<!-- end of the table -->\n"


def page_with_table(page: str) -> str:
    """Return the page with its table replaced by the current one."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{PUBLISHED.to_markdown()}\n{END}{after}"


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert BEGIN in page
    assert END in page
    assert page == page_with_table(page), "Update it: python -m tests.test_published"


def test_the_table_has_every_checkpoint_of_the_projects_once() -> None:
    names = [one.name for one in focaldet.pretrained.list()]
    assert len(names) == len(set(names))
    counts = {family: len(focaldet.pretrained.list(family)) for family in families()}
    assert counts == {
        "torchvision": 2,
        "detectron2": 6,
        "mmdet": 39,
        "odtk": 6,
        "yhenon": 1,
        "mlperf": 1,
        "deepforest": 5,
        "detectron": 8,
        "fizyr": 1,
        "zfturbo": 6,
        "paddledetection": 4,
    }
    cached = [one.file_name for one in PUBLISHED if one.hub is None]
    assert len(cached) == len(set(cached))  # all are cached in one folder


def families() -> list[str]:
    return list(dict.fromkeys(one.family for one in PUBLISHED))


@pytest.mark.parametrize("one", PUBLISHED, ids=lambda one: one.name)
def test_every_entry_is_plausible(one: PublishedWeights) -> None:
    assert re.fullmatch(r"[a-z0-9]+/[\w-]+", one.name)
    assert urlsplit(one.url).scheme == "https"
    if one.hub is None:
        name = Path(urlsplit(one.url).path).name
        several = {"model_final.pkl", "model_final.pth"}  # every file of a project has this name
        assert one.by_hand or name == one.file_name or name in several
        assert one.by_hand or Path(name).suffix == Path(one.file_name).suffix
    else:
        assert one.url == f"https://huggingface.co/{one.hub}"
    assert Path(one.file_name).suffix in (
        *(".pth", ".pt", ".pkl", ".zip", ".safetensors", ".h5", ".pdparams"),
    )
    if one.sha256_prefix is not None:
        assert re.fullmatch(r"[0-9a-f]{8}", one.sha256_prefix)
        assert Path(one.file_name).stem.endswith("-" + one.sha256_prefix)
    assert (one.sha256_prefix is not None) == (one.family in ("torchvision", "mmdet"))
    if one.data == "COCO":
        assert one.ap is not None
        assert 30 < one.ap < 48
        assert (one.num_classes, one.metric) == (80, "AP")
    assert one.licence
    assert one.input


def test_torchvisions_entries_agree_with_the_installed_package() -> None:
    from torchvision.models import detection

    enums = (detection.RetinaNet_ResNet50_FPN_Weights, detection.RetinaNet_ResNet50_FPN_V2_Weights)
    for one, enum in zip(focaldet.pretrained.list("torchvision"), enums, strict=True):
        [weights] = enum
        assert one.url == weights.url
        assert one.ap == weights.meta["_metrics"]["COCO-val2017"]["box_map"]
        assert one.megabytes == round(weights.meta["_file_size"] * 2**20 / 1e6)


@pytest.mark.parametrize(
    ("name", "folder", "file_name"),
    [
        (
            "mmdet/retinanet_r50_fpn_fp16_1x_coco",
            "https://download.openmmlab.com/mmdetection/v2.0/fp16/retinanet_r50_fpn_fp16_1x_coco",
            "retinanet_r50_fpn_fp16_1x_coco_20200702-0dbfb212.pth",
        ),
        (
            "mmdet/retinanet_x101_64x4d_fpn_2x_coco",
            "https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_x101_64x4d_fpn_2x_coco",
            "retinanet_x101_64x4d_fpn_2x_coco_20200131-bca068ab.pth",
        ),
        (
            "mmdet/pisa_retinanet_x101_32x4d_fpn_1x_coco",
            MMDET + "pisa/pisa_retinanet_x101_32x4d_fpn_1x_coco",
            "pisa_retinanet_x101_32x4d_fpn_1x_coco-a0c13c73.pth",
        ),
        (
            "mmdet/retinanet_r50_fpn_32x2_1x_openimages",
            MMDET + "openimages/retinanet_r50_fpn_32x2_1x_openimages",
            "retinanet_r50_fpn_32x2_1x_openimages_20211223_071954-d2ae5462.pth",
        ),
        (
            "mmdet/v1_retinanet_r50_fpn_2x",
            "https://open-mmlab.s3.ap-northeast-2.amazonaws.com/mmdetection/models",
            "retinanet_r50_fpn_2x_20190616-75574209.pth",
        ),
        (
            "mmdet/v1_retinanet_r101_fpn_2x",
            "https://s3.ap-northeast-2.amazonaws.com/open-mmlab/mmdetection/models",
            "retinanet_r101_fpn_2x_20181129-72c14526.pth",
        ),
        (
            "detectron2/retinanet_R_101_FPN_3x",
            "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_101_FPN_3x/190397697",
            "model_final_971ab9.pkl",
        ),
        (
            "odtk/retinanet_rn152fpn",
            "https://github.com/NVIDIA/retinanet-examples/releases/download/19.04",
            "retinanet_rn152fpn.zip",
        ),
    ],
)
def test_urls_are_built_correctly(name: str, folder: str, file_name: str) -> None:
    [one] = [one for one in PUBLISHED if one.name == name]
    assert (one.url, one.file_name) == (f"{folder}/{file_name}", file_name)


def test_the_list_is_a_tuple_that_prints_as_a_table() -> None:
    table = PublishedTable(focaldet.pretrained.list("detectron2")[:3])
    lines = str(table).splitlines()
    assert lines[0].startswith("3 published RetinaNets")
    assert lines[2] == "detectron2, trained on COCO"
    assert lines[4].split() == ["detectron2/retinanet_R_50_FPN_1x", "80", "37.4", "152", "-"]
    assert "  input: 800/1333, rounded to the nearest, antialiased" in lines
    assert max(map(len, str(PUBLISHED).splitlines())) <= 88
    assert repr(PublishedTable(())).startswith("0 published")
    with pytest.raises(ValueError, match="family 'mmcv'.*'torchvision', .*'yhenon'"):
        focaldet.pretrained.list("mmcv")


def test_entries_of_one_project_that_differ_in_their_data_have_a_table_each() -> None:
    on_coco = PUBLISHED[0]
    elsewhere = replace(
        on_coco,
        name="torchvision/other",
        data="Objects365",
        num_classes=None,
        metric="AP50",
        ap=None,
    )
    table = PublishedTable((on_coco, elsewhere))
    lines = str(table).splitlines()
    assert lines[2] == "torchvision, trained on COCO"
    assert lines[8] == "torchvision, trained on Objects365"
    assert lines[9].split() == ["name", "classes", "AP50", "MB", "sha256"]
    assert lines[10].split() == ["torchvision/other", "?", "-", "137", "eeacb38b"]
    markdown = table.to_markdown().splitlines()
    assert markdown.count("### torchvision") == 1
    assert "| name | classes | AP50 | MB | sha256 |" in markdown
    assert markdown[-1].endswith("| ? | - | 137 | eeacb38b |")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOCALDET_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("torchvison/retinanet_resnet50_fpn_coco", "torchvision/retinanet_resnet50_fpn_coco"),
        ("torchvision/retinanet_resnet50_fpn_v2", "torchvision/retinanet_resnet50_fpn_v2_coco"),
        ("retinanet_R_50_FPN_3x", "detectron2/retinanet_R_50_FPN_3x"),
        ("detectron/retinanet_r_101_fpn_3x", "detectron2/retinanet_R_101_FPN_3x"),
        ("mmdet/retinanet_r18_fpn_1x", "mmdet/retinanet_r18_fpn_1x_coco"),
        ("odtk/retinanet_rn50", "odtk/retinanet_rn50fpn"),
    ],
)
@pytest.mark.usefixtures("home")
def test_the_error_for_a_mistyped_name_suggests_the_most_similar_one(
    source: str, meant: str
) -> None:
    with pytest.raises(FileNotFoundError, match=f"{source!r}.* Did you mean {meant!r}"):
        RetinaNet.from_pretrained(source)


@pytest.mark.parametrize("source", ["model", "runs/last.pth", "a/b/c", "mmdet/nothing_like_it"])
@pytest.mark.usefixtures("home")
def test_the_error_for_an_unknown_source_says_what_was_looked_for(source: str) -> None:
    message = (
        rf"No such file, folder, published name or Hub repository: '{source}'\. "
        r"`focaldet models` or focaldet\.pretrained\.list\(\) shows"
    )
    with pytest.raises(FileNotFoundError, match=message):
        RetinaNet.from_pretrained(source)


def test_a_published_file_is_loaded_from_the_cache_and_verified(home: Path) -> None:
    from torchvision.models import detection

    [entry] = [one for one in PUBLISHED if one.name == "odtk/retinanet_mobilenetv2fpn"]
    theirs = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    home.mkdir()
    # There is no hash to verify, and the keys alone decide how the file is converted.
    torch.save(theirs.state_dict(), home / entry.file_name)
    assert cache_folder() == home
    assert RetinaNet.from_pretrained(entry.name).config.num_classes == 2
    (home / PUBLISHED[0].file_name).write_bytes(b"not the published file")
    with pytest.raises(DownloadError, match="is not torchvision/.*begins with .*Delete it"):
        RetinaNet.from_pretrained(PUBLISHED[0].name)


def test_a_published_repository_is_fetched_from_the_hub(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file_name: str | None) -> Path:
        assert file_name is None
        asked.append(repository)
        return home

    monkeypatch.setattr(_sources, "download_repository", download)
    assert _sources.locate("deepforest/deepforest-bird") == home
    assert asked == ["weecology/deepforest-bird"]


def test_the_error_for_a_published_repository_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, file_name: str | None) -> Path:
        assert file_name is None
        raise FileNotFoundError(f"no connection to {repository}")

    monkeypatch.setattr(_sources, "download_repository", download)
    message = (
        r"'deepforest/deepforest-bird' from .* repository 'weecology/deepforest-bird': no conn"
    )
    with pytest.raises(DownloadError, match=message):
        _sources.locate("deepforest/deepforest-bird")


def test_an_existing_folder_takes_precedence_over_a_published_name(
    home: Path, tiny_model: RetinaNet
) -> None:
    folder = home.parent / "torchvision" / "retinanet_resnet50_fpn_coco"
    tiny_model.save_pretrained(folder)
    loaded = RetinaNet.from_pretrained("torchvision/retinanet_resnet50_fpn_coco")
    assert loaded.config == tiny_model.config


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
