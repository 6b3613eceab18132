"""Detection of losses and weights that are NaN or infinite."""

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
    """Stop a run whose loss is NaN or infinite before the weights are updated.

    The loss is checked once per batch: on a CPU before the backward pass, on a GPU after it has been
    queued and before the weights are updated, so that the GPU is never idle. Gradients are not checked:
    if only they are not finite, the next loss will not be finite either, and weights that are not finite
    are never written to a checkpoint.

    The batch, the losses and the weights are saved to ``nonfinite_step_N.pt`` (with the rank in its
    name, in distributed training), to be read with ``torch.load``. Its "images" and "targets" can be
    passed to the model unchanged.

    Args:
        folder: Folder to save that file to.

    Raises:
        TrainingError: If a loss or a weight is NaN or infinite. The message gives the step, the ids
            of the images and the likely causes.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._batch: Any = None
        self._pending: _PendingLoss | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a reference to the batch."""
        del trainer, module, batch_idx
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
        """Check the training loss, or begin to on a GPU."""
        self._check_pending(trainer, module)  # of the batch before, if gradients are accumulated
        if _is_on_gpu(loss):
            self._pending = _PendingLoss(loss, self._batch)
        elif not bool(torch.isfinite(loss)):
            self._stop(trainer, module, "training loss", loss, self._batch)
        self._batch = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        """Check the training loss on a GPU, whose backward pass has been queued."""
        self._check_pending(trainer, module)

    def _check_pending(self, trainer: pl.Trainer, module: Any) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and not pending.is_finite():
            self._stop(trainer, module, "training loss", pending.loss, pending.batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Check the validation loss."""
        if outputs is not None and not bool(torch.isfinite(outputs["loss"])):
            self._stop(trainer, module, "validation loss", outputs["loss"], batch)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Raise if the weights to be saved are not finite."""
        broken = _nonfinite_tensors(checkpoint["state_dict"])
        if broken:
            raise TrainingError(
                f"The weights contain NaN or infinity after step {trainer.global_step}, in {broken}, "
                "because the gradients of the last step were not finite. "
                f"{_likely_causes(module, trainer)} The previous checkpoint was kept."
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
            f"The {what} is {loss.item()} in step {step} (epoch {trainer.current_epoch + 1}, images "
            f"{', '.join(map(str, ids))}). {_diagnosis(content, module, trainer)} "
            f"The batch and the weights were saved to {str(path)!r}."
        )


class _PendingLoss:
    """A loss on a GPU, checked without waiting for what is queued after it."""

    def __init__(self, loss: Tensor, batch: Any) -> None:
        self.loss, self.batch = loss.detach(), batch
        # A non-blocking copy to the host goes to pinned memory, and is valid after the event.
        self._finite = torch.isfinite(self.loss).to("cpu", non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def is_finite(self) -> bool:
        self._event.synchronize()
        return bool(self._finite)


def _is_on_gpu(loss: Tensor) -> bool:
    return loss.device.type == "cuda"


def _diagnosis(content: dict[str, Any], module: Any, trainer: pl.Trainer) -> str:
    """Say which images or weights are not finite, or else what the likely causes are."""
    for image_id, image in zip(content["image_ids"], content["images"], strict=True):
        if not _is_finite(image):
            return f"Image {image_id} contains NaN or infinity."
    broken = _nonfinite_tensors(content["state_dict"])
    if broken:
        return (
            f"The weights already contain NaN or infinity, in {broken}: the previous step broke them. "
            f"{_likely_causes(module, trainer)}"
        )
    return f"The images and the weights are finite. {_likely_causes(module, trainer)}"


def _likely_causes(module: Any, trainer: pl.Trainer) -> str:
    options = module.options
    lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0
    causes = [f"a learning rate that is too high (currently {lr:g})"]
    if trainer.global_step < 1000:
        causes.append("a warm-up that is too short")
    if options.clip_norm is None:
        causes.append("no gradient clipping (clip_norm=10 is a mild setting)")
    if options.precision.startswith("16"):
        causes.append("float16 overflow (bf16-mixed has the range of float32)")
    return f"Likely causes: {', '.join(causes)}."


def _nonfinite_tensors(state_dict: dict[str, Tensor]) -> str:
    """Describe which tensors contain NaN or infinity, or return an empty string if none does."""
    names = [name for name, value in state_dict.items() if not _is_finite(value)]
    if not names:
        return ""
    if len(names) == 1:
        return repr(names[0])
    return f"{len(names)} tensors (the first is {names[0]!r})"


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
