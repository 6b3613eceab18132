"""TF32 is off while an exact network runs, and restored afterwards."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet._tf32 import convolutions_use_tf32, without_tf32
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

BACKENDS: Any = torch.backends
CUDNN: Any = torch.backends.cudnn


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    CUDNN.allow_tf32 = True
    yield
    BACKENDS.fp32_precision = "none"
    CUDNN.allow_tf32 = True


def flags() -> tuple[bool, str, str]:
    return convolutions_use_tf32(), CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision


def set_all() -> None:
    CUDNN.allow_tf32 = True


def set_convolutions() -> None:
    CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = "tf32", "ieee"


def set_everywhere() -> None:
    CUDNN.conv.fp32_precision = CUDNN.rnn.fp32_precision = "none"
    BACKENDS.fp32_precision = "tf32"


@pytest.mark.parametrize("switch_on", [set_all, set_convolutions, set_everywhere])
def test_convolutions_are_exact_however_tf32_was_allowed(switch_on: Any) -> None:
    switch_on()
    before = flags()
    assert before[0]
    with without_tf32():
        assert not convolutions_use_tf32()
        with without_tf32():
            assert not convolutions_use_tf32()
        assert not convolutions_use_tf32()
    assert flags() == before


def test_the_usual_setting_can_be_read_meanwhile() -> None:
    with without_tf32():
        assert CUDNN.allow_tf32 is False
    assert CUDNN.allow_tf32 is True


@pytest.mark.parametrize("name", ["allow_tf32", "conv"])
def test_a_setting_that_is_off_stays_off(name: str) -> None:
    if name == "conv":
        CUDNN.conv.fp32_precision = "ieee"
    else:
        CUDNN.allow_tf32 = False
    before = flags()
    with without_tf32():
        assert flags() == before
    assert flags() == before


def test_the_last_of_several_threads_restores_the_setting() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with without_tf32():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with without_tf32():
        thread.start()
        assert inside.wait(10)
    assert not convolutions_use_tf32()
    leave.set()
    thread.join()
    assert convolutions_use_tf32()


@pytest.mark.parametrize(
    ("dtype", "allowed", "expected"),
    [
        (torch.float32, True, True),
        (torch.float32, False, False),
        (torch.bfloat16, False, True),  # is not affected
    ],
)
def test_a_float32_network_on_a_gpu_is_exact_on_request(
    dtype: torch.dtype, allowed: bool, expected: bool
) -> None:
    seen = []

    def forward_maps(_: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        seen.append(convolutions_use_tf32())
        if len(seen) > 1:
            raise ValueError("on purpose")
        return [], []

    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())
    optimised: Any = model.optimize_for_inference(allow_tf32=allowed)
    optimised.forward_maps = forward_maps
    with fake_cuda():
        images = torch.zeros(1, 3, 64, 96, device="cuda:0", dtype=dtype)
        optimised._run_network(images)
        assert convolutions_use_tf32()
        with pytest.raises(ValueError, match="on purpose"):
            optimised._run_network(images)
        assert convolutions_use_tf32()
    assert seen == [expected] * 2


def test_a_network_on_a_cpu_leaves_the_setting_alone() -> None:
    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())
    optimised = model.optimize_for_inference(allow_tf32=False)
    seen = []
    optimised.head.register_forward_hook(lambda *_: seen.append(convolutions_use_tf32()))
    optimised.predict(torch.rand(3, 64, 96))
    assert seen == [True]
