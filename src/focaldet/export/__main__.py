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
    """Export a model and print how it compares with what was written.

    Returns:
        0 if the file was written, 2 if not.
    """
    asked = _parser().parse_args(arguments)
    try:
        model = RetinaNet.from_pretrained(asked.source)
        shape = None if asked.shape is None else tuple(asked.shape)
        if asked.path.endswith(".pt2"):
            report = export_program(
                model,
                asked.path,
                postprocess=not asked.maps,
                fixed_shape=shape,
                check_image=asked.image,
            )
        else:
            report = export_onnx(
                model,
                asked.path,
                postprocess=not asked.maps,
                fixed_shape=shape,
                opset=asked.opset,
                check_image=asked.image,
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
        epilog="The exit status is 0 if the file was written, and 2 if it was not.",
    )
    parser.add_argument(
        "source", help="what RetinaNet.from_pretrained takes: a folder, a name, a file"
    )
    parser.add_argument("path", help="of the file to write, ending in .onnx or .pt2")
    parser.add_argument("--maps", action="store_true", help="leave the post-processing out")
    parser.add_argument(
        "--shape",
        nargs=3,
        type=int,
        metavar=("BATCH", "HEIGHT", "WIDTH"),
        help="the one shape that the file takes (default: any)",
    )
    parser.add_argument("--opset", type=int, default=OPSET, help=f"of ONNX (default: {OPSET})")
    parser.add_argument("--image", help="a photo on which file and model are compared")
    return parser


if __name__ == "__main__":
    sys.exit(main())
