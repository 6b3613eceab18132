"""COCO evaluation of a dataset as large as val2017, with each backend of ``evaluate_coco`` in turn.

Ground truth and detections are random: 5,000 images; 36,500 boxes of 80 classes of different
frequency, 2 % of them crowds; and 100 detections per image, a third of them near an object. Prints
medians of wall and process CPU time of the whole call, from lists, ``Detections`` or JSON files to
the result, and the ratio to pycocotools alone (``COCO``, ``loadRes``, ``evaluate``, ``accumulate``,
``summarize``) on the same input. Checks that the numbers are equal.

    python -m tests.benchmarks.coco_eval [--images 5000] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = (480, 640)
BACKENDS = ("pycocotools", "faster-coco-eval", "hotcoco")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # read when the libraries are loaded
        os.environ[name] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        run(options.images, options.repeats, options.threads, Path(folder))


def run(images: int, repeats: int, threads: int, folder: Path) -> None:
    import numpy as np
    import torch

    from focaldet.evaluation import evaluate_coco

    torch.set_num_threads(threads)
    truth, entries, found = random_evaluation(images)
    sides: dict[str, Callable[[], Any]] = {
        "pycocotools alone": lambda: pycocotools_alone(truth, entries)
    }
    for name in BACKENDS:
        sides[f"{name}, entries"] = lambda n=name: evaluate_coco(truth, entries, backend=n)  # type: ignore[misc]
    truth_file, results_file = folder / "truth.json", folder / "results.json"
    truth_file.write_text(json.dumps(truth))
    results_file.write_text(json.dumps(entries))
    sides["hotcoco, files"] = lambda: evaluate_coco(truth_file, results_file, backend="hotcoco")
    sides["pycocotools alone, files"] = lambda: pycocotools_alone(
        json.loads(truth_file.read_text()), json.loads(results_file.read_text())
    )
    sides["hotcoco, Detections"] = lambda: evaluate_coco(truth, found, backend="hotcoco")
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    results = {}
    for _ in range(repeats):
        for side, function in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            results[side] = function()
            times[side].append((time.process_time() - cpu, time.perf_counter() - wall))

    versions = [f"{name} {importlib.metadata.version(name)}" for name in (*BACKENDS, "numpy")]
    print(f"{', '.join(versions)}; {threads} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"{images} images, {len(truth['annotations'])} boxes, {len(truth['categories'])} classes, "
        f"{len(entries)} detections; medians of {repeats}"
    )
    expected = results["pycocotools alone"]
    base = [statistics.median(column) for column in zip(*times["pycocotools alone"], strict=True)]
    for side, rows in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        equal = np.array_equal(results[side].precision, expected.precision)
        equal &= np.array_equal(results[side].recall, expected.recall)
        equal &= np.array_equal(results[side].scores, expected.scores)
        equal &= np.array_equal(results[side].stats, expected.stats)
        farthest = np.abs(results[side].precision - expected.precision).max()
        assert equal or side.startswith("faster"), f"{side}: numbers differ by {farthest:.1e}"
        says = "exactly equal" if equal else f"precisions differ by {farthest:.1e} at most"
        print(
            f"{side:25s} wall {wall:7.2f} s ({base[1] / wall:5.1f}x)  "
            f"CPU {cpu:7.2f} s ({base[0] / cpu:5.1f}x)  {says}"
        )
    print(f"AP {expected.ap:.4f}")


def random_evaluation(images: int) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, Any]]:
    """Build a random ground truth, the entries of a results file, and the same as ``Detections``."""
    import numpy as np
    import torch

    from focaldet import Detections
    from focaldet.class_names import COCO_CATEGORY_IDS, COCO_CLASS_NAMES

    rng = np.random.default_rng(0)
    count, each, classes = int(7.3 * images), 100, len(COCO_CATEGORY_IDS)
    share = 1 / np.arange(1, classes + 1)

    def boxes(number: int) -> Any:
        sizes = np.exp(rng.uniform(np.log(8), np.log(400), (number, 2)))
        return np.concatenate([rng.uniform(0, 1, (number, 2)) * (640, 480), sizes], 1)

    of_image = rng.integers(0, images, count)
    label, box = rng.choice(classes, count, p=share / share.sum()), boxes(count).round(2)
    truth = {
        "images": [{"id": 3 * i, "height": SIZE[0], "width": SIZE[1]} for i in range(images)],
        "categories": [
            {"id": i, "name": name}
            for i, name in zip(COCO_CATEGORY_IDS, COCO_CLASS_NAMES, strict=True)
        ],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 3 * int(of_image[i]),
                "category_id": COCO_CATEGORY_IDS[label[i]],
                "bbox": box[i].tolist(),
                "area": 0.7 * float(box[i, 2] * box[i, 3]),
                "iscrowd": int(rng.random() < 0.02),
            }
            for i in range(count)
        ],
    }
    found, entries = {}, []
    for i in range(images):
        mine = np.flatnonzero(of_image == i)
        near = rng.choice(mine, each // 3) if len(mine) else mine
        some = np.concatenate([box[near] * rng.normal(1, 0.08, (len(near), 4)), boxes(each)])[:each]
        labels = np.concatenate([label[near], rng.choice(classes, each, p=share / share.sum())])
        some[:, 2:] += some[:, :2]
        found[3 * i] = Detections(
            torch.from_numpy(some.astype(np.float32)),
            torch.from_numpy(rng.random(each).round(3).astype(np.float32)),
            torch.from_numpy(labels[:each]),
            SIZE,
        )
        entries += found[3 * i].to_coco(3 * i, COCO_CATEGORY_IDS)
    return truth, entries, found


class PycocotoolsResult:
    """The result of pycocotools alone."""

    def __init__(self, evaluation: Any) -> None:
        self.precision, self.recall = evaluation.eval["precision"], evaluation.eval["recall"]
        self.scores, self.stats = evaluation.eval["scores"], tuple(evaluation.stats)
        self.ap = float(evaluation.stats[0])


def pycocotools_alone(truth: dict[str, Any], entries: list[dict[str, Any]]) -> PycocotoolsResult:
    """Evaluate with pycocotools alone, as its demo does."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO()
        objects.dataset = copy.deepcopy(truth)
        objects.createIndex()
        evaluation = COCOeval(objects, objects.loadRes([dict(one) for one in entries]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return PycocotoolsResult(evaluation)


if __name__ == "__main__":
    main()
