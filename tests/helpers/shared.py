"""Where real photos, weights and oracles are, if they are next to this checkout."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parents[3] / "shared"
