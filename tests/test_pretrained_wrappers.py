"""State dicts in containers and under prefixes, files with several sets of weights, and other tensors."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchvision.models import detection
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import FAMILIES, check_fit, load_checkpoint, read_tensors
from focaldet.pretrained._loading import convert
from focaldet.pretrained._recognition import recognise
from focaldet.pretrained._state_dict import find_weight_sets
from tests.helpers import (
    reference_detectron,
    reference_detectron2,
    reference_mmdet,
    reference_odtk,
    reference_paddle,
    reference_yhenon,
)
from tests.helpers import reference_models as plain
from tests.helpers.checkpoint_files import (
    FILE_FORMATS,
    WRAPPERS,
    Bomb,
    prefixed,
    thin,
    write_checkpoint,
)
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from focaldet.pretrained import Checkpoint

STATES = [
    *("focaldet", "torchvision", "Detectron2", "MMDetection", "ODTK", "yhenon", "Detectron"),
    "PaddleDetection",
]  # keras-retinanet's files are HDF5, which has no wrappers


@functools.cache
def state_of(family: str) -> dict[str, Tensor]:
    """Return a small state dict with the key names of a family."""
    if family == "focaldet":
        state: dict[str, Any] = RetinaNet.from_config(
            TINY_CONFIG, backbone=TinyBackbone()
        ).state_dict()
        return state
    if family == "torchvision":
        with torch.device("meta"):
            backbone = detection.backbone_utils.resnet_fpn_backbone(
                backbone_name="resnet18",
                weights=None,
                returned_layers=[2, 3, 4],
                extra_blocks=LastLevelP6P7(256, 256),
            )
            peer = detection.RetinaNet(backbone, num_classes=3)
        return thin({key: value.shape for key, value in peer.state_dict().items()})
    if family == "Detectron":
        shapes = plain.layout(reference_detectron.NAMES, plain.Body(50), classes=3, channels=8)
        return reference_detectron.blobs_of(thin(shapes))
    if family == "PaddleDetection":
        shapes = plain.layout(reference_paddle.NAMES, plain.Body(50), classes=3, channels=8)
        shapes[f"{reference_paddle.NAMES.p6}.weight"] = (8, 8, 3, 3)
        return reference_paddle.file_keys(thin(shapes), 50)
    names, depth = {
        "Detectron2": (reference_detectron2.NAMES, 50),
        "MMDetection": (reference_mmdet.NAMES, 18),
        "ODTK": (reference_odtk.names_of("AnyFPN"), 18),
        "yhenon": (reference_yhenon.NAMES, 18),
    }[family]
    return thin(plain.layout(names, plain.Body(depth), classes=3, channels=8))


def options_of(family: str) -> dict[str, Any]:
    return {"config": TINY_CONFIG} if family == "focaldet" else {}


def saved(contents: Any, path: Path) -> Path:
    torch.save(contents, path)
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_every_family_is_tested_here() -> None:
    for family in STATES:
        assert sum(not one.missing(state_of(family)) for one in FAMILIES) == 1


def converted(contents: Any, family: str, tmp_path: Path) -> Checkpoint:
    """Return what is loaded from the contents of a file, without writing them."""
    path = tmp_path / "x.pth"
    path.touch()
    file, found = recognise(find_weight_sets(contents), path, None, {})
    assert found.NAME.startswith(family)
    return convert(file, found, options_of(family).get("config"))


@pytest.mark.parametrize("family", STATES)
def test_every_family_is_found_in_every_wrapper(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(family)
    bare = converted(state, family, tmp_path)
    for wrapper, wrap in WRAPPERS.items():
        wrapped = converted(wrap(state), family, tmp_path)
        assert_same(wrapped.tensors, bare.tensors)
        assert wrapped.config == bare.config, wrapper
    assert not caplog.messages


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_file_of_every_wrapper_is_loaded(wrapper: str, tmp_path: Path) -> None:
    state = state_of("focaldet")
    path = saved(WRAPPERS[wrapper](state), tmp_path / "wrapped.pth")
    model = RetinaNet.from_pretrained(path, config=TINY_CONFIG, backbone=TinyBackbone())
    assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize("family", STATES)
def test_a_tensor_less_or_more_is_an_error_in_every_wrapper(family: str, tmp_path: Path) -> None:
    state = state_of(family)
    needed = next(key for key, value in reversed(state.items()) if value.ndim > 1)
    less = {key: value for key, value in state.items() if key != needed}
    more = {**state, "mask_head.weight": torch.ones(2)}
    wanted = {
        key: torch.empty(value.shape, device="meta")
        for key, value in converted(state, family, tmp_path).tensors.items()
    }
    for wrap in WRAPPERS.values():
        with pytest.raises(
            (CheckpointError, KeyError)
        ):  # a KeyError becomes one in load_checkpoint
            check_fit(wanted, converted(wrap(less), family, tmp_path).tensors)
        with pytest.raises(CheckpointError, match="mask_head"):
            check_fit(wanted, converted(wrap(more), family, tmp_path).tensors)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_no_wrapper_lets_a_file_run_code(wrapper: str, file_format: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for number, contents in enumerate(
        (
            WRAPPERS[wrapper]({**state_of("focaldet"), "bomb": Bomb(trace)}),
            {"inside": WRAPPERS[wrapper](state_of("focaldet")), "args": Bomb(trace, "eval")},
        )
    ):
        path = write_checkpoint(contents, tmp_path / f"{number}.pth", file_format)
        with pytest.raises(CheckpointError, match=path.name):
            RetinaNet.from_pretrained(path)
        assert not trace.exists()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_error_for_a_truncated_wrapped_file_names_it(wrapper: str, tmp_path: Path) -> None:
    data = saved(WRAPPERS[wrapper](state_of("focaldet")), tmp_path / "cut.pth").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.pth").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match=r"Cannot read .*cut\.pth"):
            RetinaNet.from_pretrained(tmp_path / "cut.pth")


# --- Several sets of weights ---------------------------------------------------------------------


def shifted(state: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {key: value + by if value.is_floating_point() else value for key, value in state.items()}


SEVERAL: dict[str, tuple[Any, str, str]] = {
    "model and its average": (
        lambda a, b: {"model": a, "model_ema": prefixed("module.", b)},
        "model",
        "model_ema.module",
    ),
    "MMEngine": (
        lambda a, b: {"state_dict": a, "ema_state_dict": prefixed("module.", b)},
        "state_dict",
        "ema_state_dict.module",
    ),
    "a run of focaldet": (
        lambda a, b: {
            "state_dict": prefixed("model.", a),
            "current_model_state": prefixed("model.", b),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "state_dict.model",
        "current_model_state.model",
    ),
    "student and teacher": (
        lambda a, b: {"weights": {**prefixed("student.", a), **prefixed("teacher.", b)}},
        "weights.student",
        "weights.teacher",
    ),
    "in a container": (
        lambda a, b: {"checkpoint": {"network": a, "swa": b}},
        "checkpoint.network",
        "checkpoint.swa",
    ),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_sets_of_weights_the_model_itself_is_loaded_and_the_log_says_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, taken, other = SEVERAL[kind]
    state = state_of("focaldet")
    path = saved(build(state, shifted(state, 1.0)), tmp_path / "both.ckpt")
    assert_same(load_checkpoint(path, TINY_CONFIG).tensors, state)
    [message] = [one for one in caplog.messages if "several sets" in one]
    assert f"Loading {taken}; choose another with weights=: {other}." in message
    assert ("MMEngine saves the average" in message) == (kind == "MMEngine")


@pytest.mark.parametrize("kind", SEVERAL)
def test_weights_chooses_by_the_name_or_a_part_of_it(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, taken, other = SEVERAL[kind]
    state = state_of("focaldet")
    average = shifted(state, 1.0)
    path = saved(build(state, average), tmp_path / "both.ckpt")
    for name in (other, other.rpartition(".")[0] or other, other[:-1]):
        if name not in taken:
            assert_same(load_checkpoint(path, TINY_CONFIG, weights=name).tensors, average)
    assert_same(load_checkpoint(path, TINY_CONFIG, weights=taken).tensors, state)
    swapped = [one for one in caplog.messages if "MMEngine saves the average as state_dict" in one]
    assert caplog.messages == swapped
    assert bool(swapped) == (kind == "MMEngine")
    with pytest.raises(CheckpointError, match=rf"both\.ckpt'\. weights='x' is none .*{other}"):
        load_checkpoint(path, TINY_CONFIG, weights="x")


def test_the_error_for_weights_that_cannot_be_decided_lists_them(tmp_path: Path) -> None:
    state = state_of("focaldet")
    path = saved({"first": state, "second": state}, tmp_path / "two.pth")
    message = (
        r"two\.pth'\. It contains several sets of weights: 'first', 'second'\. .*weights='first'"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, TINY_CONFIG)
    with pytest.raises(CheckpointError, match=r"weights='s' could be any of .*'first', 'second'"):
        load_checkpoint(path, TINY_CONFIG, weights="s")
    only = saved({"model": state}, tmp_path / "one.pth")
    with pytest.raises(CheckpointError, match=r"one\.pth'\. weights='ema' is none .*'model'"):
        load_checkpoint(only, TINY_CONFIG, weights="ema")


def test_read_tensors_chooses_in_the_same_way(tmp_path: Path) -> None:
    a, b = {"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.zeros(2), "v": torch.ones(1)}
    path = saved({"model": a, "ema": b, "other": {"x": torch.ones(1)}}, tmp_path / "x.pth")
    assert read_tensors(path)["w"].tolist() == [1, 1]
    assert read_tensors(path, weights="ema")["w"].tolist() == [0, 0]
    path = saved({"first": a, "second": b}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"Cannot read .*x\.pth'\. .*'first', 'second'"):
        read_tensors(path)


# --- Tensors that are not the detector's -----------------------------------------------------------


def test_tensors_next_to_the_detector_are_an_error_unless_it_was_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of("yhenon")
    more = {f"criterion.{i}": torch.ones(2) for i in range(4)}
    path = saved({"state_dict": {**prefixed("net.", state), **more}}, tmp_path / "x.ckpt")
    message = (
        r"x\.ckpt': the RetinaNet of yhenon.* under 'net\.' has 4 tensors \('criterion\.0', "
        r"'criterion\.1', 'criterion\.2', …\) next to it.* weights='state_dict\.net'"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    found = load_checkpoint(path, weights="state_dict.net")
    assert_same(found.tensors, load_checkpoint(saved(state, tmp_path / "y.pth")).tensors)
    assert "Left out what is not under 'state_dict.net' in x.ckpt: 4 tensors" in caplog.text


def test_a_value_in_place_of_a_tensor_is_an_error(tmp_path: Path) -> None:
    state = {**state_of("yhenon"), "fpn.P9.weight": None}
    for contents in (state, {"model": prefixed("module.", state)}):
        path = saved(contents, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"x\.pth': '(module\.)?fpn\.P9\.weight' is None"):
            load_checkpoint(path)


def test_the_error_for_an_unknown_file_names_the_nearest_family_and_what_it_lacks(
    tmp_path: Path,
) -> None:
    state = state_of("MMDetection")
    cut = {key: value for key, value in state.items() if "retina_" not in key}
    path = saved({"state_dict": prefixed("model.", cut)}, tmp_path / "x.pth")
    message = (
        r"x\.pth' \(\d+ tensors: .*\) is not a RetinaNet in a supported format\. The most similar "
        r"format is MMDetection, but 2 keys \('bbox_head\.retina_cls\.weight', 'bbox_head\.retina_reg\.weight'\) under "
        r"'model\.' are missing\. Also tried: .*torchvision.*\."
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
    path = saved({"diffusion.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"It has no key of focaldet, torchvision.* or "):
        load_checkpoint(path)


def test_a_file_with_very_many_containers_and_parts_is_read_in_moments(tmp_path: Path) -> None:
    one = torch.ones(1)
    wide = {f"c{i}": dict.fromkeys("abcd", one) for i in range(1000)}
    long = {f"{'a.' * 60}{i}": one for i in range(1000)}
    path = saved({"wide": wide, "long": long}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth' \(5000 tensors"):
        load_checkpoint(path)


def test_the_only_set_of_weights_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved({"state_dict": prefixed("model.", state_of("focaldet"))}, tmp_path / "x.ckpt")
    with caplog.at_level(logging.INFO, "focaldet"):
        load_checkpoint(path, TINY_CONFIG)
    assert "Loading the weights state_dict.model of x.ckpt." in caplog.messages
