"""Evaluate a detector on COCO 2017 or on your own dataset: AP, AR, and AP per class.

    python examples/evaluate_coco.py runs/r50 --data coco2017
    python examples/evaluate_coco.py runs/mine/best --annotations val.json --images photos
    python examples/evaluate_coco.py --results results.json --annotations val.json

Writes results.json (in COCO format), evaluation.json and precision_recall.png to the --output folder.
`focaldet evaluate` does the same.
"""

from __future__ import annotations

import os

# Waiting threads sleep instead of spinning; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from pathlib import Path

import torch

from focaldet import RetinaNet
from focaldet.datasets import AnnotationTable, read_annotations
from focaldet.evaluation import coco_results, evaluate_coco


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?",
        help="folder of a training run, whose best model is used, or of a saved model; a checkpoint file; "
        "a published name; or a Hugging Face Hub repository")  # fmt: skip
    add("--results", type=Path, metavar="FILE",
        help="evaluate a results file in COCO format instead of a model")  # fmt: skip
    add("--data", type=Path, metavar="FOLDER", help="folder of COCO 2017, whose val2017 is used")
    add("--annotations", type=Path, metavar="PATH",
        help="annotations of your own dataset: a COCO .json file, a .csv file, a YOLO data.yaml, or a "
        "Pascal VOC folder")  # fmt: skip
    add("--split", metavar="NAME",
        help="split of a data.yaml or Pascal VOC folder to evaluate, e.g. val")  # fmt: skip
    add("--images", type=Path, metavar="FOLDER",
        help="folder of the images, for COCO and CSV annotations (default: looked for near the file)")  # fmt: skip
    add("--batch-size", type=int, default=1, metavar="N",
        help="images per forward pass (default: 1)")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"PyTorch device of the model (default: {device})")
    add("--backend", default="auto", choices=["auto", "pycocotools", "hotcoco", "faster-coco-eval"],
        help="library that computes the AP (default: auto, which is hotcoco if installed, otherwise "
        "pycocotools)")  # fmt: skip
    add("--output", type=Path, default=Path("evaluation"), metavar="FOLDER",
        help="folder to write to (default: evaluation)")  # fmt: skip
    options = parser.parse_args()
    if (options.model is None) == (options.results is None):
        parser.error("pass either a model or --results")
    if (options.data is None) == (options.annotations is None):
        parser.error("pass either --data or --annotations")
    return options


def read_truth(options: argparse.Namespace) -> AnnotationTable:
    """Read the ground truth."""
    if options.data is None:
        return read_annotations(options.annotations, options.images, split=options.split)
    annotations = options.data / "annotations" / "instances_val2017.json"
    return read_annotations(annotations, options.data / "val2017")


def main() -> None:
    """Evaluate a model or a results file."""
    options = parse()
    try:
        truth = read_truth(options)
        options.output.mkdir(parents=True, exist_ok=True)
        results = options.results
        if results is None:
            model = RetinaNet.from_pretrained(options.model).to(options.device)
            results = options.output / "results.json"
            results.write_text(
                json.dumps(coco_results(model, truth, batch_size=options.batch_size))
            )
        result = evaluate_coco(truth, results, backend=options.backend)
        (options.output / "evaluation.json").write_text(result.to_json())
        result.plot_precision_recall(options.output / "precision_recall.png")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(result.table())
    print()
    print(result)
    images = "1 image" if result.num_images == 1 else f"{result.num_images} images"
    print(f"Evaluated {images} with {result.backend}; wrote the results to {options.output}.")


if __name__ == "__main__":
    main()
