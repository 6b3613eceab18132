"""Errors of files and runs, which share the base class :class:`FocaldetError`.

What a caller passes to a function raises a plain ``ValueError`` or ``TypeError``. What is wrong with
a file, a download or a run raises one of these, so that a program can report it and go on. Each is
also the builtin exception that fits it.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

__all__ = [
    "AnnotationError",
    "CheckpointError",
    "DownloadError",
    "ExportError",
    "FocaldetError",
    "TrainingError",
    "UnreadableImageError",
]


class FocaldetError(Exception):
    """Base class of all errors of files and runs."""


class AnnotationError(FocaldetError, ValueError):
    """An annotation or results file is damaged or not in the expected format."""


class CheckpointError(FocaldetError, ValueError):
    """A checkpoint is damaged, unsafe, in an unknown format, or does not fit the model."""


class DownloadError(FocaldetError, OSError):
    """A published file could not be downloaded."""


class ExportError(FocaldetError, RuntimeError):
    """A model could not be exported, or the exported file gives different results."""


class TrainingError(FocaldetError, RuntimeError):
    """A training run had to stop. The message says why, and what to do."""


class UnreadableImageError(FocaldetError, ValueError):
    """An image file is damaged, or its format is not supported."""
