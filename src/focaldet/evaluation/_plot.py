"""Plots of precision-recall curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from focaldet._atomic import atomic_write
from focaldet._checks import existing_folder
from focaldet._extras import import_extra

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from focaldet.evaluation._curve import PrecisionRecall


def plot_precision_recall(
    curves: Mapping[float, PrecisionRecall], title: str, path: str | os.PathLike[str] | None
) -> Figure:
    """Plot curves by IoU threshold, the lowest the darkest, and save the figure if there is a path.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib cannot write the file format.
    """
    mpl = import_extra("matplotlib", purpose="plot_precision_recall", install="focaldet[plot]")
    from matplotlib.figure import Figure

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
        _save(figure, Path(path))
    return figure


def _save(figure: Figure, path: Path) -> None:
    supported = figure.canvas.get_supported_filetypes()
    file_format = path.suffix[1:].lower() or "png"
    if file_format not in supported:
        raise ValueError(
            f"Cannot write {str(path)!r}: matplotlib has no format {file_format!r}. "
            f"Choose one of: {', '.join(sorted(supported))}."
        )
    existing_folder("path", path.parent)
    with atomic_write(path) as temporary:  # its name has no suffix that says the format
        figure.savefig(temporary, dpi=150, format=file_format)
