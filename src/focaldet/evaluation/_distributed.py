"""Evaluation over several ranks: each reads its share, the first computes, all get the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Share = TypeVar("Share")
Result = TypeVar("Result")


def gather_and_compute(
    read: Callable[[], Share], compute: Callable[[Sequence[Share]], Result]
) -> Result:
    """Call ``read`` on every rank, and ``compute`` on the first with all shares in rank order.

    An error on one rank is raised on all of them, because the others would wait for it forever.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return compute([read()])
    is_first = dist.get_rank() == 0
    shares: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(_result_or_error(read), shares)
    outcome = [
        _result_or_error(lambda: compute(_unless_failed(shares or ()))) if is_first else None
    ]
    dist.broadcast_object_list(outcome)
    return cast("Result", _unless_failed(outcome)[0])


def _result_or_error(function: Callable[[], object]) -> object:
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - it is raised on every rank
        return error


def _unless_failed(values: Sequence[Any]) -> Sequence[Any]:
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values
