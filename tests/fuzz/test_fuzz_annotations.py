"""A short run of the fuzzer of annotation files."""

from __future__ import annotations

from tests.fuzz.fuzz_annotations import ALLOWED, read_changed_file
from tests.fuzz.mutations import fuzz


def test_changed_annotation_files_give_only_documented_errors() -> None:
    count, failures = fuzz(read_changed_file, allowed=ALLOWED, seconds=20, runs=200)
    assert count > 0
    assert failures == []
