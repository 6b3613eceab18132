"""Measure a detector on COCO 2017, or on data of your own: AP, AR, and a row for each class.

    python examples/evaluate_coco.py runs/r50 --data coco2017
    python examples/evaluate_coco.py runs/mine/best --annotations val.json --images photos
    python examples/evaluate_coco.py --results results.json --annotations val.json

It writes results.json (COCO's form), evaluation.json and precision_recall.png into --output.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep: before torch

import argparse
import json
import sys
from pathlib import Path

import torch

from focaldet import RetinaNet
from focaldet.datasets import AnnotationTable, read_annotations
from focaldet.evaluation import evaluate_coco


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder of a run (its best model is taken) or of a model")
    add("--results", type=Path, help="instead of a model: a results file in COCO's form")
    add("--data", type=Path, help="folder of COCO 2017; val2017 is measured")
    add("--annotations", type=Path, metavar="PATH",
        help="your own annotations: a COCO .json, a .csv, a YOLO data.yaml, or a folder of Pascal VOC")  # fmt: skip
    add("--split", help="which part of a folder or data.yaml, such as val")
    add("--images", type=Path, help="folder of your own images (COCO and CSV)")
    add("--batch-size", type=int, default=1, help="default: 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"default: {device}")
    add("--backend", default="auto", choices=["auto", "pycocotools", "hotcoco", "faster-coco-eval"],
        help="who counts (default: hotcoco if it is installed, else pycocotools)")  # fmt: skip
    add("--output", type=Path, default=Path("evaluation"), help="default: evaluation")
    options = parser.parse_args()
    if (options.model is None) == (options.results is None):
        parser.error("give either a model or --results")
    if (options.data is None) == (options.annotations is None):
        parser.error("give either --data or --annotations")
    return options


def read_truth(options: argparse.Namespace) -> AnnotationTable:
    """Read the annotations."""
    if options.data is None:
        return read_annotations(options.annotations, options.images, split=options.split)
    annotations = options.data / "annotations" / "instances_val2017.json"
    return read_annotations(annotations, options.data / "val2017")


def find_objects(options: argparse.Namespace, truth: AnnotationTable) -> list[dict]:
    """Run the model on all images; return entries of a results file."""
    folder = Path(options.model)
    if (folder / "run.json").is_file():
        folder = folder / ("best" if (folder / "best").is_dir() else "last")
    model = RetinaNet.from_pretrained(folder).to(options.device)
    names = model.config.class_names or truth.class_names
    unknown = sorted(set(names) - set(truth.class_names))
    if unknown:
        raise ValueError(f"The annotations don't have these classes of the model: {unknown}.")
    ids = dict(zip(truth.class_names, truth.category_ids, strict=True))
    category_ids = [ids[name] for name in names]
    paths = [truth.image_path(index) for index in range(len(truth))]
    found = model.predict(paths, batch_size=options.batch_size)
    return [
        entry
        for image_id, detections in zip(truth.image_ids.tolist(), found, strict=True)
        for entry in detections.to_coco(image_id, category_ids)
    ]


def main() -> None:
    """Run it."""
    options = parse()
    try:
        truth = read_truth(options)
        options.output.mkdir(parents=True, exist_ok=True)
        results = options.results
        if results is None:
            results = options.output / "results.json"
            results.write_text(json.dumps(find_objects(options, truth)))
        result = evaluate_coco(truth.to_coco(), results, backend=options.backend)
        (options.output / "evaluation.json").write_text(result.to_json())
        result.plot_precision_recall(options.output / "precision_recall.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(result.table())
    print()
    print(result)
    print(f"{result.num_images} images, counted by {result.backend}. Written to {options.output}.")


if __name__ == "__main__":
    main()
