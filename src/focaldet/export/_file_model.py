"""Preprocessing and post-processing around an exported file, for ``predict``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._assembly import build_parts
from focaldet.detections import Detections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.export._metadata import ExportMetadata, Shape
    from focaldet.export._sessions import Session
    from focaldet.structures import ImageBatch

__all__ = ["FileModel", "fit_to_shape"]


class FileModel:
    """A :class:`~focaldet._prediction.DetectionModel` whose network is an exported file.

    Args:
        session: The loaded file.
        metadata: The metadata of the file.
    """

    def __init__(self, session: Session, metadata: ExportMetadata) -> None:
        self._session, self._metadata = session, metadata
        # The file replaces the network, so that of the parts is made small and not used.
        config = metadata.config.replace(
            fpn_channels=32, head_depth=0, num_classes=1, class_names=None
        )
        parts = build_parts(config, _Strides(metadata.strides))
        self.preprocess = parts["preprocess"]
        self._anchor_generator = parts["anchor_generator"]
        self.postprocess = parts["postprocess"]

    @property
    def config(self) -> RetinaNetConfig:
        """Configuration of the model that was exported."""
        return self._metadata.config

    def __call__(self, batch: ImageBatch) -> tuple[ImageBatch, dict[str, Tensor]]:
        """Run the file on a preprocessed batch; return the batch that it was given and its outputs."""
        batch = batch._replace(tensor=batch.tensor.cpu().float())
        if self._metadata.fixed_shape is not None:
            batch = fit_to_shape(batch, self._metadata.fixed_shape)
        blank_images = len(batch.tensor) - len(batch.sizes)
        sizes = batch.sizes + [(1, 1)] * blank_images
        inputs = {"images": batch.tensor.contiguous(), "sizes": torch.tensor(sizes)}
        return batch, self._session.run(inputs)

    def detections(
        self,
        output: tuple[ImageBatch, dict[str, Tensor]],
        *,
        score_threshold: float | None = None,
        labels: Sequence[int] | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Return the objects in each image, in pixels of the input image."""
        batch, outputs = output
        if self._metadata.kind == "maps":
            return self._from_maps(outputs, batch, score_threshold, labels, max_detections)
        threshold = (
            0.0 if score_threshold is None else score_threshold
        )  # rows are above the config's
        return [
            self._from_rows(outputs, batch, index, threshold).filter(labels=labels)[:max_detections]
            for index in range(len(batch.sizes))
        ]

    def _from_maps(
        self,
        outputs: dict[str, Tensor],
        batch: ImageBatch,
        threshold: float | None,
        labels: Sequence[int] | None,
        max_detections: int | None,
    ) -> list[Detections]:
        maps = [outputs[name] for name in self._metadata.outputs]
        logits, box_deltas = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        anchors = self._anchor_generator(
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
            class_names=self._metadata.config.class_names,
            labels=labels,
            max_detections=max_detections,
        )
        return found

    def _from_rows(
        self, outputs: dict[str, Tensor], batch: ImageBatch, index: int, threshold: float
    ) -> Detections:
        count = int(outputs["count"][index])
        boxes, scores, labels = (
            outputs[name][index, :count] for name in ("boxes", "scores", "labels")
        )
        above = scores > threshold
        size, original_size = batch.sizes[index], batch.original_sizes[index]
        return Detections(
            self.postprocess.scale_to_original(boxes[above], size, original_size),
            scores[above],
            labels[above],
            original_size,
            class_names=self._metadata.config.class_names,
        )


def fit_to_shape(batch: ImageBatch, shape: Shape) -> ImageBatch:
    """Pad or cut the padding of a batch to the shape that a file accepts.

    Args:
        batch: A preprocessed batch.
        shape: ``(batch, height, width)``. A smaller batch is filled with blank images.

    Raises:
        ValueError: If an image is larger.
    """
    count, height, width = shape
    for size, original in zip(batch.sizes, batch.original_sizes, strict=True):
        if size[0] > height or size[1] > width:
            raise ValueError(
                f"The file only accepts images of {height}x{width} pixels, but an image of "
                f"{original[0]}x{original[1]} is resized to {size[0]}x{size[1]}. Export the model "
                "without fixed_shape, or with a larger one."
            )
    canvas = batch.tensor.new_zeros(count, batch.tensor.shape[1], height, width)
    kept = batch.tensor[..., :height, :width]
    canvas[: len(kept), :, : kept.shape[2], : kept.shape[3]] = kept
    return batch._replace(tensor=canvas)


class _Strides(nn.Module):
    """A stand-in for a backbone of which only the strides matter."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.channels, self.strides = (1,) * len(strides), strides
