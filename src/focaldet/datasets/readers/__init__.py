"""The annotation formats that focaldet can read, one module per format."""

from __future__ import annotations

__all__: list[str] = []
