"""How the files of each project are recognised, checked and turned into a config and tensors.

That the boxes are the projects' own is shown in ``tests/parity``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.pretrained import FAMILIES, CheckpointFile, check_fit
from focaldet.pretrained.families import _detectron2, _mmdet, _odtk, _yhenon
from focaldet.pretrained.families._conversion import (
    fold_bgr_input,
    fold_delta_scales,
    reorder_anchors,
)
from tests.helpers import reference_models as plain
from tests.parity import test_detectron2, test_mmdet, test_odtk, test_yhenon

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FAMILY: dict[str, Any] = {
    "detectron2": _detectron2,
    "mmdet": _mmdet,
    "odtk": _odtk,
    "yhenon": _yhenon,
}
NAMES: dict[str, plain.Names] = {
    "detectron2": test_detectron2.NAMES,
    "mmdet": test_mmdet.NAMES,
    "odtk": test_odtk.names("AnyFPN"),
    "yhenon": test_yhenon.NAMES,
}


def state(
    family: str, body: plain.Body, *, numbers: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """Return a state dict in a family's names; without numbers, of shapes alone."""
    shapes = plain.layout(NAMES[family], body, **sizes)
    if numbers:
        tensors: Any = plain.filled(shapes)
    else:
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {test_detectron2.published(key): value for key, value in tensors.items()}


def fits(config: RetinaNetConfig, tensors: dict[str, Tensor]) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frozen norms without weights
        check_fit(RetinaNet.from_config(config).state_dict(), tensors)


@pytest.mark.parametrize(
    ("family", "body", "file_name", "backbone", "stride_in_1x1"),
    [
        ("detectron2", plain.Body(50), "model_final_bfca0b.pkl", "resnet50", True),
        ("detectron2", plain.Body(101), "model_final_971ab9.pkl", "resnet101", True),
        ("mmdet", plain.Body(18), "retinanet_r18_fpn_1x_coco.pth", "resnet18", False),
        ("mmdet", plain.Body(50), "retinanet_r50_fpn_1x_coco.pth", "resnet50", False),
        ("mmdet", plain.Body(50), "retinanet_r50_caffe_fpn_1x_coco.pth", "resnet50", True),
        ("mmdet", plain.Body(101), "retinanet_r101_fpn_2x_coco.pth", "resnet101", False),
        ("mmdet", plain.Body(101), "retinanet_r101_caffe_fpn_1x_coco.pth", "resnet101", True),
        ("mmdet", plain.Body(101, 32, 4), "retinanet_x101_32x4d.pth", "resnext101_32x4d", False),
        ("mmdet", plain.Body(101, 64, 4), "retinanet_x101_64x4d.pth", "resnext101_64x4d", False),
        ("odtk", plain.Body(18), "retinanet_rn18fpn.zip", "resnet18", False),
        ("odtk", plain.Body(34), "retinanet_rn34fpn.zip", "resnet34", False),
        ("odtk", plain.Body(50), "retinanet_rn50fpn.zip", "resnet50", False),
        ("odtk", plain.Body(101), "retinanet_rn101fpn.zip", "resnet101", False),
        ("odtk", plain.Body(152), "retinanet_rn152fpn.zip", "resnet152", False),
        ("odtk", plain.Body(50, 32, 4), "x.pth", "resnext50_32x4d", False),
        ("yhenon", plain.Body(50), "coco_resnet_50_map_0_335_state_dict.pt", "resnet50", False),
        ("yhenon", plain.Body(152), "x.pt", "resnet152", False),
    ],
)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_every_published_architecture_is_recognised_and_fits(
    family: str, body: plain.Body, file_name: str, backbone: str, stride_in_1x1: bool, norm: Any
) -> None:
    tensors = state(family, body, channels=256)
    recognised = [one.NAME for one in FAMILIES if not one.missing(tensors)]
    assert recognised == [FAMILY[family].NAME]
    file = CheckpointFile(tensors, name=file_name)
    config = FAMILY[family].convert(file).config
    assert (config.backbone, config.stride_in_1x1) == (backbone, stride_in_1x1)
    assert (config.num_classes, config.class_names) == (80, COCO_CLASS_NAMES)
    config = config.replace(backbone_norm=norm)
    fits(config, FAMILY[family].convert(file, config).tensors)


@pytest.mark.parametrize("family", FAMILY)
def test_other_classes_channels_and_depths_are_read_from_the_tensors(family: str) -> None:
    tensors = state(family, plain.Body(50), classes=3, channels=64)
    checkpoint = FAMILY[family].convert(CheckpointFile(tensors))
    config = checkpoint.config
    assert (config.num_classes, config.class_names) == (3, None)
    assert (config.fpn_channels, config.head_depth) == (64, 4)
    fits(config, checkpoint.tensors)
    assert RetinaNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("family", FAMILY)
