"""Models whose parts differ from RetinaNet's own: they train, save, load and predict."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from focaldet import AnchorGenerator, RetinaNet, RetinaNetConfig, RetinaNetHead
from focaldet.box_coder import BoxCoder
from focaldet.criterion import (
    CrossEntropyMapLoss,
    FocalMapLoss,
    QualityFocalMapLoss,
    RetinaNetCriterion,
    SoftmaxFocalMapLoss,
)
from focaldet.matching import ATSSAssigner, Matcher
from focaldet.pretrained import load_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(5))
TARGET: Any = {
    "boxes": torch.tensor([[8.0, 8, 40, 50], [50, 10, 90, 30]]),
    "labels": torch.tensor([1, 0]),
}


def train(model: RetinaNet, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        losses = model.train()([IMAGE], [TARGET]).losses
        optimizer.zero_grad()
        torch.autograd.backward(list(losses.values()))
        optimizer.step()
    model.eval()


def assert_same_losses(model: RetinaNet, other: RetinaNet) -> None:
    with torch.no_grad():
        expected = model([IMAGE], [TARGET]).losses
        assert_close(other([IMAGE], [TARGET]).losses, expected, rtol=0, atol=0)


def assert_same(model: RetinaNet, other: RetinaNet, *, losses: bool = True) -> None:
    if losses:
        assert_same_losses(model, other)
    [found], [again] = model.predict(IMAGE), other.predict(IMAGE)
    assert len(found) > 0
    assert_close(again.boxes, found.boxes, rtol=0, atol=0)
    assert_close(again.scores, found.scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "assigner", "loss"),
    [
        ({"assigner": "atss"}, ATSSAssigner(9), FocalMapLoss()),
        ({"assigner": "atss", "atss_top_k": 4}, ATSSAssigner(4), FocalMapLoss()),
        ({"classification_loss": "cross_entropy"}, Matcher(), CrossEntropyMapLoss()),
        (
            {"classification_loss": "softmax_focal", "focal_alpha": None, "focal_gamma": 1.0},
            Matcher(),
            SoftmaxFocalMapLoss(None, 1.0),
        ),
        (
            {"classification_loss": "quality_focal", "focal_gamma": 1.5},
            Matcher(),
            QualityFocalMapLoss(1.5),
        ),
        ({"focal_gamma": 0.5, "normalizer": "ema"}, Matcher(), FocalMapLoss(gamma=0.5)),
    ],
    ids=["atss", "atss with 4 cells", "cross entropy", "softmax", "quality", "ema"],
)
def test_parts_that_the_config_names_are_trained_saved_and_loaded(
    tiny_config: RetinaNetConfig,
    tmp_path: Path,
    options: dict[str, Any],
    assigner: object,
    loss: object,
) -> None:
    model = RetinaNet.from_config(tiny_config.replace(**options))
    assert isinstance(model.criterion, RetinaNetCriterion)
    assert repr(model.criterion.assigner) == repr(assigner)
    assert model.criterion.classification_loss == loss
    train(model)
    model.save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same(model, loaded)


class Doubled(nn.Module):
    """A criterion of one's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = RetinaNetCriterion(ATSSAssigner(), BoxCoder())
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, *head_outputs: Any) -> dict[str, torch.Tensor]:
        losses = self.inner(*head_outputs)
        return {"classification": self.scale * losses["classification"], "boxes": self.scale**2}


def test_a_custom_criterion_is_trained_saved_and_passed_again(
    tiny_config: RetinaNetConfig, tmp_path: Path
) -> None:
    model = RetinaNet.from_config(tiny_config, criterion=Doubled())
    assert model.config.criterion == "custom"
    assert set(model([IMAGE], [TARGET]).losses) == {"classification", "boxes"}
    train(model)
    with pytest.warns(UserWarning, match=r"custom criterion.*pass it again.*criterion="):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["criterion"] == "custom"
    loaded = RetinaNet.from_pretrained(tmp_path, criterion=Doubled())
    assert loaded.criterion.scale != 2  # trained, and loaded
    assert_same(model, loaded)


def test_without_its_criterion_a_model_predicts_but_has_no_losses(
    tiny_config: RetinaNetConfig, tmp_path: Path
) -> None:
    model = RetinaNet.from_config(tiny_config, criterion=Doubled()).eval()
    with pytest.warns(UserWarning, match="custom criterion"):
        model.save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path)
    assert_same(model, loaded, losses=False)
    assert loaded([IMAGE]).losses is None
    with pytest.raises(ValueError, match=r"custom criterion.*from_pretrained\(.*criterion="):
        loaded([IMAGE], [TARGET])
    assert copy.deepcopy(loaded).config.criterion == "custom"
    with pytest.warns(UserWarning, match="custom criterion"):
        loaded.save_pretrained(tmp_path)  # still says so
    with pytest.raises(ValueError, match="config.criterion is 'custom', so criterion= is required"):
        RetinaNet.from_config(loaded.config)


def test_a_custom_criterion_can_be_given_to_any_checkpoint(
    tiny_config: RetinaNetConfig, tmp_path: Path
) -> None:
    plain = RetinaNet.from_config(tiny_config.replace(normalizer="ema")).eval()
    plain.save_pretrained(tmp_path)  # with a buffer that the custom criterion does not have
    model = RetinaNet.from_pretrained(tmp_path, criterion=Doubled())
    assert model.config.criterion == "custom"
    assert model.criterion.scale == 2
    assert_same(plain, model, losses=False)


