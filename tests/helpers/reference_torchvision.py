"""The installed torchvision's RetinaNets with random weights, to compare detectors with."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

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
    return randomise(peer, class_bias=class_bias)


def randomise(peer: Any, *, class_bias: float = -3.0) -> Any:
    """Give a torchvision model random weights that keep activations at a normal scale."""
    generator = torch.Generator().manual_seed(1)
    kinds = (torch.nn.BatchNorm2d, FrozenBatchNorm2d)
    norms: list[Any] = [m for m in peer.modules() if isinstance(m, kinds)]
    for module in norms:
        count = len(module.weight)
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


def small_retinanet(
    num_classes: int,
    *,
    backbone: str = "resnet18",
    norm_layer: Any = torch.nn.BatchNorm2d,
    p6_channels: int = 256,
    group_norm: bool = False,
    scales: int = 3,
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    **options: Any,
) -> Any:
    """Build a torchvision RetinaNet as people build their own, around one of its ResNets."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=norm_layer,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(p6_channels, 256),
    )
    anchors = AnchorGenerator(
        tuple(tuple(int(x * 2 ** (i / 3)) for i in range(scales)) for x in (32, 64, 128, 256, 512)),
        (ratios,) * 5,
    )
    norm = functools.partial(torch.nn.GroupNorm, 32) if group_norm else None
    head = RetinaNetHead(256, scales * len(ratios), num_classes, norm_layer=norm)
    return detection.RetinaNet(body, num_classes, anchor_generator=anchors, head=head, **options)


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
