"""Damaged HDF5 files raise the documented errors, and nothing else."""

from __future__ import annotations

import pytest

from tests.fuzz.mutations import fuzz

pytest.importorskip("h5py")


def test_damaged_hdf5_files_raise_documented_errors() -> None:
    from tests.fuzz.fuzz_hdf5 import ALLOWED, attempt

    count, failures = fuzz(attempt, allowed=ALLOWED, seconds=2.0, runs=300, seed=1)
    assert count > 5
    assert not failures
