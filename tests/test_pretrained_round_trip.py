"""Saving and loading, for every backbone and option."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import BACKBONES

if TYPE_CHECKING:
    from pathlib import Path

HINTS = typing.get_type_hints(RetinaNetConfig)
HEAVY = {name for name in BACKBONES if "101" in name or "152" in name}


class Tiny(nn.Module):
    """A backbone of a few hundred parameters."""

    channels = (2, 3, 4)
    strides = (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.c3 = nn.Conv2d(3, 2, 8, stride=8)
        self.c4 = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.c5 = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        c3 = self.c3(images).relu()
        c4 = self.c4(c3).relu()
        return [c3, c4, self.c5(c4)]


TINY = RetinaNetConfig(
    num_classes=2,
    class_names=("cat", "owl"),
    backbone="custom",
    fpn_channels=4,
    head_depth=1,
    min_size=64,
    max_size=96,
    score_threshold=0.0,
    max_detections=20,
)

# Values of the fields that are neither bool nor a choice among a few.
OTHERS: dict[str, tuple[Any, ...]] = {
    "num_classes": (3,),
    "class_names": (None, ("Zebra", "chouette élégante")),
    "backbone": (),  # has a test of its own
    "backbone_norm_eps": (0.0, 1e-4),
    "trainable_stages": (0, 5),
    "fpn_channels": (8,),
    "head_depth": (0, 2),
    "prior": (0.1,),
    "anchor_sizes": ((10, 20.5, 40, 80, 160),),
    "octave_scales": ((1.0,), (1.0, 1.1)),
    "aspect_ratios": ((1.0,), (0.3, 1.0)),
    "anchor_offset": (0.0,),
    "box_weights": ((10.0, 10.0, 5.0, 5.0),),
    "positive_threshold": (0.6,),
    "negative_threshold": (0.3,),
    "force_match_floor": (None, 0.2),
    "focal_alpha": (None, 0.4),
    "focal_gamma": (0.0, 1.5),
    "smooth_l1_beta": (1.0,),
    "box_loss_weight": (2.0,),
    "score_threshold": (1 / 3,),
    "pre_nms_top_k": (10,),
    "nms_threshold": (0.7,),
    "max_detections": (3,),
    "min_size": (32,),
    "max_size": (128,),
    "image_mean": ((0.0, 0.1, 0.2),),
    "image_std": ((1.0, 1.0, 1.0),),
    "size_divisor": (64,),
}

# What other fields must be, for every value of a field to hold.
NEEDS: dict[str, dict[str, Any]] = {
    "head_norm": {"fpn_channels": 32},  # 32 groups
    "anchor_mode": {"anchor_offset": 0.0},
}


def choices(field: str) -> tuple[Any, ...]:
    """Return the values of a field to be tried."""
    if field in OTHERS:
        return OTHERS[field]
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
    for value in choices(field.name)
]


def assert_comes_back(model: RetinaNet, folder: Path, backbone: nn.Module | None = None) -> None:
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
def test_every_option_comes_back(change: dict[str, Any], tmp_path: Path) -> None:
    config = TINY if "num_classes" not in change else TINY.replace(class_names=None)
    config = config.replace(**NEEDS.get(next(iter(change)), {})).replace(**change)
    model = RetinaNet.from_config(config, backbone=Tiny())
    assert_comes_back(model, tmp_path, backbone=Tiny())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in BACKBONES]
)
@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_every_backbone_comes_back(name: str, tmp_path: Path) -> None:
    config = TINY.replace(backbone=name, backbone_norm="frozen", trainable_stages=2)
    assert_comes_back(RetinaNet.from_config(config), tmp_path)


def test_the_statistics_of_norms_and_of_the_normalizer_come_back(tmp_path: Path) -> None:
    config = TINY.replace(backbone="resnet18", backbone_norm="batch", normalizer="ema")
    model = RetinaNet.from_config(config).train()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.rand(1, 3, 64, 64), targets)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"backbone.bn1.running_mean", "backbone.bn1.num_batches_tracked"} < moved
    assert any(key.startswith("criterion.") for key in moved)
    assert_comes_back(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = RetinaNet.from_config(TINY, backbone=Tiny())
    expected = model.head.class_logits.weight.to(dtype).float()
    model.to(dtype).save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path, backbone=Tiny())
    assert torch.equal(loaded.head.class_logits.weight, expected)


def test_whoever_may_read_one_file_may_read_the_other(tmp_path: Path) -> None:
    RetinaNet.from_config(TINY, backbone=Tiny()).save_pretrained(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path) -> None:
    RetinaNet.from_config(TINY, backbone=Tiny()).save_pretrained(tmp_path / "mine")
    other = TINY.replace(head_depth=2)
    with pytest.raises(ValueError, match=r"mine': `tensors` must be .* missing \(head\.box_tower"):
        RetinaNet.from_pretrained(tmp_path / "mine", config=other, backbone=Tiny())


def test_a_file_of_a_family_with_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    keys = ["backbone.conv1.weight", "neck.lateral_convs.0.conv.weight", "odd"]
    keys += ["bbox_head.retina_cls.weight", "bbox_head.retina_reg.weight"]
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"mine\.pth': `source` must be made of .*'odd'"):
        RetinaNet.from_pretrained(tmp_path / "mine.pth")
