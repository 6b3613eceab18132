"""The packages of the extra ``train``: importing this module raises if one is missing."""

from __future__ import annotations

from focaldet._extras import import_extra

for _package in ("matplotlib", "pytorch_lightning", "safetensors", "tensorboard"):
    import_extra(_package, purpose="focaldet.training", install="focaldet[train]")
