"""The sigmoid focal loss with class indices, as Triton kernels that read logits as they are stored.

There are two pairs of kernels, because dense logits are stored in one of two ways:

* Rows: the K classes of a place are neighbours, as in ``[N, K]`` and in channels_last maps.
* Planes: the positions of a class are neighbours, as in contiguous ``[B, A*K, H, W]`` maps.

`focaldet.losses._cuda` imports this module if Triton is installed and needed; it also has the
autograd function. The forward kernels read the logits once and write one float32 sum per program,
which PyTorch adds up. There are no atomics, so results are reproducible. The backward kernels
recompute everything from the logits and write the gradient in their dtype and layout. All
arithmetic is float32. Offsets are 32-bit within a plane of K classes or within a program of
rows, and 64-bit beyond these, so any number of logits can be read.

The tests compare the kernels with float64 in Triton's interpreter and compile them ahead of time
for sm_80 and sm_90. They have not been run on a GPU, so no claim is made about their speed. The
interpreter cannot run inline PTX and uses exact operations in its place (see `_exp2`).
"""

# Triton is untyped and optional, and its functions take positional arguments:
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.losses._arguments import KernelOptions
    from focaldet.losses._layout import Level

BLOCK = 2048
"""Entries that a program has in registers at a time."""
VECTOR = 8
"""Largest number of neighbouring entries of a row that share the work of finding their target."""
TILE = 4
"""Most classes in a tile of the planes kernels, which has ``BLOCK // classes`` positions."""
SMALL = 256
"""Number of positions of a plane up to which tiles have more classes and fewer positions."""
CHUNK = 16
"""Classes per program of the planes kernels. More programs keep a large GPU busy."""
COMPILED = {"num_warps": 4, "enable_fp_fusion": True}
"""KernelOptions of the compiler. Triton warns unless the fusion of products and sums is specified."""
PTX = torch.version.hip is None and not triton.knobs.runtime.interpret
"""Whether inline PTX can be used: not by the interpreter and not on AMD GPUs."""


@triton.jit
def _exp2(r, PTX: tl.constexpr):
    """Compute ``2 ** r`` for r in [-0.6, 0.6].

    `tl.exp2` is the same instruction but also handles results below the normal range. The
    instruction is documented to be accurate to 2 ** -22.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505 (Triton compiles only the branch of a constant condition)
        return tl.exp2(r)


@triton.jit
def _reciprocal(d, PTX: tl.constexpr):
    """Compute ``1 / d`` for d in [1, 2]. The instruction is documented to be accurate to 1 ulp."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return 1.0 / d


@triton.jit
def _exp(a, PTX: tl.constexpr):
    """Compute ``exp(a)`` for a <= 0 to float32 accuracy, and 0 below about -87.7.

    ``exp2`` of the full exponent would be off by the rounding of that exponent, 1e-5 for small
    results. So the integer power of two is split off and built from its bits.
    """
    a = tl.maximum(a, -88.0, propagate_nan=tl.PropagateNan.ALL)
    # 1.5 * 2**23: the sum has no bits for a fraction, so n is rounded and is in its low bits.
    shifted = a * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    # The constants add up to log 2, and the first product is exact.
    r = (a - n * 0.693359375) + n * 2.12194440054690583e-4
    power = (shifted.to(tl.int32, bitcast=True) << 23) + 1065353216  # the bits of 2.0**n
    return _exp2(r * 1.4426950408889634, PTX) * power.to(tl.float32, bitcast=True)


@triton.jit
def _terms(x, positive, rest, WHOLE: tl.constexpr, REST: tl.constexpr, PTX: tl.constexpr):
    """Compute the parts of ``f(z) = p^gamma s``, where z is the logit of a wrong prediction.

    Returns:
        ``p = sigmoid(z)``, ``q = 1 - p``, ``s = log(1 + exp(z))`` and ``p^gamma``.
    """
    z = tl.where(positive, -x, x)
    e = _exp(-tl.abs(z), PTX)
    inverse = _reciprocal(1.0 + e, PTX)
    small = e * inverse
    low = z < 0.0
    p = tl.where(low, small, inverse)
    q = tl.where(low, inverse, small)
    # log(1 + e) as e times a polynomial, fitted for the least relative error on [0, 1]: 3e-8.
    series = e * 0.0053648246 - 0.030065794
    series = series * e + 0.07920454
    series = series * e - 0.13753803
    series = series * e + 0.19153655
    series = series * e - 0.24857163
    series = series * e + 0.33321324
    series = series * e - 0.49999648
    series = series * e + 1.0
    log = e * series
    s = log + tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if REST:
        power = _exp(-rest * (log + tl.maximum(-z, 0.0)), PTX)  # p ** rest
    else:
        power = tl.full(x.shape, 1.0, tl.float32)
    for _ in tl.static_range(WHOLE):
        power = power * p
    return p, q, s, power


