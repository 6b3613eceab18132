from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from tests.helpers.fake_cuda import WouldWaitError, fake_cuda

if TYPE_CHECKING:
    from collections.abc import Callable

WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "a value": lambda x: bool(x.sum() > 0),
    "a list": lambda x: x[0].tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "a mask as index, rows": lambda x: x[x[:, 0] > 0],
    "a mask as target": lambda x: x.__setitem__(x > 0, x[0, 0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),  # type: ignore[no-untyped-call]
    "repeat_interleave": lambda x: torch.repeat_interleave(x[0].long()),
    "equal": lambda x: torch.equal(x, x),
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
}
COPIES: dict[str, Callable[[torch.Tensor], object]] = {
    "tensor": lambda _: torch.tensor([1.0, 2.0], device="cuda:0"),
    "new_tensor": lambda x: x.new_tensor(1.0),
    "as_tensor": lambda _: torch.as_tensor([1.0], device="cuda:0"),
    "to": lambda _: torch.zeros(3).to("cuda:0"),
    "copy_": lambda x: x.copy_(torch.zeros(3, 4)),
    "a list as index": lambda x: x[[0, 1]],
}
NEITHER: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda x: torch.where(x > 0, x * 2.0, 0.0).clamp(min=1.0),
    "a mask as target of a number": lambda x: x.__setitem__(x > 0, 1.0),
    "fills": lambda x: x.new_full((2,), 3.0) + torch.arange(2, device="cuda:0"),
    "a number on the host": lambda x: x * torch.tensor(2.0),
}


@pytest.mark.parametrize("name", [*WAITS, *COPIES, *NEITHER])
def test_waits_and_uploads_are_counted_and_strict_mode_raises(name: str) -> None:
    function = {**WAITS, **COPIES, **NEITHER}[name]
    with fake_cuda() as counts:
        function(torch.zeros(3, 4, device="cuda:0"))
    assert (counts.num_waits, counts.num_blocking_uploads) == (name in WAITS, name in COPIES)
    with fake_cuda(strict=True):
        x = torch.zeros(3, 4, device="cuda:0")
        if name in NEITHER:
            function(x)
            return
        with pytest.raises(
            (WouldWaitError, DataDependentOutputException, DynamicOutputShapeException)
        ):
            function(x)


def test_copies_from_pinned_memory_do_not_block() -> None:
    with fake_cuda(strict=True) as counts:
        for pinned in (torch.zeros(3).pin_memory(), torch.zeros(3)):
            pinned.to("cuda:0", non_blocking=True)
        assert torch.zeros(3).pin_memory().is_pinned()
        torch.zeros(3, device="cuda:0").to("cpu", non_blocking=True)
    assert [kind for kind, _ in counts.uploads] == ["pinned", "pageable"]
    assert len(counts.downloads) == 1


def test_live_and_peak_bytes() -> None:
    with fake_cuda() as counts:
        kept = torch.zeros(1000, device="cuda:0")
        assert counts.live == 4096  # a multiple of 512
        (kept + 1).view(10, 100)  # a view shares its memory
        assert (counts.live, counts.peak) == (4096, 8192)
        counts.clear()
        assert counts.peak == 4096
        torch.zeros(1000)  # not on the device
    assert counts.peak == 4096
