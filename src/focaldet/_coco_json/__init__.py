"""Read COCO JSON files, annotations and results alike, into columns of checked numbers.

Both :func:`focaldet.datasets.read_coco` and :func:`focaldet.evaluation.evaluate_coco` read files
through this package, so they accept the same files and report the same faults. It is strict where a
value changes the result and lenient where it does not: ``iscrowd`` may be ``0.0``, an id ``1.0``, and
a field that nothing needs may be missing.
"""

from focaldet._coco_json._detections import DetectionColumns, read_detections
from focaldet._coco_json._instances import InstanceColumns, read_instances
from focaldet._coco_json._rows import describe_row, usable_boxes

__all__ = [
    "DetectionColumns",
    "InstanceColumns",
    "describe_row",
    "read_detections",
    "read_instances",
    "usable_boxes",
]
