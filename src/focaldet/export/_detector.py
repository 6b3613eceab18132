"""A detector that is an ONNX file, with the manners of the model that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

import torch

from focaldet._checks import check_range, must_be
from focaldet._prediction import predict_images
from focaldet.export._file_model import FileAsModel
from focaldet.export._inputs import check_images, check_sizes
from focaldet.export._metadata import FileFacts
from focaldet.export._sessions import open_session

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.export._sessions import RuntimeName
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

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
        ValueError: an option out of its range; a file that is damaged, no ONNX file, not written by
            focaldet, or changed since.
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
        self.facts.check_graph(str(path), self._session.inputs, self._session.outputs)
        self.runtime = self._session.runtime
        self._model = FileAsModel(self._session, self.facts)

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
        progress: bool | None = ...,
    ) -> list[Detections]: ...

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = ...,
        score_threshold: float | None = ...,
        on_error: Literal["skip"],
        progress: bool | None = ...,
    ) -> list[Detections | None]: ...

    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> list[Detections] | list[Detections | None]:
        """Find the objects in images.

        Args:
            sources: as for :meth:`focaldet.RetinaNet.predict`.
            batch_size: images that go through the network together; None takes 1, or the file's own.
                A file of a fixed shape is given empty images to fill a batch, and takes no more.
            score_threshold: scores must be greater; None takes the config's. A file of detections
                holds none with lower scores than its own threshold.
            on_error: "raise", or "skip" to warn of files that can't be read and give None for them.
            progress: as for :meth:`focaldet.RetinaNet.predict`.

        Returns:
            One :class:`~focaldet.Detections` an image, in order, in pixels of the image as given.

        Raises:
            FileNotFoundError, TypeError: a source that can't be read; the message names it.
            ValueError: likewise, an argument out of its range, or an image that does not fit a file of
                a fixed shape.
        """
        # predict_images asks of a model no more than FileAsModel has.
        return predict_images(
            cast("RetinaNet", self._model),
            sources,
            batch_size=self._checked_batch_size(batch_size),
            score_threshold=self._checked_threshold(score_threshold),
            on_error=on_error,
            progress=progress,
        )

    def run(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Run the file on a batch that is prepared already.

        Args:
            images: ``[B, 3, H, W]`` float32, RGB, normalised and padded as the config says.
            sizes: ``[B, 2]`` int64, (height, width) of each image without its padding; None if they
                have none. Maps don't depend on it.

        Returns:
            The file's outputs by name; see :func:`~focaldet.export.export_onnx`.

        Raises:
            TypeError: no tensors, or other dtypes.
            ValueError: other shapes, or sizes beyond the images.
        """
        check_images(images, self.facts)
        if sizes is None:
            sizes = torch.tensor([list(images.shape[2:])] * len(images))
        check_sizes(sizes, images)
        inputs = {"images": images, "sizes": sizes}
        return self._session.run(
            {name: value.detach().cpu().contiguous() for name, value in inputs.items()}
        )

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
