"""Damaged configurations raise the documented error, and the others can be built."""

from __future__ import annotations

from tests.fuzz.fuzz_config import ALLOWED, attempt
from tests.fuzz.mutations import fuzz


def test_damaged_configurations_raise_documented_errors() -> None:
    count, failures = fuzz(attempt, allowed=ALLOWED, seconds=2.0, runs=500, seed=1)
    assert count > 5
    assert not failures
