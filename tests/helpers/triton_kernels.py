"""Compile the Triton kernels of the focal loss ahead of time, for GPUs that are not there."""

# Triton is untyped and optional:
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["KernelCase", "compile_kernel"]

_FLOATS = {"positive_weight", "background_weight", "gamma", "rest"}
_ALIGNED = {"numel", "positions", "targets_stride"}


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """What a kernel is compiled for.

    Attributes:
        num_classes: Number of classes.
        dtype: Triton's name of the dtype of the logits.
        whole: Whole part of gamma.
        rest: Whether gamma has a fractional part.
        per_class: Whether each class has its own weight.
        positions: Positions of a plane.
        aligned: Whether sizes are multiples of 16, so that loads can be wide.
    """

    num_classes: int
    dtype: str = "fp32"
    whole: int = 2
    rest: bool = False
    per_class: bool = False
    positions: int = 16_800
    aligned: bool = True


def compile_kernel(kernel: Any, case: KernelCase, arch: int) -> Any:
    """Compile a kernel of `focaldet.losses._triton` for an NVIDIA architecture such as 90.

    Returns:
        Its code by kind, such as "ptx" and "cubin".
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from focaldet.losses import _triton

    rows = "rows" in kernel.__name__
    constants: dict[str, Any] = {
        "K": case.num_classes, "WHOLE": case.whole, "REST": case.rest, "PTX": True
    }  # fmt: skip
    if rows:
        constants |= {"V": math.gcd(case.num_classes, _triton.VECTOR), "BLOCK": _triton.BLOCK}
    else:
        tile = _triton.tile(case.num_classes, case.positions)
        constants |= {"CHUNK": tile.chunk, "CLASSES": tile.classes, "WIDTH": tile.width}
    if not case.per_class:
        constants["alpha_ptr"] = None
    names = kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | {n: "*fp32" for n in names if n.endswith("_ptr")}
    kinds |= {n: "fp32" for n in names if n in _FLOATS}
    kinds |= {n: f"*{case.dtype}" for n in names if n in {"x_ptr", "gradient_ptr"}}
    kinds |= {"targets_ptr": "*i64" if rows else "*i32"} | dict.fromkeys(constants, "constexpr")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if kinds[n].startswith("*") or (case.aligned and n in _ALIGNED)
    }
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=_triton.COMPILED).asm
