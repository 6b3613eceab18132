"""Measure a model on a dataset: COCO's AP and AR, and the AP of each class.

The --output folder receives results.json (the detections in COCO format),
evaluation.json (all the numbers) and precision_recall.png. The classes of the
model and the dataset are matched by name. Detections that were written before
are evaluated if MODEL is their results.json.

Examples:
  focaldet evaluate runs/a data
  focaldet evaluate torchvision/retinanet_resnet50_fpn_coco coco2017
  focaldet evaluate runs/a test.json --images photos --output test
  focaldet evaluate evaluation/results.json data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.cli._arguments import (
    MODEL_HELP,
    add_batch_size,
    add_data,
    add_device,
    add_output,
    load_model,
    read_data,
)

if TYPE_CHECKING:
    import argparse

    from focaldet.evaluation import CocoResult

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "measure the AP of a model on a dataset"

_BACKENDS = ("auto", "pycocotools", "hotcoco", "faster-coco-eval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL_HELP}; or a results file in COCO format (.json)"
    )
    add_data(parser, split="val")
    group = parser.add_argument_group("evaluation")
    add_batch_size(group)
    add_device(group)
    group.add_argument(
        "--backend",
        default="auto",
        choices=_BACKENDS,
        help="library that computes the AP (default: auto, which is hotcoco if it is installed, "
        "otherwise pycocotools)",
    )
    add_output(parser.add_argument_group("output"), "evaluation")


def run(options: argparse.Namespace) -> int:
    """Evaluate a model or a results file."""
    from focaldet._atomic import atomic_write_text
    from focaldet.evaluation import coco_results, evaluate_coco

    folder: Path = options.output
    results = Path(options.model)
    given = results.suffix.lower() == ".json"
    model = None if given else load_model(options)
    table = read_data(options, prefer="val")
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        results = folder / "results.json"
        entries = coco_results(model, table, batch_size=options.batch_size)
        atomic_write_text(results, json.dumps(entries))
    result = evaluate_coco(table, results, backend=options.backend)
    atomic_write_text(folder / "evaluation.json", result.to_json())
    written = [*(["results.json"] if not given else []), "evaluation.json", *_plot(result, folder)]
    images = "1 image" if result.num_images == 1 else f"{result.num_images:,} images"
    sys.stdout.write(
        f"{result.table()}\n\n{result}\n"
        f"Evaluated {images} with {result.backend}. Wrote {', '.join(written)} to {folder}.\n"
    )
    return 0


def _plot(result: CocoResult, folder: Path) -> list[str]:
    """Draw the precision-recall curves, if matplotlib is installed; return the files written."""
    from focaldet.cli._messages import warn

    try:
        result.plot_precision_recall(folder / "precision_recall.png")
    except ImportError as error:
        warn(f"precision_recall.png was not drawn. {error}")
        return []
    return ["precision_recall.png"]
