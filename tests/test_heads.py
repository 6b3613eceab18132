from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from focaldet import RetinaNetHead
from focaldet.heads import flatten_maps, gather_from_map


def test_every_class_starts_with_the_prior_probability() -> None:
    head = RetinaNetHead(8, num_classes=3, prior=0.02)
    logits, box_deltas = head([torch.zeros(1, 8, 2, 2)])
    assert_close(logits[0].sigmoid(), torch.full((1, 27, 2, 2), 0.02))
    assert_close(box_deltas[0], torch.zeros(1, 36, 2, 2))


def test_towers_are_shared_by_levels_and_separate_for_classes_and_boxes() -> None:
    head = RetinaNetHead(8, num_classes=3, depth=2)
    feature = torch.randn(1, 8, 4, 4)
    logits, _ = head([feature, feature])
    assert_close(logits[0], logits[1], rtol=0, atol=0)
    weights = head.state_dict()
    assert not torch.equal(weights["class_tower.0.conv.weight"], weights["box_tower.0.conv.weight"])


@pytest.mark.parametrize("norm", [None, "group"])
@pytest.mark.parametrize("channels", [32, 64, 256])
def test_with_fan_in_the_spread_of_the_output_does_not_depend_on_the_width(
    channels: int, norm: Any
) -> None:
    squares = []
    for seed in range(6):
        torch.manual_seed(seed)
        head = RetinaNetHead(channels, num_anchors=4, num_classes=16, norm=norm, init="fan_in")
        with torch.no_grad():
            [logits], [box_deltas] = head([torch.randn(1, channels, 20, 20)])
        logits += math.log(0.99 / 0.01)  # without the bias of the prior
        # Away from the zeros around the map.
        squares.append([maps[..., 5:-5, 5:-5].square().mean() for maps in (logits, box_deltas)])
    spreads = torch.tensor(squares).mean(0).sqrt()
    # 0.01 * sqrt(9 * 256) times the root mean square of the tower's output, which is that of the input,
    # 1, or sqrt(1 / 2) of the positive half of the normalised values.
    expected = 0.48 * (1 if norm is None else 0.5**0.5)
    assert_close(spreads, torch.full((2,), expected), rtol=0.2, atol=0)


def test_with_the_papers_weights_a_narrow_head_is_almost_silent() -> None:
    torch.manual_seed(0)
    feature = torch.randn(1, 64, 16, 16)
    spreads = {}
    inits: tuple[Literal["paper", "fan_in"], ...] = ("paper", "fan_in")
    for init in inits:
        head = RetinaNetHead(64, init=init)
        [logits], _ = head([torch.zeros(1, 64, 1, 1)])
        assert_close(logits.sigmoid(), torch.full_like(logits, 0.01))
        with torch.no_grad():
            spreads[init] = float(head.box_deltas(head.box_tower(feature)).std())
    assert spreads["paper"] < 1e-3 * spreads["fan_in"]


