"""Optimiser, learning rate, schedule, and which parameters have weight decay."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from focaldet._checks import check_choice, check_range

if TYPE_CHECKING:
    from focaldet.training._options import TrainingOptions

__all__ = [
    "PAPER_BATCH",
    "PAPER_LR",
    "build_optimizer",
    "check_backbone_lr_decay",
    "choose_lr",
    "lr_factor",
    "parameter_groups",
]

PAPER_LR = 0.01
"""The paper's learning rate, for SGD with a batch of :data:`PAPER_BATCH` images."""

PAPER_BATCH = 16
"""Batch size of the paper: 2 images on each of 8 GPUs."""

_ADAMW_LR = 1e-4  # at PAPER_BATCH
_MOMENTUM = 0.9
_STEP_MILESTONES = (2 / 3, 8 / 9)  # 60,000 and 80,000 of 90,000 updates
_LONGEST_WARMUP = 500
_WARMUP_START = 1e-3  # of the full rate


def choose_lr(options: TrainingOptions, real_batch: int) -> tuple[float, str]:
    """Return the learning rate, and a description of where it comes from for the log."""
    if options.lr is not None:
        return options.lr, f"lr {options.lr:g} ({real_batch} images per update)"
    base = PAPER_LR if options.optimizer == "sgd" else _ADAMW_LR
    lr = base * real_batch / PAPER_BATCH
    return lr, f"lr {lr:g} ({base:g} x {real_batch}/{PAPER_BATCH} images per update)"


def lr_factor(
    step: int,
    total_steps: int,
    *,
    schedule: Literal["step", "cosine", "constant"] = "step",
    warmup_steps: int | None = None,
) -> float:
    """Return the factor by which the learning rate is multiplied in one update.

    Args:
        step: Number of the update, counted from 0.
        total_steps: Number of updates in the whole run.
        schedule: "step" divides the rate by 10 after 2/3 and after 8/9 of all updates, "cosine"
            lowers it to 0 along half a cosine wave, and "constant" leaves it unchanged.
        warmup_steps: Number of updates over which the factor rises linearly from 0.001, in addition
            to the schedule. None uses 500, or a tenth of all updates if that is less.

    Raises:
        ValueError: If the schedule is unknown.

    >>> [round(lr_factor(step, 90, warmup_steps=0), 3) for step in (0, 59, 60, 79, 80)]
    [1.0, 1.0, 0.1, 0.1, 0.01]
    >>> round(lr_factor(45, 90, schedule="cosine", warmup_steps=0), 3)
    0.5
    """
    check_choice("schedule", schedule, ("step", "cosine", "constant"))
    if warmup_steps is None:
        warmup_steps = min(_LONGEST_WARMUP, total_steps // 10)
    factor = 1.0
    if schedule == "step":
        ends = [round(total_steps * part) for part in _STEP_MILESTONES]
        factor = 0.1 ** bisect.bisect_right(ends, step)
    elif schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total_steps))))
    if step < warmup_steps:
        factor *= _WARMUP_START + (1 - _WARMUP_START) * step / warmup_steps
    return factor


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_norm_and_bias: bool,
    backbone_lr_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model, in groups for an optimiser.

    Args:
        model: Model whose parameters to group; frozen ones are left out.
        weight_decay: Weight decay.
        decay_norm_and_bias: Whether normalisation parameters and biases have weight decay. False puts
            parameters with at most one dimension in a second group, without weight decay.
        backbone_lr_decay: Factor in (0, 1] between the learning rates of neighbouring stages of
            ``model.backbone``. If it is below 1, each stage has its own groups, and every group has
            the entry ``lr_factor``, by which the learning rate is to be multiplied. For a stage of the
            backbone it is ``backbone_lr_decay ** (n + 1)``, where n is the number of stages above it.
            Stages without parameters do not count. For other parts of the model, whose groups are
            first, it is 1. The first layers of a pretrained network hold general features, which need
            to change less than the last ones.

            .. versionadded:: 0.3.0

    Raises:
        ValueError: If ``backbone_lr_decay`` is out of range, or below 1 for a model whose backbone is
            not divided into stages.

    References:
        Clark et al., ELECTRA (layer-wise decay of the learning rate). ICLR 2020. arXiv:2003.10555.
        Bao et al., BEiT (the same for images). ICLR 2022. arXiv:2106.08254. Both decay the rate from
        layer to layer; here it is from stage to stage.

    >>> groups = parameter_groups(nn.Conv2d(3, 4, 1), 1e-4, decay_norm_and_bias=False)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.0001), (1, 0.0)]
    """
    check_backbone_lr_decay(model, backbone_lr_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if backbone_lr_decay == 1:
        return _decay_groups(trained, weight_decay, decay_norm_and_bias=decay_norm_and_bias)
    factors = _factors_of_stages(model.backbone, backbone_lr_decay)
    groups = []
    for factor in sorted({factors.get(parameter, 1.0) for parameter in trained}, reverse=True):
        alike = [parameter for parameter in trained if factors.get(parameter, 1.0) == factor]
        groups += [
            {**group, "lr_factor": factor}
            for group in _decay_groups(alike, weight_decay, decay_norm_and_bias=decay_norm_and_bias)
            if group["params"]
        ]
    return groups


def _decay_groups(
    trained: list[nn.Parameter], weight_decay: float, *, decay_norm_and_bias: bool
) -> list[dict[str, Any]]:
    if decay_norm_and_bias:
        return [{"params": trained, "weight_decay": weight_decay}]
    weights = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def check_backbone_lr_decay(model: nn.Module, decay: float) -> None:
    """Raise ``ValueError`` if the decay is out of range, or the model has no stages to apply it to."""
    check_range("backbone_lr_decay", decay, 0, 1, low_open=True)
    backbone = getattr(model, "backbone", None)
    if decay < 1 and not isinstance(getattr(backbone, "stages", None), list | tuple):
        raise ValueError(
            f"backbone_lr_decay={decay:g} counts stages of the backbone, but "
            f"{type(backbone).__name__} is not divided into stages. Set backbone_lr_decay=1."
        )


def _factors_of_stages(backbone: Any, decay: float) -> dict[nn.Parameter, float]:
    """Return the factors of the learning rate for the parameters of the backbone."""
    stages = [[p for part in stage for p in _parameters_of(part)] for stage in backbone.stages]
    parameters = [stage for stage in stages if stage]
    # Parameters that belong to no stage have the rate of the first one.
    factors = dict.fromkeys(backbone.parameters(), decay ** len(parameters))
    for index, stage in enumerate(parameters):
        factors.update(dict.fromkeys(stage, decay ** (len(parameters) - index)))
    return factors


def _parameters_of(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def build_optimizer(model: nn.Module, options: TrainingOptions, lr: float) -> torch.optim.Optimizer:
    """Build the optimiser described by the options.

    A group of parameters with ``lr_factor`` has ``lr`` times that factor as its learning rate.
    """
    groups = parameter_groups(
        model,
        options.weight_decay,
        decay_norm_and_bias=options.decay_norm_and_bias,
        backbone_lr_decay=options.backbone_lr_decay,
    )
    for group in groups:
        if "lr_factor" in group:
            group["lr"] = lr * group["lr_factor"]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=_MOMENTUM)
