"""Choices of a run: class weights, repeated images, frozen parts, patience, callbacks and loggers."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from focaldet.criterion import (
    CrossEntropyMapLoss,
    FocalMapLoss,
    QualityFocalMapLoss,
    SoftmaxFocalMapLoss,
)
from focaldet.datasets import DetectionDataset
from focaldet.losses._layout import dense, memory_of
from focaldet.training import (
    BestModel,
    CocoAP,
    DetectionDataModule,
    RetinaNetModule,
    TrainingOptions,
    train,
)
from focaldet.training._class_weights import WeightedClassLoss
from focaldet.training._early_stopping import StopEarly
from focaldet.training._progress import EpochBar, ProgressLog
from focaldet.training._repeat_factor import RepeatFactorBatchSampler, repeat_factors
from tests.helpers.tiny_training import (
    darken,
    read_data,
    smallest_detector,
    tiny_detector,
    tiny_options,
    write_data,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.structures import Target
    from focaldet.training import TrainingSummary


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", 8)
    write_data(folder / "val", 3, seed=1)
    return folder


def run(data: Path, folder: Path, *, resume: bool = False, callbacks: Any = (), loggers: Any = (),
        validate: bool = True, **changes: Any) -> TrainingSummary:  # fmt: skip
    return train(
        smallest_detector(),
        read_data(data / "train" / "annotations.json"),
        read_data(data / "val" / "annotations.json") if validate else None,
        folder=folder,
        options=tiny_options(batch_size=8, **changes),
        resume=resume,
        callbacks=callbacks,
        loggers=loggers,
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience.*1.*0"),
        ({"class_weights": [1.0]}, TypeError, r"class_weights must map class names.*\[1\.0\]"),
        ({"class_weights": {"owl": -1}}, ValueError, r"class_weights\['owl'\].*\[0, .*-1"),
        ({"class_weights": {"owl": "2"}}, TypeError, r"class_weights\['owl'\] must be a number"),
        ({"sampler": "balanced"}, ValueError, "sampler 'balanced'.*'repeat_factor'"),
        ({"channels_last": None}, ValueError, "channels_last None.*True.*False"),
        ({"repeat_threshold": 0}, ValueError, r"repeat_threshold.*\(0, 1\].*0"),
        ({"freeze": -1}, ValueError, "freeze.*-1"),
        ({"freeze": [3]}, TypeError, r"freeze\[0\] must be a string, got 3"),
    ],
)
def test_invalid_options_raise(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainingOptions(**changes)


def test_options_are_equal_after_a_round_trip_through_json() -> None:
    options = TrainingOptions(freeze=["backbone", "fpn"], class_weights={"owl": 2}, patience=3)
    assert TrainingOptions(**json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert TrainingOptions(freeze="fpn").freeze == ("fpn",)


# Class weights.

LOSSES = [
    FocalMapLoss(0.25, 2.0),
    FocalMapLoss(None, 1.5),
    CrossEntropyMapLoss(),
    SoftmaxFocalMapLoss(0.25, 2.0),
    SoftmaxFocalMapLoss(None, 2.0),
]


def maps_and_targets() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return maps of 2 images, 2 levels, 2 anchors and 3 classes, with a few positive anchors."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, 2 * 3, size, size, generator=generator, dtype=torch.float64)
        for size in (3, 2)
    ]
    targets = torch.full((2, 2 * (9 + 4)), -1)
    targets[0, [0, 5, 20]] = torch.tensor([0, 1, 1])
    targets[1, [3, 25]] = torch.tensor([2, 0])
    targets[1, 4] = -100
    return maps, targets, torch.tensor([3.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_weight_multiplies_the_loss_of_the_positive_anchors_of_a_class(loss: Any) -> None:
    maps, targets, divisor = maps_and_targets()
    for level in maps:
        level.requires_grad_()

    def measure(weights: list[float]) -> tuple[Tensor, tuple[Tensor, ...]]:
        weighted = WeightedClassLoss(loss, torch.tensor(weights))
        value = weighted(maps, targets, num_classes=3, divisor=divisor)
        return value, torch.autograd.grad(value, maps)

    plain = loss(maps, targets, num_classes=3, divisor=divisor)
    assert_close(measure([1, 1, 1])[0], plain, rtol=1e-6, atol=1e-6)
    # The probability of each positive anchor for its class, by hand.
    logits = torch.cat(
        [m.view(2, 2, 3, -1).permute(0, 3, 1, 2).reshape(2, -1, 3) for m in maps], dim=1
    )
    alpha = getattr(loss, "alpha", None) or 1.0
    gamma = getattr(loss, "gamma", 0.0)
    for label in range(3):
        images, anchors = (targets == label).nonzero(as_tuple=True)
        rows = logits[images, anchors]
        if isinstance(loss, SoftmaxFocalMapLoss):
            p = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1).softmax(1)[:, label]
        else:
            p = rows[:, label].sigmoid()
        own = (alpha * (1 - p) ** gamma * -p.log() / divisor[images]).sum()
        weights = [1.0, 1.0, 1.0]
        weights[label] = 3.0
        value, gradients = measure(weights)
        assert_close(value, plain + 2 * own, rtol=1e-6, atol=1e-6)
        expected = torch.autograd.grad(plain + 2 * own, maps, retain_graph=True)
        for found, wanted in zip(gradients, expected, strict=True):
            assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_multiplies_the_quality_focal_loss_of_the_positive_anchors_of_a_class() -> None:
    maps, targets, divisor = maps_and_targets()
    ious = torch.rand(
        targets.shape, generator=torch.Generator().manual_seed(0), dtype=maps[0].dtype
    )
    for level in maps:
        level.requires_grad_()
    options: dict[str, Any] = {"num_classes": 3, "divisor": divisor, "ious": ious}
    plain = QualityFocalMapLoss(1.5)
    weighted = WeightedClassLoss(plain, torch.tensor([1.0, 3.0, 1.0]))
    assert weighted.needs_ious
    logits = torch.cat(
        [m.view(2, 2, 3, -1).permute(0, 3, 1, 2).reshape(2, -1, 3) for m in maps], dim=1
    )
    images, anchors = (targets == 1).nonzero(as_tuple=True)
    p, y = logits[images, anchors, 1].sigmoid(), ious[images, anchors]
    own = -((y - p).abs() ** 1.5) * ((1 - y) * (1 - p).log() + y * p.log())
    expected = plain(maps, targets, **options) + 2 * (own / divisor[images]).sum()
    found = weighted(maps, targets, **options)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(found, maps)
    assert_close(gradients, torch.autograd.grad(expected, maps), rtol=1e-5, atol=1e-6)


def test_a_weight_of_a_class_without_positive_anchors_changes_nothing() -> None:
    maps, targets, divisor = maps_and_targets()
    none = torch.full_like(targets, -1)
    weighted = WeightedClassLoss(FocalMapLoss(), torch.tensor([5.0, 5.0, 5.0]))
    assert_close(
        weighted(maps, none, num_classes=3, divisor=divisor),
        FocalMapLoss()(maps, none, num_classes=3, divisor=divisor),
    )


@pytest.mark.parametrize("own_loss", [FocalMapLoss(), QualityFocalMapLoss()], ids=repr)
def test_class_weights_are_used_in_steps_and_leave_no_trace_in_the_model(own_loss: Any) -> None:
    model = smallest_detector()
    model.criterion.classification_loss = own_loss
    config = model.current_config()
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]
    target: Target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
    }
    loss = model.criterion.classification_loss
    values = []
    for weights in (None, {"square": 9.0}, {"circle": 9.0}):
        module = RetinaNetModule(model.train(), TrainingOptions(class_weights=weights))
        for name in ("log", "log_dict", "_lr"):  # which need a trainer
            setattr(module, name, lambda *_, **__: 0.0)
        values.append(module.training_step((images, [target]), 0).item())
        assert model.criterion.classification_loss is loss
        assert model.current_config() == config
    assert values[1] == pytest.approx(values[0])
    assert values[2] > values[0] * 1.01


def test_class_weights_that_do_not_fit_the_model_raise() -> None:
    model = smallest_detector()
    with pytest.raises(ValueError, match=r"class_weights names \['owl'\].*\['square', 'circle'\]"):
        RetinaNetModule(model, TrainingOptions(class_weights={"owl": 2}))
    options = TrainingOptions(class_weights={"circle": 2})
    model.criterion.classification_loss = nn.Identity()
    with pytest.raises(TypeError, match="class_weights needs a FocalMapLoss.*got Identity"):
        RetinaNetModule(model, options)
    model.criterion = nn.Identity()
    with pytest.raises(TypeError, match="needs a RetinaNetCriterion, but .* has a Identity"):
        RetinaNetModule(model, options)


# Repeat factor sampling.


def test_repeat_factors_follow_the_share_of_images_with_a_class(data: Path) -> None:
    table = read_data(data / "train" / "annotations.json").table
    arrays: dict[str, Any] = {
        "image_indices": np.array([0, 0, 1, 2, 3]),
        "labels": np.array([0, 1, 0, 0, 0]),  # class 1 is in 1 of 8 images, class 0 in 4
        "boxes": np.tile([1.0, 1.0, 20.0, 20.0], (5, 1)),
        "areas": np.full(5, 361.0),
        "crowd": np.zeros(5, np.bool_),
        "annotation_ids": np.arange(5),
    }
    few = DetectionDataset(dataclasses.replace(table, **arrays))
    r0 = math.sqrt(0.8 / 0.5)
    r1 = math.sqrt(0.8 / 0.125)
    assert_close(repeat_factors(few, 0.8).tolist(), [r1, r0, r0, r0, 1.0, 1.0, 1.0, 1.0])
    assert repeat_factors(few, 0.001).tolist() == [1.0] * 8
    crowds = dataclasses.replace(few.table, crowd=np.array([False, True, False, False, False]))
    assert repeat_factors(DetectionDataset(crowds), 0.4).tolist() == [1.0] * 8


def epochs_of(sampler: RepeatFactorBatchSampler, count: int) -> list[list[list[int]]]:
    epochs = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


def test_images_are_repeated_by_their_factors_on_average() -> None:
    ratios = np.array([0.5, 2.0, 0.5, 0.5, 2.0, 0.5])
    factors = np.array([1.0, 1.25, 2.5, 1.75, 1.0, 3.5])
    sampler = RepeatFactorBatchSampler(ratios, factors, 3, seed=1)
    counts = np.zeros(6)
    epochs = epochs_of(sampler, 400)
    for batches in epochs:
        indices = [index for batch in batches for index in batch]
        assert len(batches) == len(sampler) == 4  # 9 + 2 images
        assert len(set(indices)) == len(indices) == sampler.images_per_epoch == 11
        found = np.bincount([index % 6 for index in indices], minlength=6)
        assert (found >= np.floor(factors)).all()
        assert (found <= np.ceil(factors)).all()
        assert {index // 6 for index in indices if index % 6 == 5} >= {0, 1, 2}
        counts += found
    np.testing.assert_allclose(counts / 400, factors, atol=0.08)
    assert epochs == epochs_of(sampler, 400)
    assert epochs[0] != epochs[1]


def test_the_rarest_image_is_repeated_even_if_its_factor_is_below_two() -> None:
    sampler = RepeatFactorBatchSampler(np.ones(3), np.array([1.0, 1.3, 1.0]), 2)
    assert sampler.images_per_epoch == 4
    assert sorted(index for batch in sampler for index in batch) == [0, 1, 2, 4]


def test_ranks_share_the_repeated_images() -> None:
    ratios, factors = np.array([0.5, 2.0, 0.5, 0.5]), np.array([1.0, 2.0, 2.5, 2.5])
    whole = RepeatFactorBatchSampler(ratios, factors, 4)
    ranks = [
        RepeatFactorBatchSampler(ratios, factors, 2, rank=rank, num_replicas=2) for rank in (0, 1)
    ]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 2
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert sorted(index for share in shares for index in share) == sorted(batch)


def pixels_of(loader: Any) -> list[tuple[int, float]]:
    return [
        (target["image_id"], float(image.mean()))
        for images, targets in loader
        for image, target in zip(images, targets, strict=True)
    ]


def test_repeats_of_an_image_have_different_transforms_and_survive_resuming(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    train_data = read_data(data / "train" / "annotations.json", darken)

    def module() -> DetectionDataModule:
        return DetectionDataModule(
            train_data, batch_size=4, workers=0, sampler="repeat_factor", repeat_threshold=1.0
        )

    whole = pixels_of(module().train_dataloader())
    assert len(whole) > 8
    assert len(set(whole)) == len(whole)  # the same image is darkened in different ways
    assert {image_id for image_id, _ in whole} == set(range(1, 9))
    rest = module()
    rest.load_state_dict({"epoch": 0, "given": 1})
    assert pixels_of(rest.train_dataloader()) == whole[4:]
    [line] = {one for one in caplog.messages if "Repeat factor" in one}
    assert f"an epoch has {len(whole)} images." in line


def test_a_threshold_that_repeats_nothing_is_reported(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_data = read_data(data / "train" / "annotations.json")
    module = DetectionDataModule(train_data, workers=0, sampler="repeat_factor")
    module.train_dataloader()
    assert "repeats nothing: every class occurs in at least 0." in caplog.messages[-1]
    with pytest.raises(ValueError, match="sampler 'x'"):
        DetectionDataModule(train_data, sampler="x")  # type: ignore[arg-type]


# Frozen parts.


def state_of(model: nn.Module, *, prefix: str) -> dict[str, Tensor]:
    return {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith(prefix)
    }


def test_frozen_parts_do_not_change_in_a_run_and_train_again_afterwards(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    model = tiny_detector(norm="batch")
    before = [state_of(model, prefix=part) for part in ("backbone", "fpn", "head")]
    train(
        model,
        read_data(data / "train" / "annotations.json"),
        folder=tmp_path / "run",
        options=tiny_options(epochs=1, batch_size=8, freeze=("backbone", "fpn")),
    )
    after = [state_of(model, prefix=part) for part in ("backbone", "fpn", "head")]
    for name, value in (before[0] | before[1]).items():  # with BatchNorm's statistics
        assert torch.equal((after[0] | after[1])[name], value), name
    assert not all(torch.equal(after[2][name], value) for name, value in before[2].items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(one.startswith("freeze=('backbone', 'fpn'): ") for one in caplog.messages)


def test_frozen_stages_are_added_to_those_of_the_config() -> None:
    model = tiny_detector(norm="batch")
    stages: Sequence[Sequence[nn.Module]] = model.backbone.stages  # type: ignore[assignment]
    for part in stages[0]:
        part.requires_grad_(requires_grad=False)  # as by trainable_stages=4
    module = RetinaNetModule(model.train(), TrainingOptions(freeze=2))
    trains = [
        {one.requires_grad for part in stage for one in part.parameters()} for stage in stages
    ]
    assert trains == [{False}, {False}, {True}, {True}, {True}]
    module.train()
    assert not any(one.training for stage in stages[:2] for part in stage for one in part.modules())
    assert all(part.training for stage in stages[2:] for part in stage)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("neck",), r"freeze names 'neck', but model has no such part.*'backbone', 'fpn', 'head'"),
        (2, r"freeze=2 counts stages.*_Backbone is not divided into stages.*'backbone'"),
        (("backbone", "fpn", "head"), "leaves no parameter to train"),
    ],
)
def test_parts_that_cannot_be_frozen_raise(freeze: Any, message: str) -> None:
    model = smallest_detector()
    del model.backbone.stages  # of the tiny backbone, which are not those of a named one
    with pytest.raises(ValueError, match=message):
        RetinaNetModule(model, TrainingOptions(freeze=freeze))


# Patience.


@pytest.fixture
def scripted_ap(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list that the AP of each epoch is taken from."""
    values = [0.0, 0.0, 0.0, 0.3, 0.2, 0.3, 0.5]

    def log_value(_: Any, trainer: Any, module: Any) -> None:
        module.log("val/AP", values[trainer.current_epoch])

    monkeypatch.setattr(CocoAP, "on_validation_epoch_end", log_value)
    return values


