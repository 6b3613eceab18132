"""Recognising, checking and converting the files of each project.

``tests/parity`` checks that the detections are the same as those of the projects.
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
from focaldet.errors import CheckpointError
from focaldet.pretrained import FAMILIES, CheckpointFile, check_fit
from focaldet.pretrained._loading import convert
from focaldet.pretrained.families import _detectron2, _mmdet, _odtk, _yhenon
from focaldet.pretrained.families._conversion import (
    fold_bgr_input,
    fold_delta_scales,
    reorder_anchors,
)
from tests.helpers import (
    reference_detectron2,
    reference_mmdet,
    reference_odtk,
    reference_yhenon,
)
from tests.helpers import reference_models as plain

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
    "detectron2": reference_detectron2.NAMES,
    "mmdet": reference_mmdet.NAMES,
    "odtk": reference_odtk.names_of("AnyFPN"),
    "yhenon": reference_yhenon.NAMES,
}


def state(
    family: str, body: plain.Body, *, numbers: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """Return a state dict with a family's key names, on the meta device unless numbers are needed."""
    shapes = plain.layout(NAMES[family], body, **sizes)
    if numbers:
        return plain.filled(shapes)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def assert_fits(config: RetinaNetConfig, tensors: dict[str, Tensor]) -> None:
    """Require that the tensors fit the model of the config."""
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
    config = convert(file, FAMILY[family]).config
    assert (config.backbone, config.stride_in_1x1) == (backbone, stride_in_1x1)
    assert (config.num_classes, config.class_names) == (80, COCO_CLASS_NAMES)
    config = config.replace(backbone_norm=norm)
    assert_fits(config, convert(file, FAMILY[family], config).tensors)


@pytest.mark.parametrize("family", FAMILY)
def test_numbers_of_classes_and_channels_are_read_from_the_tensors(family: str) -> None:
    tensors = state(family, plain.Body(50), classes=3, channels=64)
    checkpoint = convert(CheckpointFile(tensors), FAMILY[family])
    config = checkpoint.config
    assert (config.num_classes, config.class_names) == (3, None)
    assert (config.fpn_channels, config.head_depth) == (64, 4)
    assert_fits(config, checkpoint.tensors)
    assert RetinaNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("family", FAMILY)
def test_the_error_for_unknown_keys_names_them(family: str) -> None:
    tensors = state(family, plain.Body(50)) | {"mask_head.weight": torch.zeros(1)}
    message = f"1 unknown tensor .*{FAMILY[family].NAME}.*'mask_head.weight'"
    with pytest.raises(CheckpointError, match=message):
        convert(CheckpointFile(tensors), FAMILY[family])
    tensors |= {f"mask_head.{i}": torch.zeros(1) for i in range(3)}
    message = r"4 unknown tensors .*'mask_head\.0', 'mask_head\.1', 'mask_head\.2', …"
    with pytest.raises(CheckpointError, match=message):
        convert(CheckpointFile(tensors), FAMILY[family])


@pytest.mark.parametrize("family", ["mmdet", "odtk", "yhenon"])
def test_the_error_for_other_anchors_gives_the_channels(family: str) -> None:
    tensors = state(family, plain.Body(50))
    tensors[f"{NAMES[family].boxes}.weight"] = torch.zeros(12, 32, 3, 3)
    message = f"{FAMILY[family].NAME}.* 9 anchors per cell.* 720 class channels and 12 box channels"
    with pytest.raises(CheckpointError, match=message):
        convert(CheckpointFile(tensors), FAMILY[family])


@pytest.mark.parametrize("family", ["mmdet", "yhenon"])
def test_other_anchors_are_supported_with_a_config(family: str) -> None:
    tensors = state(family, plain.Body(50), numbers=True)
    for layer, channels in ((NAMES[family].classes, 3 * 80), (NAMES[family].boxes, 3 * 4)):
        tensors[f"{layer}.weight"] = torch.zeros(channels, 32, 3, 3)
        tensors[f"{layer}.bias"] = torch.zeros(channels)
    with pytest.raises(CheckpointError, match="pass config= with their octave_scales"):
        convert(CheckpointFile(tensors), FAMILY[family])
    config = RetinaNetConfig(num_classes=80, fpn_channels=32, octave_scales=(1.0,))
    assert_fits(config, convert(CheckpointFile(tensors), FAMILY[family], config).tensors)


@pytest.mark.parametrize("family", FAMILY)
def test_the_error_for_an_unknown_backbone_gives_its_blocks(family: str) -> None:
    last_stage = NAMES[family].first_stage + 3
    block = NAMES[family].conv.format(last_stage, 2, 1).removesuffix("conv1")
    whole = state(family, plain.Body(50))
    tensors = {key: value for key, value in whole.items() if not key.startswith(block)}
    assert len(tensors) < len(whole)
    with pytest.raises(CheckpointError, match="not a known ResNet.* 3, 4, 6, 2 blocks"):
        convert(CheckpointFile(tensors), FAMILY[family])


