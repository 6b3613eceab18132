"""Export a model as a program of ``torch.export``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet._atomic import atomic_write
from focaldet.export._comparison import ExportReport, compare
from focaldet.export._exporter_calls import exporter_warnings_ignored, raising_export_errors
from focaldet.export._metadata import ExportMetadata
from focaldet.export._trace import checked_target, copy_for_export, fold_model, trace

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from focaldet.export._metadata import Kind, Shape
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

__all__ = ["export_program"]


def export_program(
    model: RetinaNet,
    path: str | os.PathLike[str],
    *,
    postprocess: bool = True,
    fixed_shape: Shape | None = None,
    check_image: ImageSource | None = None,
) -> ExportReport:
    """Write a model as a program of ``torch.export``, which runs without focaldet.

    Running it requires torch and torchvision. ``torch.export.load(path).module()`` is a function of
    the inputs described in :class:`~focaldet.export.ExportableDetector` or
    :class:`~focaldet.export.ExportableMaps`. The file contains the same metadata as an ONNX file, as
    extra files: ``torch.export.load(path, extra_files={"focaldet.config": ""})`` fills in the values.

    Args:
        model: The model to export. It is exported in evaluation mode and left unchanged.
        path: The file to write, ending with ".pt2". The file is checked before it gets this name.
        postprocess: Whether the file includes the post-processing and returns detections. Otherwise
            it returns the network's maps.
        fixed_shape: ``(batch, height, width)``, the only shape that the file then accepts. Height and
            width must be multiples of ``size_divisor``. None accepts any shape.
        check_image: The image on which the written file is compared with the model. None uses noise.

    Returns:
        How far the file's results are from the model's.

    Raises:
        ExportError: If the model cannot be traced, or the file gives different results. Nothing is
            written then.
        FileNotFoundError: If the folder of ``path`` does not exist.
        TypeError: If ``model`` is not a RetinaNet, or is a copy made by ``optimize_for_inference``.
        ValueError: If an argument is invalid, the model is not in float32, or one of its options
            cannot be exported.
    """
    target = checked_target(path, ".pt2")
    reference = copy_for_export(model)
    kind: Kind = "detections" if postprocess else "maps"
    metadata = ExportMetadata.of_model(model, kind, fixed_shape)
    program = trace(fold_model(reference), kind, fixed_shape)
    with atomic_write(target) as temporary:
        with (
            raising_export_errors("Writing the program"),
            exporter_warnings_ignored(),
            temporary.open("wb") as file,
        ):
            torch.export.save(program, file, extra_files=metadata.to_strings())
        return _check_file(temporary, reference, metadata, check_image).renamed(target)


def _check_file(
    path: Path, model: RetinaNet, metadata: ExportMetadata, image: ImageSource | None
) -> ExportReport:
    """Load the program and compare it with its model."""
    with (
        raising_export_errors("Loading the program"),
        exporter_warnings_ignored(),
        path.open("rb") as file,
    ):
        function = torch.export.load(file).module()

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        with raising_export_errors("Running the program"), torch.no_grad():
            outputs = function(*(images, sizes)[: len(metadata.inputs)])
        return dict(zip(metadata.outputs, outputs, strict=True))

    comparisons = compare(model, metadata, image, run)
    return ExportReport(path, None, f"torch {torch.__version__}", comparisons)
