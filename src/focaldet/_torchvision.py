"""The only import of torchvision, with an error that explains a broken installation."""

from __future__ import annotations

import importlib.metadata

import torch

__all__ = ["torchvision"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


try:
    import torchvision
    import torchvision.models
    import torchvision.ops
except (ImportError, RuntimeError, OSError) as error:
    # A torchvision built for a different torch, or for CUDA when torch is built for the CPU, fails
    # with RuntimeError("operator torchvision::nms does not exist").
    raise ImportError(
        f"torchvision {_version('torchvision')} does not work with torch {torch.__version__}: "
        f"{error}. Install compatible versions of both from one package index: "
        "pip install --force-reinstall torch torchvision. "
        "(FocalLoss and the other parts that need only torch work without torchvision.)"
    ) from error
