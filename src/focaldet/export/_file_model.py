"""An exported file in the place of the model, where images are read and batched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._checks import must_be
from focaldet.boxes import scale_boxes
from focaldet.detections import Detections
from focaldet.export._inputs import parts_around
from focaldet.transforms import resize_factor

if TYPE_CHECKING:
    from focaldet.export._metadata import FileFacts, Shape
    from focaldet.export._sessions import Session
    from focaldet.structures import ImageBatch

__all__ = ["FileAsModel"]


class FileAsModel(nn.Module):
    """What ``predict`` needs of a model, around a loaded file: it prepares, runs and reads detections.

    Args:
        session: the file.
        facts: what it says of itself.
    """

    def __init__(self, session: Session, facts: FileFacts) -> None:
        super().__init__()
        self._session, self._facts = session, facts
        parts = parts_around(facts)
        self.preprocess = parts["preprocess"]
        self.anchor_generator = parts["anchor_generator"]
        self.postprocess = parts["postprocess"]

    def forward(self, batch: ImageBatch) -> tuple[ImageBatch, dict[str, Tensor]]:
        """Run the file on a batch of ``preprocess``; return it as it went in, and the outputs."""
        batch = batch._replace(tensor=batch.tensor.cpu().float())
        if self._facts.fixed_shape is not None:
            batch = self._on_fixed_canvas(batch, self._facts.fixed_shape)
        sizes = batch.sizes + [(1, 1)] * (len(batch.tensor) - len(batch.sizes))  # of empty images
        inputs = {"images": batch.tensor.contiguous(), "sizes": torch.tensor(sizes)}
        return batch, self._session.run(inputs)

    def detections(
        self, output: tuple[ImageBatch, dict[str, Tensor]], *, score_threshold: float
    ) -> list[Detections]:
        """Return the objects found, in pixels of the images as given."""
        batch, outputs = output
        if self._facts.kind == "maps":
            return self._of_maps(outputs, batch, score_threshold)
        return [
            self._of_rows(outputs, batch, index, score_threshold)
            for index in range(len(batch.sizes))
        ]

    def _on_fixed_canvas(self, batch: ImageBatch, shape: Shape) -> ImageBatch:
        count, height, width = shape
        for size, original in zip(batch.sizes, batch.original_sizes, strict=True):
            if size[0] > height or size[1] > width:
                condition = f"images that fit the file's {height}x{width} when they are resized"
                got = f"one of {original[0]}x{original[1]}, resized to {size[0]}x{size[1]}"
                remedy = "Export the model without fixed_shape, or with a larger one."
                raise ValueError(must_be("sources", condition, got, remedy))
        canvas = batch.tensor.new_zeros(count, 3, height, width)
        kept = batch.tensor[..., :height, :width]
        canvas[: len(kept), :, : kept.shape[2], : kept.shape[3]] = kept
        return batch._replace(tensor=canvas)

    def _of_maps(
        self, outputs: dict[str, Tensor], batch: ImageBatch, threshold: float
    ) -> list[Detections]:
        maps = [outputs[name] for name in self._facts.outputs]
        logits, box_deltas = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        anchors = self.anchor_generator(
            [(level.shape[2], level.shape[3]) for level in logits],
            (batch.tensor.shape[2], batch.tensor.shape[3]),
        )
        found: list[Detections] = self.postprocess(
            logits,
            box_deltas,
            anchors,
            batch.sizes,
            batch.original_sizes,
            score_threshold=threshold,
            class_names=self._facts.config.class_names,
        )
        return found

    def _of_rows(
        self, outputs: dict[str, Tensor], batch: ImageBatch, index: int, threshold: float
    ) -> Detections:
        count = int(outputs["count"][index])
        boxes, scores, labels = (
            outputs[name][index, :count] for name in ("boxes", "scores", "labels")
        )
        above = scores > threshold
        size, original = batch.sizes[index], batch.original_sizes[index]
        return Detections(
            self._scale_back(boxes[above], size, original),
            scores[above],
            labels[above],
            original,
            class_names=self._facts.config.class_names,
        )

    def _scale_back(
        self, boxes: Tensor, size: tuple[int, int], original: tuple[int, int]
    ) -> Tensor:
        """Do as PostProcess does with boxes of the batch."""
        postprocess = self.postprocess
        last_pixel = boxes.new_tensor((0, 0, 1, 1)) if postprocess.inclusive_corners else 0
        if postprocess.resize_limits is None:
            return scale_boxes(boxes - last_pixel, size, original) + last_pixel
        return (boxes - last_pixel) / resize_factor(
            original, *postprocess.resize_limits
        ) + last_pixel
