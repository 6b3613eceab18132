"""Export models to ONNX and ``torch.export``, and run them (``pip install 'focaldet[export]'``).

:func:`export_onnx` and :func:`export_program` write a :class:`~focaldet.RetinaNet` with dynamic batch
size, height and width, and compare the written file with the model. ONNX files can also be in float16 or
INT8. :class:`OnnxDetector` runs an ONNX file in onnxruntime or OpenVINO, with the same ``predict``. :class:`ExportableDetector` is the module
that is exported; it also works with ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

from focaldet._deprecation import moved
from focaldet.errors import ExportError
from focaldet.export._agreement import Agreement, Tolerances
from focaldet.export._calibration import Calibration, LayerGroup
from focaldet.export._comparison import BOX_TOLERANCE, SCORE_TOLERANCE, Comparison, ExportReport
from focaldet.export._detector import OnnxDetector
from focaldet.export._exportable import ExportableDetector, ExportableMaps
from focaldet.export._metadata import ExportMetadata
from focaldet.export._onnx import OPSET, export_onnx
from focaldet.export._program import export_program

__all__ = [
    "BOX_TOLERANCE",
    "OPSET",
    "SCORE_TOLERANCE",
    "Agreement",
    "Calibration",
    "Comparison",
    "ExportError",
    "ExportMetadata",
    "ExportReport",
    "ExportableDetector",
    "ExportableMaps",
    "LayerGroup",
    "OnnxDetector",
    "Tolerances",
    "export_onnx",
    "export_program",
]

__getattr__ = moved(__name__, {"FileFacts": "focaldet.export.ExportMetadata"})
