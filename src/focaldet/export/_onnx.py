"""Export a model as an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from focaldet._atomic import atomic_write
from focaldet._checks import check_integer, check_range
from focaldet._extras import import_extra
from focaldet.export._comparison import ExportReport, compare
from focaldet.export._exporter_calls import exporter_warnings_ignored, raising_export_errors
from focaldet.export._metadata import ExportMetadata
from focaldet.export._sessions import open_session
from focaldet.export._trace import checked_target, copy_for_export, fold_model, trace

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from focaldet.export._metadata import Kind, Shape
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

__all__ = ["OPSET", "export_onnx"]

OPSET = 20
"""The default ONNX opset. onnxruntime supports it since 1.17, OpenVINO since 2024.0."""

_MIN_OPSET = 18  # the lowest that torch's exporter writes


def export_onnx(
    model: RetinaNet,
    path: str | os.PathLike[str],
    *,
    postprocess: bool = True,
    fixed_shape: Shape | None = None,
    opset: int = OPSET,
    check_image: ImageSource | None = None,
) -> ExportReport:
    """Write a model as a single ONNX file, for onnxruntime, OpenVINO and other runtimes.

    Its inputs and outputs are those of :class:`~focaldet.export.ExportableDetector`, named
    ``images``, ``sizes``, ``boxes``, ``scores``, ``labels``, ``count``; or those of
    :class:`~focaldet.export.ExportableMaps`, named ``images``, ``logits_p3`` .. ``box_deltas_p7``
    for the default levels. The file's metadata contains the model's config, class names, preprocessing, thresholds and versions,
    under keys that begin with "focaldet."; :class:`~focaldet.export.OnnxDetector` reads them.

    Args:
        model: The model to export. It is exported in evaluation mode and left unchanged.
        path: The file to write, ending with ".onnx". The file is checked before it gets this name.
        postprocess: Whether the file includes the post-processing and returns detections. Otherwise
            it returns the network's maps.
        fixed_shape: ``(batch, height, width)``, the only shape that the file then accepts. Height and
            width must be multiples of ``size_divisor``. None accepts any shape.
        opset: ONNX opset, at least 18.
        check_image: The image on which the written file, run by onnxruntime, is compared with the
            model. None uses noise.

    Returns:
        How far the file's results are from the model's.

    Raises:
        ExportError: If the model cannot be exported, or the file gives different results. Nothing is
            written then.
        FileNotFoundError: If the folder of ``path`` does not exist.
        ImportError: If a package of the extra ``export`` is missing.
        TypeError: If ``model`` is not a RetinaNet, or is a copy made by ``optimize_for_inference``.
        ValueError: If an argument is invalid, the model is not in float32, or one of its options
            cannot be exported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(package, purpose="export_onnx", install="focaldet[export]")
    check_integer("opset", opset)
    check_range("opset", opset, _MIN_OPSET)
    target = checked_target(path, ".onnx")
    reference = copy_for_export(model)
    kind: Kind = "detections" if postprocess else "maps"
    metadata = ExportMetadata.of_model(model, kind, fixed_shape, opset)
    program = _to_onnx(trace(fold_model(reference), kind, fixed_shape), metadata, opset)
    with atomic_write(target) as temporary:
        with raising_export_errors("Writing the ONNX file"), exporter_warnings_ignored():
            program.save(temporary, external_data=False)
        return _check_file(temporary, reference, metadata, check_image).renamed(target)


def _to_onnx(
    program: torch.export.ExportedProgram, metadata: ExportMetadata, opset: int
) -> torch.onnx.ONNXProgram:
    with (
        raising_export_errors("torch.onnx.export"),
        exporter_warnings_ignored(),
        torch.no_grad(),
    ):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=metadata.inputs,
            output_names=metadata.outputs,
            external_data=False,
            verbose=False,
        )
    assert converted is not None  # noqa: S101  # dynamo=True always returns a program
    converted.model.metadata_props.update(metadata.to_strings())
    if metadata.fixed_shape is None:
        _name_dynamic_sizes(converted.model.graph, metadata.num_channels)
    return converted


def _name_dynamic_sizes(graph: Any, num_channels: int) -> None:
    """Replace names such as "s34" and "32*s39" by ones that make sense in a viewer."""
    images, *others = graph.inputs
    images.shape = type(images.shape)(["batch", num_channels, "height", "width"])
    for value in (*others, *graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


def _check_file(
    path: Path, model: RetinaNet, metadata: ExportMetadata, image: ImageSource | None
) -> ExportReport:
    """Load the file in onnxruntime and compare it with its model."""
    session = open_session(path, "onnxruntime", None, torch.get_num_threads())

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return session.run({"images": images, "sizes": sizes})

    comparisons = compare(model, metadata, image, run)
    return ExportReport(path, metadata.opset, session.runtime, comparisons)