def test_the_error_for_an_unsupported_file_names_the_nearest_family(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({key: torch.zeros(1) for key in ("conv1.weight", "bn1.bias", "fc.weight")}, path)
    with pytest.raises(CheckpointError, match="3 tensors: 'bn1.bias', 'conv1.weight'") as caught:
        RetinaNet.from_pretrained(path)
    assert str(caught.value).partition("format. ")[2] == (
        "The most similar format is yhenon/pytorch-retinanet, but 3 keys ('fpn.P5_1.weight', "
        "'classificationModel.output.weight', 'regressionModel.output.weight') are missing. Also tried: "
        "focaldet, torchvision, Detectron2, MMDetection, ODTK, Detectron, keras-retinanet, "
        "PaddleDetection."
    )


# --- Pyramid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["detectron2", "mmdet"])
def test_the_source_of_p6_is_recognised_by_its_channels(family: str) -> None:
    tensors = state(family, plain.Body(50))
    assert convert(CheckpointFile(tensors), FAMILY[family]).config.p6_from == "c5"
    tensors[f"{NAMES[family].p6}.weight"] = torch.empty(32, 32, 3, 3, device="meta")
    checkpoint = convert(CheckpointFile(tensors), FAMILY[family])
    assert checkpoint.config.p6_from == "p5"
    assert_fits(checkpoint.config, checkpoint.tensors)


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
def test_mmdet_styles_are_recognised_by_the_configuration_or_the_file_name(
    name: str, meta: Any, caffe: bool
) -> None:
    extras = {} if meta is None else {"meta": meta}
    file = CheckpointFile(state("mmdet", plain.Body(50)), extras, name)
    assert _mmdet.is_caffe_style(file) is caffe
    assert convert(file, _mmdet).config.stride_in_1x1 is caffe


def test_a_config_decides_the_style_of_an_mmdet_file() -> None:
    file = CheckpointFile(state("mmdet", plain.Body(50), numbers=True), name="mine.pth")
    key = "backbone.conv1.weight"
    pytorch = convert(file, _mmdet)
    assert torch.equal(pytorch.tensors[key], file.tensors[key])
    caffe = convert(file, _mmdet, pytorch.config.replace(stride_in_1x1=True))
    assert_close(caffe.tensors[key][:, 0], file.tensors[key][:, 2] * 255 * 0.229, rtol=1e-6, atol=0)


# --- ODTK ----------------------------------------------------------------------------------------


def test_odtk_files_with_ratios_and_scales_define_their_anchors() -> None:
    ratios, scales = [0.25, 4.0], [2.0, 3.0, 5.0]
    shapes = plain.layout(NAMES["odtk"], plain.Body(18), classes=2)
    for name, count in ((NAMES["odtk"].classes, 12), (NAMES["odtk"].boxes, 24)):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (count, 32, 3, 3), (count,)
    tensors = plain.filled(shapes)
    file = CheckpointFile(tensors, {"ratios": ratios, "scales": scales})
    config, converted, *_ = convert(file, _odtk)
    assert (config.aspect_ratios, config.octave_scales) == ((0.25, 4.0), (2.0, 3.0, 5.0))
    assert (config.anchor_mode, config.anchor_plus_one) == ("exact", True)
    theirs = tensors["box_head.8.bias"].view(3, 2, 4)  # scale, ratio
    assert torch.equal(converted["head.box_deltas.bias"].view(2, 3, 4), theirs.transpose(0, 1))
    assert_fits(config, converted)


def test_odtk_files_without_ratios_have_the_rounded_anchors_of_older_versions() -> None:
    config = convert(CheckpointFile(state("odtk", plain.Body(18))), _odtk).config
    assert (config.anchor_mode, config.anchor_plus_one) == ("rounded", False)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"angles": [0]}, "ODTK.* rotated boxes"),
        ({"ratios": "1, 2"}, "'ratios'.* a list of numbers.* '1, 2'"),
        ({"scales": [None]}, r"'scales'.* a list of numbers.* \[None\]"),
        ({"ratios": [1.0]}, "3 anchors per cell"),
    ],
)
def test_the_error_for_an_unsupported_odtk_file_gives_the_reason(extras: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(CheckpointFile(state("odtk", plain.Body(18)), extras), _odtk)


def test_the_error_for_an_odtk_file_with_two_backbones_names_them() -> None:
    tensors = state("odtk", plain.Body(18))
    tensors["backbones.OtherFPN.lateral3.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"2 backbones \(AnyFPN, OtherFPN\)"):
        convert(CheckpointFile(tensors), _odtk)


# --- Folds ---------------------------------------------------------------------------------------


def test_fold_bgr_input_makes_a_bgr_network_take_rgb() -> None:
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


def test_fold_delta_scales_scales_the_output_of_the_box_layer() -> None:
    weight, bias = torch.randn(36, 5, 3, 3), torch.randn(36)
    renamed = {"head.box_deltas.weight": weight, "head.box_deltas.bias": bias}
    fold_delta_scales(renamed, (0.1, 0.1, 0.2, 0.2))
    x = torch.randn(1, 5, 6, 6)
    theirs = F.conv2d(x, weight, bias).view(9, 4, -1) * torch.tensor([0.1, 0.1, 0.2, 0.2])[:, None]
    ours = F.conv2d(x, renamed["head.box_deltas.weight"], renamed["head.box_deltas.bias"])
    assert_close(ours.view(9, 4, -1), theirs)


def test_reorder_anchors_moves_classes_and_deltas_together() -> None:
    renamed = {
        f"head.{layer}.{kind}": torch.arange(count * per).view(-1, *[1] * (3 * (kind == "weight")))
        for layer, count, per in (("class_logits", 3, 2), ("box_deltas", 3, 4))
        for kind in ("weight", "bias")
    }
    reorder_anchors(renamed, (2, 0, 1))
    assert renamed["head.class_logits.bias"].tolist() == [4, 5, 0, 1, 2, 3]
    assert renamed["head.box_deltas.weight"].flatten().tolist()[:5] == [8, 9, 10, 11, 0]