def test_a_key_that_a_family_does_not_know_is_named(family: str) -> None:
    tensors = state(family, plain.Body(50)) | {"mask_head.weight": torch.zeros(1)}
    message = f"made of the tensors of {FAMILY[family].NAME}'s RetinaNet; got 1 unknown .'mask_head"
    with pytest.raises(ValueError, match=message):
        FAMILY[family].convert(CheckpointFile(tensors))


@pytest.mark.parametrize("family", FAMILY)
def test_a_head_of_other_anchors_is_named(family: str) -> None:
    tensors = state(family, plain.Body(50))
    tensors[f"{NAMES[family].boxes}.weight"] = torch.zeros(12, 32, 3, 3)
    message = "with 9 anchors per cell; got 720 class channels and 12 box channels"
    with pytest.raises(ValueError, match=message):
        FAMILY[family].convert(CheckpointFile(tensors))


@pytest.mark.parametrize("family", FAMILY)
def test_a_backbone_of_another_depth_is_named(family: str) -> None:
    block = NAMES[family].conv.format(4, 2, 1).removesuffix("conv1").replace("res@4", "res5")
    whole = state(family, plain.Body(50))
    tensors = {key: value for key, value in whole.items() if not key.startswith(block)}
    assert len(tensors) < len(whole)
    with pytest.raises(ValueError, match=r"over a ResNet of .*got stages of \(3, 4, 6, 2\) blocks"):
        FAMILY[family].convert(CheckpointFile(tensors))


def test_a_file_of_no_family_says_what_each_one_misses(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="a RetinaNet of a known family") as caught:
        RetinaNet.from_pretrained(path)
    assert str(caught.value).partition("Tried: ")[2] == (
        "torchvision (no key 'backbone.body.conv1.weight'); "
        "Detectron2 (no key 'backbone.bottom_up.stem.conv1.weight'); "
        "MMDetection (no key 'backbone.conv1.weight'); "
        "ODTK (no key 'backbones.….lateral3.weight'); "
        "yhenon/pytorch-retinanet (no key 'fpn.P5_1.weight')."
    )


# --- Detectron2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pixel_std", [57.375, 57.12, 58.395], r"`pixel_std` must be \(1.0, 1.0, 1.0\) as in the"),
        ("pixel_mean", [0.0, 0, 0], r"`pixel_mean` must be \(103.53, 116.28, 123.675\).*got \[0.0"),
        ("pixel_mean", [0.0], "`pixel_mean` must be"),
    ],
)
def test_detectron2_models_for_other_pixels_are_named(key: str, value: Any, message: str) -> None:
    tensors = state("detectron2", plain.Body(50)) | {key: torch.tensor(value).view(-1, 1, 1)}
    with pytest.raises(ValueError, match=message):
        _detectron2.convert(CheckpointFile(tensors))


def test_detectron2_models_with_other_anchors_are_named_unless_a_config_is_handed_in() -> None:
    tensors = state("detectron2", plain.Body(50))
    cell = test_detectron2.Detectron2.anchors(2, 1, 1).float()
    key = "anchor_generator.cell_anchors.2"
    config = _detectron2.convert(CheckpointFile(tensors | {key: cell})).config
    message = f"`{key}` must be the model zoo's anchors of 128 pixels; got .* Hand in a config"
    for wrong in (cell + 4, cell[:3], cell.flip(0)):
        file = CheckpointFile(tensors | {key: wrong})
        with pytest.raises(ValueError, match=message):
            _detectron2.convert(file)
        assert _detectron2.convert(file, config).config is config


def test_detectron2_backbones_of_other_strides_are_named() -> None:
    tensors = state("detectron2", plain.Body(18))
    with pytest.raises(
        ValueError, match="over one of resnet50, resnet101, resnet152; got resnet18"
    ):
        _detectron2.convert(CheckpointFile(tensors))


@pytest.mark.parametrize("family", ["detectron2", "mmdet"])
def test_p6_of_p5_is_told_by_its_channels(family: str) -> None:
    tensors = state(family, plain.Body(50))
    assert FAMILY[family].convert(CheckpointFile(tensors)).config.p6_from == "c5"
    tensors[f"{NAMES[family].p6}.weight"] = torch.empty(32, 32, 3, 3, device="meta")
    checkpoint = FAMILY[family].convert(CheckpointFile(tensors))
    assert checkpoint.config.p6_from == "p5"
    fits(checkpoint.config, checkpoint.tensors)


# --- MMDetection ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meta", "caffe"),
    [
        ("retinanet_r50_caffe_fpn_1x_coco_20200531-f11027c5.pth", None, True),
        ("retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth", None, False),
        ("mine.pth", {"config": 'backbone=dict(depth=50, style = "caffe")'}, True),
        ("caffe.pth", {"config": "style='pytorch'"}, False),
        ("caffe.pth", {"config": "depth=50"}, True),
        ("caffe.pth", {"config": None}, True),
        ("caffe.pth", "meta", True),
    ],
)
def test_mmdet_styles_are_told_by_the_configuration_or_the_name(
    name: str, meta: Any, caffe: bool
) -> None:
    extras = {} if meta is None else {"meta": meta}
    file = CheckpointFile(state("mmdet", plain.Body(50)), extras, name)
    assert _mmdet.is_caffe_style(file) is caffe
    assert _mmdet.convert(file).config.stride_in_1x1 is caffe


