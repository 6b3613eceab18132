"""Speed of an exported file from decoded image to detections, compared with torchvision's RetinaNet.

Both sides have the same random weights (see ``peer``). torchvision runs eagerly; ours is ``OnnxDetector``
with the file that ``export_onnx`` writes. Images already have the network's size. Both run in turn in one
process with the same number of threads; the medians of wall time and process CPU time are printed as
ours / torchvision's, with the ratio. In float32, detections must equal torchvision's within 0.02 pixels
and 5e-5. The exit status is 1 if a ratio misses the target or detections differ.

``--precision int8`` exports a file in INT8, calibrated on the photos of ``--calibration``; "bfloat16" runs the
float32 file in OpenVINO's bfloat16. Where the processor has no units for a precision, the target is that of
float32. ``--memory`` also prints the resident memory of processes that predict with the file in float32
and in the given precision, above what the runtime itself takes: its libraries, of which some are only loaded
when a network is run.

    OMP_WAIT_POLICY=PASSIVE python -m tests.benchmarks.export [--sizes 320 512 800x1333] [--runtime openvino]
        [--precision int8 --calibration PHOTOS] [--memory]
"""

from __future__ import annotations

import argparse
import importlib
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto, helper

from focaldet.export import (
    BOX_TOLERANCE,
    SCORE_TOLERANCE,
    OnnxDetector,
    Tolerances,
    export_onnx,
)
from focaldet.export._processor import missing_units
from focaldet.export._sessions import shared_core
from tests.benchmarks.memory import printed_by
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
    from focaldet import RetinaNet
    from focaldet.export._sessions import RunPrecision, RuntimeName

TARGET = 1.4
# By runtime and precision, for a processor with AMX or VNNI: the ratios that are required at least.
TARGETS = {
    ("openvino", "int8"): 3.0,
    ("openvino", "bfloat16"): 5.0,
    ("onnxruntime", "int8"): 2.5,
}
MEMORY_TARGET = 0.5


def target_of(runtime: str, precision: str) -> float:
    if missing_units(precision, torch.cpu.get_capabilities()) is not None:
        return TARGET
    return TARGETS.get((runtime, precision), TARGET)


def export(model: RetinaNet, path: Path, precision: str, calibration: Path | None) -> None:
    if precision != "int8":
        export_onnx(model, path)
        return
    # Random weights lose more than trained ones, and here only speed and memory matter.
    print(
        export_onnx(
            model,
            path,
            precision="int8",
            calibration=calibration,
            error_budget=1.0,
            tolerances=Tolerances(unmatched=1, scores=1, boxes=1),
        )
    )


def resident(path: Path, size: tuple[int, int], options: argparse.Namespace) -> float:
    """Return the resident memory in MiB that a new process needs to predict with a file."""
    arguments = [
        *(f"--runtime={options.runtime}", f"--threads={options.threads}"),
        *(f"--memory-of={path}", "--sizes", "x".join(map(str, size))),
    ]
    [used] = printed_by("tests.benchmarks.export", arguments)
    return used


def print_resident(path: Path, size: tuple[int, int], runtime: RuntimeName, threads: int) -> None:
    load_libraries(runtime)
    [image] = images_of(size, 1)
    before = resident_now()
    detector = OnnxDetector(path, runtime=runtime, threads=threads)
    for _ in range(3):
        detector.predict(image)
    print(resident_now() - before)


def load_libraries(runtime: RuntimeName) -> None:
    """Run a single convolution, so that the runtime has loaded all of its libraries."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    maps = helper.make_tensor_value_info("maps", TensorProto.FLOAT, [1, 4, 6, 6])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 3, 3, 3], [0.0] * 108)
    convolution = helper.make_node("Conv", ["images", "weight"], ["maps"])
    graph = helper.make_graph([convolution], "one convolution", [images], [maps], [weight])
    opset = [helper.make_opsetid("", 20)]
    content = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    inputs = {"images": np.zeros((1, 3, 8, 8), np.float32)}
    package: Any = importlib.import_module(runtime)
    if runtime == "openvino":
        core = shared_core(package)
        core.compile_model(core.read_model(content), "CPU").create_infer_request().infer(inputs)
    else:
        package.InferenceSession(content).run(None, inputs)


def resident_now() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(size: tuple[int, int], options: argparse.Namespace) -> bool:
    batch, runtime, precision = options.batch, options.runtime, options.precision
    peer = make_peer(size)
    images = images_of(size, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = ours_of(peer, size)
        export(model, path, precision, options.calibration)
        hint: RunPrecision = "bfloat16" if precision == "bfloat16" else "float32"
        detector = OnnxDetector(path, runtime=runtime, threads=options.threads, precision=hint)
        found = detector.predict(images, batch_size=batch)
        share, boxes, scores = differences(found, peer(images))
        times = in_turn(
            lambda: detector.predict(images, batch_size=batch), lambda: peer(images), options.rounds
        )
        if options.memory:
            whole = Path(folder) / "float32.onnx"
            export(model, whole, "float32", None)
            ours, theirs = (resident(file, size, options) for file in (path, whole))
            print(
                f"resident memory {ours:.0f} / {theirs:.0f} MiB of float32, {ours / theirs:.2f} "
                f"(required at most {MEMORY_TARGET}); file {path.stat().st_size / 1e6:.1f} / "
                f"{whole.stat().st_size / 1e6:.1f} MB, {path.stat().st_size / whole.stat().st_size:.2f}"
            )
    remark = f"{len(found[0])} detections, {share:.1%} shared, {boxes:.4f} px, {scores:.1e}"
    name = f"{detector.runtime} {precision} {'x'.join(map(str, size))} batch {batch}"
    fast = report(name, *times, target_of(runtime, precision), remark)
    if precision != "float32":
        return fast
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
    parser.add_argument("--precision", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--calibration", type=Path, help="folder of photos, for int8")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print_resident(
            options.memory_of, size_of(options.sizes[0]), options.runtime, options.threads
        )
        return 0
    print(f"{header(options.threads)}, {options.runtime} {version(options.runtime)}")
    good = [measure(size_of(text), options) for text in options.sizes]
    print(f"{sum(good)} of {len(good)} rows meet the target")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
