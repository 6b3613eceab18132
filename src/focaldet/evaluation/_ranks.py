"""One result for all ranks: each reads its share, the first judges, all get what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Share = TypeVar("Share")
Result = TypeVar("Result")


def over_ranks(read: Callable[[], Share], judge: Callable[[Sequence[Share]], Result]) -> Result:
    """Call ``read`` on every rank and ``judge`` on the first, with all that was read, in order.

    An error of any rank is raised on all of them, since otherwise the others would wait for it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return judge([read()])
    first = dist.get_rank() == 0
    shares: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(_attempt(read), shares)
    outcome = [_attempt(lambda: judge(_unless_failed(shares or ()))) if first else None]
    dist.broadcast_object_list(outcome)
    return cast("Result", _unless_failed(outcome)[0])


def _attempt(function: Callable[[], object]) -> object:
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - it is raised on every rank
        return error


def _unless_failed(values: Sequence[Any]) -> Sequence[Any]:
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values
