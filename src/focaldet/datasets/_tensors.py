"""torchvision's transforms and the tensors they take, imported when a transform is asked for."""

from __future__ import annotations

from focaldet._torchvision import torchvision  # isort: split

from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["torchvision", "tv_tensors", "v2"]
