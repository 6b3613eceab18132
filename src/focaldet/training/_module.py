"""RetinaNet as a LightningModule: losses in training, losses and detections in validation."""

from __future__ import annotations

import atexit
import functools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from focaldet.training._optimisation import build_optimizer, choose_lr, lr_factor
from focaldet.training._options import TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from focaldet.retinanet import RetinaNet
    from focaldet.structures import Target

    Batch = tuple[list[Tensor], list[Target]]

__all__ = ["RetinaNetModule"]

_LOG = logging.getLogger("focaldet.training")


class RetinaNetModule(pl.LightningModule):
    """A RetinaNet with its optimiser, learning rate and schedule.

    Batches are ``(images, targets)``, as :class:`~focaldet.RetinaNet` takes them. Validation runs the
    network once a batch, for losses and detections both.

    Logged are ``train/loss``, ``train/classification``, ``train/box_regression`` and ``train/lr`` a
    step, ``train/loss_epoch``, ``val/loss``, ``val/classification`` and ``val/box_regression`` an
    epoch.

    In distributed training the criterion divides by the number of positives averaged over ranks, and
    DDP averages the gradients, so that ranks with a part of the batch each do what one process does
    with the whole batch.

    Args:
        model: trained in place.
        options: the optimiser's part of them is used; batch size and accumulation set its rate.
        resize_images: False for training images that their transform has brought to the size at
            which they are to be trained. Validation images are always resized by the model.

    Attributes:
        stopping: set to end a validation early: what is left of it is skipped.

    >>> from focaldet import RetinaNet, RetinaNetConfig
    >>> config = RetinaNetConfig(num_classes=2, backbone="resnet18", backbone_norm="batch")
    >>> RetinaNetModule(RetinaNet.from_config(config.replace(fpn_channels=32))).options.lr is None
    True
    """

    def __init__(
        self,
        model: RetinaNet,
        options: TrainingOptions | None = None,
        *,
        resize_images: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.options = options or TrainingOptions()
        self.resize_images = resize_images
        self.stopping = False

    def on_train_epoch_start(self) -> None:
        """Seed what the network itself may draw (dropout): each epoch, and each rank, differently."""
        numbers = (self.options.seed, self.current_epoch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the sum of a batch's losses."""
        images, targets = batch
        # The data module has checked the values, on the CPU.
        output = self.model(images, targets, resize=self.resize_images, validate=False)
        losses: dict[str, Tensor] = output.losses
        loss = torch.stack(list(losses.values())).sum()
        each = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(each, batch_size=len(images))
        self.log("train/loss", loss.detach(), batch_size=len(images), prog_bar=True)
        self.log("train/lr", self._lr())
        self.log(
            "train/loss_epoch",
            loss.detach(),
            batch_size=len(images),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
        )
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any] | None:  # noqa: ARG002
        """Return ``loss`` and ``detections``, both of one forward pass."""
        if self.stopping:
            return None
        images, targets = batch
        output = self.model(images, targets, validate=False)
        losses: dict[str, Tensor] = output.losses
        loss = torch.stack(list(losses.values())).sum()
        named = {"loss": loss, **losses}
        self.log_dict(
            {f"val/{name}": value for name, value in named.items()},
            batch_size=len(images),
            sync_dist=True,
        )
        return {"loss": loss, "detections": self.model.detections(output)}

    def on_fit_end(self) -> None:
        """Have the ranks part before Python ends.

        Lightning sees to that for NCCL only. A thread of gloo that still holds a tensor when Python
        ends aborts the process, upon which torchrun kills the other ranks, be they still writing.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            atexit.register(_leave_ranks)

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule, and say the learning rate aloud."""
        options = self.options
        real_batch = options.batch_size * options.accumulate * self.trainer.world_size
        lr, said = choose_lr(options, real_batch)
        steps = int(self.trainer.estimated_stepping_batches)
        _say(f"{options.optimizer}, {said}; {options.schedule} schedule over {steps} updates")
        optimizer = build_optimizer(self.model, options, lr)
        factor = functools.partial(
            lr_factor,
            total_steps=steps,
            schedule=options.schedule,
            warmup_steps=options.warmup_steps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _lr(self) -> float:
        return float(self.trainer.optimizers[0].param_groups[0]["lr"])


def _leave_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@rank_zero_only
def _say(line: str) -> None:
    _LOG.info(line)
