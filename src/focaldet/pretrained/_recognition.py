"""Recognise whose RetinaNet a file contains, in whatever containers and under whatever prefix."""

from __future__ import annotations

import heapq
import logging
from typing import TYPE_CHECKING, NamedTuple

from focaldet._checks import shortened
from focaldet.errors import CheckpointError
from focaldet.pretrained._checkpoint import CheckpointFile
from focaldet.pretrained._reading import check_tensors
from focaldet.pretrained._state_dict import (
    choose,
    is_counter,
    search_prefixes,
    without_wrappers,
)
from focaldet.pretrained.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from focaldet.pretrained._checkpoint import Family
    from focaldet.pretrained._state_dict import WeightSet

__all__ = ["recognise"]

_logger = logging.getLogger(__name__)

_MIN_SHARE = 8  # a detector has at least one tensor for so many of the largest set in its file
_MAX_SETS = 100  # that are searched, the largest ones


class _Match(NamedTuple):
    """A set of weights in a file, or the part of it under a prefix, that a family recognises."""

    family: Family
    weights: WeightSet
    prefix: str
    tensors: dict[str, Tensor]

    @property
    def label(self) -> tuple[str, ...]:
        return (*self.weights.path, *self.prefix.split(".")[:-1])

    @property
    def name(self) -> str:
        return ".".join(self.label)


class _Near(NamedTuple):
    """A family that lacks some of its characteristic keys under a prefix of a set of weights."""

    family: Family
    prefix: str
    missing: Sequence[str]


def recognise(
    sets: Sequence[WeightSet], path: Path, weights: str | None, beside: Mapping[str, str]
) -> tuple[CheckpointFile, Family]:
    """Return one set of weights of a file as its family expects it, and the family.

    Args:
        sets: All sets of weights in the file.
        path: The file's path.
        weights: The name of the set to load, or a part of it; None if there is no choice.
        beside: The texts of the files next to it.

    Raises:
        CheckpointError: If no family recognises any of the sets, it is not clear which to load, or
            tensors that do not belong to the detector are among its own.
    """
    matches, nearest = _matches(sets)
    if not matches:
        for one in sets:
            check_tensors(one.tensors, path)
        raise _unknown(sets, nearest, path)
    try:
        match = matches[choose([one.label for one in matches], weights)]
    except CheckpointError as error:
        raise CheckpointError(f"Cannot load {str(path)!r}. {error}") from error
    check_tensors(match.tensors, path)
    _account_for_others(match, matches, path, chosen=weights is not None)
    _log_choice(match, matches, path, chosen=weights is not None)
    file = CheckpointFile(match.tensors, match.weights.extras, path.name, beside)
    return file, match.family


def _matches(sets: Sequence[WeightSet]) -> tuple[list[_Match], _Near | None]:
    """Return what the families recognise, and otherwise the family that lacks the fewest keys."""
    matches: list[_Match] = []
    near: list[_Near] = []
    large = heapq.nlargest(_MAX_SETS, (len(one.tensors) for one in sets))
    least = max(large[-1], large[0] // _MIN_SHARE)
    for one in (one for one in sets if len(one.tensors) >= least):
        _search(one, matches, near)
    return matches, min(near, key=lambda one: len(one.missing), default=None)


def _search(one: WeightSet, matches: list[_Match], near: list[_Near]) -> None:
    tensors = without_wrappers(one.tensors)

    def fits(prefix: str, keys: Sequence[str]) -> bool:
        stripped = {key: tensors[prefix + key] for key in keys}
        for family in FAMILIES:
            missing = family.missing(stripped)
            if not missing:
                matches.append(_Match(family, one, prefix, stripped))
                return True
            if len(missing) < _most_missing(family):
                near.append(_Near(family, prefix, missing))
        return False

    search_prefixes(tensors, fits)


def _most_missing(family: Family) -> int:
    return len(family.missing({}))


def _account_for_others(
    match: _Match, matches: Sequence[_Match], path: Path, *, chosen: bool
) -> None:
    """Raise if a set of weights has tensors outside the detector, unless a user chose the detector."""
    one = match.weights
    values = [key for key in one.others if key.startswith(match.prefix) and "." in key]
    if values:
        raise CheckpointError(
            f"Cannot load {str(path)!r}: {values[0]!r} is {shortened(one.others[values[0]], 50)} instead "
            "of a tensor."
        )
    prefixes = tuple(other.prefix for other in matches if other.weights is one)
    left = {k: v for k, v in without_wrappers(one.tensors).items() if not k.startswith(prefixes)}
    named = sorted(key for key, value in left.items() if not is_counter(key, value))
    if not named:
        return
    count = f"{len(named)} tensor{'s' * (len(named) != 1)} ({_some(named)})"
    if chosen:
        _logger.warning("Left out what is not under %r in %s: %s.", match.name, path.name, count)
        return
    raise CheckpointError(
        f"Cannot load {str(path)!r}: the RetinaNet of {match.family.NAME} under {match.prefix!r} has "
        f"{count} next to it. If it does not need them, pass weights={match.name!r}."
    )


def _log_choice(match: _Match, matches: Sequence[_Match], path: Path, *, chosen: bool) -> None:
    name = match.name or "at the top level"
    containers = {one.label[0] for one in matches if one.label}
    swapped = {"state_dict", "ema_state_dict"} <= containers
    if chosen and swapped:
        _logger.warning("Loading %s of %s.%s", name, path.name, _SWAPPED)
    elif chosen or len(matches) == 1:
        _logger.info("Loading the weights %s of %s.", name, path.name)
    else:
        _logger.warning(
            "%s contains several sets of weights. Loading %s; choose another with weights=: %s.%s",
            path.name,
            name,
            ", ".join(one.name or "at the top level" for one in matches if one is not match),
            _SWAPPED if swapped else "",
        )


_SWAPPED = " MMEngine saves the average as state_dict, and the weights before it as ema_state_dict."


def _unknown(sets: Sequence[WeightSet], near: _Near | None, path: Path) -> CheckpointError:
    keys = [key for one in sets for key in one.tensors]
    tensors = f"{len(keys)} tensor{'s' * (len(keys) != 1)}: {_some(sorted(keys))}"
    message = f"{str(path)!r} ({tensors}) is not a RetinaNet in a supported format."
    names = [family.NAME for family in FAMILIES]
    if near is None:
        return CheckpointError(
            f"{message} It has no key of {', '.join(names[:-1])} or {names[-1]}."
        )
    lacks = f"{len(near.missing)} key{'s' * (len(near.missing) != 1)} ({_some(near.missing)})"
    under = f" under {near.prefix!r}" if near.prefix else ""
    others = ", ".join(name for name in names if name != near.family.NAME)
    return CheckpointError(
        f"{message} The most similar format is {near.family.NAME}, but {lacks}{under} {_are(near.missing)} missing. Also "
        f"tried: {others}."
    )


def _are(keys: Sequence[str]) -> str:
    return "is" if len(keys) == 1 else "are"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(map(shortened, keys[:3])) + (", …" if len(keys) > 3 else "")
