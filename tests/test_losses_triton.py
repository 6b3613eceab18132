"""The Triton path of the sigmoid focal loss, without a GPU.

The tests run this file as a program: ``interpret`` runs the kernels on a CPU in Triton's
interpreter, which must be enabled before the kernels are imported, and ``compile`` compiles them
ahead of time. Both print JSON.
"""

# Triton is untyped and optional:
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from focaldet.losses import _cuda, sigmoid_focal_loss, sigmoid_focal_loss_maps
from focaldet.losses._arguments import KernelOptions, Options
from focaldet.losses._layout import level_of, levels_of_maps
from focaldet.losses._sigmoid import _on_cuda as on_device
from tests.helpers.triton_kernels import KernelCase, compile_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GAMMAS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 12.5)
CLASSES = (1, 2, 3, 80, 365)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1.3e-6, 5e-6
# The interpreter truncates to bfloat16; a test shows that the compiled kernels round.
ROUNDING = {torch.float32: GRADIENT_TOLERANCE, torch.bfloat16: 2**-7, torch.float16: 2**-11}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def options(**changed: Any) -> Options:
    usual: dict[str, Any] = {"alpha": 0.25, "gamma": 2.0, "reduction": "sum", "normalizer": None}
    return Options(**{**usual, "ignore_index": -100, **changed})


