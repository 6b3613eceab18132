"""Random changes of bytes and of JSON values, and a loop that tries them.

All functions take a seeded ``random.Random`` and return new objects, so a failure can be repeated from
its seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ODD_VALUES",
    "Failure",
    "fuzz",
    "mutate_bytes",
    "mutate_json",
    "mutate_text",
    "run_main",
]

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e308),
    *(float("nan"), float("inf"), "", "1", "nan", "\x1b[31m", "\ud800", "é\u202e", "x" * 1000),
    *([], {}, [[]], [None], {"": None}, [0] * 100, {"a": {"b": []}}),
)
"""Values that often break a reader when they take the place of another one."""

_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)


def mutate_bytes(data: bytes, rng: random.Random, *, times: int | None = None) -> bytes:
    """Return ``data`` with a few random changes.

    Args:
        data: The bytes to change.
        rng: The source of randomness.
        times: Number of changes. None draws 1 to 4, fewer more often.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)) if times is None else times):
        mutation = rng.choice(_BYTE_MUTATIONS)
        data = mutation(data, rng)
    return data


def mutate_text(text: str, rng: random.Random) -> bytes:
    """Return ``text`` as bytes with random changes, often in another encoding or with odd characters."""
    if rng.random() < 0.3:
        at = rng.randint(0, len(text))
        odd = rng.choice(
            ("\x00", "\x1b[2J", "\ufeff", "\u2028", "é", "\U0001f989", "\t", "\r", '"', "&")
        )
        text = text[:at] + odd + text[at:]
    encoding = rng.choice(("utf-8",) * 5 + ("utf-8-sig", "utf-16", "latin-1"))
    data = text.encode(encoding, "replace")
    return mutate_bytes(data, rng) if rng.random() < 0.7 else data


def mutate_json(value: Any, rng: random.Random, *, times: int | None = None) -> Any:
    """Return a copy of a JSON value in which a few random parts were changed.

    A part is replaced by an odd value or by another part, removed, repeated or wrapped, or gets another
    key.

    Args:
        value: Dictionaries, lists and plain values.
        rng: The source of randomness.
        times: Number of changes. None draws 1 to 3.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3)) if times is None else times):
        places = _places(value)
        if not places:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        _change_place(*rng.choice(places), places, rng)
    return value


def _places(value: Any, limit: int = 5000) -> list[tuple[Any, Any]]:
    """Return pairs of a container and a key or index in it, for all parts of a value."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(places) < limit:
        container = waiting.pop()
        if isinstance(container, dict | list):
            keys = list(container) if isinstance(container, dict) else range(len(container))
            places += [(container, key) for key in keys]
            waiting += [container[key] for key in keys]
    return places


def _change_place(
    container: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random
) -> None:
    kind = rng.choice(("odd", "odd", "odd", "other", "remove", "repeat", "wrap", "nudge", "rename"))
    old = container[key]
    if kind == "remove":
        del container[key]
    elif kind == "repeat" and isinstance(container, list):
        container.insert(key, copy.deepcopy(old))
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice(("", "id", "a" * 300, f"{key} ", str(key).upper()))] = container.pop(
            key
        )
    elif kind == "wrap":
        container[key] = rng.choice(([old], {"a": old}, str(old)))
    elif kind == "nudge" and isinstance(old, int | float):
        container[key] = rng.choice((old + 1, -old, old * 10**9, float(old), old / 3, str(old)))
    elif kind == "other":
        parent, other = rng.choice(places)
        taken = isinstance(parent, dict) and other in parent
        taken = taken or (isinstance(parent, list) and other < len(parent))
        container[key] = copy.deepcopy(parent[other]) if taken else None
    else:
        container[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def _span(data: bytes, rng: random.Random, longest: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(1, longest))


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_byte(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
    return bytes(changed)


def _set_number(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    number = int(rng.choice(_NUMBERS) % 256**size)
    start = rng.randrange(len(data) + 1)
    return (
        data[:start] + number.to_bytes(size, rng.choice(("little", "big"))) + data[start + size :]
    )


def _cut_end(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove_span(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat_span(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[start:end] * rng.choice((2, 3, 50)) + data[end:]


def _move_span(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    rest = data[:start] + data[end:]
    at = rng.randrange(len(rest) + 1)
    return rest[:at] + data[start:end] + rest[at:]


def _insert_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]


_BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip_bit, _flip_bit, _set_byte, _set_byte, _set_number, _cut_end),
    *(_remove_span, _repeat_span, _move_span, _insert_bytes),
)


class Failure(NamedTuple):
    """An input that raised an undocumented error or took too long.

    Attributes:
        seed: The seed of the input.
        error: What happened.
    """

    seed: int
    error: str


def fuzz(
    attempt: Callable[[random.Random], object],
    *,
    allowed: tuple[type[Exception], ...],
    seconds: float = 3600.0,
    runs: int | None = None,
    seed: int = 0,
    slowest: float = 10.0,
) -> tuple[int, list[Failure]]:
    """Call ``attempt`` with one seeded generator after another, and collect what goes wrong.

    Args:
        attempt: Makes an input from the generator and reads it.
        allowed: The documented exceptions.
        seconds: When to stop.
        runs: Maximum number of calls. None sets no limit.
        seed: The first seed. Each call has the next one.
        slowest: Seconds that one call may take.

    Returns:
        The number of calls and the failures, one per kind of error.
    """
    failures: dict[str, Failure] = {}
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end and (runs is None or count < runs):
        one, count = seed + count, count + 1
        begin = time.monotonic()
        try:
            attempt(random.Random(one))  # noqa: S311
        except allowed:
            pass
        except Exception as error:  # noqa: BLE001  # any other kind is what fuzzing looks for
            kind = f"{type(error).__name__} at {_place_of(error)}"
            failures.setdefault(kind, Failure(one, f"{kind}: {str(error)[:200]}"))
        taken = time.monotonic() - begin
        if taken > slowest:
            failures.setdefault("slow", Failure(one, f"took {taken:.1f} s"))
    return count, list(failures.values())


def _place_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def run_main(
    name: str, attempt: Callable[[random.Random], object], allowed: tuple[type[Exception], ...]
) -> int:
    """Fuzz for the time given on the command line, print the failures, and return an exit status."""
    parser = argparse.ArgumentParser(description=f"Fuzz {name}.")
    parser.add_argument("--seconds", type=float, default=300.0, help="duration (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--runs", type=int, default=None, help="maximum number of inputs")
    options = parser.parse_args()
    count, failures = fuzz(
        attempt, allowed=allowed, seconds=options.seconds, runs=options.runs, seed=options.seed
    )
    report = {"inputs": count, "failures": [failure._asdict() for failure in failures]}
    print(json.dumps(report, indent=2))  # noqa: T201
    return 1 if failures else 0
