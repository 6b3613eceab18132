"""The RetinaNets that five projects have trained on COCO and published: names, URLs and figures.

All figures are the projects' own; none was measured here. None of the files could be opened when this
table was written, so all sizes except for torchvision's are those of the parameters.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import groupby

from focaldet._checks import check_choice

__all__ = ["PUBLISHED", "PublishedTable", "PublishedWeights", "list_published", "suggestions"]


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One published checkpoint file.

    Attributes:
        name: The name for ``RetinaNet.from_pretrained``, ``family/name``.
        ap: The box AP on COCO val2017 in percent, as published.
        url: The file's URL.
        file_name: The file's name in the cache.
        sha256_prefix: The first hexadecimal digits of its SHA-256, or None if it is not published.
        megabytes: Its size in 10^6 bytes, or None if it is not known.
        input: How the project resizes images: shorter side / limit of the longer side, and how the
            new size is rounded.
        licence: The licence of the project, and of the weights if one is stated.
        num_classes: The number of classes, COCO's 80. torchvision's files have 91 channels, of which
            80 are kept.
        by_hand: Whether the file can only be downloaded with a browser.
    """

    name: str
    ap: float
    url: str
    file_name: str
    sha256_prefix: str | None
    megabytes: int | None
    input: str
    licence: str
    num_classes: int = 80
    by_hand: bool = False

    @property
    def family(self) -> str:
        """The name of the project."""
        return self.name.partition("/")[0]


class PublishedTable(tuple[PublishedWeights, ...]):
    """A tuple of published files that prints as a table.

    >>> print(PublishedTable(PUBLISHED[:2]))
    2 published RetinaNets for COCO's 80 classes; AP on val2017 as published, size in MB
    <BLANKLINE>
    torchvision: input 800/1333, rounded down
      name                                         AP   MB  sha256
      torchvision/retinanet_resnet50_fpn_coco    36.4  137  eeacb38b
      torchvision/retinanet_resnet50_fpn_v2_coco 41.5  153  5905b1c5
      licence: BSD-3-Clause for the code; the weights "may have their own"
    """

    __slots__ = ()

    def __repr__(self) -> str:
        width = max((len(one.name) for one in self), default=0)
        lines = [
            f"{len(self)} published RetinaNets for COCO's 80 classes; AP on val2017 as published, size in MB"
        ]
        for family, members in groupby(self, key=lambda one: one.family):
            group = tuple(members)
            lines += ["", f"{family}: input {group[0].input}"]
            lines += [f"  {'name':{width}}   AP   MB  sha256"]
            lines += [
                f"  {one.name:{width}} {one.ap:4.1f} {_size(one):>4}  {one.sha256_prefix or '-'}"
                for one in group
            ]
            lines += [f"  licence: {group[0].licence}"]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        lines: list[str] = []
        for family, members in groupby(self, key=lambda one: one.family):
            group = tuple(members)
            lines += [f"### {family}", "", f"Input: {group[0].input}."]
            lines += [f"Licence: {group[0].licence}.", ""]
            lines += ["| name | AP | MB | sha256 |", "|---|---|---|---|"]
            lines += [
                f"| [`{one.name}`]({one.url}) | {one.ap:.1f} | {_size(one)} |"
                f" {one.sha256_prefix or '-'} |"
                for one in group
            ]
            lines += [""]
        return "\n".join(lines)


def _size(one: PublishedWeights) -> str:
    return "?" if one.megabytes is None else str(one.megabytes)


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
    ]


def _mmdet() -> list[PublishedWeights]:
    base = "https://download.openmmlab.com/mmdetection/v2.0"
    return [
        PublishedWeights(
            name=f"mmdet/retinanet_{name}_coco",
            ap=ap,
            url=f"{base}/{'fp16' if 'fp16' in name else 'retinanet'}/retinanet_{name}_coco/"
            f"retinanet_{name}_coco_{date}-{sha256}.pth",
            file_name=f"retinanet_{name}_coco_{date}-{sha256}.pth",
            sha256_prefix=sha256,
            megabytes=megabytes,
            input="800/1333, rounded to the nearest",
            licence="Apache-2.0 for the code; none stated for the weights",
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


PUBLISHED = PublishedTable([*_torchvision(), *_detectron2(), *_mmdet(), *_odtk(), *_yhenon()])
"""All published files, by family."""


def list_published(family: str | None = None) -> PublishedTable:
    """Return the published RetinaNets that ``RetinaNet.from_pretrained`` loads by name.

    Args:
        family: "torchvision", "detectron2", "mmdet", "odtk" or "yhenon". None returns all.

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
