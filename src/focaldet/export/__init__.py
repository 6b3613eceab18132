"""Out of PyTorch (``pip install 'focaldet[export]'``): ONNX files, ``torch.export``, other runtimes.

:func:`export_onnx` and :func:`export_program` write a :class:`~focaldet.RetinaNet` with open batch,
height and width, and compare what they wrote with it. :class:`OnnxDetector` runs such an ONNX file in
onnxruntime or OpenVINO, with the same ``predict``. :class:`ExportableDetector` is the form in which a
model is exported, which ``torch.compile(fullgraph=True)`` takes, too.
"""

from __future__ import annotations

from focaldet.errors import ExportError
from focaldet.export._comparison import BOX_TOLERANCE, SCORE_TOLERANCE, Comparison, ExportReport
from focaldet.export._detector import OnnxDetector
from focaldet.export._exportable import ExportableDetector, ExportableMaps
from focaldet.export._metadata import FileFacts
from focaldet.export._onnx import OPSET, export_onnx
from focaldet.export._program import export_program

__all__ = [
    "BOX_TOLERANCE",
    "OPSET",
    "SCORE_TOLERANCE",
    "Comparison",
    "ExportError",
    "ExportReport",
    "ExportableDetector",
    "ExportableMaps",
    "FileFacts",
    "OnnxDetector",
    "export_onnx",
    "export_program",
]
