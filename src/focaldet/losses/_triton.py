"""The sigmoid focal loss of rows ``[N, K]`` with class indices, as two Triton kernels.

`focaldet.losses._cuda` imports this module if Triton is installed and needed; it also has the
autograd function. The forward kernel reads the logits once and writes one float32 sum per program,
which PyTorch adds up. There are no atomics, so results are reproducible. The backward kernel
recomputes everything from the logits and writes the gradient in their dtype. All arithmetic is
float32.

The tests compare the kernels with float64 in Triton's interpreter and compile them ahead of time
for sm_80 and sm_90. They have not been run on a GPU, so no claim is made about their speed.
"""

# Triton is untyped and optional, and its functions take positional arguments:
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2048
"""Entries per program."""
COMPILED = {"num_warps": 4, "enable_fp_fusion": True}
"""Options of the compiler. Triton warns unless the fusion of products and sums is specified."""
MOST_FACTORS = 8
"""The highest power of the error that is computed as a product."""


@triton.jit
def _exp(a):
    """Compute ``exp(a)`` for a <= 0 to float32 accuracy: 0 below about -87.7, NaN for NaN.

    The hardware's ``exp2`` of the full exponent would be off by the rounding of that exponent, 1e-5
    for small results. So the integer power of two is split off and built from its bits.
    """
    a = tl.where(a < -88.0, -88.0, a)
    n = tl.floor(a * 1.4426950408889634 + 0.5)
    r = (
        a - n * 0.693359375
    ) + n * 2.12194440054690583e-4  # the constants add up to log 2; the first product is exact
    power = (n.to(tl.int32) + 127) << 23
    return tl.exp2(r * 1.4426950408889634) * power.to(tl.float32, bitcast=True)


@triton.jit
def _terms(x, positive, rest, WHOLE: tl.constexpr, REST: tl.constexpr):
    """Compute the parts of ``f(z) = p^gamma s``, where z is the logit of a wrong prediction.

    Returns:
        ``p = sigmoid(z)``, ``q = 1 - p``, ``s = log(1 + exp(z))`` and ``p^gamma``.
    """
    z = tl.where(positive, -x, x)
    e = _exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    p = tl.where(z < 0.0, e * inverse, inverse)
    q = tl.where(z < 0.0, inverse, e * inverse)
    # log(1 + e) = 2 artanh(w): w is at most 1/3, and nothing cancels
    w = e / (2.0 + e)
    v = w * w
    series = v * (1.0 / 15.0) + 1.0 / 13.0
    series = series * v + 1.0 / 11.0
    series = series * v + 1.0 / 9.0
    series = series * v + 1.0 / 7.0
    series = series * v + 1.0 / 5.0
    series = series * v + 1.0 / 3.0
    series = series * v + 1.0
    log = 2.0 * w * series
    s = tl.where(z < 0.0, 0.0, z) + log  # not maximum(), which would hide a NaN
    if REST:
        power = _exp(-rest * (tl.where(z < 0.0, -z, 0.0) + log))  # p ** rest
    else:
        power = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(WHOLE):
        power = power * p
    return p, q, s, power


@triton.jit
def _entries(x_ptr, targets_ptr, numel, ignore_index, K: tl.constexpr, BLOCK: tl.constexpr):
    """Read the entries of this program.

    Returns:
        The offsets, which of them are in range, the logits (0 where a row is ignored), which
        entries are positives, and which are not ignored.
    """
    start = tl.program_id(0) * BLOCK
    first_row = start // K  # the only real division, since K is a compile-time constant
    column = start - first_row * K + tl.arange(0, BLOCK)
    row = column // K
    column = column - row * K
    offsets = start + tl.arange(0, BLOCK)
    there = offsets < numel
    target = tl.load(targets_ptr + first_row + row, mask=there, other=0).to(tl.int64)
    kept = there & (target != ignore_index)
    # Ignored rows are read too, since a data-dependent mask would prevent wide loads.
    x = tl.load(x_ptr + offsets, mask=there, other=0.0).to(tl.float32)
    return offsets, there, tl.where(kept, x, 0.0), target == column, kept


