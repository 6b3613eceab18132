"""The RetinaNets that other projects have trained and published: names, URLs and figures.

All figures are the projects' own; none was measured here. None of the files could be opened when this
table was written, so all sizes except for torchvision's are those of the parameters.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from focaldet._checks import check_choice

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PUBLISHED", "PublishedTable", "PublishedWeights", "list_published", "suggestions"]


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One published checkpoint: a file, perhaps in a zip archive, or a repository on the Hub.

    Attributes:
        name: The name for ``RetinaNet.from_pretrained``, ``family/name``.
        ap: The figure that ``metric`` describes, in percent, or None if none is published.
        url: The URL of the file, or of the page of a Hub repository.
        file_name: The file's name in the cache, or in the Hub repository.
        sha256_prefix: The first hexadecimal digits of its SHA-256, or None if it is not published.
        megabytes: Its size in 10^6 bytes, or None if it is not known.
        input: How the project resizes images: shorter side / limit of the longer side, and how the
            new size is rounded.
        licence: The licence of the project, and of the weights if one is stated.
        data: The dataset that it was trained on.

            .. versionadded:: 0.3.0
        num_classes: The number of classes, or None if it is not published. torchvision's files for
            COCO have 91 channels, of which 80 are kept.
        metric: What ``ap`` is: "AP" for the mean over IoU thresholds from 0.5 to 0.95, "AP50" for one
            threshold of 0.5, each on the validation images of ``data`` (COCO's val2017); "LB" for the
            same on the public leaderboard of the challenge.

            .. versionadded:: 0.3.0
        hub: The repository on the Hugging Face Hub that has the file, "user/repo". None if the file
            is downloaded from ``url``.

            .. versionadded:: 0.3.0
        by_hand: Whether the file can only be downloaded with a browser.

    .. versionchanged:: 0.3.0
        ``ap`` and ``num_classes`` can be None.
    """

    name: str
    ap: float | None
    url: str
    file_name: str
    sha256_prefix: str | None
    megabytes: int | None
    input: str
    licence: str
    data: str = "COCO"
    num_classes: int | None = 80
    metric: str = "AP"
    hub: str | None = None
    by_hand: bool = False

    @property
    def family(self) -> str:
        """The name of the project."""
        return self.name.partition("/")[0]


class PublishedTable(tuple[PublishedWeights, ...]):
    """A tuple of published checkpoints that prints as a table.

    >>> print(PublishedTable(PUBLISHED[:2]))
    2 published RetinaNets; AP in percent as published, size in MB
    <BLANKLINE>
    torchvision, trained on COCO
      name                                       classes   AP   MB  sha256
      torchvision/retinanet_resnet50_fpn_coco         80 36.4  137  eeacb38b
      torchvision/retinanet_resnet50_fpn_v2_coco      80 41.5  153  5905b1c5
      input: 800/1333, rounded down
      licence: BSD-3-Clause for the code; the weights "may have their own"
    """

    __slots__ = ()

    def __repr__(self) -> str:
        width = max((len(one.name) for one in self), default=0)
        lines = [f"{len(self)} published RetinaNets; AP in percent as published, size in MB"]
        for group in self._groups():
            first = group[0]
            lines += ["", f"{first.family}, trained on {first.data}"]
            lines += [f"  {'name':{width}} classes {first.metric:>4}   MB  sha256"]
            lines += [
                f"  {one.name:{width}} {_known(one.num_classes):>7} {_percent(one):>4} "
                f"{_known(one.megabytes):>4}  {one.sha256_prefix or '-'}"
                for one in group
            ]
            lines += [f"  input: {first.input}", f"  licence: {first.licence}"]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        lines: list[str] = []
        family = ""
        for group in self._groups():
            first = group[0]
            if first.family != family:
                family = first.family
                lines += [f"### {family}", ""]
            lines += [f"Trained on {first.data}. Input: {first.input}."]
            lines += [f"Licence: {first.licence}.", ""]
            lines += [f"| name | classes | {first.metric} | MB | sha256 |", "|---|---|---|---|---|"]
            lines += [
                f"| [`{one.name}`]({one.url}) | {_known(one.num_classes)} | {_percent(one)} |"
                f" {_known(one.megabytes)} | {one.sha256_prefix or '-'} |"
                for one in group
            ]
            lines += [""]
        return "\n".join(lines)

    def _groups(self) -> Iterator[tuple[PublishedWeights, ...]]:
        """Yield the neighbouring entries that share a table."""
        for _, members in groupby(self, key=_shared):
            yield tuple(members)


