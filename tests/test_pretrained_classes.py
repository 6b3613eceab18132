"""Loading a checkpoint for other classes: what is kept and what starts from scratch."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import Checkpoint, for_other_classes, load_into

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet import RetinaNetConfig

CLASS_OUTPUT = {"head.class_logits.weight", "head.class_logits.bias"}
BOX_OUTPUT = {"head.box_deltas.weight", "head.box_deltas.bias"}


@pytest.fixture
def tiny_config(tiny_config: RetinaNetConfig) -> RetinaNetConfig:
    return tiny_config.replace(backbone="mobilenet_v2")


@pytest.fixture
def folder(tiny_model: RetinaNet, tmp_path: Path) -> Path:
    with torch.no_grad():  # so that new layers are recognised by their values
        for key, value in tiny_model.named_parameters():
            if key in CLASS_OUTPUT | BOX_OUTPUT:
                value.fill_(7)
    tiny_model.save_pretrained(tmp_path)
    return tmp_path


def changed(model: RetinaNet, other: RetinaNet) -> set[str]:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return {key for key in ours if not torch.equal(ours[key], theirs[key])}


def test_other_classes_reinitialise_the_class_output_with_its_prior(
    folder: Path, tiny_model: RetinaNet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "focaldet"):
        model = RetinaNet.from_pretrained(folder, num_classes=2, class_names=["ant", "bee"])
    assert model.config == tiny_model.config.replace(num_classes=2, class_names=("ant", "bee"))
    assert changed(model, tiny_model) == CLASS_OUTPUT
    assert model.head.class_logits.weight.shape[0] == 2 * 9
    bias = model.head.class_logits.bias
    assert bias is not None
    torch.testing.assert_close(bias, torch.full((18,), -math.log(99)))
    assert 0.005 < model.head.class_logits.weight.std() < 0.02
    count = len(tiny_model.state_dict()) - 2
    [message] = caplog.messages
    assert message == (
        f"Loaded the checkpoint: {count} tensors kept; dropped: head.class_logits; "
        "new (to be trained): head.class_logits"
    )
    assert not model.training


def test_the_number_of_names_is_the_number_of_classes(folder: Path) -> None:
    model = RetinaNet.from_pretrained(folder, class_names=["ant", "bee"])
    assert model.config.num_classes == 2
    assert model.config.class_names == ("ant", "bee")
    assert RetinaNet.from_pretrained(folder, num_classes=2).config.class_names is None


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 3}, {"class_names": ["cat", "dog", "owl"]}],
    ids=["as many", "the same names"],
)
def test_the_checkpoints_own_classes_change_nothing(
    folder: Path, tiny_model: RetinaNet, caplog: pytest.LogCaptureFixture, options: Any
) -> None:
    model = RetinaNet.from_pretrained(folder, **options)
    assert model.config == tiny_model.config
    assert not changed(model, tiny_model)
    assert not caplog.messages


@pytest.mark.parametrize("names", [["dog", "cat", "owl"], ["cat", "dog", "cow"]])
def test_names_in_a_different_order_or_partly_different_are_other_classes(
    folder: Path, tiny_model: RetinaNet, names: list[str]
) -> None:
    model = RetinaNet.from_pretrained(folder, class_names=names)
    assert changed(model, tiny_model) == CLASS_OUTPUT


def test_a_checkpoint_without_names_can_be_given_them(
    tiny_config: RetinaNetConfig, tmp_path: Path
) -> None:
    nameless = RetinaNet.from_config(tiny_config.replace(class_names=None))
    nameless.save_pretrained(tmp_path)
    model = RetinaNet.from_pretrained(tmp_path, class_names=["ant", "bee", "fly"])
    assert model.config.class_names == ("ant", "bee", "fly")
    assert not changed(model, nameless)


@pytest.mark.parametrize(
    "change",
    [
        {"octave_scales": (1.0, 1.5)},
        {"aspect_ratios": (1.0, 2.0, 4.0)},
        {"anchor_sizes": (8, 16, 32, 64, 128)},
        {"anchor_offset": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_anchors_also_reinitialise_the_box_output(
    folder: Path, tiny_model: RetinaNet, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_model.config.replace(**change)
    model = RetinaNet.from_pretrained(folder, config=config, num_classes=3)
    assert model.config == config
    assert changed(model, tiny_model) == CLASS_OUTPUT | BOX_OUTPUT
    assert "new (to be trained): head.class_logits, head.box_deltas" in caplog.text


def test_other_box_weights_reinitialise_the_box_output(folder: Path, tiny_model: RetinaNet) -> None:
    config = tiny_model.config.replace(box_weights=(10.0, 10.0, 5.0, 5.0))
    model = RetinaNet.from_pretrained(folder, config=config, num_classes=3)
    assert changed(model, tiny_model) == BOX_OUTPUT


def test_a_config_alone_describes_the_checkpoint_and_reinitialises_nothing(
    folder: Path, tiny_model: RetinaNet
) -> None:
    config = tiny_model.config.replace(anchor_sizes=(8, 16, 32, 64, 128))
    assert not changed(RetinaNet.from_pretrained(folder, config=config), tiny_model)
    with pytest.raises(CheckpointError, match="Likely cause: .* num_classes.* pass num_classes="):
        RetinaNet.from_pretrained(folder, config=config.replace(num_classes=2, class_names=None))


def test_every_other_mismatch_is_an_error(folder: Path, tiny_model: RetinaNet) -> None:
    for change, cause in (
        ({"backbone": "resnet18"}, "backbone"),
        ({"head_depth": 2}, "head_norm or head_depth"),
        ({"p6_from": "p5"}, "p6_from"),
    ):
        config = tiny_model.config.replace(num_classes=2, class_names=None, **change)
        with pytest.raises(CheckpointError, match=f"Likely cause: .* a different {cause}"):
            RetinaNet.from_pretrained(folder, config=config, num_classes=2)


def test_contradicting_arguments_are_errors(folder: Path, tiny_model: RetinaNet) -> None:
    config = tiny_model.config
    with pytest.raises(ValueError, match=r"class_names(?=.*\b2\b).*num_classes(?=.*\b3\b)"):
        RetinaNet.from_pretrained(folder, num_classes=3, class_names=["ant", "bee"])
    with pytest.raises(ValueError, match=r"num_classes is 2, but config\.num_classes is 3"):
        RetinaNet.from_pretrained(folder, config=config, num_classes=2)
    with pytest.raises(ValueError, match=r"class_names has 1 entry, but config\.num_classes is 3"):
        RetinaNet.from_pretrained(folder, config=config, class_names=["ant"])
    with pytest.raises(ValueError, match=r"class_names is .*'cow'.*, but config\.class_names is"):
        RetinaNet.from_pretrained(folder, config=config, class_names=["a", "b", "cow"])
    with pytest.raises(TypeError, match="class_names must be a sequence .* 'cat'"):
        RetinaNet.from_pretrained(folder, class_names="cat")
    with pytest.raises(ValueError, match=r"num_classes.*\b1\b.*\b0\b"):
        RetinaNet.from_pretrained(folder, num_classes=0)
    with pytest.raises(TypeError, match="num_classes.* an integer.* '3'"):
        RetinaNet.from_pretrained(folder, num_classes="3")  # type: ignore[arg-type]


def test_load_into_returns_its_report(tiny_model: RetinaNet) -> None:
    checkpoint = Checkpoint(tiny_model.config, tiny_model.state_dict())
    fresh = for_other_classes(checkpoint, class_names=("ant", "bee"))
    assert fresh.renewed == ("head.class_logits",)
    report = load_into(RetinaNet.from_config(fresh.config), fresh)
    assert set(report.new) == set(report.dropped) == CLASS_OUTPUT
    assert set(report.kept) == tiny_model.state_dict().keys() - CLASS_OUTPUT


def test_a_torchvision_file_becomes_a_detector_of_other_classes(tmp_path: Path) -> None:
    from torchvision.models import detection

    theirs = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = RetinaNet.from_pretrained(tmp_path / "theirs.pth", class_names=["ant", "bee"])
    assert model.config.num_classes == 2
    assert torch.equal(model.head.box_deltas.weight, theirs.head.regression_head.bbox_reg.weight)
