"""The Triton path of the sigmoid focal loss, without a GPU.

The tests run this file as a program: ``interpret`` runs the kernels on a CPU in Triton's
interpreter, which must be enabled before the kernels are imported, and ``compile`` compiles them
ahead of time. Both print JSON.
"""

# Triton is untyped and optional:
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from focaldet.losses import _cuda, sigmoid_focal_loss
from focaldet.losses._arguments import Options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
        losses = losses * torch.where(positive, o.alpha, 1 - o.alpha)
    total = (losses * kept).sum()
    (gradient,) = torch.autograd.grad(total, x)
    return total.detach(), gradient


# `interpret` runs these functions, which return descriptions of what is wrong.


def deviations(logits: Tensor, targets: Tensor, o: Options) -> list[str]:
    """Compare the results of the launch functions with float64."""
    from focaldet.losses import _triton

    assert isinstance(o.alpha, float) or o.alpha is None
    asked: Any = {"alpha": o.alpha, "gamma": o.gamma, "ignore_index": o.ignore_index}
    upstream = torch.tensor(3.0)
    loss = _triton.total(logits, targets, **asked)
    gradient = _triton.gradient(logits, targets, upstream, **asked)
    exact_loss, exact_gradient = reference(logits, targets, o)
    exact_gradient = exact_gradient * upstream
    case = f"{list(logits.shape)} {logits.dtype} {asked}"
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
        for alpha in (0.25, None):
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
    from focaldet.losses import _triton

    wrong = []
    for gamma in GAMMAS:
        logits, targets = torch.zeros(4, 3), torch.tensor([0, -1, -1, -1])
        logits[2, 1] = math.nan
        asked: Any = {"alpha": 0.25, "gamma": gamma, "ignore_index": -100}
        gradient = _triton.gradient(logits, targets, torch.tensor(1.0), **asked)
        gradient[2, 1] = 0.0 if gradient[2, 1].isnan() else math.nan
        if not _triton.total(logits, targets, **asked).isnan() or gradient.isnan().any():
            wrong.append(f"gamma {gamma}")
    return wrong


def results_are_reproducible() -> list[str]:
    from focaldet.losses import _triton

    logits, targets = draw(400, 20)
    asked: Any = {"alpha": 0.25, "gamma": 1.5, "ignore_index": -100}
    losses = {_triton.total(logits, targets, **asked).item() for _ in range(3)}
    return [] if len(losses) == 1 else [str(losses)]


def with_autograd() -> list[str]:
    """Compare all of `_cuda.rows_loss` with the CPU kernels."""
    wrong = []
    reductions: Any = [("sum", "num_pos"), ("sum", 7.0), ("mean", None)]
    reductions += [("mean", torch.tensor([3.0])), ("sum", torch.tensor(3.0))]
    for dtype, (reduction, normalizer) in itertools.product(
        (torch.float32, torch.bfloat16), reductions
    ):
        o = options(reduction=reduction, normalizer=normalizer, gamma=1.5)
        logits, targets = draw(50, 6)
        x, y = (logits.to(dtype).requires_grad_() for _ in range(2))
        if not _cuda.applies(x, targets, o, device="cpu"):
            wrong.append("does not apply")
        loss, same = _cuda.rows_loss(x, targets, o), sigmoid_focal_loss(y, targets, **o._asdict())
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
            (x, _cuda.rows_loss(x, targets, o)),
            (y, sigmoid_focal_loss(y, targets, **o._asdict())),
        ):
            (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
            torch.autograd.backward(gradient.square().sum())
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-7)
    logits, targets = draw(9, 4)
    nothing = _cuda.rows_loss(logits, torch.full_like(targets, -100), options(reduction="mean"))
    if nothing.item() != 0:
        wrong.append("a mean over no entries is not 0")
    x = logits.clone().requires_grad_()
    changed = x * 1
    loss = _cuda.rows_loss(changed, targets, options())
    changed.add_(1)
    try:
        torch.autograd.backward(loss)
        wrong.append("an in-place change did not raise")
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    return wrong


