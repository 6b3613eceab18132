"""Speed and memory of a training step, compared with torchvision's RetinaNet (float32, eager).

Both sides have the same random weights (ResNet-50, FrozenBatchNorm, the first two stages frozen) and get
the same batch of two images in the size of the network. A step is forward, losses, backward and SGD with
momentum. Ours uses channels_last. The sides alternate in one process, and the output is medians of wall
and process CPU time, ours / torchvision's, and the ratio. In float32 the first losses must agree to
1e-4. ``bf16`` compares ours under autocast with torchvision's in float32. Memory is the peak of two steps
above the level before them, after two others, with each side in its own process: allocated tensors, which
have a target, and resident memory. The exit status is 1 if a ratio misses its target.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.training_step [--rows float32 bf16 memory]
"""

from __future__ import annotations

import argparse
import functools
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from focaldet import RetinaNet, RetinaNetConfig
from tests.benchmarks.memory import compare_memory, memory_of_calls
from tests.benchmarks.peer import (
    header,
    images_of,
    in_turn,
    make_peer,
    ours_of,
    report,
    size_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tests.benchmarks.memory import Memory


class Row(NamedTuple):
    """One row of the table. ``asked`` is the lowest ratio, or for memory the highest."""

    kind: str
    size: str
    boxes: int
    asked: float


ROWS = [
    Row("float32", "512", 20, 1.12),
    Row("float32", "512", 200, 1.4),
    Row("float32", "800x1333", 20, 1.4),
    Row("bf16", "512", 20, 1.9),
    Row("bf16", "800x1333", 20, 2.7),
    Row("memory", "512", 20, 0.75),
    Row("memory", "800x1333", 20, 0.65),
    Row("memory", "512", 1000, 0.3),
]


def targets_of(size: tuple[int, int], boxes: int, batch: int) -> list[Any]:
    """Return boxes with sides from 16 pixels to half the image, anywhere in it."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.tensor([size[1], size[0]])
    targets = []
    for _ in range(batch):
        share = torch.rand(boxes, 1, generator=generator)
        side = 16 * (min(size) / 32) ** share * torch.ones(2)
        corner = torch.rand(boxes, 2, generator=generator) * (whole - side)
        labels = torch.randint(91, (boxes,), generator=generator)
        targets.append({"boxes": torch.cat((corner, corner + side), dim=1), "labels": labels})
    return targets


def models_of(size: tuple[int, int], *, small: bool = False) -> tuple[RetinaNet, Any]:
    """Return both sides in training mode, with the same weights and the same layers frozen."""
    peer = make_peer(size, small=small)
    ours = ours_of(peer, size, trainable_stages=3).train()
    peer.train()
    for name, parameter in peer.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, peer)]
    assert counts[0] == counts[1], counts
    return ours, peer


def stepping(
    model: Any, losses: Callable[[], dict[str, Tensor]]
) -> Callable[[], dict[str, Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A tiny learning rate, so that losses are of ordinary size after many steps.
    optimizer = torch.optim.SGD(trained, lr=1e-7, momentum=0.9)

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        values = losses()
        torch.autograd.backward(list(values.values()))
        optimizer.step()
        return {name: value.detach() for name, value in values.items()}

    return step


def steps_of(row: Row, batch: int = 2) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Return one training step for each side, with the same weights."""
    size = size_of(row.size)
    images, targets = images_of(size, batch), targets_of(size, row.boxes, batch)
    ours, peer = models_of(size)
    ours.to(memory_format=torch.channels_last)

    def our_losses() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=row.kind == "bf16"):
            losses: dict[str, Tensor] = ours(images, targets).losses
        return losses

    def their_losses() -> dict[str, Tensor]:
        losses: dict[str, Tensor] = peer(images, targets)
        return losses

    return {"ours": stepping(ours, our_losses), "torchvision": stepping(peer, their_losses)}


def compare(row: Row, rounds: int) -> bool:
    steps = steps_of(row)
    ours, theirs = steps["ours"](), steps["torchvision"]()
    pairs = [
        (ours["classification"], theirs["classification"]),
        (ours["box_regression"], theirs["bbox_regression"]),
    ]
    apart = max(float((a - b).abs() / b) for a, b in pairs)
    times = in_turn(steps["ours"], steps["torchvision"], rounds)
    name = f"{row.kind} {row.size} {row.boxes} boxes"
    fast = report(name, *times, row.asked, f"losses {apart:.1e} apart")
    return fast and (apart < 1e-4 or row.kind == "bf16")


def losses_of(model: RetinaNet, images: list[Tensor], targets: list[Any]) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = model(images, targets).losses
    return losses


def format_steps(
    backbone: str, head_norm: Any, size: tuple[int, int]
) -> dict[torch.memory_format, Callable[[], dict[str, Tensor]]]:
    """Return one training step for each memory format, with the same weights."""
    images, targets = images_of(size, 2), targets_of(size, 20, 2)
    config = RetinaNetConfig(
        num_classes=91,
        backbone=backbone,
        head_norm=head_norm,
        fpn_channels=256 if backbone == "resnet50" else 64,
        min_size=min(size),
        max_size=max(size),
    )
    steps = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The backbone is randomly initialised")
            model = RetinaNet.from_config(config).train()
        model.to(memory_format=layout)
        steps[layout] = stepping(model, functools.partial(losses_of, model, images, targets))
    return steps


def compare_formats(backbone: str, head_norm: str | None, size: str, rounds: int) -> bool:
    """Print one row, with the ratios of contiguous to channels_last."""
    steps = format_steps(backbone, head_norm, size_of(size))
    last, contiguous = steps[torch.channels_last], steps[torch.contiguous_format]
    pairs = zip(last().values(), contiguous().values(), strict=True)
    apart = max(float((a - b).abs() / b) for a, b in pairs)
    times = in_turn(last, contiguous, rounds)
    name = f"{backbone} {size} head_norm={head_norm}"
    report(name, *times, 0, f"losses {apart:.1e} apart")
    return apart < 1e-5


def memory(row: Row, threads: int) -> bool:
    arguments = ["--rows", row.kind, "--sizes", row.size, "--boxes", str(row.boxes)]
    arguments += ["--threads", str(threads)]
    name = f"memory {row.size} {row.boxes} boxes"
    return compare_memory(name, "tests.benchmarks.training_step", arguments, row.asked)


def memory_of(side: str, row: Row) -> Memory:
    step = steps_of(row).pop(side)

    def twice() -> None:
        step()
        step()

    return memory_of_calls(twice, runs=1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=["float32", "bf16", "memory"])
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--sizes", nargs="+", default=["512", "800x1333"])
    parser.add_argument("--boxes", nargs="+", type=int, default=[20, 200, 1000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=["ours", "torchvision"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for row in ROWS
        if row.kind in options.rows and row.size in options.sizes and row.boxes in options.boxes
    ]
    if options.memory_of:
        print(*memory_of(options.memory_of, rows[0]))
        return 0
    print(header(options.threads))
    good = [
        memory(row, options.threads) if row.kind == "memory" else compare(row, options.rounds)
        for row in rows
    ]
    if "formats" in options.rows:
        good += [
            compare_formats(backbone, head_norm, size, options.rounds)
            for backbone in options.backbones
            for size in options.sizes
            for head_norm in (None, "group")
        ]
    print(f"{sum(good)} of {len(good)} rows reach their target")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
