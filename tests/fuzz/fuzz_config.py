"""Damaged texts of ``config.json``: read them, and build the parts that they describe.

Run it with ``python -m tests.fuzz.fuzz_config --seconds 300``.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from focaldet import RetinaNetConfig
from focaldet._assembly import build_parts
from focaldet.errors import CheckpointError
from tests.fuzz.mutations import mutate_json, mutate_text, run_main

if TYPE_CHECKING:
    import random

__all__ = ["ALLOWED", "attempt"]

ALLOWED = (CheckpointError,)
_CONFIGS = (
    RetinaNetConfig.paper(3, ("cat", "dog", "owl")),
    RetinaNetConfig.torchvision_v2(),
    RetinaNetConfig(num_classes=2, assigner="atss", classification_loss="softmax_focal"),
    RetinaNetConfig(num_classes=2, classification_loss="quality_focal", focal_gamma=1.5),
)


class _Backbone(nn.Module):
    channels, strides = (8, 16, 32), (8, 16, 32)


def attempt(rng: random.Random) -> None:
    """Damage the text of a configuration. If it can be read, all parts can be built from it."""
    text = rng.choice(_CONFIGS).to_json()
    if rng.random() < 0.7:
        text = json.dumps(mutate_json(json.loads(text), rng))
    if rng.random() < 0.4:
        text = mutate_text(text, rng).decode("utf-8", "replace")
    config = RetinaNetConfig.from_json(text)
    assert RetinaNetConfig.from_json(config.to_json()) == config
    with torch.device("meta"):
        build_parts(config, _Backbone())


if __name__ == "__main__":
    sys.exit(run_main("config.json", attempt, ALLOWED))
