"""How a loss on a CUDA device is computed: the choice, its waits and its memory, without a GPU."""

from __future__ import annotations

import functools
import logging
import sys
import types
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import ops as torchvision_ops

from focaldet.losses import (
    FocalLoss,
    _cuda,
    _pieces,
    sigmoid_focal_loss,
    sigmoid_focal_loss_maps,
)
from focaldet.losses._arguments import KernelOptions, Options
from focaldet.losses._autograd import EntryLosses
from focaldet.losses._layout import dense, level_of, levels_of_maps
from tests.helpers.fake_cuda import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    Loss = Callable[[], Tensor]

CPU = torch.device("cpu")
FITTING = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
HALF = (torch.bfloat16, torch.float16)
SIZES = [(14, 16), (7, 8), (0, 3), (1, 1)]


def set_piece_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(_pieces, "SMALLEST", size)
    monkeypatch.setattr(_pieces, "LARGEST", size)


def options(**changed: Any) -> Options:
    usual: dict[str, Any] = {"alpha": 0.25, "gamma": 2.0, "reduction": "sum", "normalizer": None}
    return Options(**{**usual, "ignore_index": -100, **changed})


@pytest.fixture(autouse=True)
def _nothing_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what is known of devices, during and after each test."""
    monkeypatch.setattr(_cuda, "_probed", {})
    monkeypatch.setattr(_cuda, "_reported", set())


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.Mock]:
    """Treat the CPU as a device without Triton, and count the losses of the device's path."""
    monkeypatch.setattr(_cuda, "kernels", lambda _: None)
    for name in ("applies", "applies_to_entries"):
        on_cpu = functools.partial(getattr(_cuda, name), device="cpu")
        monkeypatch.setattr(_cuda, name, on_cpu)
    with mock.patch.object(_cuda, "reduced_loss", wraps=_cuda.reduced_loss) as used:
        yield used


# Which losses the kernels compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("alpha", [None, 0.25, 1, torch.full((3,), 0.5)])
def test_the_kernels_support_reduced_losses_with_class_indices(
    dtype: torch.dtype, reduction: str, alpha: float | None
) -> None:
    logits, targets = FITTING
    asked = options(alpha=alpha, reduction=reduction, normalizer="num_pos", gamma=0.3)
    assert _cuda.suits([logits.to(dtype)], targets, asked, 3)
    assert _cuda.suits([logits.to(dtype)], targets.int(), asked, 3)
    assert _cuda.suits([torch.zeros(2, 3, 0, 2, dtype=dtype), logits.to(dtype)], targets, asked, 3)


@pytest.mark.parametrize(
    ("logits", "targets", "changed"),
    [
        (*FITTING, {"reduction": "none"}),
        (*FITTING, {"ignore_index": 2**31}),
        (FITTING[0].double(), FITTING[1], {}),
        (FITTING[0], FITTING[1].to(torch.uint8), {}),
        (FITTING[0], FITTING[0], {}),
        (torch.zeros(3), torch.tensor(1), {}),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), {}),
        (torch.zeros(4, 0), FITTING[1], {}),
        (torch.zeros(1, 1, device="meta").expand(66_000, 1)[..., None], FITTING[1], {}),
        (torch.zeros(1, 4, 2**29, device="meta"), FITTING[1], {}),
    ],
)
def test_everything_else_uses_pytorch_operations(
    logits: Tensor, targets: Tensor, changed: dict[str, Any]
) -> None:
    num_classes = logits.shape[1] if logits.ndim > 1 else 3
    assert not _cuda.suits([logits], targets, options(**changed), num_classes)


def test_the_limit_of_planes_counts_anchors_and_not_classes() -> None:
    targets = torch.zeros(1, dtype=torch.int64, device="meta")
    maps = [torch.zeros(7281, 9 * 80, 1, 2, device="meta")]
    assert _cuda.suits(maps, targets, options(), 80)
    assert not _cuda.suits([maps[0].expand(7281, 720, 1, 2)], targets, options(), 60)


