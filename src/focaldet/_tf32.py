"""Exact float32 convolutions in cuDNN, which computes them in TF32 by default."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["convolutions_use_tf32", "without_tf32"]

_lock = threading.Lock()
_users = 0
_restore: Callable[[], None] | None = None


def convolutions_use_tf32() -> bool:
    """Return whether cuDNN may compute float32 convolutions in TF32."""
    cudnn: Any = torch.backends.cudnn
    conv = getattr(cudnn, "conv", None)
    if conv is None:  # before torch 2.9
        return bool(cudnn.allow_tf32)
    return bool(conv.fp32_precision == "tf32")


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions exactly.

    The setting belongs to the process, so the convolutions of other threads are exact, too. If several
    threads are in this context, the last one that leaves it restores the setting.
    """
    global _users, _restore  # noqa: PLW0603  # the setting is global
    with _lock:
        if _users == 0:
            _restore = _switch_off()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _restore is not None:
                _restore()
                _restore = None


def _switch_off() -> Callable[[], None] | None:
    """Switch TF32 off for convolutions. Return a function that restores it, or None if it was off."""
    if not convolutions_use_tf32():
        return None
    cudnn: Any = torch.backends.cudnn

    def restore_all() -> None:
        cudnn.allow_tf32 = True

    def restore_convolutions() -> None:
        cudnn.conv.fp32_precision = "tf32"

    # Reading allow_tf32 is an error while convolutions and recurrent layers differ, so the setting
    # that covers both is used if it was set like that.
    with contextlib.suppress(RuntimeError):
        if cudnn.allow_tf32:
            cudnn.allow_tf32 = False
            if not convolutions_use_tf32():
                return restore_all
            restore_all()
    cudnn.conv.fp32_precision = "ieee"
    return restore_convolutions
