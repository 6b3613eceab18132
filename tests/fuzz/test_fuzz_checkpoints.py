"""Damaged checkpoints of every kind raise the documented errors, and nothing else."""

from __future__ import annotations

import pytest

from tests.fuzz.fuzz_checkpoints import ALLOWED, attempt
from tests.fuzz.mutations import fuzz


@pytest.mark.filterwarnings("ignore")  # torch warns about odd tensors
def test_damaged_checkpoints_raise_documented_errors() -> None:
    count, failures = fuzz(attempt, allowed=ALLOWED, seconds=2.0, runs=300, seed=1)
    assert count > 5
    assert not failures
