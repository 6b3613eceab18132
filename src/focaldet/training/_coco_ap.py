"""COCO average precision after each validation."""

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
    """Evaluate the detections of each validation, collected from all ranks.

    Logs ``val/AP``, ``val/AP50`` and ``val/AP75``, and ``val/AP_small``, ``val/AP_medium`` and
    ``val/AP_large`` for the sizes that occur in the data.

    Args:
        data: Validation dataset.

    Attributes:
        result: Result of the last validation, or None before the first.
    """

    def __init__(self, data: DetectionDataset) -> None:
        self.truth = data.table.to_coco()
        self.category_ids = data.category_ids
        self.result: CocoResult | None = None
        self._detections: dict[int, Detections] = {}

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Discard the detections of the last validation."""
        self._detections = {}
        self.result = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Keep the detections of a batch."""
        del trainer, module
        if outputs is None:
            return
        for target, detections in zip(batch[1], outputs["detections"], strict=True):
            self._detections[int(target["image_id"])] = detections.to("cpu")

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Evaluate the detections and log the results."""
        del trainer
        if module.stopping:
            return
        self.result = evaluate_coco(
            self.truth, self._detections, category_ids=self.category_ids, backend="auto"
        )
        named = zip(_NAMES, self.result.stats, strict=False)
        module.log_dict({f"val/{name}": value for name, value in named if value >= 0})
