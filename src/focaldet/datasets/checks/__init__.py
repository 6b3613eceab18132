"""The dataset checker: :func:`check_dataset` finds mistakes in a dataset before training."""

from __future__ import annotations

__all__: list[str] = []