def test_the_kernels_apply_to_plain_tensors_of_the_device_only() -> None:
    logits, targets = FITTING
    assert not _cuda.applies([logits], targets, options(), 3)  # on a CPU
    assert _cuda.applies([logits], targets, options(), 3, device="cpu")

    class Marked(torch.Tensor):
        pass

    assert not _cuda.applies([logits.as_subclass(Marked)], targets, options(), 3, device="cpu")


def test_a_differentiable_alpha_uses_pytorch_operations() -> None:
    alpha = torch.full((3,), 0.5)
    assert _cuda.applies([FITTING[0]], FITTING[1], options(alpha=alpha), 3, device="cpu")
    alpha.requires_grad_()
    assert not _cuda.applies([FITTING[0]], FITTING[1], options(alpha=alpha), 3, device="cpu")


def test_transforms_and_forward_differentiation_use_pytorch_operations() -> None:
    logits, targets = FITTING
    seen = []

    def loss(x: Tensor) -> Tensor:
        seen.append(_cuda.applies([x], targets, options(), 3, device="cpu"))
        return sigmoid_focal_loss(x, targets)

    torch.func.grad(loss)(logits)
    with torch.autograd.forward_ad.dual_level():
        loss(logits)
    assert seen == [False, False]


def test_compiled_code_uses_pytorch_operations() -> None:
    logits, targets = FITTING

    def choice(x: Tensor) -> Tensor:
        return x + int(_cuda.applies([x], targets, options(), 3, device="cpu"))

    assert choice(logits).sum() == logits.numel()
    compiled = torch.compile(choice, fullgraph=True, backend="eager")
    assert compiled(logits).sum() == 0


def test_the_losses_on_a_cuda_device_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = FITTING
    monkeypatch.setattr(_cuda, "applies", lambda *_: True)
    monkeypatch.setattr(_cuda, "reduced_loss", lambda *_: torch.tensor(7.0))
    assert sigmoid_focal_loss(logits.to("meta"), targets.to("meta")).item() == 7
    maps = [logits.to("meta").view(1, 12, 1, 1)]
    loss = sigmoid_focal_loss_maps(maps, targets.to("meta").view(1, 4), num_classes=3)
    assert loss.item() == 7


# Whether the kernels work