def test_a_config_decides_the_style_of_an_mmdet_file() -> None:
    file = CheckpointFile(state("mmdet", plain.Body(50), numbers=True), name="mine.pth")
    key = "backbone.conv1.weight"
    pytorch = _mmdet.convert(file)
    assert torch.equal(pytorch.tensors[key], file.tensors[key])
    caffe = _mmdet.convert(file, pytorch.config.replace(stride_in_1x1=True))
    assert_close(caffe.tensors[key][:, 0], file.tensors[key][:, 2] * 255 * 0.229, rtol=1e-6, atol=0)


# --- ODTK ----------------------------------------------------------------------------------------


def test_odtk_files_with_ratios_and_scales_have_anchors_of_their_own() -> None:
    ratios, scales = [0.25, 4.0], [2.0, 3.0, 5.0]
    shapes = plain.layout(NAMES["odtk"], plain.Body(18), classes=2)
    for name, count in ((NAMES["odtk"].classes, 12), (NAMES["odtk"].boxes, 24)):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (count, 32, 3, 3), (count,)
    tensors = plain.filled(shapes)
    file = CheckpointFile(tensors, {"ratios": ratios, "scales": scales})
    config, converted, *_ = _odtk.convert(file)
    assert (config.aspect_ratios, config.octave_scales) == ((0.25, 4.0), (2.0, 3.0, 5.0))
    assert (config.anchor_mode, config.anchor_plus_one) == ("exact", True)
    theirs = tensors["box_head.8.bias"].view(3, 2, 4)  # scale, ratio
    assert torch.equal(converted["head.box_deltas.bias"].view(2, 3, 4), theirs.transpose(0, 1))
    fits(config, converted)


def test_odtk_files_without_ratios_have_the_rounded_anchors_of_their_time() -> None:
    config = _odtk.convert(CheckpointFile(state("odtk", plain.Body(18)))).config
    assert (config.anchor_mode, config.anchor_plus_one) == ("rounded", False)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"angles": [0]}, "an ODTK model of upright boxes; got one of rotated boxes"),
        ({"ratios": "1, 2"}, "`ratios` must be a list of numbers"),
        ({"scales": [None]}, "`scales` must be a list of numbers"),
        ({"ratios": [1.0]}, "with 3 anchors per cell"),
    ],
)
def test_odtk_files_of_other_kinds_are_named(extras: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _odtk.convert(CheckpointFile(state("odtk", plain.Body(18)), extras))


def test_an_odtk_file_of_two_backbones_is_named() -> None:
    tensors = state("odtk", plain.Body(18))
    tensors["backbones.OtherFPN.lateral3.weight"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match="of one backbone; got .'backbones.AnyFPN.', 'backbones.Ot"
    ):
        _odtk.convert(CheckpointFile(tensors))


# --- Folds ---------------------------------------------------------------------------------------


def test_a_network_for_blue_green_red_takes_red_green_blue() -> None:
    weight = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    image = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    renamed = {"backbone.conv1.weight": weight}
    fold_bgr_input(renamed, std.tolist())
    theirs = F.conv2d((255 * (image - mean)).flip(1), weight, padding=3)
    ours = F.conv2d(
        (image - mean) / std[:, None, None], renamed["backbone.conv1.weight"], padding=3
    )
    assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_factors_of_deltas_go_into_the_layer_that_gives_them() -> None:
    weight, bias = torch.randn(36, 5, 3, 3), torch.randn(36)
    renamed = {"head.box_deltas.weight": weight, "head.box_deltas.bias": bias}
    fold_delta_scales(renamed, (0.1, 0.1, 0.2, 0.2))
    x = torch.randn(1, 5, 6, 6)
    theirs = F.conv2d(x, weight, bias).view(9, 4, -1) * torch.tensor([0.1, 0.1, 0.2, 0.2])[:, None]
    ours = F.conv2d(x, renamed["head.box_deltas.weight"], renamed["head.box_deltas.bias"])
    assert_close(ours.view(9, 4, -1), theirs)


def test_anchors_change_places_with_their_classes_and_deltas() -> None:
    renamed = {
        f"head.{layer}.{kind}": torch.arange(count * per).view(-1, *[1] * (3 * (kind == "weight")))
        for layer, count, per in (("class_logits", 3, 2), ("box_deltas", 3, 4))
        for kind in ("weight", "bias")
    }
    reorder_anchors(renamed, (2, 0, 1))
    assert renamed["head.class_logits.bias"].tolist() == [4, 5, 0, 1, 2, 3]
    assert renamed["head.box_deltas.weight"].flatten().tolist()[:5] == [8, 9, 10, 11, 0]
