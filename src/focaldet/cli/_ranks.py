"""The rank of this process among several that were started together."""

from __future__ import annotations

import os

__all__ = ["device_of_rank", "rank_and_world_size"]


def rank_and_world_size() -> tuple[int, int]:
    """Return the environment variables RANK and WORLD_SIZE, which torchrun sets; 0 and 1 without them.

    Raises:
        ValueError: If only one of them is set, or their values do not fit together.
    """
    values = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if values == [None, None]:
        return 0, 1
    try:
        rank, world_size = (int(value or "") for value in values)
    except ValueError:
        rank, world_size = 0, 0
    if not 0 <= rank < world_size:
        raise ValueError(
            "The environment variables RANK and WORLD_SIZE must be whole numbers with 0 <= RANK < "
            f"WORLD_SIZE, got {values[0]!r} and {values[1]!r}. Start the processes with torchrun, or "
            "set or unset both."
        )
    return rank, world_size


def device_of_rank() -> str | None:
    """Return the GPU of this process, by LOCAL_RANK. None without GPUs, or if LOCAL_RANK is not set."""
    import torch

    local_rank = os.environ.get("LOCAL_RANK", "")
    if not local_rank.isdecimal() or not torch.cuda.is_available():
        return None
    return f"cuda:{int(local_rank) % torch.cuda.device_count()}"