class Broken(types.ModuleType):
    """A module of kernels that fails with each of the given errors in turn, and then works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__("broken")
        self.errors, self.calls = list(errors), 0

    def image_totals(self, *_: object) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


def install(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> Broken:
    module = Broken(*errors)
    monkeypatch.setitem(sys.modules, "focaldet.losses._triton", module)
    return module


def test_without_triton_it_is_logged_once_that_pytorch_operations_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "focaldet.losses._triton", raising=False)
    with caplog.at_level(logging.INFO, "focaldet"):
        assert _cuda.kernels(CPU) is None
        assert _cuda.kernels(CPU) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "cpu uses PyTorch operations, because Triton is not installed" in record.message


def test_a_compiler_that_fails_is_remembered_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = install(monkeypatch, RuntimeError("no C compiler"))
    assert _cuda.kernels(CPU) is None
    assert _cuda.kernels(CPU) is None
    assert module.calls == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Triton does not work on it: no C compiler" in record.message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_a_failure_of_the_device_is_logged_once_but_not_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    module = install(monkeypatch, error, error)
    assert _cuda.kernels(CPU) is None
    assert _cuda.kernels(CPU) is None
    assert len(caplog.records) == 1
    assert _cuda.kernels(CPU) is module
    assert _cuda.kernels(CPU) is module
    assert module.calls == 3  # success is remembered


def test_the_kernels_are_not_tested_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_cuda, "_probe", lambda loaded, _: loaded.image_totals())
    device = torch.device("cuda:0")
    assert _cuda.kernels(device) is None
    assert module.calls == 0
    assert "the capture of a CUDA graph" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _cuda.kernels(device) is module
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _cuda.kernels(device) is module


# Half precision without kernels


def draw_maps(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
    """Draw maps of 2 images, 3 anchors and 5 classes, some of them with odd ignored logits."""
    maps = [torch.randn(2, 15, h, w) * 3 - 2 for h, w in SIZES]
    places = 3 * sum(h * w for h, w in SIZES)
    targets = torch.randint(-1, 5, (2, places))
    targets = targets.where(torch.rand(2, places) < 0.8, -100)
    targets[1, -1] = -100  # the last anchor of the level with one position
    maps[-1][1, 10:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 5.0])[:, None, None]
    return [m.to(dtype).contiguous(memory_format=layout) for m in maps], targets


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": "num_pos"},
        {"reduction": "mean", "alpha": torch.linspace(0.1, 0.9, 5), "gamma": 1.5},
        {"normalizer": torch.tensor([2.0, 0.5]), "alpha": None, "gamma": 0.3},
    ],
)
def test_half_precision_in_pieces_has_the_loss_and_gradient_of_float64(
    no_kernels: mock.Mock,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layout: torch.memory_format,
    size: int | None,
    changed: dict[str, Any],
) -> None:
    if size is not None:  # pieces of less than a plane
        set_piece_size(monkeypatch, size)
    maps, targets = draw_maps(dtype, layout)
    exact_maps = [m.double().requires_grad_() for m in maps]
    for m in maps:
        m.requires_grad_()
    asked = {"num_classes": 5, "reduction": "sum", **changed}
    loss = sigmoid_focal_loss_maps(maps, targets, **asked)
    assert no_kernels.call_count == 1
    exact = sigmoid_focal_loss_maps(exact_maps, targets, **asked)
    assert no_kernels.call_count == 1
    assert_close(loss, exact.float(), rtol=2e-6, atol=0)
    gradients = torch.autograd.grad(64 * loss, maps)
    wanted = torch.autograd.grad(64 * exact, exact_maps)
    for m, got, want in zip(maps, gradients, wanted, strict=True):
        assert got.stride() == m.stride()
        assert_close(got, want.to(dtype))
    assert (gradients[-1][1, 10:] == 0).all()


@pytest.mark.parametrize("shape", [(50, 6), (2, 6, 5, 4), (3, 6, 1, 1)])
@pytest.mark.parametrize("rows", [False, True])
def test_logits_of_any_shape_in_pieces_have_the_gradient_of_float64(
    no_kernels: mock.Mock, shape: tuple[int, ...], rows: bool
) -> None:
    x = torch.randn(shape).bfloat16()
    if rows:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    targets = torch.randint(-1, 6, (shape[0], *shape[2:]))
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = FocalLoss()(ours, targets)
    assert no_kernels.call_count == 1
    same = FocalLoss()(exact, targets)
    assert_close(loss, same.float())
    (got,), (want,) = torch.autograd.grad(loss, ours), torch.autograd.grad(same, exact)
    assert_close(got, want.bfloat16())


def test_second_derivatives_of_half_precision_use_the_formula(no_kernels: mock.Mock) -> None:
    maps, targets = draw_maps(torch.bfloat16, torch.contiguous_format)
    maps = [m.nan_to_num(0, 0, 0) for m in maps]
    seconds = []
    for dtype in (torch.bfloat16, torch.float64):
        xs = [m.to(dtype).requires_grad_() for m in maps]
        loss = sigmoid_focal_loss_maps(xs, targets, num_classes=5, reduction="sum")
        first = torch.autograd.grad(loss, xs, create_graph=True)
        total = torch.stack([g.double().square().sum() for g in first]).sum()
        seconds.append([g.bfloat16() for g in torch.autograd.grad(total, xs)])
    assert no_kernels.call_count == 1
    assert_close(*seconds, rtol=0.05, atol=0.05)


entries_of_pieces = _pieces.EntryPieces.entries
ENTRIES = {
    "soft": lambda shape: torch.rand(shape).round(decimals=1),
    "multi-label": lambda shape: torch.randint(2, shape).float(),
    "classes": lambda shape: torch.randint(-2, shape[1], (shape[0], *shape[2:])),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("size", [None, 24])
@pytest.mark.parametrize(
    "changed",
    [
        {"gamma": 0, "normalizer": 7.0},
        {"gamma": 0.3, "alpha": None, "normalizer": "num_pos"},
        {"gamma": 1.5, "alpha": torch.linspace(0.1, 0.9, 6)},
        {"gamma": 2.0, "normalizer": torch.tensor([3.0], dtype=torch.float64)},
    ],
)
def test_losses_of_entries_in_pieces_have_the_values_and_gradient_of_float64(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kind: str,
    size: int | None,
    changed: dict[str, Any],
) -> None:
    if size is not None:  # pieces of less than a plane
        set_piece_size(monkeypatch, size)
    for shape in ((5, 6), (2, 6, 5, 4), (6,)):
        targets = ENTRIES[kind](shape) if len(shape) > 1 else ENTRIES["soft"](shape)
        asked = {"ignore_index": -2, **changed}
        base = (torch.randn(shape) * 6).to(dtype)
        if len(shape) == 4:
            base = base.contiguous(memory_format=torch.channels_last)
        for reduction in ("none", "sum") if "normalizer" in changed else ("none", "mean"):
            ours, exact = base.clone().requires_grad_(), base.double().requires_grad_()
            with mock.patch.object(_pieces.EntryPieces, "entries", autospec=True) as entries:
                entries.side_effect = entries_of_pieces
                loss = sigmoid_focal_loss(ours, targets, reduction=reduction, **asked)
            hard_sum = kind == "classes" and reduction != "none" and len(shape) > 1
            assert entries.call_count == (not hard_sum)
            expected = sigmoid_focal_loss(exact, targets, reduction=reduction, **asked)
            result_dtype = dtype if reduction == "none" else torch.float32
            assert_close(loss, expected.to(result_dtype), rtol=None, atol=None)
            upstream = torch.rand(loss.shape, dtype=result_dtype)
            (got,) = torch.autograd.grad(loss, ours, upstream)
            (want,) = torch.autograd.grad(expected, exact, upstream.to(expected.dtype))
            assert got.stride() == base.stride()
            assert_close(got, want.to(dtype))


def no_formula(tensors: Sequence[Tensor]) -> Tensor:
    raise AssertionError(f"The formula was called with {len(tensors)} tensors.")


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_saturated_logits_in_pieces_have_the_gradients_of_the_cpu(gamma: float) -> None:
    x = torch.tensor([-1e4, -200.0, -100.0, -30.0, 30.0, 100.0, 200.0, 1e4])[:, None].repeat(1, 3)
    targets = torch.tensor([[0.0, 0.5, 1.0]]).repeat(8, 1)
    kernel = _pieces.EntryPieces(targets, KernelOptions(0.25, gamma, -100), 1.0, False, no_formula)
    y = x.clone().requires_grad_()
    loss = sigmoid_focal_loss(y, targets, gamma=gamma, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    assert_close(kernel.entries(x), loss)
    assert_close(kernel.entries_gradient(x, torch.ones_like(x)), gradient)
    infinite = torch.tensor([[-torch.inf, torch.inf]]).T.repeat(1, 3)
    kernel = _pieces.EntryPieces(targets[:2], kernel.options, 1.0, False, no_formula)
    assert not kernel.entries(infinite).isnan().any()
    assert kernel.entries_gradient(infinite, torch.ones(2, 3)).isfinite().all()


@pytest.mark.usefixtures("no_kernels")
def test_ignored_places_in_pieces_hide_any_logits_and_any_upstream_gradient() -> None:
    x = torch.tensor([[torch.nan, torch.inf], [0.0, 0.0]]).requires_grad_()
    loss = sigmoid_focal_loss(x, torch.tensor([-100, 1]), reduction="none")
    assert_close(loss[0], torch.zeros(2))
    upstream = torch.tensor([[torch.nan, torch.inf], [1.0, 1.0]])
    (gradient,) = torch.autograd.grad(loss, x, upstream)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivatives_of_entries_use_the_formula(reduction: Any) -> None:
    base, targets, upstream = torch.randn(5, 6), torch.rand(5, 6), torch.rand(5, 6)
    seconds = []
    for dtype in (torch.float32, torch.float64):
        x = base.to(dtype).requires_grad_()
        loss = sigmoid_focal_loss(x, targets.to(dtype), reduction=reduction, normalizer="num_pos")
        total = (loss * upstream).sum()
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0].float())
    assert_close(*seconds, rtol=1e-4, atol=1e-6)


# Waits, uploads and memory, counted with fake tensors


class Recorder(types.ModuleType):
    """A module of kernels that only allocates what the real one does."""

    @staticmethod
    def image_totals(
        tensors: list[Tensor], levels: list[Any], targets: list[Tensor], asked: KernelOptions
    ) -> Tensor:
        assert len(tensors) == len(levels) == len(targets)
        assert asked.class_weights is None or asked.class_weights.device == tensors[0].device
        return torch.empty(levels[0].images, device=tensors[0].device)

    @staticmethod
    def gradient(x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)


def cuda_losses(dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """Return losses of tensors on the current device, which is a fake CUDA device."""
    device = "cuda:0"
    maps = [torch.empty(2, 15, h, w, dtype=dtype, device=device) for h, w in SIZES]
    targets = torch.empty(2, 3 * sum(h * w for h, w in SIZES), dtype=torch.int64, device=device)
    per_class, per_image = torch.empty(5, device=device), torch.empty(2, device=device)
    rows, classes = torch.empty(9, 5, dtype=dtype, device=device), targets[0, :9]
    loss = functools.partial(sigmoid_focal_loss_maps, maps, targets, num_classes=5)
    return {
        "maps": functools.partial(loss, reduction="sum", normalizer="num_pos"),
        "per class": functools.partial(loss, alpha=per_class, gamma=0.5),
        "per image": functools.partial(loss, reduction="sum", normalizer=per_image),
        "without reduction": functools.partial(loss, reduction="none", normalizer=per_image),
        "rows": functools.partial(sigmoid_focal_loss, rows, classes, normalizer=7.0),
        "rows per class": functools.partial(sigmoid_focal_loss, rows, classes, alpha=per_class),
        "soft targets": functools.partial(sigmoid_focal_loss, rows, rows, gamma=1.5),
        "planes": functools.partial(sigmoid_focal_loss, maps[0].view(2, 5, -1), targets[:, :672]),
        "module": functools.partial(
            FocalLoss(reduction="sum", normalizer="num_pos"), rows, classes
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["formula", "kernels", "pieces"])
def test_no_loss_waits_or_uploads(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path != "formula":
        modules = {"kernels": Recorder("recorder"), "pieces": _pieces}
        monkeypatch.setattr(_cuda, "kernels", lambda _: modules[path])
        monkeypatch.setattr("focaldet.losses._arguments.plain", lambda device, *_: device == "cuda")
    with fake_cuda(strict=True) as counts:
        losses = cuda_losses(dtype)
        for name, loss in losses.items():
            counts.clear()
            assert loss().device.type == "cuda", name
            assert counts.num_waits == counts.num_uploads == 0, f"{name}: {counts.report()}"


def torchvision_loss(x: Tensor, targets: Tensor) -> Tensor:
    """Compute the sum of the losses with the operations of torchvision's, in their order."""
    p = torch.sigmoid(x)
    ce_loss = F.binary_cross_entropy_with_logits(x, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** 2.0)
    alpha_t = 0.25 * targets + (1 - 0.25) * (1 - targets)
    return (alpha_t * loss).sum()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_no_loss_without_kernels_needs_more_memory_than_torchvision(
    soft: bool, reduction: Any, gamma: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "kernels", lambda _: None)
    monkeypatch.setattr("focaldet.losses._arguments.plain", lambda device, *_: device == "cuda")
    monkeypatch.setattr(_pieces, "PIECES", 4)  # fewer than usual, which is quicker and needs more
    monkeypatch.setattr(_pieces, "SMALLEST", 1024)
    with fake_cuda() as counts, torch.device("cuda:0"):
        x = torch.empty(500, 80, dtype=dtype).requires_grad_()
        floats, classes = torch.empty_like(x), torch.empty(500, dtype=torch.int64)
        targets = floats if soft else classes

        def bytes_of(call: Callable[[], Tensor]) -> tuple[int, int]:
            """Return the peak, and what is left with the result, above what was there before."""
            counts.clear()
            start = counts.live
            result = call()
            assert result.device.type == "cuda"
            return counts.peak - start, counts.live - start

        options: dict[str, Any] = {"gamma": gamma, "reduction": reduction}
        with mock.patch.object(EntryLosses, "apply", wraps=EntryLosses.apply) as used:
            peak, saved = bytes_of(lambda: sigmoid_focal_loss(x, targets, **options))
        most, kept = bytes_of(
            lambda: torchvision_ops.sigmoid_focal_loss(
                x, floats if soft else F.one_hot(classes, 80).to(dtype), **options
            )
        )
        assert saved <= (x.nbytes if reduction == "none" else 0) + 2**12
        assert saved <= kept
        assert peak <= most, (peak / x.numel(), most / x.numel())
        assert used.call_count == (soft or reduction == "none")
        for call in used.call_args_list:  # backward cannot run on fake CUDA tensors by itself
            upstream = floats if reduction == "none" else torch.empty(())
            with torch.no_grad():
                backward, _ = bytes_of(lambda: call.args[0].entries_gradient(x, upstream))  # noqa: B023
            assert saved + backward <= most, (backward / x.numel(), most / x.numel())


