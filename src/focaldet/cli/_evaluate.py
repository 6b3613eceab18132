"""Measure a model on a dataset: COCO's AP and AR, and the AP of each class.

The --output folder receives results.json (the detections in COCO format),
evaluation.json (all the numbers) and precision_recall.png. The classes of the
model and the dataset are matched by name. Detections that were written before
are evaluated if MODEL is their results.json.

--report also writes errors.json, with what each kind of error costs, and
report.html, one file with tables, curves, the confusion matrix and the worst
images, which opens offline.

Examples:
  focaldet evaluate runs/a data
  focaldet evaluate torchvision/retinanet_resnet50_fpn_coco coco2017
  focaldet evaluate runs/a test.json --images photos --output test
  focaldet evaluate evaluation/results.json data
  focaldet evaluate runs/a data --report --iou 0.75 --score-threshold 0.4
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet.cli._arguments import (
    MODEL_HELP,
    add_batch_size,
    add_data,
    add_device,
    add_output,
    add_suppression,
    load_model,
    positive,
    read_data,
    score,
)
from focaldet.cli._ranks import rank_and_world_size

if TYPE_CHECKING:
    import argparse

    from focaldet.datasets import AnnotationTable
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
    group.add_argument(
        "--max-detections",
        type=positive,
        default=100,
        metavar="N",
        help="maximum number of detections that count per image and class, at least 100; above 100, "
        "the model also returns at least that many per image; COCO's numbers are those with 100 "
        "(default: 100)",
    )
    add_suppression(group)
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an unfinished run in the output folder; start a new one if there is none",
    )
    report = parser.add_argument_group("report")
    report.add_argument(
        "--report", action="store_true", help="write report.html and errors.json, too"
    )
    report.add_argument(
        "--iou",
        type=score,
        default=0.5,
        metavar="T",
        help="IoU from which a detection hits an object, in the analysis of errors (default: 0.5)",
    )
    report.add_argument(
        "--score-threshold",
        type=score,
        metavar="T",
        help="count detections that score above this in the confusion matrix and the worst images "
        "(default: the threshold of the highest F1 of each class)",
    )
    add_output(parser.add_argument_group("output"), "evaluation")


def run(options: argparse.Namespace) -> int:
    """Evaluate a model or a results file."""
    from focaldet._atomic import atomic_write_text
    from focaldet._checks import check_range
    from focaldet._extras import import_extra
    from focaldet.evaluation import evaluate_coco, write_coco_results

    # A wrong option is an error before a model runs for hours.
    check_range("--max-detections", options.max_detections, 100)
    check_range("--iou", options.iou, 0, 1, low_open=True)
    if options.report:
        import_extra("matplotlib", purpose="--report", install="focaldet[plot]")
    folder: Path = options.output
    rank, world_size = rank_and_world_size()
    results: Path | None = Path(options.model)
    given = Path(options.model).suffix.lower() == ".json"
    if given and options.suppression is not None:
        raise ValueError(
            f"--suppression changes how a model predicts, but {options.model!r} is a results file. Pass "
            "the model instead, or leave out --suppression."
        )
    model = None if given else load_model(options)
    table = read_data(options, prefer="val")
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        limit = model.config.max_detections
        more = limit is not None and limit < options.max_detections > 100
        results = write_coco_results(
            model,
            table,
            folder,
            batch_size=options.batch_size,
            rank=rank,
            world_size=world_size,
            resume=options.resume,
            max_detections=options.max_detections if more else None,
        )
    if rank > 0 or results is None:  # the first process evaluates
        return 0
    result = evaluate_coco(
        table, results, backend=options.backend, max_detections=options.max_detections
    )
    atomic_write_text(folder / "evaluation.json", result.to_json())
    written = [*(["results.json"] if not given else []), "evaluation.json", *_plot(result, folder)]
    errors = ""
    if options.report:
        errors = f"{_report(options, result, table, results)}\n\n"
        written += ["errors.json", "report.html"]
    images = "1 image" if result.num_images == 1 else f"{result.num_images:,} images"
    sys.stdout.write(
        f"{result.table()}\n\n{errors}{result}\n"
        f"Evaluated {images} with {result.backend}. Wrote {', '.join(written)} to {folder}.\n"
    )
    return 0


def _report(
    options: argparse.Namespace, result: CocoResult, table: AnnotationTable, results: Path
) -> str:
    """Analyse the errors, write them and the report, and return the table of errors."""
    from focaldet._atomic import atomic_write_text
    from focaldet.evaluation import analyse_errors, write_report

    errors = analyse_errors(
        table,
        results,
        iou_threshold=options.iou,
        background_iou=min(0.1, options.iou),
        max_detections=options.max_detections,
    )
    atomic_write_text(options.output / "errors.json", errors.to_json())
    write_report(
        options.output / "report.html",
        result,
        errors,
        images={int(image_id): table.image_path(i) for i, image_id in enumerate(table.image_ids)},
        score_threshold=options.score_threshold,
        title=f"{options.model} on {options.data}",
    )
    return errors.table()


def _plot(result: CocoResult, folder: Path) -> list[str]:
    """Draw the precision-recall curves, if matplotlib is installed; return the files written."""
    from focaldet.cli._messages import warn

    try:
        result.plot_precision_recall(folder / "precision_recall.png")
    except ImportError as error:
        warn(f"precision_recall.png was not drawn. {error}")
        return []
    return ["precision_recall.png"]
