"""Checks of the checkpoint that a run is resumed from, before it trains on."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from focaldet._checks import is_number, printable, shortened
from focaldet.errors import FocaldetError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["RestoredState", "check_checkpoint", "check_count", "explain_damage", "resuming_from"]

_KINDS = {
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
_LONGEST = 300  # characters of an error in a message
_MOST = 2**53  # a count that no run reaches


@contextlib.contextmanager
def explain_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise :class:`TrainingError` for anything that torch raises on reading a damaged file.

    torch's own error is hidden, because it suggests to load the file without protection against
    malicious code.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - damaged pickles raise almost anything
        raise TrainingError(
            f"Cannot resume from {os.fspath(path)!r}: it is damaged or not a checkpoint of tensors and "
            "plain values. Start a new run in another folder."
        ) from None


def check_checkpoint(path: Path) -> int:
    """Return the number of updates that led to a checkpoint, without reading its tensors.

    Raises:
        TrainingError: If the file is damaged or not the checkpoint of a run.
    """
    with explain_damage(path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, kind in _KINDS.items():
            if not isinstance(state[name], kind):
                raise TypeError(name)
        check_count("epoch", state["epoch"])
        return check_count("global_step", state["global_step"])


def check_count(name: str, value: object) -> int:
    """Return a count from a checkpoint, or raise ``ValueError`` if it cannot be one."""
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"{name} is {shortened(value)}")
    return value


class RestoredState(pl.Callback):
    """Check the state of the optimiser, the schedule and the loops that a checkpoint restores.

    torch and Lightning take most values as they are, so that wrong ones fail later or train wrongly.

    Attributes:
        restored: Whether everything has been restored and training has started.

    Raises:
        ValueError: If a value cannot be right.
    """

    def __init__(self) -> None:
        self.restored = False

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Check the state of the loops before Lightning restores it."""
        del module
        _check_alike("loops", checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict())

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Check the optimiser and the schedule."""
        del module
        for optimizer in trainer.optimizers:
            _check_optimizer(optimizer)
        for config in trainer.lr_scheduler_configs:
            _check_schedule(config.scheduler, trainer.optimizers)
        self.restored = True


@contextlib.contextmanager
def resuming_from(last: Path, state: RestoredState) -> Iterator[None]:
    """Raise :class:`TrainingError` for any error in restoring a checkpoint, but not for later ones."""
    try:
        yield
    except (FocaldetError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if state.restored:
            raise
        what = printable(" ".join(str(error).split()))[:_LONGEST]
        raise TrainingError(
            f"Cannot resume from {str(last)!r}: its state does not fit this run "
            f"({type(error).__name__}: {what}). Resume with the model and the options of the run, or "
            "start a new run in another folder."
        ) from error


def _check_alike(name: str, saved: Any, fresh: Any) -> None:
    """Raise unless a restored value has the kind of a fresh one, and counts are not negative."""
    if isinstance(fresh, dict):
        if not isinstance(saved, dict):
            raise TypeError(f"{name} is {shortened(saved)}")
        for key in fresh.keys() & saved.keys():
            _check_alike(f"{name}[{key!r}]", saved[key], fresh[key])
    elif isinstance(fresh, bool):
        if not isinstance(saved, bool):
            raise TypeError(f"{name} is {shortened(saved)}")
    elif isinstance(fresh, int):
        check_count(name, saved)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for name, default in {**optimizer.defaults, "initial_lr": 0.0}.items():
            if not _is_setting(group[name], default):
                raise ValueError(f"{name} of the optimizer is {shortened(group[name])}")
    expected = _fresh_state(optimizer)
    for parameter, state in optimizer.state.items():
        found = _kinds(state, parameter)
        if state and found != expected:
            raise ValueError(f"the optimizer's state is {found} instead of {expected}")


def _fresh_state(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return what an optimiser with these settings stores for a parameter."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    fresh = type(optimizer)([parameter])  # type: ignore[call-arg]
    fresh.param_groups[0] |= {n: optimizer.param_groups[0][n] for n in optimizer.defaults}
    fresh.step()
    return _kinds(fresh.state[parameter], parameter)


def _kinds(state: dict[str, Any], parameter: torch.Tensor) -> dict[str, str]:
    return {name: _kind_of_state(name, value, parameter) for name, value in state.items()}


def _kind_of_state(name: str, value: Any, parameter: torch.Tensor) -> str:
    """Return what kind of value the optimiser has stored under a name."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
        raise ValueError(
            f"{name} of the optimizer has shape {list(value.shape)} for a parameter of shape "
            f"{list(parameter.shape)}"
        )
    if isinstance(value, torch.Tensor):
        return "a tensor" if value.shape == parameter.shape else "a scalar tensor"
    if value is not None and not is_number(value):
        raise ValueError(f"{name} of the optimizer is {shortened(value)}")
    return "None" if value is None else "a number"


def _is_setting(value: Any, default: Any) -> bool:
    """Return whether a value can take the place of an optimiser's default."""
    if default is None or isinstance(default, bool):
        return isinstance(value, bool) or value is default
    if isinstance(default, tuple):
        return (
            isinstance(value, tuple | list)
            and len(value) == len(default)
            and all(map(_is_amount, value))
        )
    return _is_amount(value)


def _is_amount(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _check_schedule(schedule: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    check_count("last_epoch of the schedule", schedule.last_epoch)
    check_count("_step_count of the schedule", schedule._step_count)  # noqa: SLF001
    count = len(optimizers[0].param_groups)
    for name in ("base_lrs", "_last_lr"):
        rates = getattr(schedule, name)
        if not (isinstance(rates, list) and len(rates) == count and all(map(_is_amount, rates))):
            raise ValueError(f"{name} of the schedule is {shortened(rates)}")
    replaced = [name for name in vars(schedule) if callable(getattr(type(schedule), name, None))]
    if replaced or schedule.optimizer is not optimizers[0]:
        raise ValueError(f"the schedule has {replaced or 'a different optimizer'}")
