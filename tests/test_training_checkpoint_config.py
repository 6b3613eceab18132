"""The checkpoint that a run resumes from can also be loaded as a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("pytorch_lightning")

from focaldet import RetinaNet
from focaldet.pretrained import load_checkpoint
from tests.helpers.tiny_training import read_data, tiny_detector, tiny_options, write_data

if TYPE_CHECKING:
    from pathlib import Path


def test_the_last_checkpoint_of_a_run_is_loaded_with_its_config_and_averaged_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from focaldet.training import train

    data = read_data(write_data(tmp_path / "train", 4))
    run = tmp_path / "run"
    options = tiny_options(epochs=1, batch_size=1, ema_decay=0.5)
    train(tiny_detector(), data, folder=run, options=options)
    moved = (run / "checkpoints" / "last.ckpt").rename(tmp_path / "moved.ckpt")
    caplog.clear()
    loaded, last = RetinaNet.from_pretrained(moved), RetinaNet.from_pretrained(run / "last")
    [message] = caplog.messages
    assert (
        "Loading state_dict.model; choose another with weights=: current_model_state.model"
        in message
    )
    assert loaded.config == last.config
    for key, value in last.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    key = "head.class_logits.weight"
    trained = load_checkpoint(moved, weights="current").tensors[key]
    assert not torch.equal(trained, last.state_dict()[key])