def draw(rows: int, classes: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """Draw logits, and targets of which a third are classes and a fifth are ignored."""
    targets = torch.randint(classes, (rows,))
    chance = torch.rand(rows)
    return torch.randn(rows, classes) * spread, targets.where(chance < 0.33, -1).where(
        chance < 0.8, -100
    )


def reference(logits: Tensor, targets: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Compute the sum of the losses and its gradient in float64, as the paper writes them."""
    x = logits.detach().double().clamp(-1e5, 1e5).requires_grad_()
    positive = targets[:, None] == torch.arange(x.shape[1])
    kept = (targets != o.ignore_index)[:, None].expand_as(x)
    positive = positive & kept
    x_t = torch.where(positive, x, -x).where(kept, 0.0)
    losses = -((o.gamma * F.logsigmoid(-x_t)).exp() * F.logsigmoid(x_t))
    if o.alpha is not None:
        alpha = o.alpha.double() if isinstance(o.alpha, torch.Tensor) else torch.tensor(o.alpha)
        losses = losses * torch.where(positive, alpha, 1 - alpha)
    total = (losses * kept).sum()
    (gradient,) = torch.autograd.grad(total, x)
    return total.detach(), gradient


# `interpret` runs these functions, which return descriptions of what is wrong.


def computed(logits: Tensor, targets: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Return the loss of rows and its gradient, computed by the kernels."""
    from focaldet.losses import _triton

    level, asked = level_of(logits), KernelOptions.of(o)
    (loss,) = _triton.image_totals([logits], [level], [targets[None]], asked)
    return loss, _triton.gradient(logits, level, targets[None], torch.tensor([3.0]), asked)


def deviations(logits: Tensor, targets: Tensor, o: Options) -> list[str]:
    """Compare the results of the launch functions with float64."""
    loss, gradient = computed(logits, targets, o)
    exact_loss, exact_gradient = reference(logits, targets, o)
    exact_gradient = exact_gradient * 3
    case = f"{list(logits.shape)} {logits.dtype} {o}"
    wrong = []
    if loss.dtype != torch.float32 or gradient.dtype != logits.dtype:
        wrong.append(f"{case}: types {loss.dtype}, {gradient.dtype}")
    error = (loss.double() - exact_loss).abs() / exact_loss.abs().clamp(min=1e-30)
    if not error <= LOSS_TOLERANCE:
        wrong.append(f"{case}: loss {loss} for {exact_loss}")
    error = (gradient.double() - exact_gradient).abs().max()
    error = error / exact_gradient.abs().max().clamp(min=1e-30)
    if not error <= ROUNDING[logits.dtype]:
        wrong.append(f"{case}: gradient off by {error:.2e}")
    return wrong


def every_size_and_gamma() -> list[str]:
    wrong = []
    for K, gamma in itertools.product(CLASSES, GAMMAS):
        logits, targets = draw(3000 // K + 5, K)  # a second program, which is not full
        for alpha in (0.25, None, torch.rand(K)):
            wrong += deviations(logits, targets, options(gamma=gamma, alpha=alpha))
    return wrong


def small_and_large_losses() -> list[str]:
    wrong = []
    for gamma, middle in itertools.product(GAMMAS, (-30.0, -10.0, -1.0, 1.0, 10.0, 30.0)):
        logits, targets = draw(40, 7, spread=0.5)
        one_side = torch.full_like(targets, -1)
        wrong += deviations(logits + middle, targets, options(gamma=gamma))
        if gamma * middle > -60:  # or the losses are too small for float32
            wrong += deviations(logits + middle, one_side, options(gamma=gamma))
    return wrong


def extremes() -> list[str]:
    wrong = []
    values = torch.tensor([0.0, 1e-6, 0.1, 17.0, 40.0, 86.0, 87.4, 88.0, 90.0, 104.0, 1e3, 1e4])
    every = torch.cat([values, -values])
    for gamma in GAMMAS:
        for targets in (torch.arange(24), torch.full((24,), -1)):
            wrong += deviations(every.repeat(24, 1), targets, options(gamma=gamma))
        sure = torch.full((3, 3), -math.inf)
        sure[1, 2] = math.inf
        wrong += deviations(sure, torch.tensor([-1, 2, -1]), options(gamma=gamma))
    return wrong


def ignored_rows() -> list[str]:
    wrong = []
    for dtype, ignore in itertools.product((torch.int64, torch.int32), (-100, -1, 2)):
        for gamma in (0.0, 0.5, 2.0):
            logits, targets = draw(60, 5)
            targets[targets == -100] = ignore
            targets = targets.to(dtype)
            logits[0] = torch.tensor([5.0, 30.0, 100.0, -30.0, 0.0])
            logits[targets == ignore] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e9])
            wrong += deviations(logits, targets, options(gamma=gamma, ignore_index=ignore))
    logits, targets = draw(9, 5)
    wrong += deviations(logits * math.nan, torch.full_like(targets, -100), options())
    return wrong


def half_precision() -> list[str]:
    wrong = []
    for dtype, gamma in itertools.product((torch.bfloat16, torch.float16), (0.0, 0.5, 2.0)):
        logits, targets = draw(300, 8)
        wrong += deviations(logits.to(dtype), targets, options(gamma=gamma))
    return wrong


def nan_is_not_hidden() -> list[str]:
    wrong = []
    for gamma in GAMMAS:
        logits, targets = torch.zeros(4, 3), torch.tensor([0, -1, -1, -1])
        logits[2, 1] = math.nan
        loss, gradient = computed(logits, targets, options(gamma=gamma))
        gradient[2, 1] = 0.0 if gradient[2, 1].isnan() else math.nan
        if not loss.isnan() or gradient.isnan().any():
            wrong.append(f"gamma {gamma}")
    return wrong


def results_are_reproducible() -> list[str]:
    logits, targets = draw(400, 20)
    losses = {computed(logits, targets, options(gamma=1.5))[0].item() for _ in range(3)}
    return [] if len(losses) == 1 else [str(losses)]


def with_autograd() -> list[str]:
    """Compare the loss on a device, with its autograd, with the CPU kernels."""
    wrong = []
    reductions: Any = [("sum", "num_pos"), ("sum", 7.0), ("mean", None)]
    reductions += [("mean", torch.tensor([3.0])), ("sum", torch.tensor(3.0))]
    for dtype, (reduction, normalizer) in itertools.product(
        (torch.float32, torch.bfloat16), reductions
    ):
        o = options(reduction=reduction, normalizer=normalizer, gamma=1.5)
        logits, targets = draw(50, 6)
        x, y = (logits.to(dtype).requires_grad_() for _ in range(2))
        if not _cuda.applies([x], targets, o, x.shape[1], device="cpu"):
            wrong.append("does not apply")
        loss, same = on_device(x, targets, o), sigmoid_focal_loss(y, targets, **o._asdict())
        saved = {t.data_ptr() for t in loss_tensors(loss)}
        if not saved <= {x.data_ptr(), targets.data_ptr()}:
            wrong.append("saves more than logits and targets")
        torch.autograd.backward(5 * loss, retain_graph=True)
        torch.autograd.backward(5 * loss)
        torch.autograd.backward(10 * same)
        torch.testing.assert_close(loss, same, rtol=2e-6, atol=0)
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad)
    for reduction in ("sum", "mean"):
        o = options(reduction=reduction)
        logits, targets = draw(9, 4, spread=1.0)
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        for z, loss in (
            (x, on_device(x, targets, o)),
            (y, sigmoid_focal_loss(y, targets, **o._asdict())),
        ):
            (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
            torch.autograd.backward(gradient.square().sum())
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)
    logits, targets = draw(9, 4)
    nothing = on_device(logits, torch.full_like(targets, -100), options(reduction="mean"))
    if nothing.item() != 0:
        wrong.append("a mean over no entries is not 0")
    x = logits.clone().requires_grad_()
    changed = x * 1
    loss = on_device(changed, targets, options())
    changed.add_(1)
    try:
        torch.autograd.backward(loss)
        wrong.append("an in-place change did not raise")
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    return wrong


