"""The installed torchvision's RetinaNets with random weights, to compare detectors with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.testing import assert_close
from torchvision.models import detection

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def everything_of(peer: detection.RetinaNet) -> Iterator[dict[str, Any]]:
    """Record the logits, deltas and anchors of torchvision's next forward passes."""
    seen: dict[str, Any] = {}
    hooks = [
        peer.head.register_forward_hook(lambda _, __, out: seen.update(out)),
        peer.anchor_generator.register_forward_hook(lambda _, __, out: seen.update(anchors=out)),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def randomised(name: str, *, class_bias: float = -3.0, **options: Any) -> Any:
    """Build a torchvision model with random weights that keep activations at a normal scale."""
    peer = detection.__dict__[name](weights=None, weights_backbone=None, **options)
    generator = torch.Generator().manual_seed(1)
    norms: list[Any] = [m for m in peer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for module in norms:
        count = module.num_features
        module.weight.data = 0.8 + 0.4 * torch.rand(count, generator=generator)
        module.bias.data = 0.1 * torch.randn(count, generator=generator)
        module.running_mean.data = 0.1 * torch.randn(count, generator=generator)
        module.running_var.data = 0.8 + 0.8 * torch.rand(count, generator=generator)
    head = peer.head
    for tower in (head.classification_head.conv, head.regression_head.conv):
        for conv in tower.modules():
            if isinstance(conv, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(conv.weight, generator=generator)
    head.classification_head.cls_logits.bias.data.zero_()
    peer.eval()
    with torch.no_grad(), everything_of(peer) as seen:
        peer([torch.rand(3, 128, 128, generator=generator)])
    # Without this scores saturate and their order is arbitrary.
    head.classification_head.cls_logits.weight.data /= seen["cls_logits"].std()
    head.regression_head.bbox_reg.weight.data *= 0.3 / seen["bbox_regression"].std()
    head.classification_head.cls_logits.bias.data.fill_(class_bias)
    return peer


NOISE = 2e-6  # float32 rounding of one convolution, which can differ between runs


def assert_same_detections(
    found: Any, expected: Any, *, boxes_atol: float = 0.02, scores_atol: float = 5e-5
) -> None:
    """Require equal detections in equal order, except that scores within rounding may swap."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs["scores"])
        order = torch.arange(len(ours))
        moved = (ours.boxes - theirs["boxes"]).abs().amax(dim=1) > boxes_atol
        for i in (moved | (ours.labels != theirs["labels"])).nonzero()[:, 0].tolist():
            tied = (ours.scores - theirs["scores"][i]).abs() <= NOISE
            same = (ours.boxes - theirs["boxes"][i]).abs().amax(dim=1) <= boxes_atol
            [order[i]] = (tied & same & (ours.labels == theirs["labels"][i])).nonzero()[:, 0]
        assert_close(ours.labels[order], theirs["labels"], rtol=0, atol=0)
        assert_close(ours.scores[order], theirs["scores"], rtol=0, atol=scores_atol)
        assert_close(ours.boxes[order], theirs["boxes"], rtol=0, atol=boxes_atol)
