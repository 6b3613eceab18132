"""Find the sets of weights within the contents of a file, in whatever they are wrapped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from focaldet._checks import shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "WeightSet",
    "choose",
    "find_weight_sets",
    "is_counter",
    "search_prefixes",
    "without_wrappers",
]

_MAX_DEPTH = 6  # of the dictionaries that are searched
_MAX_DICTIONARIES = 10_000
_MAX_PREFIX_PARTS = 8
_MIN_SHARE = 8  # a detector has at least one in so many tensors of a set
_MIN_KEYS = 3

# Wrappers that add a part to the keys of whatever module they wrap, also within a model.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Where training scripts save the model, and what they call averages of its weights.
_PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "weights")
_AVERAGED = re.compile(
    r"(?:^|[^a-z])(?:ema|swa)(?:[^a-z]|$)|averag|teacher|shadow|momentum", re.IGNORECASE
)
_COUNTERS = ("n_averaged", "num_updates", "steps")  # of torch, timm and MMEngine


class WeightSet(NamedTuple):
    """One set of weights in a file.

    Attributes:
        path: The keys of the dictionaries that contain it, from the outermost to the innermost.
        tensors: The tensors by key.
        around: The dictionary of the tensors, and before it those that contain it.
    """

    path: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    around: tuple[Mapping[Any, Any], ...] = ()

    @property
    def others(self) -> dict[str, Any]:
        """The other entries of the dictionary."""
        return _named_others(self.around[-1]) if self.around else {}

    @property
    def extras(self) -> dict[str, Any]:
        """The other entries of all dictionaries. If several have a key, the innermost one counts."""
        entries: dict[str, Any] = {}
        for i, dictionary in enumerate(self.around):
            within = self.path[i] if i < len(self.path) else None
            entries |= {k: v for k, v in _named_others(dictionary).items() if k != within}
        return entries


def _named_others(dictionary: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in dictionary.items()
        if isinstance(key, str) and not isinstance(value, torch.Tensor)
    }


def find_weight_sets(contents: object) -> list[WeightSet]:
    """Return the sets of weights in a file's contents: the dictionaries with tensors as values.

    >>> [found] = find_weight_sets({"state_dict": {"w": torch.tensor(1)}, "epoch": 3})
    >>> found.path, found.tensors, found.extras
    (('state_dict',), {'w': tensor(1)}, {'epoch': 3})
    """
    found: list[WeightSet] = []
    waiting: list[tuple[tuple[str, ...], tuple[dict[Any, Any], ...]]] = []
    if isinstance(contents, dict):
        waiting.append(((), (contents,)))
    for path, around in waiting:  # it grows meanwhile
        content = around[-1]
        tensors = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor)
        }
        if tensors:
            found.append(WeightSet(path, tensors, around))
        if len(path) < _MAX_DEPTH:
            waiting += [
                ((*path, key), (*around, value))
                for key, value in content.items()
                if isinstance(key, str) and isinstance(value, dict)
            ][: _MAX_DICTIONARIES - len(waiting)]
    return found


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without the parts that compilation and sharding add to their keys.

    >>> list(without_wrappers({"model._orig_mod.head.weight": torch.tensor(1)}))
    ['model.head.weight']
    """
    renamed = {_WRAPPERS.sub("", key): value for key, value in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def search_prefixes(keys: Collection[str], fits: Callable[[str, Sequence[str]], bool]) -> None:
    """Call a function with each prefix that many keys share, and those keys without it.

    Prefixes end with a dot, and the shortest ones come first. If the function returns True for a
    prefix, longer ones that begin with it are not tried.
    """
    least = max(_MIN_KEYS, len(keys) // _MIN_SHARE)
    level: list[tuple[str, list[str]]] = [("", list(keys))]
    for _ in range(_MAX_PREFIX_PARTS):
        longer: list[tuple[str, list[str]]] = []
        for prefix, rest in level:
            if fits(prefix, rest):
                continue
            parts: dict[str, list[str]] = {}
            for key in rest:
                part, dot, end = key.partition(".")
                if dot:
                    parts.setdefault(part, []).append(end)
            longer += [
                (f"{prefix}{part}.", ends) for part, ends in parts.items() if len(ends) >= least
            ]
        level = longer


def is_counter(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor only counts the updates of an average of weights.

    >>> is_counter("ema.n_averaged", torch.tensor(3))
    True
    """
    return key.rpartition(".")[2] in _COUNTERS and tensor.numel() == 1


def choose(labels: Sequence[Sequence[str]], weights: str | None) -> int:
    """Return the index of the set of weights to load.

    Without a name, it is the only one that is not an average, or else the only one that is called
    "model", "state_dict" or similar.

    Args:
        labels: For each set, the keys that contain it and the parts of its prefix.
        weights: The name of the set, or a part of it that no other name has. None decides by
            the names.

    Raises:
        CheckpointError: If no set or several sets have the name, or it is not clear which to load.
    """
    names = [".".join(label) for label in labels]
    if weights is not None:
        return _named(names, labels, weights)
    if len(labels) == 1:
        return 0
    plain = [i for i, name in enumerate(names) if not _AVERAGED.search(name)]
    if len(plain) != 1:
        usual = [i for i in plain or range(len(names)) if (labels[i] or ("",))[0] in _PLAIN]
        plain = usual or plain
    if len(plain) != 1:
        raise CheckpointError(
            f"It contains several sets of weights: {_listed(names)}. Choose one with weights=, such as "
            f"weights={names[0]!r}."
        )
    return plain[0]


def _named(names: Sequence[str], labels: Sequence[Sequence[str]], weights: str) -> int:
    for matches in (
        [i for i, name in enumerate(names) if name == weights],
        [i for i, label in enumerate(labels) if weights in label],
        [i for i, name in enumerate(names) if weights in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = _listed([names[i] for i in matches])
            raise CheckpointError(
                f"weights={shortened(weights)} could be any of these sets of weights: {several}."
            )
    raise CheckpointError(
        f"weights={shortened(weights)} is none of its sets of weights: {_listed(names)}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        ", ".join(shortened(name, 80) if name else "one at the top level" for name in names[:8])
        + more
    )
