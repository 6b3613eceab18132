"""Shared parts of the speed benchmarks: a torchvision RetinaNet, the same weights here, timing."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from focaldet import RetinaNet, RetinaNetConfig
from tests.helpers.reference_torchvision import everything_of, randomise, randomised
from tests.helpers.torchvision_pairs import CHANNELS, resnet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# How many scores per image exceed .05: few, as for a photo, growing with the number of anchors.
SCORES = {(320, 320): 606, (512, 512): 3936, (800, 1333): 8424}


class Times(NamedTuple):
    """Medians in milliseconds."""

    cpu: float
    wall: float


def size_of(text: str) -> tuple[int, int]:
    """Read "512" or "800x1333"."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def images_of(size: tuple[int, int], batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for _ in range(batch)]


def make_peer(size: tuple[int, int], *, small: bool = False) -> Any:
    """Build torchvision's RetinaNet with FrozenBatchNorm, which does not resize images of ``size``.

    ``small`` builds a narrow one on a ResNet-18, with which a benchmark runs in seconds.
    """
    torch.manual_seed(0)  # the same weights and thus the same detections in every run
    limits = {"min_size": min(size), "max_size": max(size)}
    if small:
        peer = randomise(detection.RetinaNet(resnet(), num_classes=91, **limits))
    else:
        peer = randomised("retinanet_resnet50_fpn", num_classes=91, **limits)
    for name, norm in list(peer.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
            frozen.load_state_dict(norm.state_dict())
            peer.set_submodule(name, frozen)
    [image] = images_of(size, 1)
    bias = peer.head.classification_head.cls_logits.bias
    count = SCORES.get(size, 40 * int(math.sqrt(size[0] * size[1])) // 20)
    with torch.no_grad(), everything_of(peer) as seen:
        peer([image])
        last = seen["cls_logits"].flatten().topk(count + 1).values[-1]
        bias += math.log(0.05 / 0.95) - last
    return peer.eval()


def ours_of(peer: Any, size: tuple[int, int], **options: Any) -> RetinaNet:
    """Load the same weights into focaldet's RetinaNet, through a file."""
    config = RetinaNetConfig.torchvision_v1().replace(
        min_size=min(size), max_size=max(size), backbone_norm="frozen", **options
    )
    if peer.backbone.out_channels == CHANNELS:
        config = config.replace(backbone="resnet18", fpn_channels=CHANNELS)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(peer.state_dict(), Path(folder) / "peer.pth")
        return RetinaNet.from_pretrained(Path(folder) / "peer.pth", config=config)


def header(threads: int) -> str:
    tuned = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    ]
    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {threads} threads, "
        f"load {os.getloadavg()[0]:.1f}, allocator: {' '.join(tuned) or 'default'}, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[Times, Times]:
    """Time two functions alternately, after one call of each; return their medians."""
    times: dict[Callable[[], object], list[tuple[float, float]]] = {ours: [], theirs: []}
    for turn in range(rounds + 1):
        for side in (ours, theirs) if turn % 2 else (theirs, ours):
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn:
                times[side].append((1e3 * cpu, 1e3 * wall))
    medians = [
        Times(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for rows in times.values()
    ]
    return medians[0], medians[1]


def report(name: str, ours: Times, theirs: Times, asked: float, remark: str = "") -> bool:
    """Print one row; return whether the ratio of wall times is at least ``asked``."""
    ratio = theirs.wall / ours.wall
    print(
        f"{name:34s} wall {ours.wall:8.1f} / {theirs.wall:8.1f} ms {ratio:5.2f}x   "
        f"CPU {ours.cpu:8.1f} / {theirs.cpu:8.1f} ms {theirs.cpu / ours.cpu:5.2f}x   "
        f"required {asked:.2f}x {'ok' if ratio >= asked else 'SHORT'}   {remark}",
        flush=True,
    )
    return ratio >= asked


def differences(ours: Any, theirs: Any) -> tuple[float, float, float]:
    """Compare detections: return the share in common and the largest box and score differences.

    Each detection is paired with the nearest one of its label; within a pixel they are the same.
    """
    paired, total, boxes, scores = 0, 0, 0.0, 0.0
    for found, expected in zip(ours, theirs, strict=True):
        total += max(len(found), len(expected["boxes"]))
        if not len(found) or not len(expected["boxes"]):
            continue
        apart = (found.boxes[:, None] - expected["boxes"]).abs().amax(dim=2)
        apart[found.labels[:, None] != expected["labels"]] = math.inf
        distance, index = apart.min(dim=1)
        same = distance < 1
        paired += int(same.sum())
        if bool(same.any()):
            boxes = max(boxes, float(distance[same].max()))
            score_gap = (found.scores - expected["scores"][index]).abs()[same]
            scores = max(scores, float(score_gap.max()))
    return paired / max(total, 1), boxes, scores