def _shared(one: PublishedWeights) -> tuple[str, ...]:
    """Return what the entries of one table have in common."""
    return one.family, one.data, one.metric, one.input, one.licence


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)


def _percent(one: PublishedWeights) -> str:
    return "-" if one.ap is None else f"{one.ap:.1f}"


def _torchvision() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name=f"torchvision/{name}",
            ap=ap,
            url=f"https://download.pytorch.org/models/{name}-{sha256}.pth",
            file_name=f"{name}-{sha256}.pth",
            sha256_prefix=sha256,
            megabytes=megabytes,
            input="800/1333, rounded down",
            licence='BSD-3-Clause for the code; the weights "may have their own"',
        )
        for name, sha256, ap, megabytes in (
            ("retinanet_resnet50_fpn_coco", "eeacb38b", 36.4, 137),
            ("retinanet_resnet50_fpn_v2_coco", "5905b1c5", 41.5, 153),
        )
    ]


def _detectron2() -> list[PublishedWeights]:
    base = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
    return [
        PublishedWeights(
            name=f"detectron2/{name}",
            ap=ap,
            url=f"{base}/{name}/{run}/{file_name}",
            file_name=file_name,
            sha256_prefix=None,  # the meaning of the six digits in the name is not documented
            megabytes=megabytes,
            input="800/1333, rounded to the nearest, antialiased",
            licence="CC BY-SA 3.0 for the weights, Apache-2.0 for the code",
        )
        for name, run, file_name, ap, megabytes in (
            ("retinanet_R_50_FPN_1x", 190397773, "model_final_bfca0b.pkl", 37.4, 152),
            ("retinanet_R_50_FPN_3x", 190397829, "model_final_5bd44e.pkl", 38.7, 152),
            ("retinanet_R_101_FPN_3x", 190397697, "model_final_971ab9.pkl", 40.4, 228),
        )
    ] + [*_fathomnet(), _hjdataset()]


def _fathomnet() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name=f"detectron2/{repository}",
            ap=None,
            url=f"https://huggingface.co/FathomNet/{repository}",
            file_name="model_final.pth",
            sha256_prefix=None,
            megabytes=megabytes,
            input="as in the config.yaml next to it, or else 800/1333; antialiased",
            licence="CC BY 4.0",
            data="underwater images of FathomNet",
            num_classes=num_classes,
            hub=f"FathomNet/{repository}",
        )
        for repository, num_classes, megabytes in (
            ("MBARI-benthic-supercategory-detector", 20, 303),
            ("MBARI-midwater-detector", 16, None),
        )
    ]


def _hjdataset() -> PublishedWeights:
    return PublishedWeights(
        name="detectron2/hjdataset_retinanet_R_50_FPN_3x",
        ap=None,
        url="https://www.dropbox.com/s/yxsloxu3djt456i/model_final.pth?dl=1",
        file_name="hjdataset_retinanet_R_50_FPN_3x.pth",
        sha256_prefix=None,
        megabytes=None,
        input="800/1333 unless its config.yml is kept next to it; antialiased",
        licence="Apache-2.0 for the code (LayoutParser); none stated for the weights",
        data="HJDataset (pages of Japanese documents)",
        num_classes=None,
    )