def test_group_norm_follows_convolutions_without_bias() -> None:
    head = RetinaNetHead(32, num_classes=3, norm="group", depth=3)
    norms = [m for m in head.modules() if isinstance(m, nn.GroupNorm)]
    convs = [m for m in head.class_tower.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == 6
    assert all(conv.bias is None for conv in convs)


@pytest.mark.parametrize(
    ("options", "kinds", "biases"),
    [
        ({"norm": "batch"}, (nn.BatchNorm2d, nn.BatchNorm2d), (False, False)),
        ({"box_norm": "group"}, (None, nn.GroupNorm), (True, False)),
        ({"norm": "group", "box_norm": None}, (nn.GroupNorm, None), (False, True)),
        (
            {"norm": "group_with_bias", "box_norm": "batch"},
            (nn.GroupNorm, nn.BatchNorm2d),
            (True, False),
        ),
    ],
)
def test_each_tower_has_its_norm_and_a_bias_where_the_norm_leaves_it(
    options: dict[str, Any], kinds: tuple[Any, Any], biases: tuple[bool, bool]
) -> None:
    head = RetinaNetHead(32, num_classes=3, depth=2, **options)
    for tower, kind, bias in zip((head.class_tower, head.box_tower), kinds, biases, strict=True):
        norms = [m for m in tower.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        convs = [m for m in tower.modules() if isinstance(m, nn.Conv2d)]
        assert len(norms) == (2 if kind else 0)
        assert all(isinstance(norm, kind) for norm in norms)
        assert [conv.bias is not None for conv in convs] == [bias, bias]


def test_each_level_is_normalised_by_its_own_statistics_in_training() -> None:
    head = RetinaNetHead(4, num_classes=1, depth=1, norm="batch").train()
    levels = [torch.randn(2, 4, 8, 8), 5 + 3 * torch.randn(2, 4, 4, 4)]
    _, together = head(levels)
    for level, expected in zip(levels, together, strict=True):
        assert_close(head([level])[1][0], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["group", "group_with_bias"])
def test_groups_of_one_channel_give_an_image_the_same_output_alone_as_in_a_batch(
    norm: Any, training: bool
) -> None:
    head = RetinaNetHead(32, num_classes=2, norm=norm).train(training)
    levels = [torch.randn(2, 32, 3, 3), torch.randn(2, 32, 1, 1)]
    both = head(levels)
    alone = head([level[:1].requires_grad_() for level in levels])
    for maps, expected in zip(alone, both, strict=True):
        for level, in_batch in zip(maps, expected, strict=True):
            assert_close(level, in_batch[:1])
    sum(level.square().sum() for maps in alone for level in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_the_norm_of_the_head_is_the_group_norm_of_torch() -> None:
    head = RetinaNetHead(32, num_classes=2, norm="group", num_groups=8, depth=1)
    norm: Any = head.class_tower[0].norm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    peer = nn.GroupNorm(8, 32)
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 32, 3, 5)
    assert_close(norm(x), peer(x), rtol=0, atol=0)


def test_batch_norm_names_the_level_with_a_single_value_in_training() -> None:
    head = RetinaNetHead(32, num_classes=2, box_norm="batch")
    levels = [torch.randn(1, 32, 2, 2), torch.randn(1, 32, 1, 1)]
    with pytest.raises(ValueError, match=r"features\[1\] is a 1x1 map of one image.*more images"):
        head(levels)
    assert head.eval()(levels)[1][1].shape == (1, 36, 1, 1)
    head.train()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # frozen, as in fine-tuning
    assert head(levels)[0][1].shape == (1, 18, 1, 1)


def test_a_tensor_instead_of_a_list_of_levels_is_an_error() -> None:
    with pytest.raises(
        TypeError, match=r"features must be a list.*got a tensor of shape \[1, 8, 4, 4\]"
    ):
        RetinaNetHead(8)(torch.zeros(1, 8, 4, 4))


def test_flattening_follows_level_row_column_anchor_class() -> None:
    batch, anchors, classes, height, width = 2, 3, 4, 2, 5
    maps = [torch.randn(batch, anchors * classes, height, width), torch.randn(batch, 12, 1, 2)]
    rows = flatten_maps(maps, anchors)
    assert rows.shape == (batch, (10 + 2) * anchors, classes)
    for h, w, a, k in [(0, 0, 0, 0), (1, 3, 2, 1), (0, 4, 1, 3)]:
        row = (h * width + w) * anchors + a
        assert rows[1, row, k] == maps[0][1, a * classes + k, h, w]
    assert rows[0, 30 + 3 + 1, 2] == maps[1][0, 1 * classes + 2, 0, 1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathering_rows_agrees_with_flattening(layout: torch.memory_format) -> None:
    level = torch.randn(2, 12, 3, 4).contiguous(memory_format=layout)
    images, anchors = torch.tensor([0, 1, 1]), torch.tensor([35, 0, 17])
    expected = flatten_maps([level], 3)[images, anchors]
    assert_close(gather_from_map(level, images, anchors, 3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_anchors", [0, -3, 5])
def test_the_number_of_anchors_must_divide_the_channels(num_anchors: int) -> None:
    level, none = torch.randn(2, 12, 3, 4), torch.zeros(0, dtype=torch.int64)
    message = rf"num_anchors={num_anchors} .*\[2, 12, 3, 4\]"
    with pytest.raises(ValueError, match=message):
        flatten_maps([level], num_anchors)
    with pytest.raises(ValueError, match=message):
        gather_from_map(level, none, none, num_anchors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes.* 0"),
        ({"num_anchors": 0}, "num_anchors.* 0"),
        ({"depth": -1}, "depth.* -1"),
        ({"prior": 1.0}, r"prior must be in \(0, 1\), got 1.0"),
        ({"norm": "layer"}, "norm 'layer'.*'group'"),
        ({"box_norm": "layer"}, "box_norm 'layer'.*'same'"),
        ({"init": "he"}, "init 'he'.*'paper' or 'fan_in'"),
        ({"box_norm": "group", "in_channels": 40}, "num_groups.* 40 .*32"),
        ({"norm": "group", "in_channels": 40}, "num_groups.* 40 .*32"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetHead(**options)
