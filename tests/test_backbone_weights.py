"""Backbone weights by name and by file: where they come from, and what is said if they can't be had."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import BACKBONES, build_backbone, imagenet_weights
from focaldet.backbones import _imagenet as source_module
from focaldet.errors import CheckpointError, DownloadError
from focaldet.pretrained import _downloads

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.backbones import ImageNetWeights


def config(**changes: Any) -> RetinaNetConfig:
    options: dict[str, Any] = {"num_classes": 2, "backbone": "mobilenet_v2", "fpn_channels": 16}
    return RetinaNetConfig(**(options | changes))


def without_hash(weights: ImageNetWeights, monkeypatch: pytest.MonkeyPatch) -> ImageNetWeights:
    """Make the published weights ones whose file may have any content."""
    changed = source_module.ImageNetWeights(**(vars(weights) | {"sha256_prefix": None}))
    monkeypatch.setattr("focaldet._assembly.imagenet_weights", lambda _name: changed)
    return changed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(_downloads, "urlopen", fail)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setenv("FOCALDET_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def random_weights(name: str = "mobilenet_v2") -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return build_backbone(name).state_dict()


def test_imagenet_weights_come_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights()
    published = without_hash(imagenet_weights("mobilenet_v2"), monkeypatch)
    torch.save(weights, cache / published.file_name)
    model = RetinaNet.from_config(config(trainable_stages=2), backbone_weights="imagenet")
    assert_close(dict(model.backbone.state_dict()), dict(weights))
    assert model.config.trainable_stages == 2


def test_a_cached_file_with_a_different_hash_is_an_error(cache: Path) -> None:
    torch.save(random_weights(), cache / "mobilenet_v2-b0353104.pth")
    with pytest.raises(DownloadError, match=r"is not torchvision's MobileNet_V2_Weights.*SHA-256"):
        RetinaNet.from_config(config(), backbone_weights="imagenet")


def test_without_a_network_the_error_says_where_to_put_the_file(cache: Path) -> None:
    message = (
        r"Could not download mobilenet_v2-b0353104\.pth: .*To use it without a network, download "
        r"https://download\.pytorch\.org/models/mobilenet_v2-b0353104\.pth \(about 14 MB\) and save it as "
        rf"'{cache}/mobilenet_v2-b0353104\.pth'"
    )
    with pytest.raises(DownloadError, match=message):
        RetinaNet.from_config(config(), backbone_weights="imagenet")


def test_a_file_of_weights_is_read(tmp_path: Path) -> None:
    weights = random_weights()
    torch.save({"state_dict": weights}, tmp_path / "imagenet")
    for path in (tmp_path / "imagenet", str(tmp_path / "imagenet")):
        model = RetinaNet.from_config(config(), backbone_weights=path)
        assert_close(dict(model.backbone.state_dict()), dict(weights))


def test_a_path_named_imagenet_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path as AnyPath

    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such file: 'imagenet'"):
        RetinaNet.from_config(config(), backbone_weights=AnyPath("imagenet"))


def test_files_of_weights_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file: 'none.pth'"):
        RetinaNet.from_config(config(), backbone_weights="none.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\3\4 damaged")
    with pytest.raises(CheckpointError, match=r"damaged\.pth"):
        RetinaNet.from_config(config(), backbone_weights=tmp_path / "damaged.pth")
    torch.save(random_weights(), tmp_path / "mobilenet.pth")
    with pytest.raises(
        ValueError, match=r"^backbone_weights do not fit a torchvision mobilenet_v3_large"
    ):
        RetinaNet.from_config(
            config(backbone="mobilenet_v3_large"), backbone_weights=tmp_path / "mobilenet.pth"
        )


def test_every_published_backbone_has_a_hash_and_a_size() -> None:
    without = {name for name, spec in BACKBONES.items() if spec.weights is None}
    assert without == {"resnext101_32x4d"}
    for name in BACKBONES.keys() - without:
        published = imagenet_weights(name)
        assert published.sha256_prefix is not None, name
        assert published.url.endswith(f"-{published.sha256_prefix}.pth"), name
        assert published.megabytes is not None, name
        assert published.image_mean == RetinaNetConfig(num_classes=1).image_mean


def test_backbones_without_published_weights_are_errors() -> None:
    with pytest.raises(ValueError, match="torchvision does not publish weights for it"):
        RetinaNet.from_config(config(backbone="resnext101_32x4d"), backbone_weights="imagenet")
    with pytest.raises(ValueError, match="Unknown backbone 'resnet5O'; did you mean 'resnet50'"):
        RetinaNet.from_config(config(backbone="resnet5O"), backbone_weights="imagenet")


def test_imagenet_weights_do_not_fit_strides_in_the_1x1_convolutions() -> None:
    strided = config(backbone="resnet50", stride_in_1x1=True)
    with pytest.raises(ValueError, match=r"'imagenet' does not fit config.stride_in_1x1=True"):
        RetinaNet.from_config(strided, backbone_weights="imagenet")


def test_a_different_normalisation_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    published = without_hash(imagenet_weights("mobilenet_v2"), monkeypatch)
    torch.save(random_weights(), cache / published.file_name)
    with caplog.at_level(logging.WARNING, "focaldet"):
        RetinaNet.from_config(config(image_std=(0.5, 0.5, 0.5)), backbone_weights="imagenet")
    [message] = caplog.messages
    assert "was trained with image_std=(0.229, 0.224, 0.225), but the config has (0.5" in message


def test_timms_weights_come_from_the_hub(cache: Path) -> None:
    timm = pytest.importorskip("timm")
    published = imagenet_weights("timm/resnet18")
    assert (
        published.url
        == "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors"
    )
    torch.manual_seed(7)
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    save = pytest.importorskip("safetensors.torch").save_file
    save(weights, cache / published.file_name)
    model = RetinaNet.from_config(config(backbone="timm/resnet18"), backbone_weights="imagenet")
    assert_close(model.backbone.body.conv1.weight, weights["conv1.weight"])  # type: ignore[union-attr]


def test_a_tag_chooses_among_timms_weights() -> None:
    pytest.importorskip("timm")
    published = imagenet_weights("timm/convnext_tiny.fb_in22k")
    assert published.url.startswith("https://huggingface.co/timm/convnext_tiny.fb_in22k/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("darknet21", "timm does not publish weights for it"),
        ("resnet5O", "is not possible for 'timm/resnet5O'"),
        ("convnext_tiny.none", "is not possible for 'timm/convnext_tiny.none'"),
    ],
)
def test_timm_networks_without_weights_are_errors(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        imagenet_weights(f"timm/{name}")
