"""The checkpoint formats that focaldet can read, one module per project.

A family (:class:`~focaldet.pretrained.Family`) is a module with a ``NAME``, a function
``missing(tensors)`` that returns the characteristic keys a file lacks (none: the file belongs to the
family), a function ``suggest(file)`` that returns the :class:`~focaldet.pretrained.SuggestedConfig` of
a file, and a function ``convert(file, config)`` that returns the tensors of the model that a config
describes. To add a family, write its module and list it in ``FAMILIES``.
"""

from __future__ import annotations

from focaldet.pretrained._checkpoint import Family
from focaldet.pretrained.families import (
    _detectron,
    _detectron2,
    _focaldet,
    _keras_retinanet,
    _mmdet,
    _odtk,
    _paddledetection,
    _torchvision,
    _yhenon,
)

__all__ = ["FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (
    _focaldet,
    _torchvision,
    _detectron2,
    _mmdet,
    _odtk,
    _yhenon,
    _detectron,
    _keras_retinanet,
    _paddledetection,
)
"""The supported families, in the order in which they are tried.

:meta hide-value:
"""