def maps_of(
    sizes: list[tuple[int, int]], images: int, anchors: int, classes: int
) -> tuple[list[Tensor], Tensor]:
    """Draw the maps of a head, and targets of which some are classes and some are ignored."""
    maps = [torch.randn(images, anchors * classes, h, w) * 4 - 1 for h, w in sizes]
    places = anchors * sum(h * w for h, w in sizes)
    targets = torch.randint(-1, classes, (images, places))
    return maps, targets.where(torch.rand(images, places) < 0.8, -100)


def maps_deviations(maps: list[Tensor], targets: Tensor, classes: int, **o: Any) -> list[str]:
    """Compare the loss of maps on a device with float64 on the CPU."""
    o = {"num_classes": classes, "reduction": "sum", **o}
    xs = [m.detach().clone().requires_grad_() for m in maps]
    ys = [m.detach().double().requires_grad_() for m in maps]
    applies = functools.partial(_cuda.applies, device="cpu")
    with (
        mock.patch.object(_cuda, "applies", applies),
        mock.patch.object(_cuda, "reduced_loss", wraps=_cuda.reduced_loss) as used,
    ):
        loss = sigmoid_focal_loss_maps(xs, targets, **o)
    exact_loss = sigmoid_focal_loss_maps(ys, targets, **o)
    gradients = torch.autograd.grad(3 * loss, xs)
    exact_gradients = torch.autograd.grad(3 * exact_loss, ys)
    case = f"{[list(m.shape) for m in maps]} {maps[0].dtype} {o}"
    wrong = []
    if loss.dtype != torch.float32 or not used.called:
        wrong.append(f"{case}: {loss.dtype}, calls of the device's path: {used.call_count}")
    if not abs(loss.double() - exact_loss) <= LOSS_TOLERANCE * abs(exact_loss):
        wrong.append(f"{case}: loss {loss} for {exact_loss}")
    largest = max(g.abs().max() for g in exact_gradients if g.numel())
    for x, got, want in zip(maps, gradients, exact_gradients, strict=True):
        error = (got.double() - want).abs().max() if x.numel() else 0.0
        if not error <= ROUNDING[x.dtype] * largest:
            wrong.append(f"{case}: gradient off by {error / largest:.2e}")
        same = got.dtype == x.dtype and (got.stride() == x.stride() or not _is_dense(x))
        if not same:
            wrong.append(f"{case}: gradient in {got.dtype} with strides {got.stride()}")
    return wrong


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def maps_of_every_layout() -> list[str]:
    wrong = []
    for layout in ("planes", "rows", "mixed", "transposed"):
        maps, targets = maps_of([(5, 7), (0, 3), (2, 1)], 2, 3, 5)
        if layout == "transposed":
            maps = [m.transpose(2, 3).contiguous().transpose(2, 3) for m in maps]
        for i, m in enumerate(maps):
            if layout == "rows" or (layout == "mixed" and i == 0):
                maps[i] = m.contiguous(memory_format=torch.channels_last)
        for o in (
            {"normalizer": "num_pos"},
            {"reduction": "mean", "alpha": torch.rand(5), "gamma": 1.5},
            {"normalizer": torch.tensor([2.0, 0.5]), "gamma": 0.3, "alpha": None},
            {"reduction": "mean", "normalizer": torch.tensor([[4.0], [9.0]])[:, 0], "gamma": 0.0},
        ):
            wrong += maps_deviations(maps, targets, 5, **o)
    return wrong


def maps_of_every_size() -> list[str]:
    from focaldet.losses import _triton

    wrong = []
    seen = set()
    for classes, anchors, size in (
        (1, 2, (30, 20)),  # the fewest classes
        (6, 1, (19, 27)),  # two blocks of positions; classes end within a tile
        (80, 1, (1, 9)),  # several chunks of classes
        (21, 2, (16, 16)),  # a chunk that is not full, and the largest of the small planes
        (18, 1, (257, 1)),  # the smallest of the large planes
    ):
        seen.add(_triton.tile(classes, math.prod(size)))
        for layout in (torch.contiguous_format, torch.channels_last):
            maps, targets = maps_of([size], 2, anchors, classes)
            maps = [m.contiguous(memory_format=layout) for m in maps]
            wrong += maps_deviations(maps, targets, classes, alpha=torch.rand(classes))
    return wrong if len(seen) == 3 else [*wrong, f"only the tiles {seen}"]