def _detectron() -> list[PublishedWeights]:
    base = "https://dl.fbaipublicfiles.com/detectron"
    folder = "output/train/coco_2014_train%3Acoco_2014_valminusminival/retinanet"
    return [
        PublishedWeights(
            name=f"detectron/retinanet_{name}",
            ap=ap,
            url=f"{base}/{number}/12_2017_baselines/retinanet_{name}.yaml.{run}/{folder}/model_final.pkl",
            file_name=f"detectron_retinanet_{name}.pkl",
            sha256_prefix=None,  # MD5 sums are published
            megabytes=None,  # with the state of the optimiser
            input="800/1333, rounded to even at halves; padded to multiples of 128",
            licence="CC BY-SA 3.0 for the weights, Apache-2.0 for the code",
        )
        for name, number, run, ap in (
            ("R-50-FPN_1x", 36768636, "08_29_48.t4zc9clc", 35.7),
            ("R-50-FPN_2x", 36768677, "08_30_38.sgZIQZQ5", 35.7),
            ("R-101-FPN_1x", 36768744, "08_31_38.5poQe1ZB", 37.7),
            ("R-101-FPN_2x", 36768840, "08_33_29.grtM0RTf", 37.8),
            ("X-101-64x4d-FPN_1x", 36768875, "08_34_37.FSXgMpzP", 39.8),
            ("X-101-64x4d-FPN_2x", 36768907, "08_35_40.pF3nzPpu", 39.2),
            ("X-101-32x8d-FPN_1x", 36769563, "08_42_05.06JTK6vJ", 39.5),
            ("X-101-32x8d-FPN_2x", 36769641, "08_42_55.sUPnwXI5", 38.6),
        )
    ]


