"""Damaged image files raise the documented error, and nothing else."""

from __future__ import annotations

from tests.fuzz.fuzz_images import ALLOWED, attempt
from tests.fuzz.mutations import fuzz


def test_damaged_images_raise_documented_errors() -> None:
    count, failures = fuzz(attempt, allowed=ALLOWED, seconds=2.0, runs=1000, seed=1)
    assert count > 20
    assert not failures