def maps_in_half_precision() -> list[str]:
    wrong = []
    for dtype, layout in itertools.product(
        (torch.bfloat16, torch.float16), (torch.contiguous_format, torch.channels_last)
    ):
        maps, targets = maps_of([(4, 5), (1, 1)], 2, 2, 7)
        maps = [m.to(dtype).contiguous(memory_format=layout) for m in maps]
        wrong += maps_deviations(maps, targets, 7, normalizer=torch.tensor([2.0, 0.5]))
    return wrong


def logits_of_every_shape() -> list[str]:
    """Compare logits with more axes than rows, which are planes or rows of one anchor."""
    wrong = []
    for shape in ((2, 5, 3, 4), (3, 4, 6), (2, 3, 1, 1), (2, 3, 2, 2, 2)):
        x = torch.randn(shape) * 3
        targets = torch.randint(-1, shape[1], (shape[0], *shape[2:])).to(torch.int32)
        targets[0, ..., 0] = -100
        rows_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        for logits, index in ((x, targets), (rows_last, targets), (x[:, :, ::1].flip(0), targets)):
            o = options(reduction="mean", alpha=torch.rand(shape[1]))
            ours, exact = (logits.clone().to(d).requires_grad_() for d in (None, torch.float64))
            if not _cuda.applies([ours], index, o, ours.shape[1], device="cpu"):
                wrong.append(f"{shape}: does not apply")
            loss = on_device(ours, index, o)
            same = sigmoid_focal_loss(exact, index, **o._asdict())
            for got, want in (
                (loss, same),
                (torch.autograd.grad(loss, ours)[0], torch.autograd.grad(same, exact)[0]),
            ):
                if not (got - want).abs().max() <= 2e-6 * want.abs().max():
                    wrong.append(f"{shape} {logits.stride()}: {got} for {want}")
    return wrong


def ignored_positions() -> list[str]:
    wrong = []
    for layout, ignore in itertools.product(
        (torch.contiguous_format, torch.channels_last), (-100, -1, 2)
    ):
        maps, targets = maps_of([(3, 4), (1, 2)], 1, 2, 5)
        targets[targets == -100] = ignore
        start = 0
        for i, m in enumerate(maps):
            _, C, H, W = m.shape
            part = (targets[:, start : start + 2 * H * W] == ignore).view(1, H, W, 2, 1)
            odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e9])
            rows = m.permute(0, 2, 3, 1).reshape(1, H, W, 2, 5)
            rows = torch.where(part, odd, rows).reshape(1, H, W, C)
            maps[i] = rows.permute(0, 3, 1, 2).contiguous(memory_format=layout)
            start += 2 * H * W
        for gamma in (0.0, 0.5, 2.0):
            wrong += maps_deviations(maps, targets, 5, gamma=gamma, ignore_index=ignore)
    return wrong


def nan_and_infinity_in_maps() -> list[str]:
    """Compare with the CPU where logits are infinite, and check that a NaN stays in its image."""
    wrong = []
    for layout, gamma in itertools.product(
        (torch.contiguous_format, torch.channels_last), (0.0, 0.5, 2.0)
    ):
        m = torch.zeros(2, 3, 2, 2)
        m[0, 1, 0, 1], m[0, 2, 0, 0], m[1, 0, 1, 1] = -math.inf, math.inf, math.nan
        targets = torch.tensor([[2, -1, -1, -1], [-1, -1, -1, 0]])
        x = m.clone().contiguous(memory_format=layout).requires_grad_()
        levels = levels_of_maps([x], 3)
        asked = options(gamma=gamma)
        totals = _cuda._ImageTotals.apply(levels, targets, asked, None, x)
        torch.autograd.backward(totals.sum())
        y = m[:1].clone().requires_grad_()
        exact = sigmoid_focal_loss_maps([y], targets[:1], num_classes=3, **asked._asdict())
        torch.autograd.backward(exact)
        assert x.grad is not None
        assert y.grad is not None
        if not (totals[0] - exact).abs() <= 1e-6 * exact or not totals[1].isnan():
            wrong.append(f"gamma {gamma}: {totals}")
        close = torch.isclose(x.grad[:1], y.grad, rtol=1e-5, atol=1e-7).all()
        if not close or x.grad.isnan().nonzero().tolist() != [[1, 0, 1, 1]]:
            wrong.append(f"gamma {gamma}: {x.grad}")
    return wrong


