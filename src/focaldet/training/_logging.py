"""Log lines of a run: which ones a user sees, and on which rank they are written."""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_only

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LOG", "hide_lightning_messages", "log_on_rank_zero", "show_log", "warn_on_rank_zero"]

LOG = logging.getLogger("focaldet.training")
_HIDDEN_WARNINGS = (  # of pytorch-lightning and torch; a user of train() cannot act on them
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*WeightAveraging callback.*",
    r".*sync_dist=True.*",  # about AP, which every rank computes from all detections
)


@rank_zero_only
def log_on_rank_zero(line: str) -> None:
    """Log a line once in distributed training."""
    LOG.info(line)


@rank_zero_only
def warn_on_rank_zero(line: str, *values: object) -> None:
    """Log a warning once in distributed training."""
    LOG.warning(line, *values)


@contextlib.contextmanager
def show_log() -> Iterator[None]:
    """Print the run's log lines to stderr unless the program has configured logging."""
    handler = None
    level = LOG.level
    if not LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        LOG.addHandler(handler)
    if level == logging.NOTSET:
        LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(level)
        if handler is not None:
            LOG.removeHandler(handler)


@contextlib.contextmanager
def hide_lightning_messages() -> Iterator[None]:
    """Hide PyTorch Lightning's info messages, and warnings that a user cannot act on."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _HIDDEN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
