"""Files of detections that are written as they come, by one process or by several.

:func:`predict_to_folder` runs a detector on any number of image files. The detections of a few images
at a time become a part file, so that they never fill the memory, several processes can share the work,
and a run that was killed continues with the next part. At the end the parts are joined, in the order of
the images. :func:`write_results` writes detections from an iterator to a single file.

.. versionadded:: 0.3.0
"""

from focaldet.results._fingerprint import model_fingerprint
from focaldet.results._formats import FORMATS, ResultsFormat, ResultsSummary, write_results
from focaldet.results._parts import predict_to_folder

__all__ = [
    "FORMATS",
    "ResultsFormat",
    "ResultsSummary",
    "model_fingerprint",
    "predict_to_folder",
    "write_results",
]