def second_derivatives_of_maps() -> list[str]:
    seconds = []
    maps, targets = maps_of([(2, 3), (1, 1)], 2, 2, 3)
    for device, dtype in (("cpu", torch.float32), ("none", torch.float64)):
        xs = [m.to(dtype).requires_grad_() for m in maps]
        applies = functools.partial(_cuda.applies, device=device)
        with mock.patch.object(_cuda, "applies", applies):
            loss = sigmoid_focal_loss_maps(
                xs, targets, num_classes=3, reduction="sum", normalizer=torch.tensor([2.0, 3.0])
            )
            first = torch.autograd.grad(loss, xs, create_graph=True)
            square = torch.stack([g.square().sum() for g in first]).sum()
            seconds.append([g.double() for g in torch.autograd.grad(square, xs)])
    pairs = zip(*seconds, strict=True)
    return [str(g) for g, w in pairs if not torch.isclose(g, w, rtol=1e-4, atol=1e-5).all()]


def loss_tensors(loss: Tensor) -> list[Tensor]:
    """Return the tensors with several elements that the graph of ``loss`` saves for backward."""
    found: list[Tensor | None] = []
    nodes = [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None:
            continue
        found += getattr(node, "saved_tensors", ())
        nodes += [n for n, _ in node.next_functions]
    return [t for t in found if t is not None and t.numel() > 1]


INTERPRETED: list[Callable[[], list[str]]] = [
    every_size_and_gamma,
    small_and_large_losses,
    extremes,
    ignored_rows,
    half_precision,
    nan_is_not_hidden,
    results_are_reproducible,
    with_autograd,
    maps_of_every_layout,
    maps_of_every_size,
    maps_in_half_precision,
    logits_of_every_shape,
    ignored_positions,
    nan_and_infinity_in_maps,
    second_derivatives_of_maps,
]


def compile_ahead() -> dict[str, dict[str, Any]]:
    """Compile all kernels in three variants for two kinds of GPUs, and describe the output."""
    from focaldet.losses import _triton

    made = {}
    kernels = (
        _triton.rows_forward_kernel,
        _triton.rows_backward_kernel,
        _triton.planes_forward_kernel,
        _triton.planes_backward_kernel,
    )
    cases = [
        KernelCase(num_classes=80, dtype="fp32", whole=2, rest=False, per_class=False),
        KernelCase(num_classes=365, dtype="bf16", whole=1, rest=True, per_class=True),
        KernelCase(num_classes=1, dtype="fp16", whole=0, rest=False, per_class=False),
    ]
    for arch, kernel, case in itertools.product((80, 90), kernels, cases):
        try:
            done = compile_kernel(kernel, case, arch)
        except Exception as error:
            if "ptxas" not in str(error):
                raise
            done = {"ptx": str(error)}
        ptx = done.get("ptx", "")
        made[f"sm_{arch} {kernel.__name__} {case}"] = {
            "cubin": len(done.get("cubin", b"")),
            "ptx": f".target sm_{arch}" in ptx,
            "rounds": ptx.count("cvt.rn.bf16") > 0,
            "atomics": ptx.count("atom.") + ptx.count("red.global"),
            "64-bit": "mul.lo.s64" in ptx or "mul.wide" in ptx or "mad.lo.s64" in ptx,
            "divisions": ptx.count("div."),
        }
    return made


# The tests


def run(what: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_losses_triton", what],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("check", [f.__name__ for f in INTERPRETED])
def test_the_kernels_are_correct_in_the_interpreter(check: str, interpreted: Any) -> None:
    assert interpreted[check] == []


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_two_generations_of_gpus(tmp_path: Path) -> None:
    made = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(made) == 24
    for case, parts in made.items():
        assert parts["cubin"] > 0, case
        assert parts["ptx"], case
        assert parts["atomics"] == 0, case
        assert parts["64-bit"], case
        assert parts["rounds"] == ("backward" in case and "bf16" in case), case


def test_the_loss_on_a_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, focaldet; x = torch.zeros(4, 3, requires_grad=True)\n"
        "focaldet.FocalLoss()(x, torch.zeros(4).long()).backward()\n"
        "focaldet.FocalLoss()(x.double(), torch.zeros(4).long()).backward()\n"
        "print([m for m in sys.modules if m.startswith('triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        result: object = {check.__name__: check() for check in INTERPRETED}
    else:
        result = compile_ahead()
    sys.stdout.write(json.dumps(result))
