"""``python -m focaldet.export``: export a model from the command line."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from focaldet.errors import ExportError
from focaldet.export._onnx import OPSET, export_onnx
from focaldet.export._program import export_program
from focaldet.retinanet import RetinaNet

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_WRITTEN, _FAILED = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a model and print how the file compares with it.

    Args:
        arguments: The command line. None uses ``sys.argv``.

    Returns:
        0 if the file was written, 2 if not.
    """
    options = _parser().parse_args(arguments)
    try:
        model = RetinaNet.from_pretrained(options.source)
        shape = None if options.shape is None else tuple(options.shape)
        if options.path.endswith(".pt2"):
            report = export_program(
                model,
                options.path,
                postprocess=not options.maps,
                fixed_shape=shape,
                check_image=options.image,
            )
        else:
            report = export_onnx(
                model,
                options.path,
                postprocess=not options.maps,
                fixed_shape=shape,
                opset=options.opset,
                check_image=options.image,
            )
    except (ExportError, ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return _FAILED
    sys.stdout.write(f"{report}\n")
    return _WRITTEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m focaldet.export",
        description="Export a model to ONNX (.onnx) or torch.export (.pt2), and compare the file with "
        "the model.",
        epilog="The exit status is 0 if the file was written, and 2 if not.",
    )
    parser.add_argument(
        "source", help="model to export: a folder, checkpoint file or published name"
    )
    parser.add_argument("path", help="file to write, ending with .onnx or .pt2")
    parser.add_argument(
        "--maps", action="store_true", help="export the network without post-processing"
    )
    parser.add_argument(
        "--shape",
        nargs=3,
        type=int,
        metavar=("BATCH", "HEIGHT", "WIDTH"),
        help="the only input shape that the file accepts (default: any)",
    )
    parser.add_argument("--opset", type=int, default=OPSET, help=f"ONNX opset (default: {OPSET})")
    parser.add_argument(
        "--image", help="photo on which file and model are compared (default: noise)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
