"""Speed of an exported file from decoded image to detections, compared with torchvision's RetinaNet.

Both sides have the same random weights (see ``peer``). torchvision runs eagerly; ours is ``OnnxDetector``
with the file that ``export_onnx`` writes. Images already have the network's size. Both run in turn in one
process with the same number of threads; the medians of wall time and process CPU time are printed as
ours / torchvision's, with the ratio. Detections must equal torchvision's within 0.02 pixels and 5e-5. The
exit status is 1 if a ratio misses the target or detections differ.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.export [--sizes 320 512 800x1333] [--runtime openvino]
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from focaldet.export import BOX_TOLERANCE, SCORE_TOLERANCE, OnnxDetector, export_onnx
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

if TYPE_CHECKING:
    from focaldet.export._sessions import RuntimeName

TARGET = 1.4


def measure(
    size: tuple[int, int], *, batch: int, threads: int, rounds: int, runtime: RuntimeName
) -> bool:
    peer = make_peer(size)
    images = images_of(size, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(ours_of(peer, size), path)
        detector = OnnxDetector(path, runtime=runtime, threads=threads)
        found = detector.predict(images, batch_size=batch)
        share, boxes, scores = differences(found, peer(images))
        times = in_turn(
            lambda: detector.predict(images, batch_size=batch), lambda: peer(images), rounds
        )
    remark = f"{len(found[0])} detections, {share:.1%} shared, {boxes:.4f} px, {scores:.1e}"
    name = f"{detector.runtime} {'x'.join(map(str, size))} batch {batch}"
    fast = report(name, *times, TARGET, remark)
    equal = share == 1 and boxes <= BOX_TOLERANCE and scores <= SCORE_TOLERANCE
    if not equal:
        print("    the detections DIFFER")
    return fast and equal


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=["320", "512", "800x1333"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"], default="onnxruntime")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{header(options.threads)}, {options.runtime} {version(options.runtime)}")
    good = [
        measure(
            size_of(text),
            batch=options.batch,
            threads=options.threads,
            rounds=options.rounds,
            runtime=options.runtime,
        )
        for text in options.sizes
    ]
    print(f"{sum(good)} of {len(good)} rows meet the target")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
