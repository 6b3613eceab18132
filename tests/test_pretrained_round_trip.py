"""Saving and loading gives the same model, for every backbone and every option."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import BACKBONES
from focaldet.errors import CheckpointError
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from pathlib import Path

HINTS = typing.get_type_hints(RetinaNetConfig)
HEAVY = {name for name in BACKBONES if "101" in name or "152" in name}


# Values to try for the fields that are neither a bool nor a choice.
OTHER_VALUES: dict[str, tuple[Any, ...]] = {
    "num_classes": (3,),
    "class_names": (None, ("Zebra", "chouette élégante")),
    "in_channels": (1, 4),
    "backbone": (),  # tested separately
    "backbone_norm_eps": (0.0, 1e-4),
    "trainable_stages": (0, 5),
    "levels": (),  # tested in test_retinanet.py, as is fpn_channels=None
    "fpn_channels": (8,),
    "head_depth": (0, 2),
    "prior": (0.1,),
    "anchor_sizes": ((10, 20.5, 40, 80, 160),),
    "octave_scales": ((1.0,), (1.0, 1.1)),
    "aspect_ratios": ((1.0,), (0.3, 1.0)),
    "anchor_offset": (0.0,),
    "box_weights": ((10.0, 10.0, 5.0, 5.0),),
    "criterion": (),  # tested in test_assembly.py
    "atss_top_k": (4,),
    "positive_threshold": (0.6,),
    "negative_threshold": (0.3,),
    "force_match_floor": (None, 0.2),
    "focal_alpha": (None, 0.4),
    "focal_gamma": (0.0, 1.5),
    "smooth_l1_beta": (1.0,),
    "box_loss_weight": (2.0,),
    "score_threshold": (1 / 3,),
    "last_level_threshold": (None, 0.0),
    "pre_nms_top_k": (10,),
    "pre_nms_top_k_per_class": (None, 10),
    "nms_threshold": (0.7,),
    "soft_nms_sigma": (0.3,),
    "max_detections": (3,),
    "min_size": (32,),
    "max_size": (128,),
    "image_mean": ((0.0, 0.1, 0.2),),
    "image_std": ((1.0, 1.0, 1.0),),
    "size_divisor": (64,),
}

# Changes to other fields without which some values of a field are invalid.
REQUIRED_CHANGES: dict[str, dict[str, Any]] = {
    "head_norm": {"fpn_channels": 32},  # 32 groups
    "head_box_norm": {"fpn_channels": 32},
    "anchor_mode": {"anchor_offset": 0.0},
    "resize_by": {"antialias": False},
}


def values_to_try(field: str) -> tuple[Any, ...]:
    """Return the values of a field to try."""
    if field in OTHER_VALUES:
        return OTHER_VALUES[field]
    kinds = typing.get_args(HINTS[field]) or (HINTS[field],)
    values: list[Any] = []
    for kind in kinds:
        if kind is bool:
            values += [True, False]
        elif kind is type(None):
            values.append(None)
        else:
            values += typing.get_args(kind) or [kind]
    return tuple(values)


CASES = [
    pytest.param({field.name: value}, id=f"{field.name}={value}")
    for field in dataclasses.fields(RetinaNetConfig)
    for value in values_to_try(field.name)
]


def assert_round_trip(model: RetinaNet, folder: Path, backbone: nn.Module | None = None) -> None:
    """Require that a saved model loads with the same config, weights and frozen parameters."""
    model.save_pretrained(folder)
    loaded = RetinaNet.from_pretrained(folder, backbone=backbone)
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in loaded.parameters()
    ]


@pytest.mark.parametrize("change", CASES)
def test_every_option_survives_a_round_trip(change: dict[str, Any], tmp_path: Path) -> None:
    config = TINY_CONFIG if "num_classes" not in change else TINY_CONFIG.replace(class_names=None)
    required = REQUIRED_CHANGES.get(next(iter(change)), {})
    if change.get("anchor_mode") == "inclusive_rounded":
        required = {"anchor_offset": 0.5}
    if "in_channels" in change:
        required = dict.fromkeys(("image_mean", "image_std"), (0.5,) * change["in_channels"])
    config = config.replace(**required | change)
    model = RetinaNet.from_config(config, backbone=TinyBackbone())
    assert_round_trip(model, tmp_path, backbone=TinyBackbone())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in BACKBONES]
)
@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_every_backbone_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = TINY_CONFIG.replace(backbone=name, backbone_norm="frozen", trainable_stages=2)
    assert_round_trip(RetinaNet.from_config(config), tmp_path)


def test_the_statistics_of_norms_and_of_the_normalizer_survive_a_round_trip(tmp_path: Path) -> None:
    config = TINY_CONFIG.replace(backbone="resnet18", backbone_norm="batch", normalizer="ema")
    model = RetinaNet.from_config(config).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.rand(1, 3, 64, 64), targets)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"backbone.bn1.running_mean", "backbone.bn1.num_batches_tracked"} < moved
    assert any(key.startswith("criterion.") for key in moved)
    assert_round_trip(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())
    expected = model.head.class_logits.weight.to(dtype).float()
    model.to(dtype).save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path, backbone=TinyBackbone())
    assert torch.equal(loaded.head.class_logits.weight, expected)


def test_both_files_have_the_same_permissions(tmp_path: Path) -> None:
    RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).save_pretrained(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_the_error_for_a_different_architecture_names_the_checkpoint(tmp_path: Path) -> None:
    RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).save_pretrained(tmp_path / "mine")
    other = TINY_CONFIG.replace(head_depth=2)
    with pytest.raises(CheckpointError, match=r"mine'.*missing \(head\.box_tower.*head_depth"):
        RetinaNet.from_pretrained(tmp_path / "mine", config=other, backbone=TinyBackbone())


def test_the_error_for_an_unknown_tensor_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    keys = ["backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "odd"]
    keys += ["bbox_head.retina_cls.weight", "bbox_head.retina_reg.weight"]
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r"mine\.pth'.*unknown .*MMDetection.*'odd'"):
        RetinaNet.from_pretrained(tmp_path / "mine.pth")