@triton.jit
def _gradient(p, q, s, power, gamma):
    """Compute the derivative of ``f(z)``, which is ``p^gamma (gamma q s + p)``."""
    s = tl.where(s > 3e38, 3e38, s)  # q is 0 there, and 0 * inf would be NaN
    return power * (gamma * q * s + p)


@triton.jit
def _row_entries(
    x_ptr,
    targets_ptr,
    alpha_ptr,
    positive_weight,
    background_weight,
    numel,
    ignore_index,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read the entries of this program, as groups of V neighbours that are in the same row.

    Returns:
        The first entry, offsets from it, which of them exist, the logits (0 where a row is
        ignored), which entries are positives, which are not ignored, and the weights of both.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = first // K  # the only real division, since K is a compile-time constant
    start = (first - first_row * K).to(tl.int32) // V
    GROUPS: tl.constexpr = K // V
    group = start + tl.arange(0, BLOCK // V)
    row = group // GROUPS
    column = ((group - row * GROUPS) * V)[:, None] + tl.arange(0, V)[None, :]
    offsets = tl.arange(0, BLOCK // V)[:, None] * V + tl.arange(0, V)[None, :]
    left = tl.minimum(numel - first, BLOCK).to(tl.int32)
    exists = tl.arange(0, BLOCK // V) * V < left
    target = tl.load(targets_ptr + first_row + row, mask=exists, other=ignore_index).to(tl.int32)
    kept = (target != ignore_index)[:, None]
    there = exists[:, None]
    # Ignored rows are read too, since a data-dependent mask would prevent wide loads.
    x = tl.load(x_ptr + first + offsets, mask=there, other=0.0).to(tl.float32)
    if alpha_ptr is not None:
        positive_weight = tl.load(alpha_ptr + column)
        background_weight = 1.0 - positive_weight
    positive = target[:, None] == column
    x = tl.where(kept, x, 0.0)
    return first, offsets, there, x, positive, kept, positive_weight, background_weight


@triton.jit(do_not_specialize=["targets_start", "sums_stride", "sums_start", "ignore_index"])
def rows_forward_kernel(
    x_ptr,
    targets_ptr,
    alpha_ptr,
    sums_ptr,
    numel,
    targets_stride,
    targets_start,
    sums_stride,
    sums_start,
    ignore_index,
    positive_weight,
    background_weight,
    rest,
    K: tl.constexpr,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write the sum of the losses of each program's entries; the second axis is the image."""
    image = tl.program_id(1).to(tl.int64)
    _, _, _, x, positive, kept, positive_weight, background_weight = _row_entries(
        x_ptr + image * numel, targets_ptr + image * targets_stride + targets_start,
        alpha_ptr, positive_weight, background_weight, numel, ignore_index, K, V, BLOCK,
    )  # fmt: skip
    _, _, s, power = _terms(x, positive, rest, WHOLE, REST, PTX)
    losses = tl.where(positive, positive_weight, background_weight) * (power * s)
    place = sums_ptr + image * sums_stride + sums_start + tl.program_id(0)
    tl.store(place, tl.sum(tl.where(kept, losses, 0.0)))


@triton.jit(do_not_specialize=["targets_start", "ignore_index"])
def rows_backward_kernel(
    x_ptr,
    targets_ptr,
    alpha_ptr,
    upstream_ptr,
    gradient_ptr,
    numel,
    targets_stride,
    targets_start,
    ignore_index,
    positive_weight,
    background_weight,
    gamma,
    rest,
    K: tl.constexpr,
    V: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write the gradient of each program's entries times the image's ``upstream``."""
    image = tl.program_id(1).to(tl.int64)
    first, offsets, there, x, positive, kept, positive_weight, background_weight = _row_entries(
        x_ptr + image * numel, targets_ptr + image * targets_stride + targets_start,
        alpha_ptr, positive_weight, background_weight, numel, ignore_index, K, V, BLOCK,
    )  # fmt: skip
    p, q, s, power = _terms(x, positive, rest, WHOLE, REST, PTX)
    upstream = tl.load(upstream_ptr + image)
    factor = tl.where(positive, -positive_weight * upstream, background_weight * upstream)
    gradient = tl.where(kept, factor * _gradient(p, q, s, power, gamma), 0.0)
    place = gradient_ptr + image * numel + first + offsets
    tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=there)


@triton.jit
def _plane_targets(
    targets_ptr, positions, planes, targets_stride, targets_start, ignore_index, WIDTH: tl.constexpr
):
    """Read the targets of this program's positions.

    Returns:
        The image, the first position of the program, which positions exist, and their targets
        (``ignore_index`` where they do not exist).
    """
    plane = tl.program_id(1)
    image = plane // planes
    first = tl.program_id(0) * WIDTH
    there = tl.arange(0, WIDTH) < positions - first
    start = image.to(tl.int64) * targets_stride + targets_start
    start += (plane - image * planes).to(tl.int64) * positions + first
    targets = tl.load(targets_ptr + start + tl.arange(0, WIDTH), mask=there, other=ignore_index)
    return image, first, there, targets.to(tl.int32)


@triton.jit(
    do_not_specialize=["planes", "targets_start", "sums_stride", "sums_start", "ignore_index"]
)
def planes_forward_kernel(
    x_ptr,
    targets_ptr,
    alpha_ptr,
    sums_ptr,
    positions,
    planes,
    targets_stride,
    targets_start,
    sums_stride,
    sums_start,
    ignore_index,
    positive_weight,
    background_weight,
    rest,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write the sum of the losses of each program's positions and classes.

    The axes of the grid are blocks of WIDTH positions, planes of all images and chunks of classes.
    """
    image, first, there, target = _plane_targets(
        targets_ptr, positions, planes, targets_stride, targets_start, ignore_index, WIDTH
    )
    plane, chunk = tl.program_id(1), tl.program_id(2)
    x_ptr += plane.to(tl.int64) * K * positions + first
    totals = tl.zeros([CLASSES, WIDTH], tl.float32)
    for k0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, K), CLASSES):
        k = k0 + tl.arange(0, CLASSES)
        mask = there[None, :] & (k < K)[:, None]
        offsets = k[:, None] * positions + tl.arange(0, WIDTH)[None, :]
        # A logit of -inf has no loss as background.
        x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        positive = target[None, :] == k[:, None]
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + k, mask=k < K, other=0.0)[:, None]
            weight = tl.where(positive, alpha, 1.0 - alpha)
        else:
            weight = tl.where(positive, positive_weight, background_weight)
        _, _, s, power = _terms(x, positive, rest, WHOLE, REST, PTX)
        totals += weight * (power * s)
    totals = tl.where((target != ignore_index)[None, :], totals, 0.0)
    program = ((plane - image * planes) * tl.num_programs(2) + chunk) * tl.num_programs(0)
    place = sums_ptr + image.to(tl.int64) * sums_stride + sums_start + program + tl.program_id(0)
    tl.store(place, tl.sum(totals))


@triton.jit(do_not_specialize=["planes", "targets_start", "ignore_index"])
def planes_backward_kernel(
    x_ptr,
    targets_ptr,
    alpha_ptr,
    upstream_ptr,
    gradient_ptr,
    positions,
    planes,
    targets_stride,
    targets_start,
    ignore_index,
    positive_weight,
    background_weight,
    gamma,
    rest,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """Write the gradient of each program's positions and classes times the image's ``upstream``."""
    image, first, there, target = _plane_targets(
        targets_ptr, positions, planes, targets_stride, targets_start, ignore_index, WIDTH
    )
    plane, chunk = tl.program_id(1), tl.program_id(2)
    start = plane.to(tl.int64) * K * positions + first
    kept = (target != ignore_index)[None, :]
    upstream = tl.load(upstream_ptr + image)
    for k0 in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, K), CLASSES):
        k = k0 + tl.arange(0, CLASSES)
        mask = there[None, :] & (k < K)[:, None]
        offsets = k[:, None] * positions + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        positive = target[None, :] == k[:, None]
        if alpha_ptr is not None:
            alpha = tl.load(alpha_ptr + k, mask=k < K, other=0.0)[:, None] * upstream
            factor = tl.where(positive, -alpha, upstream - alpha)
        else:
            factor = tl.where(positive, -positive_weight * upstream, background_weight * upstream)
        p, q, s, power = _terms(x, positive, rest, WHOLE, REST, PTX)
        gradient = tl.where(kept, factor * _gradient(p, q, s, power, gamma), 0.0)
        place = gradient_ptr + start + offsets
        tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """How the planes kernels divide a plane of K classes."""

    chunk: int  # classes per program
    classes: int  # classes per step of a program
    width: int  # positions per program


def tile(num_classes: int, positions: int) -> Tile:
    """Choose a tile of `BLOCK` entries. A plane with few positions gets more classes per step."""
    classes = TILE if positions > SMALL else CHUNK
    classes = min(classes, triton.next_power_of_2(num_classes))
    return Tile(max(CHUNK, classes), classes, BLOCK // classes)


def image_totals(
    tensors: Sequence[Tensor],
    levels: Sequence[Level],
    targets: Sequence[Tensor],
    options: KernelOptions,
) -> Tensor:
    """Compute the sum of the losses of each image over all levels, float32 ``[B]``.

    Args:
        tensors: Logits per level in float32, bfloat16 or float16, with at least one entry.
        levels: How each of them is stored.
        targets: int64 or int32 class indices per level. Each tensor is contiguous with one row per
            image, in which those of the level begin at ``level.start``, in the order of its memory.
        options: What to compute.
    """
    images, device = levels[0].images, tensors[0].device
    grids = [_grid(level) for level in levels]
    sizes = [math.prod(grid) // images for grid in grids]
    stride = sum(sizes)
    sums = torch.empty(images, stride, dtype=torch.float32, device=device)
    start = 0
    with torch.cuda.device_of(sums):
        for x, level, target, grid, size in zip(
            tensors, levels, targets, grids, sizes, strict=True
        ):
            if size == 0:  # a level without positions
                continue
            kernel = planes_forward_kernel if level.planes else rows_forward_kernel
            kernel[grid](
                x, target, options.class_weights, sums, *_sizes(level), target.shape[-1],
                level.start, stride, start, options.ignore_index, *options.weights, options.rest,
                **_constants(level, options),
            )  # fmt: skip
            start += size
    return sums.sum(1)


def gradient(
    x: Tensor, level: Level, target: Tensor, upstream: Tensor, options: KernelOptions
) -> Tensor:
    """Compute the gradient of ``(image_totals(...) * upstream).sum()`` for one level.

    Args:
        x: As an element of ``tensors`` in `image_totals`; the others are such elements, too.
        level: How ``x`` is stored.
        target: Class indices.
        upstream: float32 ``[B]``, contiguous.
        options: What to compute.

    Returns:
        A tensor with the shape, dtype and strides of ``x``.
    """
    out = torch.empty_like(x)
    if level.places == 0:
        return out
    kernel = planes_backward_kernel if level.planes else rows_backward_kernel
    with torch.cuda.device_of(x):
        kernel[_grid(level)](
            x, target, options.class_weights, upstream, out, *_sizes(level), target.shape[-1],
            level.start, options.ignore_index, *options.weights, options.gamma, options.rest,
            **_constants(level, options),
        )  # fmt: skip
    return out


def _grid(level: Level) -> tuple[int, ...]:
    if not level.planes:
        return triton.cdiv(level.places * level.num_classes, BLOCK), level.images
    shape = tile(level.num_classes, level.positions)
    blocks = triton.cdiv(level.positions, shape.width)
    return blocks, level.images * level.planes, triton.cdiv(level.num_classes, shape.chunk)


def _sizes(level: Level) -> tuple[int, ...]:
    if not level.planes:
        return (level.places * level.num_classes,)
    return level.positions, level.planes


def _constants(level: Level, options: KernelOptions) -> dict[str, Any]:
    """Return the constants that a kernel is compiled for, and options of the compiler."""
    K = level.num_classes
    constants = {"K": K, "WHOLE": options.whole, "REST": options.rest > 0, "PTX": PTX, **COMPILED}
    if not level.planes:
        return constants | {"V": math.gcd(K, VECTOR), "BLOCK": BLOCK}
    shape = tile(K, level.positions)
    return constants | {"CHUNK": shape.chunk, "CLASSES": shape.classes, "WIDTH": shape.width}
