"""Trace a model with ``torch.export``, the first step of both exporters."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from focaldet._checks import check_integer, check_range, existing_folder, shortened
from focaldet.export._exportable import ExportableDetector, ExportableMaps
from focaldet.export._exporter_calls import exporter_warnings_ignored, raising_export_errors
from focaldet.retinanet import OptimizedRetinaNet, RetinaNet

if TYPE_CHECKING:
    import os

    from focaldet.export._metadata import Kind, Shape

__all__ = ["checked_target", "copy_for_export", "fold_model", "trace"]

_REMEDY = "A custom backbone must not have control flow or shapes that depend on the values of the images."
_MAX_BATCH = 4096
_MAX_SIDE = 2**15


def checked_target(path: str | os.PathLike[str], suffix: str) -> Path:
    """Return the path of the file to write.

    Raises:
        ValueError: If the name does not end with the suffix.
        FileNotFoundError: If the folder does not exist.
    """
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(f"path must end with {suffix!r}, got {str(target)!r}.")
    existing_folder("path", target.parent)
    return target


def copy_for_export(model: RetinaNet) -> RetinaNet:
    """Return a copy on the CPU in evaluation mode, whose parameters do not require gradients.

    Raises:
        TypeError: If the model is not a RetinaNet, or is an optimised copy.
        ValueError: If the model is not in float32.
    """
    if isinstance(model, OptimizedRetinaNet):
        raise TypeError(
            "model is a copy made by optimize_for_inference, which cannot be exported. Export the "
            "original model; the export folds its norms too."
        )
    if not isinstance(model, RetinaNet):
        raise TypeError(f"model must be a RetinaNet, got {type(model).__name__}.")
    dtypes = {tensor.dtype for tensor in model.parameters()} - {torch.float32}
    if dtypes:
        raise ValueError(
            f"model must be in float32, got {', '.join(sorted(map(str, dtypes)))}. Convert it with "
            "model.float(); for an ONNX file in half precision, pass precision='float16'."
        )
    return copy.deepcopy(model).cpu().eval().requires_grad_(requires_grad=False)


def fold_model(model: RetinaNet, dtype: torch.dtype | None = None) -> OptimizedRetinaNet:
    """Return a copy whose norms are folded into its convolutions, if its backbone can be traced.

    Args:
        model: The model.
        dtype: What the network computes in. None keeps the model's dtype.
    """
    with exporter_warnings_ignored():
        return model.optimize_for_inference(dtype, winograd=False).to(
            memory_format=torch.contiguous_format
        )


def trace(
    model: RetinaNet | OptimizedRetinaNet, kind: Kind, fixed_shape: Shape | None
) -> torch.export.ExportedProgram:
    """Trace a model on one batch.

    Args:
        model: The model, in evaluation mode.
        kind: "detections" with post-processing, "maps" without.
        fixed_shape: ``(batch, height, width)``. None makes all three dynamic.

    Raises:
        ExportError: If the model cannot be traced.
        TypeError: If ``fixed_shape`` is not made of integers.
        ValueError: If ``fixed_shape`` or an option of the post-processing is not supported.
    """
    module = ExportableDetector(model) if kind == "detections" else ExportableMaps(model)
    divisor = model.preprocess.size_divisor
    if fixed_shape is None:
        # Large enough that no level has a single cell, which would be traced as a constant, as would one
        # tile.
        tile = max(2, -(-2 * model.anchor_generator.strides[-1] // divisor))
        batch, height, width = 2, tile * divisor, (tile + 1) * divisor
    else:
        batch, height, width = _checked_shape(fixed_shape, divisor)
    channels = len(model.config.image_mean)
    example: tuple[torch.Tensor, ...] = (torch.zeros(batch, channels, height, width),)
    if kind == "detections":
        example += (torch.tensor([[height, width]] * batch),)
    # One cell of the backbone's last map.
    smallest_side = model.anchor_generator.strides[len(model.config.map_levels) - 1]
    dynamic = (
        _dynamic_shapes(divisor, smallest_side)[: len(example)] if fixed_shape is None else None
    )
    with (
        raising_export_errors("torch.export", _REMEDY),
        exporter_warnings_ignored(),
        torch.no_grad(),
        _no_specialisation_of_ones(),
    ):
        program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic)
    _remove_stack_traces(program)
    return program


def _remove_stack_traces(program: torch.export.ExportedProgram) -> None:
    """Remove the paths of this machine's Python files, which would be written with each operation."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _checked_shape(shape: Shape, divisor: int) -> Shape:
    if len(shape) != 3:
        raise ValueError(f"fixed_shape must be (batch, height, width), got {shortened(shape)}.")
    for value in shape:
        check_integer("fixed_shape", value)
        check_range("fixed_shape", value, 1)
    if shape[1] % divisor or shape[2] % divisor:
        height, width = (-(-side // divisor) * divisor for side in shape[1:])
        raise ValueError(
            f"The height and width of fixed_shape must be multiples of size_divisor={divisor}, got "
            f"{shape}. The next larger are {height} and {width}."
        )
    return shape


def _dynamic_shapes(divisor: int, smallest_side: int) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    height, width = (
        torch.export.Dim(name, min=-(-smallest_side // divisor), max=_MAX_SIDE // divisor)
        for name in ("tiles_down", "tiles_across")
    )
    return {0: batch, 2: divisor * height, 3: divisor * width}, {0: batch}


def _no_specialisation_of_ones() -> Any:
    """Stop torch.export from assuming that sizes above 1 in the example are always above 1.

    Batches and the last levels may have size 1. Versions of PyTorch without this setting make no such
    assumption.
    """
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return _config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