def _mmdet() -> list[PublishedWeights]:
    base = "https://download.openmmlab.com/mmdetection/v2.0"
    licence = "Apache-2.0 for the code; none stated for the weights"
    plain = [
        PublishedWeights(
            name=f"mmdet/retinanet_{name}_coco",
            ap=ap,
            url=f"{base}/{'fp16' if 'fp16' in name else 'retinanet'}/retinanet_{name}_coco/"
            f"retinanet_{name}_coco_{date}-{sha256}.pth",
            file_name=f"retinanet_{name}_coco_{date}-{sha256}.pth",
            sha256_prefix=sha256,
            megabytes=megabytes,
            input="800/1333, rounded to the nearest",
            licence=licence,
        )
        for name, date, sha256, ap, megabytes in (
            ("r18_fpn_1x", "20220407_171055", "614fd399", 31.7, 86),
            ("r18_fpn_1x8_1x", "20220407_171255", "4ea310d7", 31.7, 86),
            ("r50_caffe_fpn_1x", "20200531", "f11027c5", 36.3, 152),
            ("r50_fpn_1x", "20200130", "c2398f9e", 36.5, 152),
            ("r50_fpn_fp16_1x", "20200702", "0dbfb212", 36.4, 152),
            ("r50_fpn_2x", "20200131", "fdb43119", 37.4, 152),
            ("r50_fpn_mstrain_3x", "20210718_220633", "88476508", 39.5, 152),
            ("r101_caffe_fpn_1x", "20200531", "b428fa0f", 38.5, 228),
            ("r101_caffe_fpn_mstrain_3x", "20210721_063439", "88a8a944", 40.7, 228),
            ("r101_fpn_1x", "20200130", "7a93545f", 38.5, 228),
            ("r101_fpn_2x", "20200131", "5560aee8", 38.9, 228),
            ("r101_fpn_mstrain_3x", "20210720_214650", "7ee888e0", 41.0, 228),
            ("x101_32x4d_fpn_1x", "20200130", "5c8b7ec4", 39.9, 227),
            ("x101_32x4d_fpn_2x", "20200131", "237fc5e1", 40.1, 227),
            ("x101_64x4d_fpn_1x", "20200130", "366f5af1", 41.0, 384),
            ("x101_64x4d_fpn_2x", "20200131", "bca068ab", 40.8, 384),
            ("x101_64x4d_fpn_mstrain_3x", "20210719_051838", "022c2187", 41.6, 384),
        )
    ]
    of_papers = [
        PublishedWeights(
            name=f"mmdet/{name}",
            ap=ap,
            url=f"{base}/{folder}/{name}/{name}{suffix}.pth",
            file_name=f"{name}{suffix}.pth",
            sha256_prefix=suffix[-8:],
            megabytes=megabytes,
            input="800/1333, rounded to the nearest",
            licence=licence,
        )
        for folder, name, suffix, ap, megabytes in (
            ("ghm", "retinanet_ghm_r50_fpn_1x_coco", "_20200130-a437fda3", 37.0, 152),
            ("ghm", "retinanet_ghm_r101_fpn_1x_coco", "_20200130-c148ee8f", 39.1, 228),
            ("ghm", "retinanet_ghm_x101_32x4d_fpn_1x_coco", "_20200131-e4333bd0", 40.7, 227),
            ("ghm", "retinanet_ghm_x101_64x4d_fpn_1x_coco", "_20200131-dd381cef", 41.4, 384),
            ("pisa", "pisa_retinanet_r50_fpn_1x_coco", "-76409952", 36.9, 152),
            ("pisa", "pisa_retinanet_x101_32x4d_fpn_1x_coco", "-a0c13c73", 40.7, 227),
            *(
                ("free_anchor", f"retinanet_free_anchor_{body}_fpn_1x_coco", suffix, ap, megabytes)
                for body, suffix, ap, megabytes in (
                    ("r50", "_20200130-0f67375f", 38.7, 152),
                    ("r101", "_20200130-358324e6", 40.3, 228),
                    ("x101_32x4d", "_20200130-d4846968", 41.9, 227),
                )
            ),
            (
                *("resnet_strikes_back", "retinanet_r50_fpn_rsb-pretrain_1x_coco"),
                *("_20220113_175432-bd24aae9", 39.0, 152),
            ),
        )
    ]
    of_other_data = [
        PublishedWeights(
            name=f"mmdet/{name}",
            ap=ap,
            url=f"{base}/{folder}/{name}/{name}_{suffix}.pth",
            file_name=f"{name}_{suffix}.pth",
            sha256_prefix=suffix[-8:],
            megabytes=megabytes,
            input=f"800/{limit}, rounded to the nearest",
            licence=licence,
            data=data,
            num_classes=num_classes,
            metric=metric,
        )
        for folder, name, suffix, ap, megabytes, limit, data, num_classes, metric in (
            (
                *("objects365", "retinanet_r50_fpn_1x_obj365v1", "20221219_181859-ba3e3dd5"),
                *(14.8, 176, 1333, "Objects365 v1", 365, "AP"),
            ),
            (
                *("objects365", "retinanet_r50_fpn_syncbn_1350k_obj365v1"),
                *("20220513_111237-7517c576", 18.0, 176, 1333, "Objects365 v1", 365, "AP"),
            ),
            (
                *("objects365", "retinanet_r50_fpn_1x_obj365v2", "20221223_122105-d9b191f1"),
                *(16.7, 176, 1333, "Objects365 v2", 365, "AP"),
            ),
            (
                *("openimages", "retinanet_r50_fpn_32x2_1x_openimages"),
                *("20211223_071954-d2ae5462", 61.5, 195, 1024, "OpenImages v6", 601, "AP50"),
            ),
        )
    ]
    amazon = "ap-northeast-2.amazonaws.com"
    version_1 = [
        PublishedWeights(
            name=f"mmdet/v1_retinanet_{name}",
            ap=ap,
            url=f"https://{host}/mmdetection/models/retinanet_{name}_{date}-{sha256}.pth",
            file_name=f"retinanet_{name}_{date}-{sha256}.pth",
            sha256_prefix=sha256,
            megabytes=megabytes,
            input="800/1333, rounded to the nearest",
            licence=licence,
        )
        for name, date, sha256, ap, megabytes in (
            ("r50_fpn_1x", "20181125", "7b0c2548", 35.6, 152),
            ("r50_fpn_2x", "20190616", "75574209", 36.4, 152),
            ("r101_fpn_1x", "20181129", "f016f384", 37.7, 228),
            ("r101_fpn_2x", "20181129", "72c14526", 38.1, 228),
            ("x101_32x4d_fpn_1x", "20190501", "967812ba", 39.0, 227),
            ("x101_32x4d_fpn_2x", "20181218", "8596452d", 39.3, 227),
            ("x101_64x4d_fpn_1x", "20181218", "a0a22662", 40.0, 384),
            ("x101_64x4d_fpn_2x", "20181218", "5e88d045", 39.6, 384),
        )
        for host in (
            f"open-mmlab.s3.{amazon}" if date == "20190616" else f"s3.{amazon}/open-mmlab",
        )
    ]
    return [*plain, *of_papers, *of_other_data, *version_1]


