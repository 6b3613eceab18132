"""COCO's average precision after each validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from focaldet.evaluation import CocoResult, evaluate_coco

if TYPE_CHECKING:
    from focaldet.datasets import DetectionDataset
    from focaldet.detections import Detections

__all__ = ["CocoAP"]

_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


class CocoAP(pl.Callback):
    """Evaluate the detections of each validation, of all ranks together.

    Logged are ``val/AP``, ``val/AP50``, ``val/AP75`` and, where there are such objects,
    ``val/AP_small``, ``val/AP_medium`` and ``val/AP_large``.

    Args:
        data: the validation data.

    Attributes:
        result: of the last validation.
    """

    def __init__(self, data: DetectionDataset) -> None:
        self.truth = data.table.to_coco()
        self.category_ids = data.category_ids
        self.result: CocoResult | None = None
        self._found: dict[int, Detections] = {}

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Forget the last validation."""
        self._found = {}
        self.result = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep a batch's detections."""
        del trainer, module
        if outputs is None:
            return
        for target, found in zip(batch[1], outputs["detections"], strict=True):
            self._found[int(target["image_id"])] = found.to("cpu")

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Evaluate."""
        del trainer
        if module.stopping:
            return
        self.result = evaluate_coco(
            self.truth, self._found, category_ids=self.category_ids, backend="auto"
        )
        named = zip(_NAMES, self.result.stats, strict=False)
        module.log_dict({f"val/{name}": value for name, value in named if value >= 0})
