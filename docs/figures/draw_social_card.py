"""Draw the picture that links to the docs are shown with: ``python docs/figures/draw_social_card.py``.

It is written to docs/_static/social_card.png, with 1200 x 630 pixels, the size that most sites show.
"""

from __future__ import annotations

import draw_focal_loss as style
import torch
from matplotlib import pyplot as plt


def main() -> None:
    """Write the name of the project on the left, and draw its loss for five values of gamma on the right."""
    figure = plt.figure(figsize=(12, 6.3))
    figure.text(0.06, 0.60, "focaldet", fontsize=62, fontweight="bold")
    figure.text(
        0.063, 0.43, "RetinaNet and the focal loss\nfor PyTorch", fontsize=24, linespacing=1.5
    )
    axes = figure.add_axes((0.57, 0.16, 0.37, 0.68))
    p = torch.linspace(0.005, 0.9995, 400, dtype=torch.float64)
    for gamma, color in zip((0.0, 0.5, 1.0, 2.0, 5.0), style.SHADES, strict=True):
        loss = style.losses_of(p.logit(), 1.0, gamma)
        axes.plot(p, loss, color=color, linewidth=4, label=f"{style.GAMMA} = {gamma:g}")
    axes.set(xlim=(0, 1), ylim=(0, 4), xticks=(0, 0.5, 1), yticks=(0, 2, 4))
    axes.set_xlabel("probability of the true label", fontsize=18)
    axes.set_ylabel("loss", fontsize=18)
    axes.tick_params(labelsize=16)
    axes.legend(frameon=False, fontsize=16)
    path = style.HERE.parent / "_static" / "social_card.png"
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
