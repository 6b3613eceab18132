"""From a model to a program of ``torch.export``, and to its file."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from focaldet._atomic import atomic_write
from focaldet._checks import check_range, must_be
from focaldet.export._comparison import check_program
from focaldet.export._errors import explaining, hushed
from focaldet.export._exportable import ExportableDetector, ExportableMaps
from focaldet.export._metadata import FileFacts
from focaldet.retinanet import RetinaNet

if TYPE_CHECKING:
    import os

    from focaldet.export._comparison import ExportReport
    from focaldet.export._metadata import Kind, Shape
    from focaldet.images import ImageSource

__all__ = ["export_program", "folded", "frozen_copy", "target_path", "trace"]

_REMEDY = (
    "A backbone of your own must have no branch and no shape that depends on the values of images."
)
_MAX_BATCH = 4096
_MAX_SIDE = 2**15


def export_program(
    model: RetinaNet,
    path: str | os.PathLike[str],
    *,
    postprocess: bool = True,
    fixed_shape: Shape | None = None,
    check_image: ImageSource | None = None,
) -> ExportReport:
    """Write a model as a program of ``torch.export``, which needs torch and torchvision but not focaldet.

    ``torch.export.load(path).module()`` is a function of the inputs that
    :class:`~focaldet.export.ExportableDetector` or :class:`~focaldet.export.ExportableMaps` describes.
    ``torch.export.load(path, extra_files={"focaldet.config": ""})`` fills in what the file says of
    itself; the keys are those of the metadata of an ONNX file.

    Args:
        model: exported as in evaluation mode, and left as it is.
        path: ends in ".pt2". Written to a temporary file, checked, then renamed.
        postprocess: with it the file gives detections, without the network's maps.
        fixed_shape: ``(batch, height, width)``, the only shape that the file then takes, its sides
            multiples of ``size_divisor``. None lets it take any batch, height and width.
        check_image: on which the written file is compared with the model; None draws one.

    Returns:
        How far the file's results are from the model's.

    Raises:
        ExportError: the model can't be traced, or the file gives something else; the message says why.
        TypeError, ValueError: an argument that doesn't hold, a model that isn't float32 or is the copy
            that ``optimize_for_inference`` made, or one whose options can't be exported.
    """
    target = target_path(path, ".pt2")
    reference = frozen_copy(model)
    kind: Kind = "detections" if postprocess else "maps"
    facts = FileFacts.of_model(model, kind, fixed_shape)
    program = trace(folded(reference), kind, fixed_shape)
    with atomic_write(target) as temporary:
        with explaining("Writing the program"), hushed(), temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=facts.to_strings())
        return check_program(temporary, reference, facts, check_image).renamed(target)


def target_path(path: str | os.PathLike[str], suffix: str) -> Path:
    """Return where to write, or raise if the name or the folder doesn't hold."""
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(must_be("path", f"a file name that ends in {suffix}", repr(str(target))))
    if not target.parent.is_dir():
        raise FileNotFoundError(must_be("path", "in an existing folder", repr(str(target))))
    return target


def frozen_copy(model: RetinaNet) -> RetinaNet:
    """Return a copy on the CPU, in evaluation mode, for which no gradients are kept."""
    if not isinstance(model, RetinaNet):
        raise TypeError(must_be("model", "a RetinaNet", type(model).__name__))
    if model.is_optimized:
        remedy = "Export the original: its norms are folded then, too."
        got = "the copy that optimize_for_inference made"
        raise ValueError(must_be("model", "as it was before it was optimised", got, remedy))
    dtypes = {tensor.dtype for tensor in model.parameters()} - {torch.float32}
    if dtypes:
        got = ", ".join(sorted(str(dtype) for dtype in dtypes))
        remedy = "Convert it with model.float(): runtimes convert a file to half precision better."
        raise ValueError(must_be("model", "of float32 to be exported", got, remedy))
    return copy.deepcopy(model).cpu().eval().requires_grad_(requires_grad=False)


def folded(model: RetinaNet) -> RetinaNet:
    """Return a copy whose norms are folded into its convolutions, where the backbone can be traced."""
    with hushed():
        return model.optimize_for_inference(winograd=False).to(
            memory_format=torch.contiguous_format
        )


def trace(model: RetinaNet, kind: Kind, fixed_shape: Shape | None) -> torch.export.ExportedProgram:
    """Follow a model through one batch, of sizes that are left open unless they are fixed.

    Args:
        model: in evaluation mode.
        kind: with post-processing or without.
        fixed_shape: ``(batch, height, width)``, or None.
    """
    form = ExportableDetector(model) if kind == "detections" else ExportableMaps(model)
    divisor = model.preprocess.size_divisor
    if fixed_shape is None:
        # Large enough that no level has a single cell, which would be taken for a constant.
        tile = -(-2 * model.anchor_generator.strides[-1] // divisor)
        batch, height, width = 2, tile * divisor, (tile + 1) * divisor
    else:
        batch, height, width = _checked_shape(fixed_shape, divisor)
    example: tuple[torch.Tensor, ...] = (torch.zeros(batch, 3, height, width),)
    if kind == "detections":
        example += (torch.tensor([[height, width]] * batch),)
    least = model.anchor_generator.strides[2]  # a cell of C5
    dynamic = _open_dimensions(divisor, least)[: len(example)] if fixed_shape is None else None
    with (
        explaining("torch.export", _REMEDY),
        hushed(),
        torch.no_grad(),
        _sizes_of_one_are_like_others(),
    ):
        return torch.export.export(form.eval(), example, dynamic_shapes=dynamic)


def _checked_shape(shape: Shape, divisor: int) -> Shape:
    if len(shape) != 3:
        raise ValueError(must_be("fixed_shape", "(batch, height, width)", shape))
    for value in shape:
        check_range("fixed_shape", value, 1)
    if shape[1] % divisor or shape[2] % divisor:
        condition = f"of sides that size_divisor={divisor} divides"
        up = tuple(-(-side // divisor) * divisor for side in shape[1:])
        raise ValueError(must_be("fixed_shape", condition, shape, f"The next are {up}."))
    return shape


def _open_dimensions(divisor: int, least: int) -> tuple[dict[int, Any], ...]:
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    height, width = (
        torch.export.Dim(name, min=-(-least // divisor), max=_MAX_SIDE // divisor)
        for name in ("tiles_down", "tiles_across")
    )
    return {0: batch, 2: divisor * height, 3: divisor * width}, {0: batch}


def _sizes_of_one_are_like_others() -> Any:
    """Let torch.export assume nothing of sizes that might be 1, as batches and the last levels are.

    Otherwise it would write "not 1" into the program wherever the example had more. A torch that lacks
    the setting does so.
    """
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return _config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
