"""Tell whether two models have the same weights and configuration."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from focaldet.config import RetinaNetConfig

__all__ = ["model_fingerprint"]


class _Model(Protocol):
    """A detector."""

    @property
    def config(self) -> RetinaNetConfig:
        """Its configuration."""


def model_fingerprint(model: _Model) -> str:
    """Return a short text that changes with the weights or the configuration of a model.

    It is one of the settings by which :func:`predict_to_folder` recognises that an unfinished run was
    started with a different model, even if that had the same name.

    Args:
        model: A :class:`focaldet.RetinaNet` on any device. Of an object without a ``state_dict``, such
            as a :class:`focaldet.export.OnnxDetector`, only the configuration is compared.

    Returns:
        16 hexadecimal digits. They do not depend on the device or on the memory layout.

    >>> from focaldet import RetinaNet, RetinaNetConfig
    >>> config = RetinaNetConfig(num_classes=1, backbone="resnet18", backbone_norm="batch")
    >>> model = RetinaNet.from_config(config)
    >>> before = model_fingerprint(model)
    >>> before == model_fingerprint(model)
    True
    >>> _ = torch.nn.init.zeros_(next(model.parameters()))
    >>> before == model_fingerprint(model)
    False

    .. versionadded:: 0.3.0
    """
    digest = hashlib.sha256(model.config.to_json().encode())
    weights: Mapping[str, Tensor] = model.state_dict() if isinstance(model, nn.Module) else {}
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
