"""What watches for losses and weights that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from focaldet._atomic import atomic_write
from focaldet.errors import TrainingError

if TYPE_CHECKING:
    import os

    from torch import Tensor

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard(pl.Callback):
    """Stop a run whose loss is NaN or infinite, before such a number reaches the weights.

    The loss is looked at once a step, before the backward pass: on a GPU that is one wait more, for
    the end of a forward pass whose matching has waited for the GPU already. Gradients are not
    looked at. If they alone were not finite, the next loss is not either; and no checkpoint is ever
    written of weights that are not finite.

    The batch, the losses and the weights are written to ``nonfinite_step_N.pt`` (with the rank, in
    distributed training), which ``torch.load`` opens: "images" and "targets" can be given to the
    model as they are.

    Args:
        folder: where that file is written.

    Raises:
        TrainingError: with the step, the images' ids and the likely causes.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch at hand."""
        del trainer, module, batch_idx
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
        """Check the training loss."""
        if not bool(torch.isfinite(loss)):
            self._stop(trainer, module, "training loss", loss, self._batch)
        self._batch = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Check the validation loss."""
        if outputs is not None and not bool(torch.isfinite(outputs["loss"])):
            self._stop(trainer, module, "validation loss", outputs["loss"], batch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to have weights written that are not finite."""
        bad = [name for name, value in checkpoint["state_dict"].items() if not _finite(value)]
        if bad:
            where = f"{len(bad)} tensors of the weights (the first is {bad[0]!r})"
            raise TrainingError(
                f"After step {trainer.global_step} {where} hold NaN or infinity: the gradients of the "
                f"last step were not finite. {_remedies(module, trainer)} The last checkpoint was "
                "left as it is."
            )

    def _stop(self, trainer: pl.Trainer, module: Any, what: str, loss: Tensor, batch: Any) -> None:
        images, targets = batch
        step = trainer.global_step
        ids = [int(target.get("image_id", -1)) for target in targets]
        rank = f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.folder / f"nonfinite_step_{step}{rank}.pt"
        content = {
            "step": step,
            "loss": loss.detach().cpu(),
            "image_ids": ids,
            "images": [image.cpu() for image in images],
            "targets": [
                {
                    key: value.cpu() if isinstance(value, torch.Tensor) else value
                    for key, value in target.items()
                }
                for target in targets
            ],
            "state_dict": {key: v.detach().cpu() for key, v in module.model.state_dict().items()},
        }
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
        raise TrainingError(
            f"The {what} is {loss.item()} in step {step} (epoch {trainer.current_epoch + 1}), "
            f"images {', '.join(map(str, ids))}. {_causes(content, module, trainer)} "
            f"Batch and weights were saved in {str(path)!r}."
        )


def _causes(content: dict[str, Any], module: Any, trainer: pl.Trainer) -> str:
    """Say what is wrong with the batch or the weights, or else what usually is."""
    for image_id, image in zip(content["image_ids"], content["images"], strict=True):
        if not _finite(image):
            return f"Cause: the pixels of image {image_id} are not finite."
    bad = [name for name, value in content["state_dict"].items() if not _finite(value)]
    if bad:
        where = f"{len(bad)} tensors of the weights (the first is {bad[0]!r})"
        return (
            f"{where} are not finite already: the step before broke them. "
            f"{_remedies(module, trainer)}"
        )
    return f"Images, targets and weights are in order. {_remedies(module, trainer)}"


def _remedies(module: Any, trainer: pl.Trainer) -> str:
    options = module.options
    lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0
    causes = [f"a learning rate that is too high (it is {lr:g})"]
    if trainer.global_step < 1000:
        causes.append("a warm-up that is too short")
    if options.clip_norm is None:
        causes.append("no gradient clipping (clip_norm=10 is mild)")
    if options.precision.startswith("16"):
        causes.append("16-bit floats (bf16-mixed has float32's range)")
    return f"Likely causes: {', '.join(causes)}."


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