def _odtk() -> list[PublishedWeights]:
    base = "https://github.com/NVIDIA/retinanet-examples/releases/download"
    return [
        PublishedWeights(
            name=f"odtk/{file_name.partition('.')[0]}",
            ap=ap,
            url=f"{base}/{release}/{file_name}",
            file_name=file_name,
            sha256_prefix=None,
            megabytes=None,  # an archive whose other contents are not known
            input="800/1333, rounded down, antialiased; padded to multiples of 128",
            licence="BSD-3-Clause for the code; none stated for the weights",
        )
        for release, file_name, ap in (
            ("19.04", "retinanet_rn18fpn.zip", 31.8),
            ("19.04", "retinanet_rn34fpn.zip", 34.3),
            ("19.04", "retinanet_rn50fpn.zip", 35.8),
            ("19.04", "retinanet_rn101fpn.zip", 37.6),
            ("19.04", "retinanet_rn152fpn.zip", 39.3),
            ("v0.2.3", "retinanet_mobilenetv2fpn.pth", 33.3),
        )
    ]


def _yhenon() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name="yhenon/coco_resnet_50_map_0_335",
            ap=33.5,
            url="https://drive.google.com/open?id=1yLmjq3JtXi841yXWBxst0coAgR26MNBS",
            file_name="coco_resnet_50_map_0_335_state_dict.pt",
            sha256_prefix=None,
            megabytes=152,
            input="608/1024, rounded to the nearest",
            licence="see the project, yhenon/pytorch-retinanet; none stated for the weights",
            by_hand=True,
        )
    ]


def _mlperf() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name="mlperf/retinanet_resnext50_32x4d_openimages",
            ap=37.55,
            url="https://zenodo.org/record/6605272/files/retinanet_model_10.zip",
            file_name="retinanet_model_10.zip",
            sha256_prefix=None,
            megabytes=None,  # an archive of the weights and the state of the optimiser
            input="both sides to 800, without keeping the aspect ratio",
            licence="Apache-2.0 for the code; none stated for the weights",
            data="OpenImages (264 classes)",
            num_classes=264,
        )
    ]


def _deepforest() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name=f"deepforest/{repository}",
            ap=None,
            url=f"https://huggingface.co/weecology/{repository}",
            file_name="model.safetensors",
            sha256_prefix=None,
            megabytes=megabytes,
            input="patches of 400x400, enlarged to 800x800",
            licence="MIT for the code; none stated for the weights",
            data="aerial images",
            num_classes=num_classes,
            hub=f"weecology/{repository}",
        )
        for repository, num_classes, megabytes in (
            ("deepforest-tree", 1, 129),
            ("deepforest-bird", 1, 129),
            ("deepforest-livestock", 1, 129),
            ("everglades-bird-species-detector", None, None),
            ("everglades-nest-detection", None, None),
        )
    ]


def _fizyr() -> list[PublishedWeights]:
    return [
        PublishedWeights(
            name="fizyr/resnet50_coco_best",
            ap=35.0,
            url="https://github.com/fizyr/keras-retinanet/releases/download/0.5.1/"
            "resnet50_coco_best_v2.1.0.h5",
            file_name="resnet50_coco_best_v2.1.0.h5",
            sha256_prefix=None,
            megabytes=152,
            input="800/1333, rounded to the nearest; not padded",
            licence="Apache-2.0 for the code; none stated for the weights",
        )
    ]


