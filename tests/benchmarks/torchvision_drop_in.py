"""Speed and memory of :class:`focaldet.torchvision.RetinaNet`, compared with torchvision's class.

Both sides have the same random weights (ResNet-50, FrozenBatchNorm, the first two stages frozen) and are
called in the same way, so the only difference is the import. The sides alternate in one process. The
output is medians of wall and process CPU time, the drop-in's / torchvision's, and the ratio; ``infer``
compares detections, too, and ``optimized`` takes the drop-in's optimised copy. Memory is the peak of
allocated tensors and resident memory, with each side in its own process.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.torchvision_drop_in [--rows step infer memory]
"""

from __future__ import annotations

import argparse
import copy
import functools
from typing import TYPE_CHECKING, Any

import torch

from focaldet import torchvision as drop_in
from focaldet.detections import Detections
from tests.benchmarks.memory import compare_memory, memory_of_calls
from tests.benchmarks.peer import (
    differences,
    header,
    images_of,
    in_turn,
    make_peer,
    report,
    size_of,
)
from tests.benchmarks.training_step import stepping, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.memory import Memory

ROWS = {
    "step": (20, 1000),
    "infer": (0,),
    "memory": (20, 1000),
}  # with the numbers of boxes per image


def models_of(size: tuple[int, int]) -> dict[str, Any]:
    peer = make_peer(size)
    ours = drop_in.RetinaNet.from_torchvision(copy.deepcopy(peer))
    return {"ours": ours, "torchvision": peer}


def steps_of(size: tuple[int, int], boxes: int) -> dict[str, Callable[[], Any]]:
    images, targets = images_of(size, 2), targets_of(size, boxes, 2)
    steps = {}
    for side, model in models_of(size).items():
        model.train()
        for name, parameter in model.backbone.body.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
        steps[side] = stepping(model, functools.partial(model, images, targets))
    return steps


def compare_steps(size: tuple[int, int], boxes: int, rounds: int) -> None:
    steps = steps_of(size, boxes)
    ours, theirs = steps["ours"](), steps["torchvision"]()
    apart = max(float((ours[name] - theirs[name]).abs() / theirs[name]) for name in theirs)
    times = in_turn(steps["ours"], steps["torchvision"], rounds)
    report(f"step {boxes} boxes", *times, 1.0, f"losses {apart:.1e} apart")


@torch.no_grad()
def compare_inference(size: tuple[int, int], rounds: int) -> None:
    models, images = models_of(size), images_of(size, 1)
    optimized = models["ours"].optimize_for_inference()
    for name, model in (("infer", models["ours"]), ("optimized", optimized)):
        found = [Detections(**one, image_size=size) for one in model(images)]
        same, boxes, scores = differences(found, models["torchvision"](images))
        remark = f"{same:.1%} in common, boxes {boxes:.1e} px, scores {scores:.1e} apart"
        theirs = functools.partial(models["torchvision"], images)
        times = in_turn(functools.partial(model, images), theirs, rounds)
        report(name, *times, 1.0, remark)


def compare_peaks(size: str, boxes: int, threads: int) -> None:
    arguments = ["--size", size, "--boxes", str(boxes), "--threads", str(threads)]
    module = "tests.benchmarks.torchvision_drop_in"
    compare_memory(f"memory {boxes} boxes", module, arguments, 1.0)


def memory_of(side: str, size: tuple[int, int], boxes: int) -> Memory:
    step = steps_of(size, boxes).pop(side)

    def twice() -> None:
        step()
        step()

    return memory_of_calls(twice, runs=1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--size", default="512")
    parser.add_argument("--boxes", type=int, default=None, help="only this number of boxes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=["ours", "torchvision"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = size_of(options.size)
    if options.memory_of:
        print(*memory_of(options.memory_of, size, options.boxes))
        return 0
    print(header(options.threads))
    for row in options.rows:
        for boxes in ROWS[row] if options.boxes is None else (options.boxes,):
            if row == "step":
                compare_steps(size, boxes, options.rounds)
            elif row == "infer":
                compare_inference(size, options.rounds)
            else:
                compare_peaks(options.size, boxes, options.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
