"""A detector that runs an ONNX file and predicts like the model that was exported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from focaldet._prediction import Predictor
from focaldet.errors import CheckpointError
from focaldet.export._file_model import FileModel
from focaldet.export._input_checks import check_images, check_sizes
from focaldet.export._metadata import ExportMetadata
from focaldet.export._processor import log_missing_units
from focaldet.export._sessions import open_session

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.config import RetinaNetConfig
    from focaldet.export._sessions import RunPrecision, RuntimeName

__all__ = ["OnnxDetector"]


class OnnxDetector(Predictor):
    """Detect objects with a file that :func:`~focaldet.export.export_onnx` wrote.

    Images are read, preprocessed and batched as in :meth:`focaldet.RetinaNet.predict`, as the file's
    metadata describes, and the detections are the same except for rounding. For a file of maps, the
    post-processing runs in PyTorch. Several threads may call :meth:`predict` and :meth:`run` of one
    detector at the same time, with either runtime.

    A file in INT8 warns if it was calibrated without the runtime, because OpenVINO computes some layers
    of some models wrong, which the calibration finds only where OpenVINO is installed.

    Args:
        path: The ONNX file.
        runtime: "onnxruntime", or "openvino", which must be installed.
        providers: Execution providers of onnxruntime in order of preference, such as
            ``["CUDAExecutionProvider"]``. None uses the CPU.
        threads: Number of threads. None lets the runtime choose.
        precision: "float32", "bfloat16" or "float16": what OpenVINO computes the float32 layers of
            the file in. The last two require ``runtime="openvino"``. If the processor has no units
            for them, a line in the log names them and float32 is used.

            .. versionadded:: 0.3.0

    Attributes:
        metadata: The metadata of the file.
        runtime: Name and version of the runtime.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If the runtime is not installed.
        CheckpointError: If the file is damaged, is not an ONNX file, was not exported by focaldet, or
            was changed since. This is a ``ValueError``.
        ValueError: If an option is invalid.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        runtime: RuntimeName = "onnxruntime",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        precision: RunPrecision = "float32",
    ) -> None:
        self._session = open_session(Path(path), runtime, providers, threads, precision)
        self.metadata = ExportMetadata.from_strings(str(path), self._session.metadata)
        self.metadata.check_graph(str(path), self._session.inputs, self._session.outputs)
        self.runtime = self._session.runtime
        try:
            self._model = FileModel(self._session, self.metadata)
        except (OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The metadata of {str(path)!r} is damaged: {str(error).rstrip('.')}. Export the model "
                "again."
            ) from error
        if self.metadata.precision == "int8" and providers is None:
            log_missing_units("int8", "INT8 files run correctly, but gain less than with them.")
        calibration = self.metadata.calibration
        if calibration is not None and runtime not in calibration.runtimes:
            warnings.warn(
                f"{str(path)!r} was calibrated without {runtime}, which may compute some of its INT8 "
                f"layers wrong. Export the model again where {runtime} is installed, so that such layers "
                "are found and stay in float32.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def config(self) -> RetinaNetConfig:
        """Configuration of the model that was exported."""
        return self.metadata.config

    @property
    def facts(self) -> ExportMetadata:
        """The old name of ``metadata``.

        .. deprecated:: 0.3.0
            Use ``metadata``.
        """
        warnings.warn(
            "OnnxDetector.facts is deprecated and will be removed in focaldet 1.0; use metadata.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.metadata

    def run(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Run the file on a batch that is already preprocessed.

        Args:
            images: ``[B, C, H, W]`` float32, normalised and padded as the config says.
            sizes: ``[B, 2]`` int64, (height, width) of each image without its padding. None if the
                images have no padding. Maps do not depend on it.

        Returns:
            The file's outputs by name; see :func:`~focaldet.export.export_onnx`.

        Raises:
            TypeError: If an argument is not a tensor or has a wrong dtype.
            ValueError: If an argument has a wrong shape, or a size exceeds that of the batch.
        """
        check_images(images, self.metadata)
        if sizes is None:
            sizes = torch.tensor([list(images.shape[2:])] * len(images))
        check_sizes(sizes, images)
        inputs = {"images": images, "sizes": sizes}
        return self._session.run(
            {name: value.detach().cpu().contiguous() for name, value in inputs.items()}
        )

    def __repr__(self) -> str:
        shape = self.metadata.fixed_shape
        accepts = "any shape" if shape is None else f"shape {shape}"
        precision = "" if self.metadata.precision == "float32" else f"{self.metadata.precision}, "
        return (
            f"OnnxDetector({self.metadata.kind} of {self.config.num_classes} classes, {accepts}, "
            f"{precision}{self.runtime})"
        )

    def _choose_model(
        self,
        batch_size: int | None,
        score_threshold: float | None,
        max_detections: int | None,
    ) -> tuple[FileModel, int]:
        shape = self.metadata.fixed_shape
        if batch_size is not None and shape is not None and batch_size > shape[0]:
            raise ValueError(
                f"batch_size must be at most {shape[0]}, the batch size that the file was exported "
                f"with, got {batch_size}. Export the model without fixed_shape to use any batch size."
            )
        lowest = self.config.score_threshold if self.metadata.kind == "detections" else 0.0
        if score_threshold is not None and score_threshold < lowest:
            raise ValueError(
                f"score_threshold must be at least {lowest}, the threshold that the file was exported "
                f"with, got {score_threshold}. Export the model with a lower score_threshold in its "
                "config, or with postprocess=False."
            )
        most = self.config.max_detections if self.metadata.kind == "detections" else None
        if max_detections is not None and most is not None and max_detections > most:
            raise ValueError(
                f"max_detections must be at most {most}, the number that the file was exported with, "
                f"got {max_detections}. Export the model with a larger max_detections in its config, "
                "or with postprocess=False."
            )
        if batch_size is None:
            batch_size = 1 if shape is None else shape[0]
        return self._model, batch_size
