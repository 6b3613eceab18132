"""The parts of training: options, learning rate, weight average, data module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.datasets import DetectionDataset
from focaldet.training import (
    AverageWeights,
    DetectionDataModule,
    LastCheckpoint,
    Pictures,
    RetinaNetModule,
    TrainingError,
    TrainingOptions,
    lr_factor,
    parameter_groups,
)
from focaldet.training._data_module import _Loader
from focaldet.training._failures import explain_failures
from focaldet.training._freezing import has_same_buffers
from focaldet.training._optimisation import build_optimizer, choose_lr
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone
from tests.helpers.tiny_training import darken, read_data, tiny_detector, write_data

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs.*1.*0"),
        ({"lr": 0.0}, r"lr.*0, got 0\.0"),
        ({"ema_decay": 1.5}, r"ema_decay.*\[0, 1\].*1\.5"),
        ({"warmup_steps": -1}, "warmup_steps.*-1"),
        ({"clip_norm": 0.0}, r"clip_norm.*0\.0"),
        ({"backbone_lr_decay": 0.0}, r"backbone_lr_decay.*\(0, 1\].*0\.0"),
        ({"backbone_lr_decay": 1.5}, r"backbone_lr_decay.*\(0, 1\].*1\.5"),
        ({"checkpoint_every": 0}, "checkpoint_every.*0"),
        ({"devices": 0}, "devices.*0"),
        ({"devices": "all"}, "devices.*'auto'.*'all'"),
        ({"optimizer": "adam"}, "optimizer 'adam'.*'sgd'.*'adamw'"),
        ({"schedule": "linear"}, "schedule 'linear'.*'step'.*'cosine'.*'constant'"),
        ({"precision": "fp8"}, "precision 'fp8'.*'32-true'"),
    ],
)
def test_invalid_options_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**changes)


def test_the_default_learning_rate_is_the_papers_scaled_with_the_images_per_update() -> None:
    assert choose_lr(TrainingOptions(), 16) == (0.01, "lr 0.01 (0.01 x 16/16 images per update)")
    assert choose_lr(TrainingOptions(), 4)[0] == pytest.approx(0.0025)
    assert choose_lr(TrainingOptions(optimizer="adamw"), 32)[0] == pytest.approx(2e-4)
    assert choose_lr(TrainingOptions(lr=0.02), 4) == (0.02, "lr 0.02 (4 images per update)")


def test_the_step_schedule_divides_by_ten_after_60_and_80_of_90_thousand_steps() -> None:
    factors = [lr_factor(step, 90_000) for step in (0, 250, 500, 59_999, 60_000, 79_999, 80_000)]
    assert_close(factors, [0.001, 0.5005, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_the_warm_up_of_a_short_run_takes_a_tenth_of_it() -> None:
    assert lr_factor(9, 100) < 1
    assert lr_factor(10, 100) == 1
    assert lr_factor(0, 5) == 1  # too short for a warm-up


def test_the_cosine_schedule_falls_to_zero_and_stays_there() -> None:
    factors = [
        lr_factor(step, 100, schedule="cosine", warmup_steps=0) for step in (0, 50, 100, 150)
    ]
    assert_close(factors, [1.0, 0.5, 0.0, 0.0])
    assert lr_factor(99, 100, schedule="constant") == 1
    with pytest.raises(ValueError, match="schedule 'other'.*'step'"):
        lr_factor(0, 1, schedule="other")  # type: ignore[arg-type]


def test_weight_decay_on_norms_and_biases_is_optional() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].requires_grad_(requires_grad=False)
    [group] = parameter_groups(model, 0.1, decay_norm_and_bias=True)
    assert len(group["params"]) == 4
    weights, others = parameter_groups(model, 0.1, decay_norm_and_bias=False)
    assert [p.ndim for p in weights["params"]] == [4]
    assert [p.ndim for p in others["params"]] == [1, 1, 1]
    assert others["weight_decay"] == 0
    adamw = build_optimizer(model, TrainingOptions(optimizer="adamw"), 0.3)
    assert isinstance(adamw, torch.optim.AdamW)
    sgd = build_optimizer(model, TrainingOptions(), 0.3)
    assert (sgd.defaults["momentum"], sgd.param_groups[0]["weight_decay"]) == (0.9, 1e-4)


def test_each_stage_of_the_backbone_has_its_own_learning_rate() -> None:
    model = tiny_detector("batch")  # all norms train, so each stage has weights and others
    backbone: Any = model.backbone
    for part in backbone.stages[0]:
        part.requires_grad_(requires_grad=False)
    options = TrainingOptions(backbone_lr_decay=0.5, decay_norm_and_bias=False, lr=0.8)
    groups = build_optimizer(model, options, 0.8).param_groups
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert rates.keys() == set(trained)
    assert sum(len(group["params"]) for group in groups) == len(trained)
    for stage, rate in zip(backbone.stages[1:], (0.05, 0.1, 0.2, 0.4), strict=True):
        assert {rates[p] for part in stage for p in part.parameters()} == {rate}
    outside = [p for part in (model.fpn, model.head) for p in part.parameters()]
    assert {rates[p] for p in outside} == {0.8}
    assert all(decays[p] == (1e-4 if p.ndim > 1 else 0) for p in trained)
    assert groups[0]["lr"] == 0.8  # the rate that is logged


def test_a_decay_of_1_changes_no_group() -> None:
    model = tiny_detector()
    for both in (True, False):
        before = parameter_groups(model, 0.1, decay_norm_and_bias=both)
        after = parameter_groups(model, 0.1, decay_norm_and_bias=both, backbone_lr_decay=1.0)
        assert [group.keys() for group in after] == [{"params", "weight_decay"}] * (2 - both)
        assert [[id(p) for p in group["params"]] for group in after] == [
            [id(p) for p in group["params"]] for group in before
        ]


def test_stages_that_are_not_built_do_not_count() -> None:
    config = RetinaNetConfig(
        num_classes=1,
        backbone="resnet18",
        backbone_norm="batch",
        levels=(3, 4),
        anchor_sizes=(32, 64),
        fpn_channels=8,
        trainable_stages=5,
    )
    model = RetinaNet.from_config(config)
    backbone: Any = model.backbone
    assert not backbone.stages[4]
    groups = parameter_groups(model, 0.0, decay_norm_and_bias=True, backbone_lr_decay=0.5)
    rates = {p: group["lr_factor"] for group in groups for p in group["params"]}
    assert rates[backbone.layer3[0].conv1.weight] == 0.5
    assert rates[backbone.conv1.weight] == 0.5**4


def test_a_backbone_without_stages_has_only_one_learning_rate() -> None:
    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())
    message = r"backbone_lr_decay=0\.7 counts stages.*TinyBackbone is not divided.*decay=1\."
    with pytest.raises(ValueError, match=message):
        RetinaNetModule(model, TrainingOptions(backbone_lr_decay=0.7))


def test_the_weight_average_follows_fast_at_first_and_slowly_later() -> None:
    average = AverageWeights(0.9)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert_close(average.average(one, zero, torch.tensor(0)), torch.tensor(0.1))
    assert_close(average.average(one, zero, torch.tensor(1000)), torch.tensor(0.9))
    assert average.average(torch.tensor(3), torch.tensor(5), 7) == 5  # a counter
    with pytest.raises(ValueError, match=r"decay.*\[0, 1\].*2"):
        AverageWeights(2)


def test_all_tensors_are_averaged_as_each_alone() -> None:
    torch.manual_seed(0)
    module: Any = pl.LightningModule()
    module.layers = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.Linear(2, 2).double()])
    module.norm = nn.BatchNorm2d(2)
    callback = AverageWeights(0.2)
    callback.setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    average: Any = callback._average_model
    assert average.n_averaged.device.type == "cpu"
    expected = None
    for step in range(1, 5):
        with torch.no_grad():
            for value in (*module.parameters(), module.norm.running_mean):
                value.normal_()
            module.norm.num_batches_tracked.fill_(step)
        state = {name: value.clone() for name, value in module.state_dict().items()}
        if expected is None:
            expected = state
        else:
            expected = {
                name: callback.average(expected[name], value, step - 1)
                for name, value in state.items()
            }
        trainer: Any = SimpleNamespace(global_step=step)
        callback.on_train_batch_end(trainer, module, None, None, 0)
        callback.on_train_batch_end(trainer, module, None, None, 1)  # accumulated; no update
        assert_close(average.module.state_dict(), expected, rtol=0, atol=0)
    assert average.n_averaged == 4


def test_buffers_are_the_same_on_all_ranks_if_all_norms_are_frozen() -> None:
    frozen = RetinaNet.from_config(TINY_CONFIG.replace(normalizer="ema"), backbone=TinyBackbone())
    assert has_same_buffers(frozen)
    assert not has_same_buffers(tiny_detector())
    frozen.backbone.register_buffer("own", torch.zeros(1))
    assert not has_same_buffers(frozen)


def test_checkpoints_are_at_least_one_update_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every.*1.*0"):
        LastCheckpoint(tmp_path / "last.ckpt", every=0)


def test_items_depend_on_the_epoch_but_not_on_the_number_of_workers(tmp_path: Path) -> None:
    data = read_data(write_data(tmp_path / "train", 6), darken)

    def first_epochs(workers: int) -> list[torch.Tensor]:
        loader: Any = DetectionDataModule(data, batch_size=4, workers=workers).train_dataloader()
        found = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)
            for images, targets in loader:
                found += [
                    image.mean() + 10 * target["image_id"]
                    for image, target in zip(images, targets, strict=True)
                ]
        return found

    torch.manual_seed(1)
    alone = first_epochs(0)
    torch.manual_seed(2)
    assert_close(first_epochs(2), alone, rtol=0, atol=0)
    assert sorted(int(v / 10) for v in alone[:6]) == [1, 2, 3, 4, 5, 6]
    assert sorted(alone[:6]) != sorted(alone[6:])


def test_reading_items_does_not_change_the_global_random_state(tmp_path: Path) -> None:
    data = read_data(write_data(tmp_path / "train", 4), darken)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(DetectionDataModule(data, batch_size=2, workers=0).train_dataloader())
    assert torch.equal(torch.rand(2), expected)


def test_a_dataset_may_replace_how_items_are_read(tmp_path: Path) -> None:
    class Inverted(DetectionDataset):
        def __getitem__(self, index: int) -> Any:
            image, target = super().__getitem__(index)
            return 1 - image, target

    data = read_data(write_data(tmp_path / "train", 2))
    assert torch.equal(data.read(1)[0].float() / 255, data[1][0])
    [(images, _)] = DetectionDataModule(data, Inverted(data.table), workers=0).val_dataloader()
    for image, index in zip(images, range(2), strict=True):
        assert torch.equal(image, 1 - data[index][0])


def test_a_loader_continues_at_the_saved_position(tmp_path: Path) -> None:
    data = read_data(write_data(tmp_path / "train", 6))

    def ids(loader: Any) -> list[list[int]]:
        return [[target["image_id"] for target in targets] for _, targets in loader]

    whole = DetectionDataModule(data, batch_size=2, workers=0)
    loader: Any = whole.train_dataloader()
    loader.batch_sampler.set_epoch(1)
    batches = ids(loader)
    rest = DetectionDataModule(data, batch_size=2, workers=0)
    rest.load_state_dict({"epoch": 1, "given": 1})
    loader = rest.train_dataloader()
    assert len(loader) == 3  # Lightning also counts the batches before the position
    assert ids(loader) == batches[1:]
    assert rest.state_dict() == {"epoch": 1, "given": 3}
    after = DetectionDataModule(data, batch_size=2, workers=0)
    after.load_state_dict(rest.state_dict())
    loader = after.train_dataloader()
    assert (loader.batch_sampler.epoch, len(ids(loader))) == (2, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, workers: int) -> None:
    data = read_data(write_data(tmp_path / "train", 4))
    (tmp_path / "train" / "2.png").unlink()
    module = DetectionDataModule(data, batch_size=2, workers=workers)
    with pytest.raises(TrainingError, match=r"2\.png.*image 3") as caught:
        list(module.train_dataloader())
    assert "Traceback" in caught.value.__notes__[0]


def test_a_worker_that_dies_while_sending_a_batch_is_reported() -> None:
    def broken() -> Iterator[None]:
        raise ConnectionResetError("by peer")
        yield  # type: ignore[unreachable]  # makes it a generator

    with (
        pytest.raises(TrainingError, match="worker was killed.*start again: no checkpoint"),
        explain_failures(Path("run"), Path("run/last.ckpt")),
    ):
        _Loader._next(broken())


def test_an_image_outside_0_to_1_after_its_transform_is_named(tmp_path: Path) -> None:
    def convert(image: Any, target: Any) -> Any:
        return image.float(), target  # without dividing by 255

    data = read_data(write_data(tmp_path / "train", 1), convert)
    with pytest.raises(TrainingError, match=r"\[0, 1\], but image 1 .*255"):
        list(DetectionDataModule(data, workers=0).train_dataloader())


def test_a_transform_that_breaks_a_target_is_reported_with_the_image(tmp_path: Path) -> None:
    def shift(image: Any, target: Any) -> Any:
        return image.float() / 255, {**target, "boxes": target["boxes"] + 40}

    data = read_data(write_data(tmp_path / "train", 1), shift)
    with pytest.raises(TrainingError, match=r"image 1: .*boxes"):
        list(DetectionDataModule(data, workers=0).train_dataloader())


def test_datasets_must_have_images_and_the_same_classes(tmp_path: Path) -> None:
    path = write_data(tmp_path / "train", 2)
    data = read_data(path)
    path.write_text(path.read_text(encoding="utf-8").replace("circle", "disc"), encoding="utf-8")
    with pytest.raises(ValueError, match="train_data.*circle.*val_data.*disc"):
        DetectionDataModule(data, read_data(path))
    with pytest.raises(ValueError, match="batch_size.*1.*0"):
        DetectionDataModule(data, batch_size=0)
    path = write_data(tmp_path / "none", 0)
    with pytest.warns(UserWarning, match="There are no images"):
        empty = read_data(path)
    with pytest.raises(ValueError, match="train_data is empty"):
        DetectionDataModule(empty)


def test_a_missing_package_is_named() -> None:
    code = "import sys; sys.modules['pytorch_lightning'] = None; import focaldet.training"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: focaldet.training requires pytorch_lightning")
    assert "pip install 'focaldet[train]'" in last


def test_pictures_show_the_best_few_detections_if_none_passes_the_threshold(tmp_path: Path) -> None:
    data = read_data(write_data(tmp_path / "data", 3))

    def sheet(scores: list[float]) -> np.ndarray[Any, Any]:
        image, target = data[0]
        corners = torch.arange(6.0)[:, None] * torch.tensor([2.0, 3.0])
        boxes = torch.cat((corners, corners + torch.tensor([30.0, 36.0])), dim=1)
        found = Detections(
            boxes[: len(scores)],
            torch.tensor(scores),
            torch.zeros(len(scores), dtype=torch.int64),
            (64, 48),
            class_names=data.class_names,
        )
        pictures = Pictures(tmp_path / "pictures", data)
        trainer: Any = SimpleNamespace(is_global_zero=True, current_epoch=0)
        module: Any = SimpleNamespace(stopping=False)
        pictures.on_validation_epoch_start()
        pictures.on_validation_batch_end(
            trainer, module, {"detections": [found]}, ([image], [target])
        )
        pictures.on_validation_end(trainer, module)
        with Image.open(tmp_path / "pictures" / "epoch_001.png") as picture:
            return np.asarray(picture.convert("RGB"))

    five = [0.2, 0.1, 0.15, 0.12, 0.18]
    nothing, low, six_low, high = map(sheet, ([], [0.2], [*five, 0.05], [0.4]))
    assert six_low.shape[1] == low.shape[1] == high.shape[1] == 2 * 48 + 3 * 8
    assert high.shape[0] < nothing.shape[0] <= low.shape[0]  # there is a note
    rows, columns = slice(26, 26 + 64), slice(48 + 16, 48 + 16 + 48)
    assert (low[rows, columns] != nothing[rows, columns]).any()  # a box
    assert (six_low == sheet(five)).all()  # the sixth is not drawn
    assert (six_low[rows, columns] != low[rows, columns]).any()
