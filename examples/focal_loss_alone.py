"""Find the rare class: the focal loss without a detector, against cross-entropy, on drawn data.

Two points in a hundred are positive, and their cloud overlaps the others'. Three equal networks see
the same batches and differ in their loss only. It takes a few seconds on one CPU core.

    python examples/focal_loss_alone.py
"""

import torch
from torch import nn

from focaldet import FocalLoss


def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n points in 16 dimensions [n, 16] and their labels [n, 1]: 1 on a noisy shell."""
    y = (torch.rand(n, 1) < 0.02).float()
    x = torch.randn(n, 16)
    return x * (1 + 0.4 * y) + 0.4 * y, y


def average_precision(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of the precisions at each positive, best score first."""
    hits = y[scores.argsort(descending=True)].cumsum(0)
    precision = hits / torch.arange(1, len(y) + 1)
    return precision[hits.diff(prepend=hits.new_zeros(1)) > 0].mean().item()


losses = {
    "cross-entropy": FocalLoss(alpha=None, gamma=0.0),  # equal to BCEWithLogitsLoss()
    "focal, paper's alpha": FocalLoss(alpha=0.25, gamma=2.0),
    "focal, alpha 0.75": FocalLoss(alpha=0.75, gamma=2.0),
}
torch.manual_seed(0)
(x, y), (x_test, y_test) = draw(40_000), draw(40_000)

print(f"{int(y_test.sum())} positives in {len(y_test)} held-out points; threshold 0.5")
print(f"{'loss':<22}{'average precision':>18}{'precision':>11}{'recall':>8}{'found':>7}")
for name, criterion in losses.items():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    nn.init.constant_(model[-1].bias, -4.0)  # start at p = 0.02, as the paper does with 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    scores = model(x_test).detach().sigmoid()[:, 0]
    found, truth = scores > 0.5, y_test[:, 0] > 0.5
    right = int((found & truth).sum())
    precision, recall = right / max(int(found.sum()), 1), right / int(truth.sum())
    ap = average_precision(scores, y_test[:, 0])
    print(f"{name:<22}{ap:>18.3f}{precision:>11.3f}{recall:>8.3f}{int(found.sum()):>7}")
