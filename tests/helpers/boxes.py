"""Random boxes that several test modules share."""

from __future__ import annotations

import torch
from torch import Tensor


def random_boxes(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return boxes with corners in [0, 100) and sides from 1 to 51."""
    corners = torch.rand(count, 2, dtype=dtype) * 100
    return torch.cat((corners, corners + 1 + 50 * torch.rand(count, 2, dtype=dtype)), dim=1)
