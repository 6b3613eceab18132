"""What the processor can compute quickly, for the sentence that says when a precision does not pay off."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Precision", "log_missing_units", "missing_units"]

Precision = Literal["float32", "bfloat16", "float16", "int8"]

_LOG = logging.getLogger("focaldet")

# By architecture and precision: the capabilities of torch.cpu.get_capabilities, any of which is enough.
_UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "bfloat16": ("amx_bf16", "avx512_bf16"),
        "float16": ("amx_fp16", "avx512_fp16"),
        "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "avx_vnni_int8"),
    },
    "arm64": {"bfloat16": ("bf16",), "float16": ("fp16_arith",), "int8": ("dot", "i8mm")},
}
_NAMES = {
    "x86_64": {
        "bfloat16": "AVX512-BF16 or AMX-BF16",
        "float16": "AVX512-FP16 or AMX-FP16",
        "int8": "VNNI or AMX-INT8",
    },
    "arm64": {"bfloat16": "BF16", "float16": "FP16", "int8": "dot product or I8MM"},
}


def missing_units(precision: str, capabilities: Mapping[str, object]) -> str | None:
    """Return the names of the units that a processor lacks for a precision.

    Args:
        precision: "float32", "bfloat16", "float16" or "int8".
        capabilities: What ``torch.cpu.get_capabilities`` returned.

    Returns:
        The names for a message, or None if the processor has the units, needs none, or is unknown.

    >>> missing_units("int8", {"architecture": "x86_64", "avx2": True})
    'VNNI or AMX-INT8'
    >>> missing_units("int8", {"architecture": "x86_64", "avx_vnni": True})
    """
    architecture = str(capabilities.get("architecture", ""))
    architecture = "arm64" if architecture == "aarch64" else architecture
    wanted = _UNITS.get(architecture, {}).get(precision)
    if wanted is None or any(capabilities.get(name) for name in wanted):
        return None
    return _NAMES[architecture][precision]


def log_missing_units(precision: str, consequence: str) -> None:
    """Log one sentence if this processor has no units for a precision.

    Args:
        precision: "float32", "bfloat16", "float16" or "int8".
        consequence: A sentence that says what happens instead.
    """
    read = getattr(torch.cpu, "get_capabilities", None)  # older versions of PyTorch have none
    names = None if read is None else missing_units(precision, read())
    if names is not None:
        _LOG.warning("This processor has no units for %s (%s). %s", precision, names, consequence)