def _zfturbo() -> list[PublishedWeights]:
    base = "https://github.com/ZFTurbo/Keras-RetinaNet-for-Open-Images-Challenge-2018/releases/download"
    return [
        PublishedWeights(
            name=f"zfturbo/{name}",
            ap=ap,
            url=f"{base}/{release}/{name}{version}_converted.h5",
            file_name=f"{name}{version}_converted.h5",
            sha256_prefix=None,
            megabytes=megabytes,
            input="768/1024 (ResNet-152: 600/800), rounded to the nearest; not padded",
            licence="see the project, ZFTurbo's Keras-RetinaNet-for-Open-Images-Challenge-2018",
            data=data,
            num_classes=num_classes,
            metric=metric,
        )
        for data, num_classes, metric, release, name, version, ap, megabytes in (
            *(
                ("OpenImages (443 classes of level 1)", 443, "AP50", *row)
                for row in (
                    ("v1.1", "retinanet_resnet50_level_1", "", 35.2, 178),
                    ("v1.2", "retinanet_resnet101_level_1", "_v1.2", 38.7, 247),
                    ("v1.2", "retinanet_resnet152_level_1", "_v1.2", 39.6, 308),
                )
            ),
            *(
                ("OpenImages (500 classes)", 500, "LB", *row)
                for row in (
                    ("v1.3", "retinanet_resnet50_500_classes", "_0.4594", 42.2, 178),
                    ("v1.3", "retinanet_resnet101_500_classes", "_0.4986", 45.2, 251),
                    ("v1.3", "retinanet_resnet152_500_classes", "_0.4991", 46.5, 312),
                )
            ),
        )
    ]


def _paddledetection() -> list[PublishedWeights]:
    base = "https://bj.bcebos.com/v1/paddledet/models"
    return [
        PublishedWeights(
            name=f"paddledetection/{name}",
            ap=ap,
            url=f"{url}/{name}.pdparams",
            file_name=f"{name}.pdparams",
            sha256_prefix=None,
            megabytes=megabytes,
            input="800/1333, rounded to the nearest",
            licence="Apache-2.0 for the code; none stated for the weights",
        )
        for url, name, ap, megabytes in (
            (base, "retinanet_r50_fpn_1x_coco", 37.5, 152),
            (base, "retinanet_r50_fpn_2x_coco", 39.1, 152),
            (base, "retinanet_r101_distill_r50_2x_coco", 40.8, 152),  # a ResNet-50
            ("https://paddledet.bj.bcebos.com/models", "retinanet_r101_fpn_2x_coco", 40.6, 228),
        )
    ]


PUBLISHED = PublishedTable(
    [
        *_torchvision(),
        *_detectron2(),
        *_mmdet(),
        *_odtk(),
        *_yhenon(),
        *_mlperf(),
        *_deepforest(),
        *_detectron(),
        *_fizyr(),
        *_zfturbo(),
        *_paddledetection(),
    ]
)
"""All published checkpoints, by family."""


def list_published(family: str | None = None) -> PublishedTable:
    """Return the published RetinaNets that ``RetinaNet.from_pretrained`` loads by name.

    Args:
        family: "torchvision", "detectron2", "mmdet", "odtk", "yhenon", "mlperf", "deepforest",
            "detectron", "fizyr", "zfturbo" or "paddledetection". None returns all.

    Raises:
        ValueError: If the family is unknown.

    >>> import focaldet.pretrained
    >>> [one.name for one in focaldet.pretrained.list("torchvision") if one.ap > 40]
    ['torchvision/retinanet_resnet50_fpn_v2_coco']
    """
    if family is None:
        return PUBLISHED
    check_choice("family", family, dict.fromkeys(one.family for one in PUBLISHED))
    return PublishedTable(one for one in PUBLISHED if one.family == family)


def suggestions(name: str) -> list[str]:
    """Return up to three published names similar to a mistyped one, the most similar first.

    >>> suggestions("torchvison/retinanet_resnet50_fpn")[0]
    'torchvision/retinanet_resnet50_fpn_coco'
    >>> suggestions("Retinanet_R_50_FPN_3x")[0]
    'detectron2/retinanet_R_50_FPN_3x'
    """
    spellings = {one.name.lower(): one.name for one in PUBLISHED}
    spellings |= {one.name.partition("/")[2].lower(): one.name for one in PUBLISHED}
    close = difflib.get_close_matches(name.lower(), spellings, n=3)
    return [*dict.fromkeys(spellings[spelling] for spelling in close)]
