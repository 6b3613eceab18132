"""Draw the pictures of docs/focal_loss.md: ``python docs/figures/draw_focal_loss.py``.

All numbers are computed with focaldet's functions. The same versions of torch and matplotlib
produce identical files. ``--png`` also writes PNG files for a quick look.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn

from focaldet import FocalLoss, sigmoid_focal_loss

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
GAMMA, ALPHA = "\N{GREEK SMALL LETTER GAMMA}", "\N{GREEK SMALL LETTER ALPHA}"
MINUS = "\N{MINUS SIGN}"
INK, GREY = "#1a1a1a", "#6b6b6b"
# From dark to light, so that the order is visible without colour; each curve is also labelled.
SHADES = ("#000000", "#4b1d6b", "#0072b2", "#009e73", "#d55e00")
POSITIVE, NEGATIVE = "#e69f00", "#b9ddf5"  # orange, and a light blue

mpl.rcParams.update(
    {
        "svg.hashsalt": "focaldet",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "axes.labelcolor": INK,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.constrained_layout.w_pad": 0.12,  # for dark pages, which make the edge visible
        "figure.constrained_layout.h_pad": 0.1,
        "lines.linewidth": 2,
    }
)


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None, "Creator": None})
    if "--png" in sys.argv:
        figure.savefig(HERE / f"{name}.png", dpi=110)
    plt.close(figure)


def losses_of(x: torch.Tensor, target: float, gamma: float) -> torch.Tensor:
    targets = torch.full_like(x, target)
    return sigmoid_focal_loss(x, targets, alpha=None, gamma=gamma, reduction="none")


def draw_curves() -> None:
    """Draw figure 1 of the paper: the loss of an entry over the probability of the true label."""
    p = torch.linspace(0.005, 0.9995, 400, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    axes.axvspan(0.6, 1, color="#f0f0f0", zorder=0)
    axes.text(0.8, 2.1, "well classified", ha="center", color=GREY)
    places = {0.0: 0.26, 0.5: 0.28, 1.0: 0.3, 2.0: 0.3, 5.0: 0.26}  # of the labels
    for (gamma, place), colour in zip(places.items(), SHADES, strict=True):
        loss = losses_of(p.logit(), 1.0, gamma)
        axes.plot(p, loss, color=colour)
        at = int((p - place).abs().argmin())
        axes.text(
            *(place, loss[at], f"{GAMMA} = {gamma:g}"),
            ha="center",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )
    axes.text(0.31, 1.4, "cross-entropy", color=SHADES[0], fontsize=9)
    axes.set(
        xlim=(0, 1), ylim=(0, 4), xlabel="$p_t$, the probability of the true label", ylabel="loss"
    )
    axes.set_title("$-(1 - p_t)^\\gamma\\,\\log\\,p_t$")
    save(figure, "focal_loss_curves")


def train_scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of positives and negatives of a small classifier trained with the focal loss.

    One point in a hundred is positive. The positives form five tight clusters in a plane full of
    negatives, which overlap with them. So most negatives are easy and some are impossible to
    classify, as in a detector.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for reproducible sums

    def points(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.rand(n) < 0.01
        angle = 2 * math.pi / 5 * torch.randint(5, (n,))
        centres = 2.5 * torch.stack([angle.cos(), angle.sin()], 1)
        x = torch.where(y[:, None], centres + 0.25 * torch.randn(n, 2), 3 * torch.randn(n, 2))
        return x, y.float()[:, None]

    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    nn.init.constant_(model[-1].bias, -math.log(99))
    criterion = FocalLoss(alpha=0.25, gamma=2.0, reduction="sum", normalizer="num_pos")
    x, y = points(100_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        batch = torch.randint(len(x), (1024,))
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, y = points(200_000)
        logits = model(x)
    return logits[y == 1].double(), logits[y == 0].double()


def draw_cumulative() -> None:
    """Draw figure 4 of the paper: the share of the total loss in the easiest entries."""
    positive, negative = train_scores()
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.9), sharey=True, layout="constrained")
    for axes, x, target in ((panels[0], positive, 1.0), (panels[1], negative, 0.0)):
        for gamma, colour in zip((0.0, 0.5, 1.0, 2.0, 5.0), SHADES, strict=True):
            total = losses_of(x, target, gamma).sort().values.cumsum(0)
            share = torch.linspace(0, 1, 501, dtype=torch.float64)
            curve = total[(share * (len(x) - 1)).long()] / total[-1]
            easiest = 100 * curve[450]
            axes.plot(share, curve, color=colour, label=f"{GAMMA} = {gamma:g}: {easiest:.0f}%")
        axes.axvline(0.9, color=GREY, lw=0.8, ls=(0, (3, 3)), zorder=0)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="fraction of entries, easiest first")
        axes.legend(title="in the easiest 90%", frameon=False, loc="upper left", alignment="left")
    panels[0].set_ylabel("fraction of their loss")
    panels[0].set_title(f"{len(positive):,} positives")
    panels[1].set_title(f"{len(negative):,} negatives")
    save(figure, "focal_loss_cumulative")


def draw_alpha() -> None:
    """Draw which entries alpha weights and which 1 - alpha, as computed by the loss itself."""
    alpha, K = 0.25, 4
    targets = torch.tensor([2, -1, -100])
    logits = torch.zeros(len(targets), K)
    losses = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=0.0, reduction="none")
    weights = losses / math.log(2)  # each entry's cross-entropy at p = 1/2
    figure, axes = plt.subplots(figsize=(7.2, 3.7), layout="constrained")
    notes = (
        "target 2\n(an object)",
        f"target {MINUS}1\n(background)",
        f"target {MINUS}100\n(ignored)",
    )
    for row, note in enumerate(notes):
        axes.text(-0.12, row + 0.5, note, ha="right", va="center", linespacing=1.4)
        for k in range(K):
            weight = weights[row, k].item()
            fill = {0.25: POSITIVE, 0.75: NEGATIVE, 0.0: "white"}[round(weight, 4)]
            name = {0.25: ALPHA, 0.75: f"1 {MINUS} {ALPHA}", 0.0: "0"}[round(weight, 4)]
            axes.add_patch(Rectangle((k + 0.03, row + 0.05), 0.94, 0.9, fc=fill, ec=GREY, lw=0.8))
            axes.text(
                k + 0.5,
                row + (0.42 if weight else 0.5),
                name,
                ha="center",
                va="center",
                fontsize=14,
                fontweight="bold",
            )
            if weight:
                axes.text(k + 0.5, row + 0.76, f"{weight:.2f}", ha="center", va="center")
    for k in range(K):
        axes.text(k + 0.5, -0.12, f"class {k}", ha="center", va="bottom", color=GREY)
    axes.set(xlim=(-1.15, K), ylim=(len(notes), -0.4))
    axes.axis("off")
    axes.set_title(
        f"{ALPHA} weights the true class, 1 {MINUS} {ALPHA} all other entries (here {ALPHA} = {alpha})"
    )
    save(figure, "focal_loss_alpha")


if __name__ == "__main__":
    draw_curves()
    draw_cumulative()
    draw_alpha()