@pytest.mark.parametrize("size", [(4, 6), (50, 84)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_in_pieces_needs_less_memory_than_torchvision(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    dtype = torch.bfloat16
    with fake_cuda() as counts:
        m = torch.empty(2, 9 * 80, *size, dtype=dtype, device="cuda:0")
        m = m.contiguous(memory_format=layout)
        places = 9 * size[0] * size[1]
        targets = torch.empty(2, places, dtype=torch.int64, device="cuda:0")
        asked, upstream = KernelOptions(0.25, 2.0, -100), torch.empty(2, device="cuda:0")
        (level,) = levels_of_maps([m], 80)
        counts.clear()
        start = counts.live
        totals = _pieces.image_totals([m], [level], [targets], asked)
        saved = counts.live - start
        gradient = _pieces.gradient(m, level, targets, upstream, asked)
        ours = counts.peak - start
        assert gradient.stride() == m.stride()
        assert saved < 2**12  # only the sums remain after the forward pass
        del totals, gradient
        one_hot = torch.empty(2, places, 80, dtype=dtype, device="cuda:0")
        rows = torch.empty_like(one_hot).requires_grad_()
        counts.clear()
        start = counts.live
        loss = torchvision_loss(rows, one_hot)
        theirs = counts.peak - start
        assert loss.requires_grad
    assert ours < theirs, (ours / m.numel(), theirs / m.numel())
    if size[0] == 50:
        assert ours < 0.6 * theirs


def test_dense_logits_are_not_copied() -> None:
    x = torch.zeros(2, 6, 3, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert dense(x) is x
    assert dense(last) is last
    assert dense(x.transpose(2, 3)).is_contiguous()
    assert level_of(x).shape == (2, 6, 12)
    assert level_of(last).shape == (24, 6, 1)
    planes, rows = levels_of_maps([x, last], 3)
    assert (planes.shape, planes.planes, planes.start) == ((4, 3, 12), 2, 0)
    assert (rows.shape, rows.planes, rows.start) == ((48, 3, 1), 0, 24)
