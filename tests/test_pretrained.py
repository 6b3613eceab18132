from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchvision.models import detection
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.class_names import COCO_CATEGORY_IDS, COCO_CLASS_NAMES
from focaldet.pretrained import CheckpointFile, _directory
from focaldet.pretrained.families import _torchvision

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(scope="module")
def v1_tensors() -> dict[str, Tensor]:
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    frozen: dict[str, Tensor] = model.state_dict()  # as FrozenBatchNorm2d has it: no counters
    return {k: v for k, v in frozen.items() if not k.endswith("num_batches_tracked")}


def saved(tensors: Any, path: Path) -> Path:
    torch.save(tensors, path)
    return path


def assert_equal_models(a: RetinaNet, b: RetinaNet) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    assert a.config == b.config


@pytest.mark.parametrize("with_safetensors", [True, False])
def test_saving_and_loading_gives_the_same_model_bit_for_bit(
    tiny_model: RetinaNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_safetensors: bool
) -> None:
    if with_safetensors:
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setattr(_directory, "_safetensors_installed", lambda: False)
    folder = tmp_path / "deep" / "model"
    tiny_model.save_pretrained(folder)
    tensors = "model.safetensors" if with_safetensors else "model.pth"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", tensors]
    loaded = RetinaNet.from_pretrained(folder)
    assert not loaded.training
    assert_equal_models(loaded, tiny_model)
    image = torch.rand(3, 64, 64)
    assert torch.equal(loaded.predict(image)[0].boxes, tiny_model.predict(image)[0].boxes)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_options_survive_a_round_trip(
    tiny_config: RetinaNetConfig, tmp_path: Path, backbone: str, norm: Any
) -> None:
    config = tiny_config.replace(
        backbone=backbone,
        backbone_norm=norm,
        backbone_norm_eps=1e-4,
        head_norm="group",
        p6_from="p5",
        normalizer="ema",
        octave_scales=(1.0, 1.5),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frozen norms without weights
        model = RetinaNet.from_config(config)
    model.save_pretrained(tmp_path)
    assert_equal_models(RetinaNet.from_pretrained(tmp_path), model)


def test_saving_over_a_model_replaces_it_and_a_failure_leaves_it(
    tiny_model: RetinaNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "model.pth").write_bytes(b"stale")
    tiny_model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.pth").exists()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with torch.no_grad():
        tiny_model.head.class_logits.weight.fill_(7)
    with pytest.raises(OSError, match="No space left"):
        tiny_model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_torchvision_file_gives_the_80_classes_of_coco(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    model = RetinaNet.from_pretrained(saved(v1_tensors, tmp_path / "v1.pth"))
    assert model.config.class_names == COCO_CLASS_NAMES
    assert (COCO_CLASS_NAMES[0], COCO_CLASS_NAMES[79]) == ("person", "toothbrush")
    assert model.config == RetinaNetConfig.torchvision_v1(80, COCO_CLASS_NAMES).replace(
        backbone_norm_eps=0.0
    )
    theirs = v1_tensors["head.classification_head.cls_logits.weight"].view(9, 91, 256, 3, 3)
    ours = model.head.class_logits.weight.view(9, 80, 256, 3, 3)
    for label, category in ((0, 1), (11, 13), (79, 90)):
        assert COCO_CATEGORY_IDS[label] == category
        assert torch.equal(ours[:, label], theirs[:, category])


def old_spelling(key: str) -> str:
    """Return the key as torchvision wrote it before its convolutions became blocks."""
    parts = key.split(".")
    if "inner_blocks" in parts or "layer_blocks" in parts:
        del parts[-2]
    elif "conv" in parts and parts[0] == "head":
        parts[-3:-1] = [str(2 * int(parts[-3]))]
    return ".".join(parts)


def test_both_spellings_of_torchvisions_keys_are_known(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    old = {old_spelling(key): value for key, value in v1_tensors.items()}
    assert "head.classification_head.conv.6.weight" in old
    assert "backbone.fpn.inner_blocks.2.weight" in old
    assert_equal_models(
        RetinaNet.from_pretrained(saved(old, tmp_path / "old.pth")),
        RetinaNet.from_pretrained(saved({"model": v1_tensors}, tmp_path / "new.pth")),
    )


def test_a_config_of_ones_own_keeps_all_channels(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    config = RetinaNetConfig.torchvision_v1()
    model = RetinaNet.from_pretrained(saved(v1_tensors, tmp_path / "v1.pth"), config=config)
    assert model.config is config
    theirs = v1_tensors["head.classification_head.cls_logits.weight"]
    assert torch.equal(model.head.class_logits.weight, theirs)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet34", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_64x4d"],
)
def test_torchvisions_other_resnets_are_recognised(name: str) -> None:
    with torch.device("meta"):
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name=name,
            weights=None,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
            trainable_layers=5,
        )
        generator = detection.retinanet._default_anchorgen()
        peer = detection.RetinaNet(backbone, num_classes=4, anchor_generator=generator)
    checkpoint = _torchvision.convert(CheckpointFile(peer.state_dict()))
    assert checkpoint.config.backbone == name
    assert checkpoint.config.num_classes == 4
    assert checkpoint.config.backbone_norm == "frozen"


def fails(tensors: Any, path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNet.from_pretrained(saved(tensors, path), **options)


def test_tensors_of_another_architecture_are_an_error_with_the_likely_cause(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path, v1 = tmp_path / "v1.pth", RetinaNetConfig.torchvision_v1()
    cut = {k: v for k, v in v1_tensors.items() if "p6" not in k}
    fails(cut, path, r"keys 2 missing \(fpn.p6.bias, fpn.p6.weight\)")
    extra = {**v1_tensors, "mask_head.weight": torch.zeros(1)}
    fails(extra, path, r"keys 1 unexpected \(mask_head.weight\)")
    for change, cause in (
        ({"num_classes": 7}, "num_classes"),
        ({"p6_from": "c5"}, "p6_from"),
        ({"backbone": "resnet18"}, "backbone"),
        ({"backbone_norm": "batch"}, "backbone_norm"),
        ({"head_norm": "group"}, "head_norm` or `head_depth"),
        ({"head_depth": 5}, "head_norm` or `head_depth"),
        ({"normalizer": "ema"}, "normalizer"),
        ({"aspect_ratios": (1.0,)}, "octave_scales` or `aspect_ratios"),
    ):
        message = f"those of this architecture.*Likely cause: another `{cause}`"
        fails(v1_tensors, path, message, config=v1.replace(**change))


def test_files_of_no_known_family_say_which_were_tried(tmp_path: Path) -> None:
    tensors = {"model.diffusion.weight": torch.zeros(2)}
    fails(tensors, tmp_path / "x.pth", r"known family; got .*x\.pth.*1 tensors.*Tried: torchvision")
    fails([1, 2], tmp_path / "x.pth", r"a file with a state dict; got .*holding a list")
    fails({"epoch": 3}, tmp_path / "x.pth", "a file with a state dict")


def test_torchvision_models_that_are_not_its_own_retinanet_are_named(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    key = "head.regression_head.bbox_reg.weight"
    fails({**v1_tensors, key: torch.zeros(12, 256, 3, 3)}, tmp_path / "x.pth", "9 anchors.*got 3")
    cut = {k: v for k, v in v1_tensors.items() if not k.startswith("backbone.body.layer4.2")}
    fails(cut, tmp_path / "x.pth", r"a ResNet of torchvision; got stages of \(3, 4, 6, 2\) blocks")


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "ran")


@pytest.mark.parametrize("route", ["torch.save", "old torch.save", "pickle"])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, route: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "bomb.pth"
    content = {"model": {"weight": torch.zeros(2)}, "extra": Bomb(trace)}
    if route == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=route == "torch.save")
    with pytest.raises(ValueError, match=r"`source` must be a (file of plain tensors|readable)"):
        RetinaNet.from_pretrained(path)
    (tmp_path / "config.json").write_text(RetinaNetConfig.paper().to_json())
    path.rename(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"`source` must be a (file of plain tensors|readable)"):
        RetinaNet.from_pretrained(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_named(
    v1_tensors: dict[str, Tensor], tmp_path: Path, kind: str, suffix: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(dict(list(v1_tensors.items())[:3]), path)
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(dict(list(v1_tensors.items())[:3]), path)
    content = {"cut": path.read_bytes()[:-200], "text": b"<html>404</html>", "empty": b""}[kind]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"`source` must be a readable checkpoint.*weights\{suffix}"
    ):
        RetinaNet.from_pretrained(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`source` must be.*nowhere.*does not exist"):
        RetinaNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"written by save_pretrained.*without config\.json"
    ):
        RetinaNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(RetinaNetConfig.paper().to_json())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors or model\.pth"):
        RetinaNet.from_pretrained(tmp_path)


def test_of_the_folder_of_a_run_the_models_are_named(tiny_model: RetinaNet, tmp_path: Path) -> None:
    for name in ("best", "last"):
        tiny_model.save_pretrained(tmp_path / name)
    (tmp_path / "config.json").write_text(tiny_model.config.to_json())
    with pytest.raises(
        FileNotFoundError, match=r"with neither\. Models are in its 'best' and 'last'"
    ):
        RetinaNet.from_pretrained(tmp_path)


def test_safetensors_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        RetinaNet.from_pretrained(path)
