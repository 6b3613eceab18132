"""Plots of precision-recall curves, of kinds of errors and of confusion matrices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from focaldet._atomic import atomic_write
from focaldet._checks import existing_folder, printable
from focaldet._extras import import_extra

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from matplotlib.figure import Figure

    from focaldet.evaluation._curve import PrecisionRecall


_MOST_CLASSES = 30  # of a confusion matrix; more cannot be read
_LONGEST_NAME = 24


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


def plot_errors(
    kinds: Sequence[tuple[str, int, float, float]], title: str, path: str | os.PathLike[str] | None
) -> Figure:
    """Plot two bars per kind of error, given as name, count, gain and share.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib cannot write the file format.
    """
    import_extra("matplotlib", purpose="plot", install="focaldet[plot]")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(kinds))
    values = np.nan_to_num([[gain, share] for _, _, gain, share in kinds])
    for column, (label, color) in enumerate(
        (("AP gained by fixing this alone", "#2b6cb0"), ("share of 1 - AP", "#b9cde2"))
    ):
        bars = axes.barh(
            rows + 0.2 * (2 * column - 1), values[:, column], height=0.36, color=color, label=label
        )
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    names = [f"{name} ({count:,})" for name, count, _, _ in kinds]
    axes.set(title=title, xlabel="AP", yticks=rows, yticklabels=names)
    axes.set_xlim(min(0.0, values.min() * 1.2), max(0.01, values.max() * 1.18))
    axes.invert_yaxis()
    figure.legend(frameon=False, loc="outside lower right", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if path is not None:
        _save(figure, Path(path))
    return figure


def plot_confusion(
    counts: npt.NDArray[np.int64],
    class_names: Sequence[str],
    iou_threshold: float,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """Plot a confusion matrix whose last row and column are the background.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib cannot write the file format.
    """
    import_extra("matplotlib", purpose="plot", install="focaldet[plot]")
    from matplotlib.figure import Figure

    total = len(class_names)
    kept = np.arange(total)
    if total > _MOST_CLASSES:
        inner = counts[:total, :total] * (1 - np.eye(total, dtype=np.int64))
        confused = inner.sum(axis=0) + inner.sum(axis=1)
        kept = np.sort(np.argsort(-confused, kind="stable")[:_MOST_CLASSES])
    rows = np.append(kept, total)
    shown = counts[np.ix_(rows, rows)]
    # A row is relative to all of its class, also where some columns are not drawn.
    fractions = shown / counts.sum(axis=1)[rows, None].clip(min=1)
    names = [*(_short(printable(class_names[k])) for k in kept.tolist()), "background"]
    side = 2.4 + 0.36 * len(rows)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(shown), strict=True):
        color = "white" if fractions[i, j] > 0.5 else "black"
        axes.text(j, i, f"{shown[i, j]}", ha="center", va="center", color=color, fontsize=7)
    title = f"IoU {iou_threshold:g}"
    if total > _MOST_CLASSES:
        title += f", the {_MOST_CLASSES} most confused of {total} classes"
    places = np.arange(len(rows))
    axes.set(title=title, xlabel="detected as", ylabel="object", xticks=places, yticks=places)
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    figure.colorbar(picture, ax=axes, label="fraction of the row", shrink=0.6)
    if path is not None:
        _save(figure, Path(path))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


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