@triton.jit
def forward_kernel(
    x_ptr,
    targets_ptr,
    sums_ptr,
    numel,
    ignore_index,
    positive_weight,
    background_weight,
    rest,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of the losses of each program's entries."""
    _, _, x, positive, kept = _entries(x_ptr, targets_ptr, numel, ignore_index, K, BLOCK)
    _, _, s, power = _terms(x, positive, rest, WHOLE, REST)
    losses = tl.where(positive, positive_weight, background_weight) * (power * s)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(kept, losses, 0.0)))


@triton.jit
def backward_kernel(
    x_ptr,
    targets_ptr,
    upstream_ptr,
    gradient_ptr,
    numel,
    ignore_index,
    positive_weight,
    background_weight,
    gamma,
    rest,
    K: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of each program's entries, ``p^gamma (gamma q s + p)`` times factors."""
    offsets, there, x, positive, kept = _entries(x_ptr, targets_ptr, numel, ignore_index, K, BLOCK)
    p, q, s, power = _terms(x, positive, rest, WHOLE, REST)
    s = tl.where(s > 3e38, 3e38, s)  # q is 0 there, and 0 * inf would be NaN
    factor = tl.where(positive, -positive_weight, background_weight) * tl.load(upstream_ptr)
    gradient = tl.where(kept, factor * (power * (gamma * q * s + p)), 0.0)
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=there)


def total(
    x: Tensor, targets: Tensor, *, alpha: float | None, gamma: float, ignore_index: int
) -> Tensor:
    """Compute the sum of the losses of contiguous logits ``[N, K]``, a float32 scalar.

    Args:
        x: float32, bfloat16 or float16, fewer than 2**31 - BLOCK entries, at least one.
        targets: int64 or int32 class indices ``[N]``, contiguous.
        alpha: Weight of the positives, or None.
        gamma: Focusing parameter, >= 0.
        ignore_index: Index of rows to ignore.
    """
    programs = triton.cdiv(x.numel(), BLOCK)
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    weights, power = _weights(alpha), _power(gamma)
    with torch.cuda.device_of(x):
        forward_kernel[(programs,)](
            x, targets, sums, x.numel(), ignore_index, *weights, *power[:1],
            K=x.shape[1], WHOLE=power[1], REST=power[2], BLOCK=BLOCK, **COMPILED,
        )  # fmt: skip
    return sums.sum()


def gradient(
    x: Tensor,
    targets: Tensor,
    upstream: Tensor,
    *,
    alpha: float | None,
    gamma: float,
    ignore_index: int,
) -> Tensor:
    """Compute the gradient of ``total(...) * upstream`` in the dtype of ``x``.

    Args:
        x: As in `total`.
        targets: As in `total`.
        upstream: A float32 scalar.
        alpha: As in `total`.
        gamma: As in `total`.
        ignore_index: As in `total`.
    """
    out = torch.empty_like(x)
    programs = triton.cdiv(x.numel(), BLOCK)
    weights, power = _weights(alpha), _power(gamma)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            x, targets, upstream, out, x.numel(), ignore_index, *weights, float(gamma), power[0],
            K=x.shape[1], WHOLE=power[1], REST=power[2], BLOCK=BLOCK, **COMPILED,
        )  # fmt: skip
    return out


def _weights(alpha: float | None) -> tuple[float, float]:
    """Return the weights of positives and of background."""
    return (1.0, 1.0) if alpha is None else (float(alpha), 1.0 - alpha)


def _power(gamma: float) -> tuple[float, int, bool]:
    """Split gamma into whole factors and a rest; return rest, factors, whether the rest is > 0."""
    whole = min(math.floor(gamma), MOST_FACTORS)
    return float(gamma - whole), whole, gamma > whole
