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


def test_p3_depends_on_c5() -> None:
    fpn, maps = FPN((4, 6, 8), 16), features()
    maps[2].requires_grad_()
    fpn(maps)[0].sum().backward()
    assert maps[2].grad is not None
    assert float(maps[2].grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": (4, 6)}, r"in_channels must be three numbers.*\(4, 6\)"),
        ({"in_channels": (4, 6, 8), "p6_from": "p4"}, "p6_from 'p4'.*'c5' or 'p5'"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FPN(**options)


def test_a_wrong_number_of_features_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"features must be three maps.*2 maps"):
        FPN((4, 6, 8))(features()[:2])
