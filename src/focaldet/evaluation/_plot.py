"""The picture of precision-recall curves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from focaldet.evaluation._result import PrecisionRecall


def plot_precision_recall(
    curves: Mapping[float, PrecisionRecall], title: str, path: str | os.PathLike[str] | None
) -> Figure:
    """Draw curves by IoU threshold, dark for low thresholds, and write them if there is a path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_precision_recall needs the package matplotlib: pip install 'focaldet[plot]'"
        ) from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for (threshold, curve), color in zip(curves.items(), colors, strict=True):
        ap = curve.precision.mean()
        label = f"{threshold:.2f}   {'-' if np.isnan(ap) else f'{ap:.3f}'}"
        axes.plot(curve.recall, curve.precision, color=color, label=label, linewidth=1.5)
    axes.set(
        title=title,
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        xticks=np.linspace(0, 1, 6),
        yticks=np.linspace(0, 1, 6),
    )
    axes.grid(color="0.9")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(
        title="IoU        AP", alignment="right", loc="outside right upper", frameon=False
    )
    if path is not None:
        _write(figure, Path(path))
    return figure


def _write(figure: Figure, path: Path) -> None:
    """Write the picture aside, then rename it, so that a failure leaves what was there."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        figure.savefig(aside, dpi=150)
        aside.replace(path)
