"""Saving, loading and converting models, and the errors for what cannot be loaded."""

from __future__ import annotations

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
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile, _folder, read_tensors
from focaldet.pretrained._loading import convert
from focaldet.pretrained.families import _torchvision
from tests.helpers.checkpoint_files import Bomb, write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(scope="module")
def v1_tensors() -> dict[str, Tensor]:
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    tensors: dict[str, Tensor] = model.state_dict()  # FrozenBatchNorm2d has no batch counters
    return {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


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
def test_saving_and_loading_gives_a_bitwise_identical_model(
    tiny_model: RetinaNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_safetensors: bool
) -> None:
    if with_safetensors:
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setattr(_folder, "_safetensors_installed", lambda: False)
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


def test_saving_replaces_a_model_and_a_failure_leaves_it_unchanged(
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
    """Return the key that torchvision used before its convolutions became blocks."""
    parts = key.split(".")
    if "inner_blocks" in parts or "layer_blocks" in parts:
        del parts[-2]
    elif "conv" in parts and parts[0] == "head":
        parts[-3:-1] = [str(2 * int(parts[-3]))]
    return ".".join(parts)


def test_both_spellings_of_torchvisions_keys_are_supported(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    old = {old_spelling(key): value for key, value in v1_tensors.items()}
    assert "head.classification_head.conv.6.weight" in old
    assert "backbone.fpn.inner_blocks.2.weight" in old
    assert_equal_models(
        RetinaNet.from_pretrained(saved(old, tmp_path / "old.pth")),
        RetinaNet.from_pretrained(saved({"model": v1_tensors}, tmp_path / "new.pth")),
    )


def test_with_a_91_class_config_all_channels_are_kept(
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
    checkpoint = convert(CheckpointFile(peer.state_dict()), _torchvision)
    assert checkpoint.config.backbone == name
    assert checkpoint.config.num_classes == 4
    assert checkpoint.config.backbone_norm == "frozen"


def assert_refused(tensors: Any, path: Path, message: str, **options: Any) -> None:
    """Require an error with the message when a file with these tensors is loaded."""
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(saved(tensors, path), **options)


def test_the_error_for_a_different_architecture_names_keys_and_the_likely_cause(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path, v1 = tmp_path / "v1.pth", RetinaNetConfig.torchvision_v1()
    cut = {k: v for k, v in v1_tensors.items() if "p6" not in k}
    assert_refused(cut, path, r"v1\.pth'.*2 keys are missing \(fpn\.p6\.bias, fpn\.p6\.weight\)")
    extra = {**v1_tensors, "mask_head.weight": torch.zeros(1)}
    assert_refused(extra, path, r"1 key is unexpected \(mask_head\.weight\)")
    saved(v1_tensors, path)
    for change, cause in (
        ({"num_classes": 7}, "num_classes"),
        ({"p6_from": "c5"}, "p6_from"),
        ({"backbone": "resnet18"}, "backbone"),
        ({"backbone_norm": "batch"}, "backbone_norm"),
        ({"head_norm": "group"}, "head_norm or head_depth"),
        ({"head_depth": 5}, "head_norm or head_depth"),
        ({"normalizer": "ema"}, "normalizer"),
    ):
        message = rf"v1\.pth'.*do not fit.*Likely cause: .* a different {cause}\."
        with pytest.raises(CheckpointError, match=message):
            RetinaNet.from_pretrained(path, config=v1.replace(**change))
    message = r"v1\.pth'.*9 anchors per cell instead of 3 .*octave_scales= and aspect_ratios="
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(path, config=v1.replace(aspect_ratios=(1.0,)))


def test_the_error_for_other_files_says_what_they_contain_and_which_formats_were_tried(
    tmp_path: Path,
) -> None:
    tensors = {"model.diffusion.weight": torch.zeros(2)}
    assert_refused(
        tensors,
        tmp_path / "x.pth",
        r"x\.pth.*1 tensor: 'model.diff.*no key of focaldet, torchvision",
    )
    assert_refused([1, 2], tmp_path / "x.pth", r"x\.pth.*no state dict.*type list")
    assert_refused({}, tmp_path / "x.pth", "no state dict.*an empty dict")
    assert_refused(
        {"epoch": 3}, tmp_path / "x.pth", "no state dict.*a dict with the keys 'epoch'.*torch.save"
    )


def test_other_anchors_and_backbones_in_torchvision_files_are_errors(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    key = "head.regression_head.bbox_reg.weight"
    assert_refused(
        {**v1_tensors, key: torch.zeros(28, 256, 3, 3)},
        tmp_path / "x.pth",
        "has 7 anchors per cell.* 9.*octave_scales=.*config=",
    )
    cut = {k: v for k, v in v1_tensors.items() if not k.startswith("backbone.body.layer4.2")}
    assert_refused(cut, tmp_path / "x.pth", r"torchvision.*ResNet.*3, 4, 6, 2 blocks")


@pytest.mark.parametrize("file_format", ["torch", "torch old", "pickle as .pth"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, file_format: str) -> None:
    trace = tmp_path / "trace"
    contents = {"model": {"weight": torch.zeros(2)}, "extra": Bomb(trace)}
    path = write_checkpoint(contents, tmp_path / "bomb.pth", file_format)
    with pytest.raises(CheckpointError, match=r"bomb\.pth"):
        RetinaNet.from_pretrained(path)
    (tmp_path / "config.json").write_text(RetinaNetConfig.paper().to_json())
    path.rename(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        RetinaNet.from_pretrained(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_error_for_a_damaged_file_names_it(
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
    with pytest.raises(CheckpointError, match=rf"Cannot read .*weights\{suffix}"):
        RetinaNet.from_pretrained(path)


def test_the_error_for_a_missing_file_or_folder_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or folder: .*nowhere.*source"):
        RetinaNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No config\.json in .*save_pretrained"):
        RetinaNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(RetinaNetConfig.paper().to_json())
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors or model\.pth in "):
        RetinaNet.from_pretrained(tmp_path)


def test_the_error_for_the_folder_of_a_run_names_its_models(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    for name in ("best", "last"):
        tiny_model.save_pretrained(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"No config\.json .*'best', 'last'"):
        RetinaNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(tiny_model.config.to_json())
    with pytest.raises(FileNotFoundError, match=r"No model\.safetensors .*'best', 'last'"):
        RetinaNet.from_pretrained(tmp_path)


def test_the_folder_of_a_run_gives_its_best_model_or_else_its_last(
    tiny_model: RetinaNet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text(tiny_model.config.to_json())
    with pytest.raises(FileNotFoundError, match=r"no model in 'best' or 'last' yet"):
        RetinaNet.from_pretrained(tmp_path)
    for name, threshold in (("last", 0.25), ("best", 0.75)):
        tiny_model.postprocess.score_threshold = threshold
        tiny_model.save_pretrained(tmp_path / name)
        caplog.clear()
        with caplog.at_level("INFO", "focaldet"):
            loaded = RetinaNet.from_pretrained(tmp_path)
        assert loaded.config.score_threshold == threshold
        assert caplog.messages == [f"Loading the {name} model of the run {str(tmp_path)!r}."]


def test_a_model_saved_into_the_folder_of_a_run_comes_before_those_of_the_run(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    tiny_model.save_pretrained(tmp_path / "best")
    tiny_model.postprocess.score_threshold = 0.75
    tiny_model.save_pretrained(tmp_path)
    assert RetinaNet.from_pretrained(tmp_path).config.score_threshold == 0.75


def test_safetensors_without_the_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"model\.safetensors.* pip install 'safetensors'"):
        RetinaNet.from_pretrained(path)


def test_tensors_alone_can_be_read(v1_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = read_tensors(str(saved({"model": v1_tensors, "epoch": 3}, tmp_path / "v1.pth")))
    assert tensors.keys() == v1_tensors.keys()
    with pytest.raises(FileNotFoundError, match=r"No such file: 'nowhere\.pth' \(path\)"):
        read_tensors("nowhere.pth")


def test_a_tensor_that_conversion_needs_is_named_if_it_is_missing(
    v1_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    cut = {k: v for k, v in v1_tensors.items() if "p7.weight" not in k}
    message = r"x\.pth': .*RetinaNet of torchvision.* no tensor for focaldet's 'fpn\.p7\.weight'"
    assert_refused(cut, tmp_path / "x.pth", message)


def test_tensors_with_too_few_dimensions_are_an_error(tmp_path: Path) -> None:
    keys = ["backbone.conv1.weight", "neck.lateral_convs.0.conv.weight"]
    keys += ["bbox_head.retina_cls.weight", "bbox_head.retina_reg.weight"]
    tensors = {key: torch.tensor(0.0) for key in keys}
    message = r"x\.pth': .*RetinaNet of MMDetection.* not its shapes"
    assert_refused(tensors, tmp_path / "x.pth", message)
