"""From a model to an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from focaldet._atomic import atomic_write
from focaldet._checks import check_range
from focaldet.export._comparison import ExportReport, compare
from focaldet.export._errors import explaining, hushed, needed
from focaldet.export._metadata import FileFacts
from focaldet.export._program import folded, frozen_copy, target_path, trace
from focaldet.export._sessions import open_session

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from focaldet.export._metadata import Kind, Shape
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

__all__ = ["OPSET", "export_onnx"]

OPSET = 20
"""Of ONNX, unless another is asked for; onnxruntime has it since 1.17, OpenVINO since 2024.0."""

_FIRST_OPSET = 18  # that torch's exporter writes


def export_onnx(
    model: RetinaNet,
    path: str | os.PathLike[str],
    *,
    postprocess: bool = True,
    fixed_shape: Shape | None = None,
    opset: int = OPSET,
    check_image: ImageSource | None = None,
) -> ExportReport:
    """Write a model as one ONNX file, for onnxruntime, OpenVINO and others.

    Its inputs and outputs are those of :class:`~focaldet.export.ExportableDetector`, by the names
    ``images``, ``sizes``, ``boxes``, ``scores``, ``labels``, ``count``; or those of
    :class:`~focaldet.export.ExportableMaps`, ``images``, ``logits_p3`` .. ``box_deltas_p7``. The file's
    metadata holds the model's config, class names, preprocessing, thresholds and versions, by keys
    that begin with "focaldet."; :class:`~focaldet.export.OnnxDetector` reads them.

    Args:
        model: exported as in evaluation mode, and left as it is.
        path: ends in ".onnx". Written to a temporary file, checked, then renamed.
        postprocess: with it the file gives detections, without the network's maps.
        fixed_shape: ``(batch, height, width)``, the only shape that the file then takes, its sides
            multiples of ``size_divisor``. None lets it take any batch, height and width.
        opset: of ONNX, at least 18.
        check_image: on which the written file, run by onnxruntime, is compared with the model; None
            draws one.

    Returns:
        How far the file's results are from the model's.

    Raises:
        ExportError: the model can't be exported, or the file gives something else; the message says
            why.
        ImportError: a package of the extra ``export`` is missing.
        TypeError, ValueError: an argument that doesn't hold, a model that isn't float32 or is the copy
            that ``optimize_for_inference`` made, or one whose options can't be exported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package)
    check_range("opset", opset, _FIRST_OPSET)
    target = target_path(path, ".onnx")
    reference = frozen_copy(model)
    kind: Kind = "detections" if postprocess else "maps"
    facts = FileFacts.of_model(model, kind, fixed_shape, opset)
    program = _to_onnx(trace(folded(reference), kind, fixed_shape), facts, opset)
    with atomic_write(target) as temporary:
        with explaining("Writing the ONNX file"), hushed():
            program.save(temporary, external_data=False)
        return _check(temporary, reference, facts, check_image).renamed(target)


def _to_onnx(
    program: torch.export.ExportedProgram, facts: FileFacts, opset: int
) -> torch.onnx.ONNXProgram:
    with explaining("torch.onnx.export"), hushed(), torch.no_grad():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=facts.inputs,
            output_names=facts.outputs,
            external_data=False,
            verbose=False,
        )
    assert converted is not None  # noqa: S101  # with dynamo=True there is a program
    converted.model.metadata_props.update(facts.to_strings())
    if facts.fixed_shape is None:
        _name_open_sizes(converted.model.graph)
    return converted


def _name_open_sizes(graph: Any) -> None:
    """Give what people see in a viewer its names, rather than torch's "s34" and "32*s39"."""
    images, *others = graph.inputs
    images.shape = type(images.shape)(["batch", 3, "height", "width"])
    for value in (*others, *graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


def _check(
    path: Path, model: RetinaNet, facts: FileFacts, image: ImageSource | None
) -> ExportReport:
    session = open_session(path, "onnxruntime", None, torch.get_num_threads())

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return session.run({"images": images, "sizes": sizes})

    return ExportReport(path, facts.opset, session.runtime, compare(model, facts, image, run))
