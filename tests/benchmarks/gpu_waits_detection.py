"""Count what a GPU waits for in detection, without a GPU.

Prints waits, uploads and the peak memory of post-processing for fake CUDA tensors in the sizes of a
ResNet-50 RetinaNet at 800x1344, for both formulations. Time is not measured.

    python -m tests.benchmarks.gpu_waits_detection
"""

from __future__ import annotations

import argparse
import warnings
from unittest import mock

import torch

from focaldet import AnchorGenerator, Detections
from focaldet.box_coder import BoxCoder
from focaldet.postprocess import PostProcess
from tests.helpers.fake_cuda import Counts, fake_cuda

FEATURES = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
SIZE = (800, 1333)


def count(images: int, classes: int, *, fixed_shape: bool) -> Counts:
    """Count the waits and uploads of one batch."""
    device = torch.device("cuda:0")
    choice = mock.patch.object(PostProcess, "_prefers_fixed_shape", return_value=fixed_shape)
    valid = mock.patch.object(Detections, "_check_each_value")  # fake values seem to be wrong
    with torch.no_grad(), choice, valid, fake_cuda() as counts:
        logits, box_deltas = (
            [torch.zeros(images, 9 * channels, *size, device=device) for size in FEATURES]
            for channels in (classes, 4)
        )
        anchors = AnchorGenerator()(FEATURES, device=device)
        process = PostProcess(BoxCoder())
        counts.clear()
        maps = counts.live
        process(logits, box_deltas, anchors, [SIZE] * images, [SIZE] * images, device="cpu")
        counts.peak -= maps
        return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--classes", type=int, default=80)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'images':>6} {'formulation':12} {'waits':>6} {'uploads':>8} {'peak MiB':>9}")
    for images in options.images:
        for name, fixed in (("per image", False), ("whole batch", True)):
            counts = count(images, options.classes, fixed_shape=fixed)
            row = f"{counts.num_waits:6d} {counts.num_uploads:8d} {counts.peak / 2**20:9.1f}"
            print(f"{images:6d} {name:12} {row}")


if __name__ == "__main__":
    main()
