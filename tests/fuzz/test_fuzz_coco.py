from __future__ import annotations

from tests.fuzz.fuzz_coco import attempt
from tests.fuzz.mutations import fuzz


def test_damaged_coco_files_give_a_table_or_a_documented_error() -> None:
    count, failures = fuzz(attempt, allowed=(), runs=100)
    assert count == 100
    assert not failures
