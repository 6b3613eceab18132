"""Fuzzers: damage valid files in random ways and require documented errors.

Each module ``fuzz_<kind>`` has a ``main`` for long runs, such as
``python -m tests.fuzz.fuzz_checkpoints --seconds 300``. The suite runs each for a few seconds.
"""
