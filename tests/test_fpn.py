from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from focaldet import FPN


def features(height: int = 12, width: int = 20) -> list[torch.Tensor]:
    return [
        torch.randn(2, channels, -(-height // 2**i), -(-width // 2**i))
        for i, channels in enumerate((4, 6, 8))
    ]


@pytest.mark.parametrize("size", [(12, 20), (13, 7), (1, 1), (25, 3)])
def test_any_input_size_gives_five_levels(size: tuple[int, int]) -> None:
    levels = FPN((4, 6, 8), 16)(features(*size))
    assert [level.shape[:2] for level in levels] == [(2, 16)] * 5
    assert levels[0].shape[2:] == size
    for finer, coarser in itertools.pairwise(levels):
        assert coarser.shape[2:] == tuple(-(-s // 2) for s in finer.shape[2:])


def test_p6_is_computed_from_c5_or_p5_and_p7_from_p6_with_or_without_relu() -> None:
    maps = features()
    for p6_from in ("c5", "p5"):
        for p7_relu in (True, False):
            fpn = FPN((4, 6, 8), 16, p6_from=p6_from, p7_relu=p7_relu)
            *_, p5, p6, p7 = fpn(maps)
            assert_close(p6, fpn.p6(maps[2] if p6_from == "c5" else p5))
            assert_close(p7, fpn.p7(F.relu(p6) if p7_relu else p6))


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (8, 8)])
def test_gradients_of_maps_one_cell_wide_are_complete_in_bfloat16(size: tuple[int, int]) -> None:
    fpn = FPN((4, 6, 8), 32)
    maps = features(*size)
    gradients = []
    for enabled in (True, False):
        fpn.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = sum(level.float().square().mean() for level in fpn(maps))
        # Fill memory that is reused next with NaN, so that values left uninitialised show.
        poison = [torch.full((32 * 32 * 9 * share // 4,), torch.nan) for share in (1, 2, 4, 8)]
        del poison
        torch.autograd.backward([total])
        gradients.append({name: p.grad.clone() for name, p in fpn.named_parameters()})  # type: ignore[union-attr]
    for name, ours in gradients[0].items():
        assert_close(ours, gradients[1][name], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("maps", [1, 2, 4, 5])
@pytest.mark.parametrize("num_extra", [0, 1, 2, 4])
def test_any_number_of_maps_and_extra_levels(maps: int, num_extra: int) -> None:
    channels = (4, 6, 8, 10, 12)[:maps]
    inputs = [torch.randn(1, c, -(-70 // 2**i), -(-90 // 2**i)) for i, c in enumerate(channels)]
    fpn = FPN(channels, 16, num_extra=num_extra)
    levels = fpn(inputs)
    assert [tuple(level.shape) for level in levels] == [
        (1, 16, -(-70 // 2**i), -(-90 // 2**i)) for i in range(maps + num_extra)
    ]
    extra = [f"p{6 + i}" for i in range(num_extra)]
    assert [name for name, _ in fpn.named_children()] == ["lateral", "output", *extra]


def test_four_maps_with_the_same_weights_give_the_levels_of_the_last_three() -> None:
    four, three = FPN((2, 4, 6, 8), 16), FPN((4, 6, 8), 16)
    weights = {k: v for k, v in four.state_dict().items() if ".0." not in k}
    shifted = {k.replace(".1.", ".0.").replace(".2.", ".1."): v for k, v in weights.items()}
    shifted |= {k.replace(".3.", ".2."): v for k, v in weights.items() if ".3." in k}
    three.load_state_dict({k: v for k, v in shifted.items() if ".3." not in k})
    maps = [torch.randn(2, 2, 24, 40), *features()]
    for ours, expected in zip(four(maps)[1:], three(maps[1:]), strict=True):
        assert_close(ours, expected, rtol=0, atol=0)


def test_p8_is_computed_from_p7_as_p7_from_p6() -> None:
    fpn = FPN((4, 6, 8), 16, num_extra=3)
    *_, p7, p8 = fpn(features(64, 64))
    assert_close(p8, fpn.get_submodule("p8")(F.relu(p7)))


def test_p3_depends_on_c5() -> None:
    fpn, maps = FPN((4, 6, 8), 16), features()
    maps[2].requires_grad_()
    fpn(maps)[0].sum().backward()
    assert maps[2].grad is not None
    assert float(maps[2].grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": ()}, "in_channels is empty"),
        ({"in_channels": (4, 6), "num_extra": -1}, "num_extra must be at least 0, got -1"),
        ({"in_channels": (4, 6, 8), "p6_from": "p4"}, "p6_from 'p4'.*'c5' or 'p5'"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPN(**options)


def test_a_wrong_number_of_features_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"features must be 3 maps.*got 2"):
        FPN((4, 6, 8))(features()[:2])


def test_a_tensor_instead_of_a_list_of_maps_is_an_error() -> None:
    with pytest.raises(
        TypeError, match=r"features must be a list.*got a tensor of shape \[1, 4, 8, 8\]"
    ):
        FPN((4,))(torch.zeros(1, 4, 8, 8))
