"""Two ranks with half of the batch each compute the same as one process with the whole batch."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from focaldet.training import CocoAP, DetectionDataModule, RetinaNetModule, TrainingOptions
from tests.helpers.tiny_training import read_data, tiny_detector, write_data


class Record(pl.Callback):
    """Record the losses and the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        del optimizer
        losses = {
            name: torch.as_tensor(float(value))
            for name, value in trainer.callback_metrics.items()
            if name in {"train/classification", "train/box_regression"}
        }
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in module.model.named_parameters()
            if parameter.grad is not None
        }
        self.steps.append({**losses, **gradients})


def fit(data: Path, batch_size: int, ranks: int) -> dict[str, Any]:
    train_data = read_data(data / "train" / "annotations.json")
    val_data = read_data(data / "val" / "annotations.json")
    record, ap = Record(), CocoAP(val_data)
    options = TrainingOptions(batch_size=batch_size, warmup_steps=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=2,
        limit_train_batches=2,
        use_distributed_sampler=False,
        callbacks=[record, ap],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = RetinaNetModule(tiny_detector(norm="frozen").train(), options)
    trainer.fit(module, DetectionDataModule(train_data, val_data, batch_size=batch_size, workers=0))
    assert ap.result is not None
    if ranks > 1:  # the loss of the whole batch is the mean over the ranks
        for step in record.steps:
            for name in ("train/classification", "train/box_regression"):
                step[name] = trainer.strategy.reduce(step[name], reduce_op="mean")
    return {"steps": record.steps, "stats": ap.result.stats, "val": ap.result.num_images}


@pytest.mark.filterwarnings("ignore")  # of Lightning, and about frozen norms without weights
def test_two_ranks_match_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    write_data(tmp_path / "train", 8)
    write_data(tmp_path / "val", 5, seed=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", __file__, str(tmp_path)]
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    ranks = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one = fit(tmp_path, batch_size=4, ranks=1)
    assert len(one["steps"]) == len(two["steps"]) == 4
    for here, there in zip(one["steps"], two["steps"], strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            error = float((there[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
            assert error < 1e-5, f"{name}: {error}"
    assert_close(two["stats"], list(one["stats"]), rtol=1e-5, atol=1e-5)
    assert two["val"] == one["val"] == 5
    # gloo threads that are still running when Python exits sometimes abort the process.
    for rank in range(2):
        assert (tmp_path / f"group_at_exit_{rank}").read_text() == "False"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    at_exit = folder / f"group_at_exit_{os.environ['RANK']}"
    atexit.register(lambda: at_exit.write_text(str(torch.distributed.is_initialized())))
    found = fit(folder, batch_size=2, ranks=2)
    if os.environ["RANK"] == "0":
        torch.save({**found, "stats": list(found["stats"])}, folder / "two.pt")
