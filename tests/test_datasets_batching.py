from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focaldet.datasets import AspectRatioBatchSampler, seed_worker


def batches_of(ratios: Any, batch_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    sampler = AspectRatioBatchSampler(ratios, batch_size, **options)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


RATIOS = st.lists(st.floats(0.2, 5), max_size=60)


@given(RATIOS, st.integers(1, 7), st.integers(0, 3), st.booleans())
def test_every_image_is_in_one_batch_and_few_batches_are_mixed(
    ratios: list[float], batch_size: int, epoch: int, shuffle: bool
) -> None:
    batches = batches_of(ratios, batch_size, epoch, shuffle=shuffle)
    assert sorted(index for batch in batches for index in batch) == list(range(len(ratios)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    mixed = [batch for batch in batches if len({ratios[index] > 1 for index in batch}) == 2]
    assert len(mixed) <= 2  # the images left over from each shape are less than a batch


@given(RATIOS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_ranks_share_the_batches_of_one_process(
    ratios: list[float], batch_size: int, ranks: int, drop_last: bool
) -> None:
    whole = batches_of(ratios, batch_size * ranks, drop_last=drop_last)
    parts = [
        batches_of(ratios, batch_size, drop_last=drop_last, rank=rank, num_replicas=ranks)
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for together, *shares in zip(whole, *parts, strict=True):
        sizes = {len(share) for share in shares}
        assert len(sizes) == 1
        assert max(sizes) <= batch_size
        shared = [index for share in shares for index in share]
        assert set(shared) == set(together)
        assert len(shared) - len(together) < ranks  # the number of repeated images
        if drop_last:
            assert len(shared) == batch_size * ranks


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    ratios = np.linspace(0.5, 2, 50)
    first = batches_of(ratios, 4, seed=3)
    np.random.seed(1)  # noqa: NPY002
    assert batches_of(ratios, 4, seed=3) == first
    assert batches_of(ratios, 4, 1, seed=3) != first
    assert batches_of(ratios, 4, seed=4) != first
    sampler = AspectRatioBatchSampler(ratios, 4, seed=3)
    assert list(sampler) == list(sampler) == first


def test_without_shuffling_images_keep_their_order() -> None:
    assert batches_of([2, 2, 0.5, 2, 2], 2, shuffle=False) == [[0, 1], [2], [3, 4]]
    assert batches_of([1.0] * 5, 2, shuffle=False) == [[0, 1], [2, 3], [4]]
    assert batches_of([1.0] * 5, 2, shuffle=False, drop_last=True) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("ratios", "options", "message"),
    [
        ([1.0], {"batch_size": 0}, "batch_size.*1.*0"),
        ([1.0], {"seed": -1}, "seed.*-1"),
        ([1.0], {"num_replicas": 0}, "num_replicas.*1.*0"),
        ([1.0], {"rank": 2, "num_replicas": 2}, r"rank.*\[0, 1\].*2"),
        ([1.0, 0.0], {}, "aspect_ratios.*0.0 at index 1"),
        ([float("nan")], {}, "aspect_ratios.*nan at index 0"),
    ],
)
def test_wrong_options_are_named(ratios: list[float], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AspectRatioBatchSampler(ratios, **{"batch_size": 1, **options})


def test_a_negative_epoch_is_named() -> None:
    with pytest.raises(ValueError, match="epoch.*-1"):
        AspectRatioBatchSampler([1.0], 1).set_epoch(-1)


def test_workers_seed_python_and_numpy_from_torch() -> None:
    def drawn(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        seed_worker(0)
        return random.random(), float(np.random.rand())  # noqa: NPY002, S311

    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        assert drawn(2**62 + 1) == drawn(2**62 + 1)
        assert drawn(1) != drawn(2)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
