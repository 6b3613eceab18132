"""Damaged run folders raise the documented errors when the run is resumed."""

from __future__ import annotations

import logging

import pytest

from tests.fuzz.fuzz_runs import ALLOWED, attempt
from tests.fuzz.mutations import fuzz


@pytest.mark.filterwarnings("ignore")  # of torch and Lightning, about odd values
def test_damaged_runs_raise_documented_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="focaldet.training")
    count, failures = fuzz(attempt, allowed=ALLOWED, seconds=2.0, runs=40, seed=1, slowest=60.0)
    assert count > 1
    assert not failures
