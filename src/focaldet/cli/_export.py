"""Export a model to ONNX (.onnx) or torch.export (.pt2).

The file is compared with the model, and only written if it gives the same
boxes and scores, except for rounding.

Examples:
  focaldet export runs/a detector.onnx --image photo.jpg
  focaldet export runs/a detector.pt2
  focaldet export runs/a detector.onnx --shape 1 800 1344 --maps
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet.cli._arguments import add_model

if TYPE_CHECKING:
    import argparse

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
        help="photo on which the file and the model are compared (default: noise)",
    )


def run(options: argparse.Namespace) -> int:
    """Export the model and print how the file compares with it."""
    from focaldet import RetinaNet
    from focaldet.export import export_onnx, export_program

    suffix = options.path.suffix.lower()
    if suffix not in {".onnx", ".pt2"}:
        raise ValueError(f"FILE must end with .onnx or .pt2, got {str(options.path)!r}.")
    if suffix == ".pt2" and options.opset is not None:
        raise ValueError("--opset is for .onnx files only. Leave it out.")
    model = RetinaNet.from_pretrained(options.model)
    arguments: dict[str, Any] = {
        "postprocess": not options.maps,
        "fixed_shape": None if options.shape is None else tuple(options.shape),
        "check_image": options.image,
    }
    if options.opset is not None:
        arguments["opset"] = options.opset
    export = export_program if suffix == ".pt2" else export_onnx
    sys.stdout.write(f"{export(model, options.path, **arguments)}\n")
    return 0
