"""Classify a rare class with the focal loss and with cross-entropy, on synthetic data.

Two points in a hundred are positive, and they overlap with the negatives. Three identical networks
are trained on the same batches with different losses. This takes about ten seconds on one CPU core.

    python examples/focal_loss_alone.py
"""

import torch
from torch import Tensor, nn

from focaldet import FocalLoss


def draw(n: int) -> tuple[Tensor, Tensor]:
    """Draw n points [n, 16] and labels [n, 1]; positives have a shifted mean and a larger spread."""
    y = (torch.rand(n, 1) < 0.02).float()
    return torch.randn(n, 16) * (1 + 0.4 * y) + 0.4 * y, y


def measure(p: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Compute average precision, and precision and recall at threshold 0.5."""
    hits = y[p.argsort(descending=True)]
    average = (hits.cumsum(0) / torch.arange(1, len(y) + 1))[hits > 0].mean().item()
    right = y[p > 0.5].sum().item()
    return average, right / max(int((p > 0.5).sum()), 1), right / y.sum().item()


torch.manual_seed(0)
(x, y), (x_test, y_test) = draw(40_000), draw(40_000)
print(f"{int(y_test.sum())} of {len(y_test)} held-out points are positive")
print(f"{'loss':<24}{'average precision':>18}{'precision':>12}{'recall':>9}")
for name, criterion in {
    "cross-entropy": FocalLoss(alpha=None, gamma=0.0),  # equals BCEWithLogitsLoss()
    "focal, alpha 0.25": FocalLoss(alpha=0.25, gamma=2.0),  # the setting of the paper
    "focal, alpha 0.75": FocalLoss(alpha=0.75, gamma=2.0),
}.items():
    torch.manual_seed(1)  # the same initial weights and batches
    hidden = (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model = nn.Sequential(*hidden, nn.Linear(64, 1))
    nn.init.constant_(model[-1].bias, -4.0)  # so that p is about 0.02 everywhere at first
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in torch.cat([torch.randperm(len(x)) for _ in range(10)]).split(256):
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        average, precision, recall = measure(model(x_test).sigmoid()[:, 0], y_test[:, 0])
    print(f"{name:<24}{average:>18.3f}{precision:>12.3f}{recall:>9.3f}")
print("Precision and recall are at p > 0.5. Alpha affects that threshold more than the ranking.")
