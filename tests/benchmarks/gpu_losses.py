"""The focal loss on a GPU, compared with torchvision's: sections of :mod:`tests.benchmarks.gpu`.

Two of them need no GPU: the instructions that the Triton kernels execute, counted in the code that is
compiled for sm_90, and the memory of the loss, counted with fake tensors.
"""

# Triton and apex are untyped and optional:
# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from focaldet.losses import _pieces, sigmoid_focal_loss, sigmoid_focal_loss_maps
from focaldet.losses._arguments import KernelOptions
from focaldet.losses._layout import levels_of_maps
from tests.benchmarks.gpu_timing import Row, measure, no_waits
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.triton_kernels import KernelCase, compile_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tests.benchmarks.gpu_timing import Setting

    Loss = Callable[[Sequence[Tensor]], Tensor]

CLASSES, ANCHORS = 80, 9
LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # of an image of 800x1333 pixels
SMALL_LEVELS = [(12, 20), (6, 10), (3, 5)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def levels_of(setting: Setting) -> list[tuple[int, int]]:
    return SMALL_LEVELS if setting.small else LEVELS


def rows_of(maps: Sequence[Tensor]) -> Tensor:
    """Permute and concatenate the maps to logits ``[B, R, K]``, as torchvision's head does."""
    parts = []
    for m in maps:
        B, _, H, W = m.shape
        parts.append(m.view(B, ANCHORS, CLASSES, H, W).permute(0, 3, 4, 1, 2).flatten(1, 3))
    return torch.cat(parts, 1)


def one_hot(targets: Tensor, x: Tensor) -> Tensor:
    """Build float targets ``[..., K]``, with zeros for background and ignored places."""
    classes = torch.arange(x.shape[-1], device=x.device)
    return (targets[..., None] == classes).to(x.dtype)


def through_torchvision(maps: Sequence[Tensor], targets: Tensor) -> Tensor:
    x = rows_of(maps)
    losses = torchvision_loss(x, one_hot(targets, x), reduction="none")
    total: Tensor = losses.masked_fill((targets == -100)[..., None], 0.0).sum()
    return total


def losses_of(setting: Setting, targets: Tensor) -> dict[str, Loss]:
    """Return the losses to compare, by name; all but apex's have the same value."""
    flat = targets.view(-1)

    def ours(maps: Sequence[Tensor]) -> Tensor:
        return sigmoid_focal_loss_maps(maps, targets, num_classes=CLASSES, reduction="sum")

    def rows(maps: Sequence[Tensor]) -> Tensor:
        return sigmoid_focal_loss(rows_of(maps).flatten(0, 1), flat, reduction="sum")

    def theirs(maps: Sequence[Tensor]) -> Tensor:
        return through_torchvision(maps, targets)

    losses: dict[str, Loss] = {"focaldet, maps": ours, "focaldet, rows": rows}
    losses["torchvision"] = theirs
    if setting.device.type == "cuda":
        losses["torchvision compiled"] = torch.compile(theirs)
    if setting.device.type == "cuda" and find_spec("apex") is not None:
        apex = importlib.import_module("apex.contrib.focal_loss.focal_loss")
        marked = targets.masked_fill(targets == -100, -2)  # its mark of ignored places
        one = torch.ones(1, device=setting.device)

        def fused(maps: Sequence[Tensor]) -> Tensor:
            x = rows_of(maps)
            loss: Tensor = apex.focal_loss(x, marked, one, CLASSES, 0.25, 2.0)
            return loss.sum()

        losses["apex"] = fused
    return losses


def losses(setting: Setting) -> Iterator[Row]:
    """Compare time and memory of loss and gradient of a batch's maps."""
    sizes = levels_of(setting)
    places = ANCHORS * sum(h * w for h, w in sizes)
    torch.manual_seed(0)
    targets = torch.full((2, places), -1, device=setting.device)
    chance = torch.rand(2, places, device=setting.device)
    targets = torch.where(chance < 0.0005, 3, targets).where(chance < 0.999, -100)
    compared = losses_of(setting, targets)
    for dtype in DTYPES[:1] if setting.small else DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            maps = [
                torch.randn(2, ANCHORS * CLASSES, h, w, device=setting.device, dtype=dtype)
                .sub_(4)
                .contiguous(memory_format=layout)
                .requires_grad_()
                for h, w in sizes
            ]
            for name, loss in compared.items():
                call = functools.partial(cost_of_loss, name, loss, compared, maps, setting)
                yield Row(f"{str(dtype)[6:]}, {str(layout)[6:]}, {name}", call)


def cost_of_loss(
    name: str, loss: Loss, compared: dict[str, Loss], maps: list[Tensor], setting: Setting
) -> str:
    """Measure one loss, and compare its value with that of the first."""

    def step() -> Tensor:
        value = loss(maps)
        torch.autograd.grad(value, maps)
        return value

    value = float(step().detach())
    with torch.no_grad():
        exact = float(next(iter(compared.values()))(maps))
    with no_waits(setting) if name == "focaldet, maps" else contextlib.nullcontext():
        step()
    cost = measure(step, setting)
    return (
        f"{cost.milliseconds:9.3f} ms {cost.mebibytes:8.0f} MiB   "
        f"loss off by {abs(value / exact - 1):.1e}"
    )


def loss_memory(setting: Setting) -> Iterator[Row]:
    """Count the memory that the loss of maps needs beyond them, with fake tensors."""
    for dtype in DTYPES:
        call = functools.partial(memory_row, dtype, levels_of(setting))
        yield Row(str(dtype)[6:], call)


def memory_row(dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> str:
    return "; ".join(f"{name} {value:.0f}" for name, value in memory_of(dtype, sizes).items())


def memory_of(dtype: torch.dtype, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return peaks in MiB beyond the maps, by name."""
    with fake_cuda() as counts, torch.device("cuda:0"):
        maps = [torch.empty(2, ANCHORS * CLASSES, h, w, dtype=dtype) for h, w in sizes]
        levels, asked = levels_of_maps(maps, CLASSES), KernelOptions(0.25, 2.0, -100)
        targets = torch.empty(2, ANCHORS * sum(h * w for h, w in sizes), dtype=torch.int64)
        upstream = torch.empty(2)

        def peak(call: Callable[[], object]) -> float:
            counts.clear()
            start = counts.live
            call()
            return (counts.peak - start) / 2**20

        def gradients() -> list[Tensor]:
            pairs = zip(maps, levels, strict=True)
            return [_pieces.gradient(m, level, targets, upstream, asked) for m, level in pairs]

        every = [targets] * len(maps)
        result = {
            "kernels, gradient alone": sum(m.nbytes for m in maps) / 2**20,
            "pieces, forward": peak(lambda: _pieces.image_totals(maps, levels, every, asked)),
            "pieces, backward": peak(gradients),
        }
        for m in maps:
            m.requires_grad_()
        result["formula, forward"] = peak(
            lambda: sigmoid_focal_loss_maps(maps, targets, num_classes=CLASSES)
        )
        result["torchvision, forward"] = peak(lambda: through_torchvision(maps, targets))
    return result


def loss_instructions(_: Setting) -> Iterator[Row]:
    """Count how many instructions per logit the kernels execute on sm_90."""
    if find_spec("triton") is None:
        yield Row("every kernel", lambda: "not counted: Triton is not installed")
        return
    for name in ("rows_forward", "rows_backward", "planes_forward", "planes_backward"):
        for dtype in ("fp32", "bf16"):
            yield Row(f"{name}, {dtype}", functools.partial(instructions_of, name, dtype))


def instructions_of(name: str, dtype: str) -> str:
    from focaldet.losses import _triton

    case = KernelCase(num_classes=CLASSES, dtype=dtype)
    kernel = getattr(_triton, f"{name}_kernel")
    code = disassembled(compile_kernel(kernel, case, 90)["cubin"])
    tile = _triton.tile(CLASSES, case.positions)
    loops = 1 if "rows" in name else tile.chunk // tile.classes
    entries = loops * _triton.BLOCK // (32 * _triton.COMPILED["num_warps"])
    return f"{executed(code, loops) / entries:5.1f}"


def disassembled(cubin: bytes) -> str:
    """Return the machine code of a kernel, with the tool that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True)
    return done.stdout


def executed(code: str, loops: int) -> int:
    """Count the instructions that a thread executes, if its largest loop runs ``loops`` times."""
    labels: dict[str, int] = {}
    count, loop = 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = count
        if " NOP" in line or not re.search(r"/\*[0-9a-f]{4,5}\*/\s+[@A-Z]", line):
            continue
        count += 1
        branch = re.search(r"BRA.*`\((\.L\w+)\)", line)
        if branch and branch.group(1) in labels:
            loop = max(loop, count - labels[branch.group(1)])
    return count + (loops - 1) * loop
