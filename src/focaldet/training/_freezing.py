"""Parts of a detector that do not train in a run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

from focaldet._checks import shortened
from focaldet.backbones import FrozenBatchNorm2d
from focaldet.criterion import RetinaNetCriterion

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["freeze_parts", "has_same_buffers", "restored_gradients"]


def freeze_parts(model: nn.Module, freeze: Sequence[str] | int) -> list[nn.Module]:
    """Freeze parts of a detector: their parameters and the statistics of their norms.

    Parts that are frozen already, such as the stages that ``config.trainable_stages`` leaves out, stay
    frozen.

    Args:
        model: The detector, whose parameters are changed in place.
        freeze: Names of submodules, such as "backbone" or "fpn"; or the number of stages of the
            backbone to freeze, counted from the first.

    Returns:
        The frozen modules, which must be in evaluation mode during training.

    Raises:
        ValueError: If a name does not exist, the backbone has no stages to count, or nothing is left
            to train.
    """
    parts = _stages(model, freeze) if isinstance(freeze, int) else _named(model, freeze)
    modules = []
    for part in parts:
        part.requires_grad_(requires_grad=False)
        if isinstance(part, nn.Module):
            part.eval()
            modules.append(part)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={shortened(freeze)} leaves no parameter to train; freeze less.")
    return modules


def has_same_buffers(model: nn.Module) -> bool:
    """Return whether the buffers of a model are the same on all ranks without being sent to them.

    Frozen norms do not change, and the criterion averages over ranks. The statistics of other norms
    depend on the images of the rank, and those of other modules are unknown.
    """
    return all(
        isinstance(module, FrozenBatchNorm2d | RetinaNetCriterion)
        for module in model.modules()
        if any(True for _ in module.buffers(recurse=False))
    )


@contextlib.contextmanager
def restored_gradients(model: nn.Module) -> Iterator[None]:
    """Let the parameters that a run has frozen require gradients again after it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def _named(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    for name in names:
        try:
            yield model.get_submodule(name)
        except AttributeError:
            children = ", ".join(repr(child) for child, _ in model.named_children())
            raise ValueError(
                f"freeze names {name!r}, but model has no such part. Its parts are {children}; parts "
                "of these, such as 'head.class_tower', are named as in model.named_modules()."
            ) from None


def _stages(model: nn.Module, count: int) -> list[Any]:
    stages = getattr(model.backbone, "stages", None)
    if not isinstance(stages, list | tuple) or not count <= len(stages):
        has = "is not divided into stages" if stages is None else f"has {len(stages)} stages"
        raise ValueError(
            f"freeze={count} counts stages of the backbone, but {type(model.backbone).__name__} {has}. "
            "Name parts instead, such as freeze=('backbone',)."
        )
    return [part for stage in stages[:count] for part in stage]