def test_settings_changed_after_construction_are_saved(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    assert tiny_model.current_config() == tiny_model.config
    tiny_model.postprocess.score_threshold = 0.3
    tiny_model.postprocess.class_agnostic_nms = True
    tiny_model.postprocess.suppression = "gaussian"
    tiny_model.postprocess.soft_nms_sigma = 0.3
    tiny_model.preprocess.min_size = 48
    tiny_model.criterion.box_loss_weight = 2.0  # type: ignore[assignment]
    tiny_model.criterion.assigner = Matcher(0.6)  # type: ignore[assignment]
    tiny_model.criterion.classification_loss = FocalMapLoss(None, 1.0)  # type: ignore[assignment]
    changed = tiny_model.current_config()
    assert changed == tiny_model.config.replace(
        score_threshold=0.3,
        class_agnostic_nms=True,
        suppression="gaussian",
        soft_nms_sigma=0.3,
        min_size=48,
        box_loss_weight=2.0,
        positive_threshold=0.6,
        focal_alpha=None,
        focal_gamma=1.0,
    )
    tiny_model.save_pretrained(tmp_path)
    assert RetinaNet.from_pretrained(tmp_path).current_config() == changed


def test_swapped_parts_that_the_config_has_names_for_are_saved(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    tiny_model.criterion.assigner = ATSSAssigner(5)  # type: ignore[assignment]
    tiny_model.criterion.classification_loss = CrossEntropyMapLoss()  # type: ignore[assignment]
    tiny_model.save_pretrained(tmp_path)
    assert_same_losses(tiny_model, RetinaNet.from_pretrained(tmp_path))


def test_the_beta_of_a_swapped_quality_focal_loss_is_saved_as_focal_gamma(
    tiny_model: RetinaNet,
) -> None:
    tiny_model.criterion.classification_loss = QualityFocalMapLoss(1.5)  # type: ignore[assignment]
    config = tiny_model.current_config()
    assert config == tiny_model.config.replace(classification_loss="quality_focal", focal_gamma=1.5)
    assert RetinaNetConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("swapped", ["assigner", "loss", "coder", "criterion"])
def test_a_swapped_criterion_that_the_config_cannot_describe_must_be_passed_again(
    tiny_model: RetinaNet, tmp_path: Path, swapped: str
) -> None:
    def everything_is_background(_: torch.Tensor, grid: Any) -> torch.Tensor:
        return torch.full((len(grid.anchors),), -1)

    criterion: Any = tiny_model.criterion
    if swapped == "assigner":
        criterion.assigner = everything_is_background
    elif swapped == "loss":
        criterion.classification_loss = lambda logits, *_, **__: logits[0].sum()
    elif swapped == "coder":
        criterion.box_coder = BoxCoder((1, 1, 2, 2))
    else:
        tiny_model.criterion = Doubled()
    with pytest.warns(UserWarning, match="custom criterion"):
        tiny_model.save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path, criterion=tiny_model.criterion)
    assert_same_losses(tiny_model, loaded)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("postprocess.box_coder", BoxCoder((1, 1, 2, 2)), r"box_coder\.weights is \(1, 1, 2, 2\)"),
        ("postprocess.first_stride", 4, "postprocess.first_stride is 4 instead of 8"),
        ("anchor_generator.offset", 0.25, "anchor_generator.offset is 0.25 instead of 0.5"),
        ("anchor_generator", AnchorGenerator((8, 16, 32, 64, 128)), r"anchor_generator\.sizes is \(8,"),
        ("fpn.p7_relu", False, "fpn.p7_relu is False instead of True"),
        ("fpn.p6", nn.Identity(), "fpn.p6 is of type Identity instead of Conv2d"),
        ("head", RetinaNetHead(32, num_classes=3, depth=2), "head.class_tower has an extra '1'"),
        ("head.quality", nn.Linear(2, 2), "head has an extra 'quality'"),
        ("preprocess.mean", (0.0, 0.0, 0.0), r"preprocess.mean is \(0\.0"),
        ("postprocess", nn.Identity(), "postprocess is of type Identity instead of PostProcess"),
    ],
)  # fmt: skip
def test_other_parts_that_the_config_cannot_describe_are_an_error(
    tiny_model: RetinaNet, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(tiny_model.get_submodule(owner), attribute, value)
    with pytest.raises(ValueError, match=message):
        tiny_model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_does_not_change_the_model_does_not_hinder_saving(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    tiny_model.head.note = "best so far"  # type: ignore[assignment]
    tiny_model.fpn.register_forward_hook(lambda *_: None)
    tiny_model.anchor_generator.sizes = list(tiny_model.anchor_generator.sizes)  # type: ignore[assignment]
    tiny_model.double().requires_grad_(requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert load_checkpoint(tmp_path).config == tiny_model.config


def test_an_invalid_setting_is_named_when_saving(tiny_model: RetinaNet, tmp_path: Path) -> None:
    tiny_model.postprocess.score_threshold = 30
    with pytest.raises(ValueError, match=r"score_threshold must be in \[0, 1\], got 30"):
        tiny_model.save_pretrained(tmp_path)


def test_errors_name_a_backbone_without_channels(tiny_config: RetinaNetConfig) -> None:
    with pytest.raises(TypeError, match=r"backbone.*'channels'.*Linear.channels is None"):
        RetinaNet.from_config(tiny_config.replace(backbone="custom"), backbone=nn.Linear(1, 1))
