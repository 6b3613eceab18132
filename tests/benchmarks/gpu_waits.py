"""What a GPU would wait for in a training step, compared with torchvision's RetinaNet, without a GPU.

Both sides run on fake CUDA tensors: ResNet-50 with frozen BatchNorm, of which all layers train, 800x1333
pixels, 91 classes, images and targets on the device. Counted are waits (the host reads a value or a shape that depends on values),
uploads (copies of small tensors from the host, which wait too), and the peak memory of forward pass and
losses in float32, in MiB above the weights. There is no backward pass on fake tensors. The matcher's rows
are its own peak for 201,600 anchors. The exit status is 1 if ours waits or has a higher peak.

    python -m tests.benchmarks.gpu_waits [--images 2 16] [--boxes 20]
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torchvision
from torchvision.models.detection._utils import Matcher as PeerMatcher

from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.anchor_grid import AnchorGrid
from focaldet.matching import Matcher
from tests.helpers.fake_cuda import Counts, fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 800, 1333
LEVELS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


def model_of(side: str) -> Any:
    """Return a detector in training mode on the default device."""
    if side == "ours":
        config = RetinaNetConfig.torchvision_v1().replace(backbone_norm="frozen")
        model: Any = RetinaNet.from_config(config)
    else:
        model = torchvision.models.detection.retinanet_resnet50_fpn(
            weights=None,
            weights_backbone=None,
        )
        for name, norm in list(model.named_modules()):
            if isinstance(norm, torch.nn.BatchNorm2d):
                frozen = torchvision.ops.FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
                model.set_submodule(name, frozen)
    return model.train()


def count_step(step: Callable[[Any, Any], Any], counts: Counts, images: int, boxes: int) -> int:
    """Count the second step, and return its peak above what was live before."""
    targets = [
        {"boxes": torch.rand(boxes, 4), "labels": torch.zeros(boxes, dtype=torch.int64)}
        for _ in range(images)
    ]
    batch = [torch.rand(3, *SIZE) for _ in range(images)]
    step(batch, targets)
    before = counts.live
    counts.clear()
    step(batch, targets)
    return counts.peak - before


def training_step(side: str, images: int, boxes: int) -> tuple[int, int, float]:
    """Return waits, uploads and MiB. Boolean indices choose all rows, as nearly all anchors are valid."""
    with fake_cuda(masked_rows=10**9) as counts, torch.device("cuda:0"):
        model = model_of(side)
        options = {"validate": False} if side == "ours" else {}
        peak = count_step(lambda *batch: model(*batch, **options), counts, images, boxes)
    return counts.num_waits, counts.num_uploads, peak / 2**20


def detection(side: str, images: int) -> tuple[int, int, float]:
    """Return waits, uploads and MiB of detection, as :func:`training_step` does.

    Ours gives detections on the host, torchvision's on the device.
    """
    valid = mock.patch.object(Detections, "_check_each_value")  # fake values seem to be wrong
    with torch.no_grad(), valid, fake_cuda() as counts, torch.device("cuda:0"):
        model = model_of(side).eval()

        def run(batch: Any, _: Any) -> None:
            if side == "ours":
                model.detections(model(batch, validate=False), device="cpu")
            else:
                model(batch)

        peak = count_step(run, counts, images, boxes=1)
    return counts.num_waits, counts.num_uploads, peak / 2**20


def match(side: str, images: int, boxes: int) -> tuple[int, int, float]:
    """Return waits, uploads and MiB of matching alone."""
    with fake_cuda() as counts, torch.device("cuda:0"):
        grid = AnchorGrid([torch.zeros(9 * h * w, 4) for h, w in LEVELS], LEVELS)
        batch = torch.zeros(images, boxes, 4)
        valid = torch.ones(images, boxes, dtype=torch.bool)
        before = counts.live
        counts.clear()
        if side == "ours":
            Matcher().match_batch(batch, valid, grid)
        else:
            matcher = PeerMatcher(0.5, 0.4, allow_low_quality_matches=True)
            kept = [matcher(torchvision.ops.box_iou(each, grid.anchors)) for each in batch]
            del kept
    return counts.num_waits, counts.num_uploads, (counts.peak - before) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--boxes", nargs="+", type=int, default=[20])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, fake CUDA tensors")
    print(f"{'':34s} {'waits':>12s} {'uploads':>12s} {'MiB':>17s}")
    good = True
    rows = [("step", training_step, i, g) for i in options.images for g in options.boxes]
    rows += [("matching", match, i, g) for i, g in ((2, 20), (16, 20), (16, 300))]
    for name, function, images, boxes in rows:
        mine, theirs = function("ours", images, boxes), function("torchvision", images, boxes)
        good &= mine[0] == 0 and mine[2] <= theirs[2]
        print(
            f"{f'{name}, {images} images, {boxes} boxes':34s} {mine[0]:5d} / {theirs[0]:4d} "
            f"{mine[1]:5d} / {theirs[1]:4d} {mine[2]:8,.0f} / {theirs[2]:6,.0f}",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
