"""A detector that is an ONNX file, with the manners of the model that it was made of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import torch

from focaldet._checks import check_range, must_be
from focaldet.boxes import scale_boxes
from focaldet.detections import Detections
from focaldet.export._facts import FileFacts
from focaldet.export._inputs import check_images, check_sizes, parts_around
from focaldet.export._sessions import open_session
from focaldet.images import iter_images
from focaldet.transforms import resize_factor

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from focaldet.config import RetinaNetConfig
    from focaldet.export._sessions import RuntimeName
    from focaldet.images import ImageSource, LoadedImage
    from focaldet.structures import ImageBatch

__all__ = ["OnnxDetector"]


class OnnxDetector:
    """Find objects with a file that :func:`~focaldet.export.export_onnx` wrote.

    Images are read, prepared and batched as :meth:`focaldet.RetinaNet.predict` does, by the facts in the
    file's metadata, and the detections are the same but for rounding. For a file of maps the
    post-processing runs in PyTorch.

    Args:
        path: of the file.
        runtime: "onnxruntime", or "openvino", which must be installed.
        providers: where onnxruntime runs it, best first, such as ``["CUDAExecutionProvider"]``; None
            for the CPU.
        threads: for one run; None lets the runtime choose.

    Attributes:
        facts: what the file says of itself.
        runtime: its name and version.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the runtime is not installed.
        ValueError: an option out of its range; a file that is damaged, no ONNX file, or not written by
            focaldet.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        runtime: RuntimeName = "onnxruntime",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self._session = open_session(Path(path), runtime, providers, threads)
        self.facts = FileFacts.from_strings(str(path), self._session.metadata)
        self.runtime = self._session.runtime
        parts = parts_around(self.facts)
        self._preprocess = parts["preprocess"]
        self._anchor_generator = parts["anchor_generator"]
        self._postprocess = parts["postprocess"]

    @property
    def config(self) -> RetinaNetConfig:
        """The configuration of the model that the file was made of."""
        return self.facts.config

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["raise"] = ...,
    ) -> list[Detections]: ...

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["skip"],
    ) -> list[Detections | None]: ...

    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[Detections] | list[Detections | None]:
        """Find the objects in images.

        Args:
            sources: as for :meth:`focaldet.RetinaNet.predict`.
            batch_size: images that go through the network together; None takes 1, or the file's own.
                A file of a fixed shape is given empty images to fill a batch, and takes no more.
            score_threshold: scores must be greater; None takes the config's. A file of detections
                holds none with lower scores than its own threshold.
            on_error: "raise", or "skip" to warn of files that can't be read and give None for them.

        Returns:
            One :class:`~focaldet.Detections` an image, in order, in pixels of the image as given.

        Raises:
            FileNotFoundError, TypeError: a source that can't be read; the message names it.
            ValueError: likewise, an argument out of its range, or an image that does not fit a file of
                a fixed shape.
        """
        batch_size = self._checked_batch_size(batch_size)
        threshold = self._checked_threshold(score_threshold)
        images = iter_images(sources, on_error=on_error)
        found: list[Detections | None] = []
        while batch := list(itertools.islice(images, batch_size)):
            results = iter(self._find([item for item in batch if item is not None], threshold))
            found += [None if item is None else next(results) for item in batch]
        return found

    def run(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Run the file on a batch that is prepared already.

        Args:
            images: ``[B, 3, H, W]`` float32, RGB, normalised and padded as the config says.
            sizes: ``[B, 2]`` int64, (height, width) of each image without its padding; None if they
                have none. Maps don't depend on it.

        Returns:
            The file's outputs by name; see :func:`~focaldet.export.export_onnx`.

        Raises:
            TypeError: other dtypes.
            ValueError: other shapes, or sizes beyond the images.
        """
        check_images(images, self.facts)
        if sizes is None:
            sizes = torch.tensor([list(images.shape[2:])] * len(images))
        check_sizes(sizes, images)
        return self._session.run({"images": images.contiguous(), "sizes": sizes.contiguous()})

    def __repr__(self) -> str:
        takes = "any shape" if self.facts.fixed_shape is None else str(self.facts.fixed_shape)
        return (
            f"OnnxDetector({self.facts.kind} of {self.config.num_classes} classes, takes {takes}, "
            f"{self.runtime})"
        )

    def _checked_batch_size(self, batch_size: int | None) -> int:
        fixed = None if self.facts.fixed_shape is None else self.facts.fixed_shape[0]
        if batch_size is None:
            return fixed or 1
        check_range("batch_size", batch_size, 1)
        if fixed is not None and batch_size > fixed:
            remedy = "Export the model without fixed_shape to take batches of any size."
            condition = f"at most {fixed}, to which the file is fixed"
            raise ValueError(must_be("batch_size", condition, batch_size, remedy))
        return batch_size

    def _checked_threshold(self, score_threshold: float | None) -> float:
        own = self.config.score_threshold
        if score_threshold is None:
            return own
        check_range("score_threshold", score_threshold, 0, 1)
        if self.facts.kind == "detections" and score_threshold < own:
            condition = f"at least {own}, which the file was exported with"
            remedy = "Export the model with a lower score_threshold, or with postprocess=False."
            raise ValueError(must_be("score_threshold", condition, score_threshold, remedy))
        return score_threshold

    @torch.no_grad()
    def _find(self, loaded: Sequence[LoadedImage], threshold: float) -> list[Detections]:
        if not loaded:
            return []
        pixels = [item.image.cpu() for item in loaded]
        images = [p if p.is_floating_point() else p.float() / 255 for p in pixels]
        batch = self._preprocess(images, validate=False)  # iter_images has checked their values
        batch = batch._replace(tensor=batch.tensor.float())
        if self.facts.fixed_shape is not None:
            batch = self._on_fixed_canvas(batch, self.facts.fixed_shape)
        sizes = batch.sizes + [(1, 1)] * (len(batch.tensor) - len(loaded))  # of empty images
        outputs = self._session.run({"images": batch.tensor, "sizes": torch.tensor(sizes)})
        if self.facts.kind == "maps":
            found = self._of_maps(outputs, batch, threshold)
        else:
            found = [self._of_rows(outputs, batch, i, threshold) for i in range(len(loaded))]
        return [one.with_source(item.name) for one, item in zip(found, loaded, strict=True)]

    def _on_fixed_canvas(self, batch: ImageBatch, shape: tuple[int, int, int]) -> ImageBatch:
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
        maps = [outputs[name] for name in self.facts.outputs]
        logits, box_deltas = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        anchors = self._anchor_generator(
            [(level.shape[2], level.shape[3]) for level in logits],
            (batch.tensor.shape[2], batch.tensor.shape[3]),
        )
        found: list[Detections] = self._postprocess(
            logits,
            box_deltas,
            anchors,
            batch.sizes,
            batch.original_sizes,
            score_threshold=threshold,
            class_names=self.config.class_names,
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
            class_names=self.config.class_names,
        )

    def _scale_back(
        self, boxes: Tensor, size: tuple[int, int], original: tuple[int, int]
    ) -> Tensor:
        """Do as PostProcess does with boxes of the batch."""
        postprocess = self._postprocess
        last_pixel = boxes.new_tensor((0, 0, 1, 1)) if postprocess.inclusive_corners else 0
        if postprocess.resize_limits is None:
            return scale_boxes(boxes - last_pixel, size, original) + last_pixel
        return (boxes - last_pixel) / resize_factor(
            original, *postprocess.resize_limits
        ) + last_pixel
