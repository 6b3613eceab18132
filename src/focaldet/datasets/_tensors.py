"""torchvision's transforms and tensor types, imported only when a transform is used."""

from __future__ import annotations

from focaldet._torchvision import torchvision  # isort: split

from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["torchvision", "tv_tensors", "v2"]