def test_a_run_stops_when_its_ap_has_not_risen_for_some_epochs_and_can_be_resumed(
    data: Path, tmp_path: Path, scripted_ap: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    folder = tmp_path / "run"
    summary = run(data, folder, epochs=7, patience=2)
    assert (summary.best_epoch, summary.epochs) == (4, 6)
    assert summary.best_ap == pytest.approx(0.3)
    stop = (
        "Stopping early after epoch 6: the AP has not risen above 0.300 since epoch 4 (patience=2)."
    )
    assert caplog.messages[-2] == stop
    result = json.loads((folder / "run.json").read_text())["result"]
    assert result["stopped_early"] is True
    assert run(data, folder, epochs=7, patience=2, resume=True).epochs == 6  # nothing is left to do
    resumed = run(data, folder, epochs=7, patience=3, resume=True)
    assert (resumed.best_epoch, resumed.epochs) == (7, 7)
    assert resumed.best_ap == pytest.approx(scripted_ap[-1])
    assert json.loads((folder / "run.json").read_text())["result"]["stopped_early"] is False


def test_patience_needs_validation(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience=2 stops a run by its validation AP"):
        run(data, tmp_path / "run", validate=False, patience=2)


def test_an_abandoned_validation_does_not_count() -> None:
    best = BestModel("unused")
    best.best, best.epoch = 0.5, 1
    trainer: Any = type("Trainer", (), {"current_epoch": 9, "should_stop": False})()
    module: Any = type("Module", (), {"stopping": True})()
    callback = StopEarly(best, 3)
    callback.on_train_epoch_end(trainer, module)
    assert not trainer.should_stop
    module.stopping = False
    callback.on_train_epoch_end(trainer, module)
    assert trainer.should_stop


# Callbacks and loggers.


class Watch(pl.Callback):
    """Note what a callback sees, and keep a state in the checkpoints."""

    def __init__(self) -> None:
        self.epochs = 0
        self.seen: list[str] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        del module
        self.seen.append(f"start at {trainer.current_epoch} with {self.epochs}")

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        del module
        self.epochs += 1
        self.seen.append(f"AP {'val/AP' in trainer.callback_metrics}")

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


def test_callbacks_and_loggers_of_the_caller_take_part_and_resume(
    data: Path, tmp_path: Path
) -> None:
    watch = Watch()
    folder = tmp_path / "run"

    def logger() -> CSVLogger:
        return CSVLogger(tmp_path, name="csv", version="mine")

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)

    run(data, folder, epochs=1, callbacks=[watch, keep()], loggers=[logger()])
    assert watch.seen == ["start at 0 with 0", "AP True"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=0.ckpt"]
    header = (tmp_path / "csv" / "mine" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "val/AP", "epoch"} <= set(header.split(","))
    hyperparameters = (tmp_path / "csv" / "mine" / "hparams.yaml").read_text()
    assert "batch_size: 8" in hyperparameters
    assert "backbone: custom" in hyperparameters
    assert (folder / "metrics.csv").is_file()
    resumed = Watch()
    run(data, folder, epochs=2, resume=True, callbacks=[resumed, keep()], loggers=[])
    assert resumed.seen == ["start at 1 with 1", "AP True"]
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"epoch=0.ckpt", "epoch=1.ckpt"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("callbacks", [print], r"callbacks\[0\] must be a Callback of pytorch_lightning, got"),
        ("callbacks", Watch(), r"callbacks must be a sequence; pass one as \[Watch"),
        ("loggers", ["wandb"], r"loggers\[0\] must be a Logger of pytorch_lightning, got 'wandb'"),
    ],
)
def test_other_callbacks_and_loggers_raise(
    data: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        run(data, tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


# What is shown.


def test_the_progress_bar_counts_epochs_from_1_and_shows_no_version(
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("focaldet.training._train.on_terminal", lambda: True)
    run(data, tmp_path / "run", epochs=1, validate=False)
    shown = "".join(capfd.readouterr())
    assert "Epoch 1/1" in shown
    assert "train/loss=" in shown
    assert "v_num" not in shown


def test_a_progress_bar_of_the_caller_replaces_the_usual_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("focaldet.training._train.on_terminal", lambda shown=terminal: shown)
        bar = EpochBar()
        run(data, tmp_path / str(terminal), epochs=1, validate=False, callbacks=[bar])
        assert bar.trainer.progress_bar_callback is bar


@pytest.mark.parametrize("count", [1, 2, 10, 11])
def test_the_line_of_an_epoch_has_the_ap_of_each_of_up_to_ten_classes(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="focaldet.training")
    classes = [
        type("ClassResult", (), {"name": f"c{i}", "ap": i / 100 if i else math.nan, "objects": i})()
        for i in range(count)
    ]
    ap = CocoAP.__new__(CocoAP)
    ap.result = type("Result", (), {"classes": classes})()
    values = {"callbacks": [ap], "is_global_zero": True, "callback_metrics": {}, "current_epoch": 0}
    trainer: Any = type("Trainer", (), {**values, "max_epochs": 1})()
    module: Any = type("Module", (), {"stopping": False})()
    ProgressLog().on_train_epoch_end(trainer, module)
    line = caplog.messages[-1]
    assert ("AP per class (c0 -, c1 0.010" in line) == (2 <= count <= 10)


class RecordLayout(pl.Callback):
    """Record whether the weights of convolutions are channels_last, at the end of training."""

    found: tuple[bool, ...] = ()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        del trainer
        self.found = layouts(pl_module)


def layouts(model: nn.Module) -> tuple[bool, ...]:
    """Return whether weights are contiguous, for those whose two memory formats differ."""
    formats = [
        (p.is_contiguous(), p.is_contiguous(memory_format=torch.channels_last))
        for p in model.parameters()
        if p.ndim == 4
    ]
    return tuple(contiguous for contiguous, last in formats if not (contiguous and last))


def test_a_run_in_channels_last_has_the_same_losses_and_writes_contiguous_weights(
    data: Path, tmp_path: Path
) -> None:
    saved, losses = [], []
    for channels_last in (False, True):
        folder, record = tmp_path / str(channels_last), RecordLayout()
        model = smallest_detector()
        train(
            model,
            read_data(data / "train" / "annotations.json"),
            folder=folder,
            options=tiny_options(batch_size=8, epochs=1, channels_last=channels_last),
            callbacks=[record],
        )
        assert set(record.found) == {not channels_last}
        assert all(layouts(model))
        with (folder / "metrics.csv").open() as rows:
            losses.append(next(csv.DictReader(rows)))
        saved.append(load_file(folder / "last" / "model.safetensors"))
    for name in ("train/classification", "train/box_regression"):
        assert_close(float(losses[1][name]), float(losses[0][name]), rtol=1e-5, atol=0)
    assert_close(saved[1], saved[0], rtol=1e-4, atol=1e-6)
    # The format may change when a run is resumed.
    summary = run(data, tmp_path / "True", resume=True, validate=False, epochs=2)
    assert summary.epochs == 2


def test_channels_last_maps_reach_the_losses_without_a_copy() -> None:
    model = tiny_detector("batch").to(memory_format=torch.channels_last)
    logits, box_deltas = model.forward_maps(torch.rand(2, 3, 64, 96))
    for m in (*logits, *box_deltas):
        assert m.is_contiguous(memory_format=torch.channels_last)
        assert dense(m) is m
        memory, _ = memory_of(m)
        assert memory.data_ptr() == m.data_ptr()
