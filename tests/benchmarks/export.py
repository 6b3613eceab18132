"""Speed of an exported RetinaNet beside torchvision's: from the decoded image to detections.

Both sides are a RetinaNet with ResNet-50 (torchvision's first one, FrozenBatchNorm, 91 classes) of the same
random weights, with a class bias that lets some hundred scores pass. torchvision runs eagerly; ours is
``OnnxDetector`` on the file that ``export_onnx`` writes of the converted weights. A and B run in turn in one
process, with as many threads. Prints medians of wall and of process CPU time and their ratios; the exit
status is 1 if the wall ratio falls short of what is asked or the detections differ.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.export [--threads 2] [--sizes 320 512 800x1333]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.export import OnnxDetector, export_onnx
from focaldet.pretrained import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from focaldet.export._sessions import RuntimeName

ASKED = 1.4


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=["320", "512", "800x1333"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"], default="onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchvision", "onnxruntime")
    )
    print(
        f"{versions}; {options.threads} threads, batch {options.batch}, load {os.getloadavg()[0]:.1f}"
    )
    good = [
        measure(
            *size_of(text),
            batch=options.batch,
            threads=options.threads,
            rounds=options.rounds,
            runtime=options.runtime,
        )
        for text in options.sizes
    ]
    return 0 if all(good) else 1


def size_of(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def measure(
    height: int, width: int, *, batch: int, threads: int, rounds: int, runtime: RuntimeName
) -> bool:
    """Time one size; images have it already, so that neither side's resizing changes it."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, height, width, generator=generator) for _ in range(batch)]
    peer = make_peer(height, width, images)
    with tempfile.TemporaryDirectory() as folder:
        model = ours_of(peer, height, width, Path(folder))
        export_onnx(model, Path(folder) / "model.onnx")
        detector = OnnxDetector(Path(folder) / "model.onnx", runtime=runtime, threads=threads)

        def theirs() -> Any:
            with torch.no_grad():
                return peer(images)

        def ours() -> Any:
            return detector.predict(images, batch_size=batch)

        equal = compare(ours(), theirs())
        times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
        for _ in range(rounds):
            times["theirs"].append(timed(theirs))
            times["ours"].append(timed(ours))
    (wall, cpu), (our_wall, our_cpu) = (
        [statistics.median(column) for column in zip(*side, strict=True)] for side in times.values()
    )
    print(
        f"{height}x{width}: torchvision {wall:.3f} s (CPU {cpu:.3f}), {detector.runtime} "
        f"{our_wall:.3f} s (CPU {our_cpu:.3f}), {wall / our_wall:.2f} x (CPU {cpu / our_cpu:.2f} x; "
        f"asked {ASKED}); {equal}",
        flush=True,
    )
    return wall / our_wall >= ASKED and equal.startswith("equal")


def make_peer(height: int, width: int, images: list[Tensor]) -> Any:
    """torchvision's RetinaNet with FrozenBatchNorm, and a class bias that lets some scores pass."""
    torch.manual_seed(0)
    resnet50 = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(
        resnet50,
        5,
        returned_layers=[2, 3, 4],
        extra_blocks=torchvision.ops.feature_pyramid_network.LastLevelP6P7(256, 256),
    )
    for name, tensor in resnet50.named_buffers():
        if name.endswith("bn3.weight"):
            tensor.fill_(0.2)  # or the sums of residual blocks grow from stage to stage
    peer = torchvision.models.detection.RetinaNet(
        backbone,
        num_classes=91,
        anchor_generator=torchvision.models.detection.retinanet._default_anchorgen(),
        min_size=min(height, width),
        max_size=max(height, width),
    ).eval()
    head = peer.head.classification_head
    torch.nn.init.normal_(head.cls_logits.weight, std=0.02)
    with torch.no_grad():
        features = list(peer.backbone(peer.transform(images)[0].tensors).values())
        logits = head(features).flatten()
        tail = logits.topk(len(images) * 3000).values[-1] - head.cls_logits.bias[0]
        head.cls_logits.bias.fill_(float(math.log(0.05 / 0.95) - tail))
    return peer


def ours_of(peer: Any, height: int, width: int, folder: Path) -> RetinaNet:
    """The same weights, read as a checkpoint of torchvision's."""
    path = folder / "peer.pth"
    torch.save(peer.state_dict(), path)
    config = RetinaNetConfig.torchvision_v1().replace(
        min_size=min(height, width), max_size=max(height, width)
    )
    checkpoint = load_checkpoint(path, config)
    model = RetinaNet.from_config(config, backbone_weights=None)
    model.load_state_dict(checkpoint.tensors)
    return model.eval()


def compare(ours: Any, theirs: Any) -> str:
    """Say how far boxes and scores are apart where both sides have as many."""
    counts = [(len(a), len(b["boxes"])) for a, b in zip(ours, theirs, strict=True)]
    if any(a != b for a, b in counts):
        return f"other detections: {counts}"
    boxes = scores = 0.0
    for a, b in zip(ours, theirs, strict=True):
        scores = max(scores, float((a.scores - b["scores"]).abs().max()))
        for box, label in zip(a.boxes, a.labels, strict=True):
            same = b["boxes"][b["labels"] == label]
            boxes = max(boxes, float((same - box).abs().amax(1).min()) if len(same) else math.inf)
    verdict = "equal" if boxes <= 0.02 and scores <= 5e-5 else "different"
    return f"{verdict}: {counts[0][0]} detections, {boxes:.4f} px, {scores:.1e}"


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.exit(main())