def loss_tensors(loss: Tensor) -> list[Tensor]:
    """Return the tensors with several elements that the graph of ``loss`` saves for backward."""
    found: list[Tensor] = []
    nodes = [loss.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None:
            continue
        found += getattr(node, "saved_tensors", ())
        nodes += [n for n, _ in node.next_functions]
    return [t for t in found if t.numel() > 1]


INTERPRETED: list[Callable[[], list[str]]] = [
    every_size_and_gamma,
    small_and_large_losses,
    extremes,
    ignored_rows,
    half_precision,
    nan_is_not_hidden,
    results_are_reproducible,
    with_autograd,
]


def compile_ahead() -> dict[str, dict[str, Any]]:
    """Compile both kernels, with and without a fractional part of gamma, and describe the output."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from focaldet.losses import _triton

    pointers = {"targets_ptr": "*i64", "sums_ptr": "*fp32", "upstream_ptr": "*fp32"}
    made = {}
    cases = [(80, "fp32", 2, False), (365, "bf16", 1, True), (1, "fp16", 0, False)]
    for arch, kernel, case in itertools.product(
        (80, 90), (_triton.forward_kernel, _triton.backward_kernel), cases
    ):
        K, dtype, whole, rest = case
        constants = {"K": K, "WHOLE": whole, "REST": rest, "BLOCK": _triton.BLOCK}
        kinds = pointers | {"x_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
        kinds |= {"numel": "i32", "ignore_index": "i32"} | dict.fromkeys(constants, "constexpr")
        names = kernel.arg_names
        source = ASTSource(kernel, {n: kinds.get(n, "fp32") for n in names}, constexprs=constants)
        target = GPUTarget("cuda", arch, 32)
        try:
            done = triton.compile(source, target=target, options=_triton.COMPILED).asm
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
        }
    return made


# The tests


def run(what: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, what],
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
    assert len(made) == 12
    for case, parts in made.items():
        assert parts["cubin"] > 0, case
        assert parts["ptx"], case
        assert parts["atomics"] == 0, case
        assert parts["rounds"] == ("backward" in case and "bf16" in case), case


FITTING = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("alpha", [None, 0.25, 1])
def test_the_kernels_support_rows_with_class_indices(
    dtype: torch.dtype, reduction: str, alpha: float | None
) -> None:
    logits, targets = FITTING
    asked = options(alpha=alpha, reduction=reduction, normalizer="num_pos", gamma=0.3)
    assert _cuda.suits(logits.to(dtype), targets, asked)
    assert _cuda.suits(logits.to(dtype), targets.int(), asked)


@pytest.mark.parametrize(
    ("logits", "targets", "changed"),
    [
        (*FITTING, {"reduction": "none"}),
        (*FITTING, {"alpha": torch.full((3,), 0.5)}),
        (FITTING[0].double(), FITTING[1], {}),
        (FITTING[0], FITTING[1].to(torch.uint8), {}),
        (FITTING[0], FITTING[0], {}),
        (torch.zeros(3, 4).t(), FITTING[1], {}),
        (FITTING[0], torch.zeros(8, dtype=torch.int64)[::2], {}),
        (torch.zeros(4, 3, 2), torch.zeros(4, 2, dtype=torch.int64), {}),
        (torch.zeros(3), torch.tensor(1), {}),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), {}),
        (torch.zeros(4, 0), FITTING[1], {}),
    ],
)
def test_everything_else_uses_pytorch_operations(
    logits: Tensor, targets: Tensor, changed: dict[str, Any]
) -> None:
    assert not _cuda.suits(logits, targets, options(**changed))


def test_more_entries_than_int32_can_count_use_pytorch_operations() -> None:
    targets = torch.zeros(2**27, dtype=torch.int64, device="meta")
    assert not _cuda.suits(torch.zeros(2**27, 16, device="meta"), targets, options())
    assert _cuda.suits(torch.zeros(2**27, 15, device="meta"), targets, options())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the kernels work on every device."""
    monkeypatch.setattr(_cuda, "kernels", lambda _: types.ModuleType("kernels"))


@pytest.mark.usefixtures("served")
def test_the_kernels_apply_to_plain_tensors_of_the_device_only() -> None:
    logits, targets = FITTING
    assert not _cuda.applies(logits, targets, options())  # on a CPU
    assert _cuda.applies(logits, targets, options(), device="cpu")

    class Marked(torch.Tensor):
        pass

    assert not _cuda.applies(logits.as_subclass(Marked), targets, options(), device="cpu")


@pytest.mark.usefixtures("served")
def test_transforms_and_forward_differentiation_use_pytorch_operations() -> None:
    logits, targets = FITTING
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(_cuda.applies(x, targets, options(), device="cpu"))
        return sigmoid_focal_loss(x, targets)

    torch.func.grad(loss)(logits)
    with torch.autograd.forward_ad.dual_level():
        loss(logits)
    assert seen == [False, False]


@pytest.mark.usefixtures("served")
def test_compiled_code_uses_pytorch_operations() -> None:
    logits, targets = FITTING

    def choice(x: Tensor) -> Tensor:
        return x + int(_cuda.applies(x, targets, options(), device="cpu"))

    assert choice(logits).sum() == logits.numel()
    compiled = torch.compile(choice, fullgraph=True, backend="eager")
    assert compiled(logits).sum() == 0


def test_without_triton_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "focaldet.losses._triton", raising=False)
    _cuda.kernels.cache_clear()
    assert _cuda.kernels(torch.device("cpu")) is None
    _cuda.kernels.cache_clear()
    assert not _cuda.applies(*FITTING, options(), device="cpu")
    _cuda.kernels.cache_clear()


def test_a_broken_triton_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("broken")

    def total(*_: object, **__: object) -> None:
        raise RuntimeError("no C compiler")

    broken.total = total  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "focaldet.losses._triton", broken)
    _cuda.kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="does not work on cpu, .* no C compiler"):
        assert _cuda.kernels(torch.device("cpu")) is None
    assert _cuda.kernels(torch.device("cpu")) is None  # without a second warning
    _cuda.kernels.cache_clear()


def test_the_loss_on_a_cuda_device_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = FITTING
    monkeypatch.setattr(_cuda, "applies", lambda *_: True)
    monkeypatch.setattr(_cuda, "rows_loss", lambda *_: torch.tensor(7.0))
    assert sigmoid_focal_loss(logits.to("meta"), targets.to("meta")).item() == 7


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
