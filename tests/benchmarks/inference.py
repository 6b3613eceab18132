"""Speed and memory of ``optimize_for_inference``, compared with torchvision's RetinaNet (float32, eager).

Both sides have the same random weights, with FrozenBatchNorm, and a class bias with which as many scores
pass the threshold as in a photo. Images already have the network's size. Both run in turn in one process;
the medians of wall time and process CPU time are printed as ours / torchvision's, with the ratio. In
float32 the detections must equal torchvision's within 0.05 pixels and 1e-4; for bfloat16 the difference is
printed. Memory is the peak during a later call minus that before it, with each side in its own process:
memory allocated for tensors, which has to meet the target, and resident memory, the median of five. The
exit status is 1 if a ratio misses its target or detections differ.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.inference [--rows eager compiled bf16 postprocess
        memory memory-bf16]
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._inductor.config

from tests.benchmarks.memory import compare_memory, memory_of_calls
from tests.benchmarks.peer import (
    differences,
    header,
    images_of,
    in_turn,
    make_peer,
    ours_of,
    report,
    size_of,
)
from tests.helpers.reference_torchvision import everything_of

if TYPE_CHECKING:
    from focaldet import RetinaNet
    from focaldet.retinanet import OptimizedRetinaNet
    from tests.benchmarks.memory import Memory


class Row(NamedTuple):
    """One row of the table. ``target`` is the minimum ratio, or the maximum one for memory."""

    kind: str
    size: str
    batch: int
    target: float


ROWS = [
    Row("eager", "320", 1, 1.2),
    Row("eager", "512", 1, 1.2),
    Row("eager", "512", 4, 1.5),
    Row("eager", "800x1333", 1, 1.5),
    Row("compiled", "512", 1, 1.4),
    Row("compiled", "800x1333", 1, 1.7),
    Row("bf16", "320", 1, 1.9),
    Row("bf16", "512", 1, 2.3),
    Row("bf16", "800x1333", 1, 3.0),
    Row("postprocess", "512", 1, 1.6),
    Row("postprocess", "800x1333", 1, 3.0),
    Row("memory", "800x1333", 1, 0.7),
    Row("memory-bf16", "800x1333", 1, 0.35),
]


def variant(model: RetinaNet, kind: str) -> OptimizedRetinaNet:
    optimised = model.optimize_for_inference(torch.bfloat16 if "bf16" in kind else None)
    if kind == "compiled":
        torch._inductor.config.freezing = True
        compile_maps(optimised)
    return optimised


def compile_maps(model: OptimizedRetinaNet, backend: str = "inductor") -> None:
    """Compile the network of a model."""
    compiled = torch.compile(model.forward_maps, fullgraph=True, dynamic=False, backend=backend)
    model.forward_maps = compiled  # type: ignore[method-assign]


def whole(row: Row, rounds: int) -> bool:
    """Measure from images to detections."""
    size, peer, ours = prepared(row)
    images = images_of(size, row.batch)
    found, expected = ours.detections(ours(images)), peer(images)
    share, boxes, scores = differences(found, expected)
    equal = share == 1 and boxes <= 0.05 and scores <= 1e-4
    remark = f"{len(found[0])} detections, {share:.1%} shared, {boxes:.4f} px, {scores:.1e}"
    times = in_turn(lambda: ours.detections(ours(images)), lambda: peer(images), rounds)
    fast = report(f"{row.kind} {row.size} batch {row.batch}", *times, row.target, remark)
    if row.kind != "bf16" and not equal:
        print("    the detections DIFFER")
    return fast and (equal or row.kind == "bf16")


def postprocessing(row: Row, rounds: int) -> bool:
    """Measure from the head's outputs to detections."""
    size, peer, ours = prepared(row)
    images = images_of(size, row.batch)
    output = ours(images)
    with everything_of(peer) as seen:
        peer(images)
    counts = [len(level) for level in output.anchors]
    sizes = [(height, width) for height, width in output.sizes]
    rows = {
        name: list(seen[name].split(counts, dim=1)) for name in ("cls_logits", "bbox_regression")
    }
    anchors = [list(image.split(counts)) for image in seen["anchors"]]
    found = ours.postprocess(output.logits, output.box_deltas, output.anchors, output.sizes)

    def theirs() -> Any:
        return peer.postprocess_detections(rows, anchors, sizes)

    share, boxes, scores = differences(found, theirs())
    remark = f"{len(found[0])} detections, {share:.1%} shared, {boxes:.4f} px, {scores:.1e}"
    times = in_turn(
        lambda: ours.postprocess(output.logits, output.box_deltas, output.anchors, output.sizes),
        theirs,
        rounds * 3,
    )
    return report(f"post-processing {row.size}", *times, row.target, remark) and share == 1


def memory(row: Row, threads: int) -> bool:
    arguments = ["--rows", row.kind, "--threads", str(threads)]
    name = f"{row.kind} {row.size}"
    return compare_memory(name, "tests.benchmarks.inference", arguments, row.target)


def memory_of(side: str, row: Row) -> Memory:
    size, peer, ours = prepared(row)
    images = images_of(size, row.batch)
    if side == "torchvision":
        return memory_of_calls(lambda: peer(images))
    return memory_of_calls(lambda: ours.detections(ours(images)))


def prepared(row: Row) -> tuple[tuple[int, int], Any, OptimizedRetinaNet]:
    size = size_of(row.size)
    peer = make_peer(size)
    return size, peer, variant(ours_of(peer, size), row.kind)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=sorted({row.kind for row in ROWS}))
    parser.add_argument("--sizes", nargs="+", default=sorted({row.size for row in ROWS}))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=["ours", "torchvision"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for row in ROWS if row.kind in options.rows and row.size in options.sizes]
    if options.memory_of:
        print(*memory_of(options.memory_of, rows[0]))
        return 0
    print(header(options.threads))
    good = []
    for row in rows:
        if row.kind.startswith("memory"):
            good.append(memory(row, options.threads))
        elif row.kind == "postprocess":
            good.append(postprocessing(row, options.rounds))
        else:
            good.append(whole(row, options.rounds))
    print(f"{sum(good)} of {len(good)} rows meet their targets")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
