r"""Export a model to ONNX (.onnx) or torch.export (.pt2).

The file is compared with the model, and only written if it gives the same
boxes and scores, except for rounding. A file in float16 or INT8 must be
within tolerances, and is otherwise kept as FILE.rejected.onnx.

Examples:
  focaldet export runs/a detector.onnx --image photo.jpg
  focaldet export runs/a detector.pt2
  focaldet export runs/a detector.onnx --shape 1 800 1344 --maps
  focaldet export runs/a small.onnx --precision int8 --calibration photos \
    --evaluate val.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet.cli._arguments import add_device, add_model, load_model, read_data, score

if TYPE_CHECKING:
    import argparse

    from focaldet.datasets import AnnotationTable

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "export a model to ONNX or torch.export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_model(parser)
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="file to write, ending with .onnx or .pt2"
    )
    group = parser.add_argument_group("export")
    group.add_argument(
        "--maps", action="store_true", help="export the network without post-processing"
    )
    group.add_argument(
        "--shape",
        nargs=3,
        type=int,
        metavar=("BATCH", "HEIGHT", "WIDTH"),
        help="the only input shape that the file accepts (default: any)",
    )
    group.add_argument("--opset", type=int, metavar="N", help="ONNX opset (default: 20)")
    group.add_argument(
        "--image",
        metavar="PHOTO",
        help="photo on which the file and the model are compared (default: some of the calibration "
        "photos, or noise without them)",
    )
    reduced = parser.add_argument_group("precision (.onnx only)")
    reduced.add_argument(
        "--precision",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="what the network computes in; int8 requires --calibration (default: float32)",
    )
    reduced.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        metavar="PHOTO",
        help="photos, or folders of them, that are like those the file will see; 16 to 300 are enough",
    )
    reduced.add_argument(
        "--error-budget",
        type=score,
        metavar="E",
        help="maximum mean error of scores and boxes in INT8; convolutions that exceed it stay in "
        "float32 (default: 0.03)",
    )
    reduced.add_argument(
        "--evaluate",
        type=Path,
        metavar="DATA",
        help="dataset on which the AP of model and file is computed: a folder, a COCO .json file, a "
        ".csv file, or a YOLO data.yaml",
    )
    reduced.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="folder of the images of --evaluate (default: looked for near the annotations)",
    )
    reduced.add_argument("--split", metavar="NAME", help="split of --evaluate (default: val)")
    add_device(reduced)


def run(options: argparse.Namespace) -> int:
    """Export the model and print how the file compares with it."""
    from focaldet.export import export_onnx, export_program
    from focaldet.images import list_images

    suffix = options.path.suffix.lower()
    if suffix not in {".onnx", ".pt2"}:
        raise ValueError(f"FILE must end with .onnx or .pt2, got {str(options.path)!r}.")
    only_onnx = {
        "--opset": options.opset,
        "--precision": None if options.precision == "float32" else options.precision,
        "--calibration": options.calibration,
        "--error-budget": options.error_budget,
        "--evaluate": options.evaluate,
    }
    for name, value in only_onnx.items():
        if suffix == ".pt2" and value is not None:
            raise ValueError(f"{name} is for .onnx files only. Leave it out.")
    if options.evaluate is None and (options.images or options.split):
        raise ValueError("--images and --split say how to read --evaluate. Give it, too.")
    # The float model computes on the device; without --evaluate, the export needs none.
    model = load_model(options)
    arguments: dict[str, Any] = {
        "postprocess": not options.maps,
        "fixed_shape": None if options.shape is None else tuple(options.shape),
        "check_image": options.image,
    }
    if options.opset is not None:
        arguments["opset"] = options.opset
    if suffix == ".onnx":
        arguments["precision"] = options.precision
        arguments["error_budget"] = options.error_budget
        if options.calibration is not None:
            arguments["calibration"] = list_images(options.calibration)
        if options.evaluate is not None:
            arguments["evaluate"] = _table(options)
    export = export_program if suffix == ".pt2" else export_onnx
    sys.stdout.write(f"{export(model, options.path, **arguments)}\n")
    return 0


def _table(options: argparse.Namespace) -> AnnotationTable:
    """Read the dataset of --evaluate."""
    from argparse import Namespace

    data = Namespace(
        data=options.evaluate, images=options.images, split=options.split, exif="upright"
    )
    return read_data(data, prefer="val")
