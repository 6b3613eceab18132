"""The effect of reduced precision on the average precision of trained models.

Evaluates saved models on annotations in COCO format: unchanged, optimised in float32 and bfloat16, and,
with ``--calibration``, as exported files: float32 in both runtimes, OpenVINO's bfloat16 (if the processor
has it), and INT8 in both runtimes. The last column is the median process CPU time per photo, from file to
detections; the variants of a model take turns photo by photo. With several models the means follow.

    python -m tests.benchmarks.precision MODEL... ANNOTATIONS IMAGES [--calibration TRAIN.json] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from focaldet import RetinaNet
from focaldet.evaluation import evaluate_coco
from focaldet.export import OnnxDetector, Tolerances, export_onnx
from focaldet.export._processor import missing_units

if TYPE_CHECKING:
    from focaldet import Detections

CALIBRATION_PHOTOS = 64


class Row(NamedTuple):
    """Average precisions, and milliseconds of CPU time per photo."""

    ap: float
    ap50: float
    ap75: float
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"AP {self.ap:.3f}  AP50 {self.ap50:.3f}  AP75 {self.ap75:.3f}  "
            f"{self.milliseconds:6.1f} ms CPU per photo"
        )


def photos_of(annotations: Path, images: Path) -> dict[int, Path]:
    content = json.loads(annotations.read_text(encoding="utf-8"))
    return {photo["id"]: images / Path(photo["file_name"]).name for photo in content["images"]}


def variants_of(
    model: RetinaNet, calibration: list[Path], folder: Path, threads: int
) -> dict[str, Any]:
    """Return detectors by name."""
    variants: dict[str, Any] = {
        "unchanged": model,
        "optimised, float32": model.optimize_for_inference(),
        "optimised, bfloat16": model.optimize_for_inference(torch.bfloat16),
    }
    if not calibration:
        return variants
    export_onnx(model, folder / "float32.onnx", check_image=calibration[0])
    report = export_onnx(
        model,
        folder / "int8.onnx",
        precision="int8",
        calibration=calibration,
        tolerances=Tolerances(unmatched=1, scores=1, boxes=1, average_precision=1),
    )
    print(report)
    for runtime in ("onnxruntime", "openvino"):
        for precision in ("float32", "int8"):
            variants[f"{runtime}, {precision}"] = OnnxDetector(
                folder / f"{precision}.onnx", runtime=runtime, threads=threads
            )
    if missing_units("bfloat16", torch.cpu.get_capabilities()) is None:
        variants["openvino, bfloat16"] = OnnxDetector(
            folder / "float32.onnx", runtime="openvino", precision="bfloat16", threads=threads
        )
    else:
        print("this processor has no bfloat16 units; OpenVINO's bfloat16 is left out")
    return variants


def measure(variants: dict[str, Any], annotations: Path, photos: dict[int, Path]) -> dict[str, Row]:
    found: defaultdict[str, dict[int, Detections]] = defaultdict(dict)
    times: defaultdict[str, list[float]] = defaultdict(list)
    for image_id, path in photos.items():
        for name, variant in variants.items():
            started = time.process_time()
            [found[name][image_id]] = variant.predict(path)
            times[name].append(time.process_time() - started)
    rows = {}
    for name, by_id in found.items():
        stats = evaluate_coco(annotations, by_id).stats
        rows[name] = Row(stats[0], stats[1], stats[2], 1e3 * statistics.median(times[name]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="model")
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument(
        "--calibration", type=Path, help="annotations of the photos to calibrate on, 64 of them"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photos = photos_of(options.annotations, options.images)
    calibration: list[Path] = []
    if options.calibration is not None:
        every = list(photos_of(options.calibration, options.images).values())
        count = min(CALIBRATION_PHOTOS, len(every))
        calibration = [every[index * len(every) // count] for index in range(count)]
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {cpu}, {options.threads} threads, {len(photos)} photos")
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for folder in options.models:
        model = RetinaNet.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as temporary:
            variants = variants_of(model, calibration, Path(temporary), options.threads)
            for name, row in measure(variants, options.annotations, photos).items():
                rows[name].append(row)
                print(f"{folder.name:20s} {name:22s} {row}", flush=True)
    if len(options.models) > 1:
        for name, found in rows.items():
            mean = Row(*(statistics.mean(column) for column in zip(*found, strict=True)))
            print(f"{'mean':20s} {name:22s} {mean}")


if __name__ == "__main__":
    main()
