"""PaddleDetection's files: parity with a reimplementation, recognition, and damaged ones."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile, check_fit, load_checkpoint, read_tensors
from focaldet.pretrained._loading import convert
from focaldet.pretrained.families import _paddledetection
from tests.helpers import reference_models as plain
from tests.helpers import reference_paddle
from tests.helpers.checkpoint_files import Bomb
from tests.helpers.parity import check_image, load_like
from tests.helpers.reference_models import smooth_image

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Any:
    made = reference_paddle.make_reference(50)
    path = tmp_path_factory.mktemp("paddle") / "retinanet_r50_fpn_1x_coco.pdparams"
    return load_like(reference_paddle.write_file(made, path), made), made


@pytest.mark.parametrize("size", [(160, 192), (161, 243), (119, 121), (333, 400)])
def test_detections_are_the_same_for_even_and_odd_sizes(pair: Any, size: tuple[int, int]) -> None:
    model, reference = pair
    assert check_image(model, reference, smooth_image(*size), other_pixels=0) >= 50


@pytest.mark.parametrize("limits", [(40, 1000), (1000, 3), (100, 5)])
def test_detections_are_the_same_where_limits_bind(
    pair: Any, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]
) -> None:
    model, reference = pair
    image = smooth_image(160, 192)
    limited = reference_paddle.Paddle(reference.state, 50, limits)
    monkeypatch.setattr(model.postprocess, "pre_nms_top_k", limits[0])
    monkeypatch.setattr(model.postprocess, "pre_nms_top_k_per_class", limits[1])
    assert 5 <= check_image(model, limited, image, other_pixels=0) < 100


def file_of(depth: int, **sizes: int) -> CheckpointFile:
    """Return the contents of a file, on the meta device."""
    shapes = plain.layout(reference_paddle.NAMES, plain.Body(depth), **sizes)
    channels = sizes.get("channels", 32)
    shapes["neck.fpn_6.weight"] = (channels, channels, 3, 3)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return CheckpointFile(reference_paddle.file_keys(state, depth), name="x.pdparams")


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_every_published_architecture_is_recognised_and_fits(depth: int, norm: Any) -> None:
    file = file_of(depth, channels=256)
    suggested = _paddledetection.suggest(file)
    config = suggested.config
    assert (config.backbone, config.class_names) == (f"resnet{depth}", COCO_CLASS_NAMES)
    assert (config.p6_from, config.clip_to, config.pre_nms_top_k_of) == ("p5", None, "anchors")
    assert {"min_size", "anchor_sizes"} <= {*suggested.assumed}
    assert RetinaNetConfig.from_json(config.to_json()) == config
    config = config.replace(backbone_norm=norm)
    with torch.device("meta"):
        model = RetinaNet.from_config(config)
    check_fit(model.state_dict(), convert(file, _paddledetection, config).tensors)


def test_long_stages_are_named_by_numbers() -> None:
    keys = {key.split(".")[2] for key in file_of(101).tensors if key.startswith("backbone.res4")}
    assert {"res4a", "res4b1", "res4b22"} <= keys  # what the test above has tried
    assert len(keys) == 23


def test_unknown_and_doubled_tensors_are_errors() -> None:
    file = file_of(50)
    with pytest.raises(
        CheckpointError, match="unknown tensor .*PaddleDetection: 'head.mask.weight'"
    ):
        _paddledetection.suggest(
            CheckpointFile({**file.tensors, "head.mask.weight": torch.zeros(1)})
        )
    key = "backbone.res2.res2b.branch2a.conv.weight"
    twice = {**file.tensors, key.replace("res2b", "res2b1"): file.tensors[key]}
    with pytest.raises(CheckpointError, match=r"Two tensors .* 'backbone\.res2\.1\.branch2a"):
        _paddledetection.suggest(CheckpointFile(twice))


def test_the_error_for_other_anchors_gives_the_channels() -> None:
    tensors = {**file_of(50).tensors, "head.retina_reg.weight": torch.zeros(12, 32, 3, 3)}
    with pytest.raises(CheckpointError, match="PaddleDetection .* 9 anchors per cell"):
        _paddledetection.suggest(CheckpointFile(tensors))


@pytest.mark.parametrize("how", ["call", "eval", "open"])
def test_code_in_a_file_does_not_run(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.pdparams"
    contents = {
        "w": np.ones(3, np.float32),
        "StructuredToParameterName@@": Bomb(tmp_path / "t", how),
    }
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match="a .pdparams file may only contain NumPy arrays"):
        read_tensors(path)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pdparams"
    contents = {"w": np.ones(3, np.float32), "StructuredToParameterName@@": {"w": "linear_0.w_0"}}
    path.write_bytes(pickle.dumps(contents, protocol))
    assert read_tensors(path).keys() == {"w"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_errors(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.pdparams"
    data = pickle.dumps({"w": np.ones(300, np.float32)})
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="Cannot read '.*x.pdparams'"):
        load_checkpoint(path)
