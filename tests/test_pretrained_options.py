"""Options of loading: fields of the config, class names, backgrounds, files of folders, and the log."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchvision.models import detection
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile, SuggestedConfig, _neighbours, load_checkpoint
from focaldet.pretrained._neighbours import texts_beside
from focaldet.pretrained.families import _yhenon
from tests.helpers import reference_models as plain
from tests.helpers import reference_yhenon
from tests.helpers.checkpoint_files import prefixed, thin
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def yhenon_state(classes: int = 3) -> dict[str, Tensor]:
    return thin(plain.layout(reference_yhenon.NAMES, plain.Body(18), classes=classes, channels=8))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint of a different project, with 3 classes that it does not name."""
    torch.save({"model": prefixed("module.", yhenon_state())}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


@pytest.fixture
def own() -> RetinaNet:
    return RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())


# --- Fields of the config ------------------------------------------------------------------------


def test_fields_replace_what_a_checkpoint_says(file: Path, own: RetinaNet, tmp_path: Path) -> None:
    suggested = load_checkpoint(file).config
    config = load_checkpoint(file, min_size=320, score_threshold=0.2).config
    assert config == suggested.replace(min_size=320, score_threshold=0.2)
    own.save_pretrained(tmp_path / "own")
    model = RetinaNet.from_pretrained(tmp_path / "own", backbone=TinyBackbone(), max_detections=7)
    assert model.config == own.config.replace(max_detections=7)
    assert model.postprocess.max_detections == 7


def test_fields_of_the_architecture_must_fit(file: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"theirs\.pth'.*Likely cause: .* different head_norm"
    ):
        RetinaNet.from_pretrained(file, head_depth=3)


def test_wrong_fields_are_errors(file: Path) -> None:
    with pytest.raises(TypeError, match=r"min_sise is neither .* Did you mean min_size"):
        load_checkpoint(file, min_sise=600)
    with pytest.raises(TypeError, match="zzz is neither an argument nor a field of the config.$"):
        load_checkpoint(file, zzz=600)
    with pytest.raises(TypeError, match=r"config= and min_size, max_size cannot be given together"):
        load_checkpoint(file, TINY_CONFIG, min_size=600, max_size=800)
    with pytest.raises(ValueError, match="min_size must be in") as caught:
        load_checkpoint(file, min_size=0)
    assert not isinstance(caught.value, CheckpointError)  # the argument is wrong, not the file


# --- Class names and backgrounds -----------------------------------------------------------------


def test_names_of_the_checkpoints_own_classes_keep_the_class_layer(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain_model = RetinaNet.from_pretrained(file)
    caplog.clear()
    model = RetinaNet.from_pretrained(file, class_names=["a", "b", "c"])
    assert model.config.class_names == ("a", "b", "c")
    assert torch.equal(model.head.class_logits.weight, plain_model.head.class_logits.weight)
    assert not caplog.messages


def test_names_that_were_only_assumed_can_be_replaced(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assume(monkeypatch, "class_names", class_names=("x", "y", "z"))
    checkpoint = load_checkpoint(file, class_names=["a", "b", "c"])
    assert (checkpoint.config.class_names, checkpoint.renewed) == (("a", "b", "c"), ())


def test_a_background_is_dropped_from_the_head_and_the_names(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_checkpoint(file)
    names = ("background", "ant", "bee")
    with caplog.at_level(logging.INFO, "focaldet"):
        checkpoint = load_checkpoint(file, drop_background=True, class_names=names)
    assert checkpoint.config.class_names == ("ant", "bee")
    assert not checkpoint.renewed
    assert "Dropped the first of class_names, 'background'" in caplog.text
    for kind in ("weight", "bias"):
        key = f"head.class_logits.{kind}"
        before, after = whole.tensors[key], checkpoint.tensors[key]
        assert torch.equal(
            after.view(9, 2, *after.shape[1:]), before.view(9, 3, *after.shape[1:])[:, 1:]
        )
    assert load_checkpoint(file, drop_background=True).config.class_names is None
    again = load_checkpoint(file, drop_background=True, class_names=("ant", "bee"))
    assert again.config == checkpoint.config
    config = checkpoint.config.replace(min_size=300)
    assert load_checkpoint(file, config, drop_background=True).config is config
    assert load_checkpoint(file, drop_background=True, num_classes=5).renewed


def test_a_background_is_dropped_from_a_model_of_focaldet(own: RetinaNet, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path, drop_background=True)
    assert checkpoint.config.class_names == ("owl",)
    RetinaNet.from_config(checkpoint.config, backbone=TinyBackbone()).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"Cannot load .* drop_background=True no class remains"
    ):
        load_checkpoint(tmp_path, drop_background=True)
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pth")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(
        CheckpointError, match=r"no tensor for focaldet's 'head\.class_logits\.weight'"
    ):
        load_checkpoint(tmp_path, drop_background=True)


def test_a_torchvision_model_whose_labels_count_from_1_gives_equal_detections(
    tmp_path: Path,
) -> None:
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
        trainable_layers=5,
    )
    theirs = detection.RetinaNet(backbone, 3, min_size=96, max_size=128, score_thresh=0.005).eval()
    with torch.no_grad():
        logits = theirs.head.classification_head.cls_logits
        logits.weight.normal_(0, 0.02)
        logits.bias.view(9, 3)[:, 0] = -100.0  # what training makes of an unused class
        image = torch.rand(3, 96, 120)
        [expected] = theirs([image])
    torch.save({"model": theirs.state_dict()}, tmp_path / "theirs.pth")
    model = RetinaNet.from_pretrained(
        tmp_path / "theirs.pth",
        drop_background=True,
        class_names=("background", "cat", "dog"),
        min_size=96,
        max_size=128,
        score_threshold=0.005,
    )
    assert model.config.class_names == ("cat", "dog")
    [found] = model.predict(image)
    assert len(found) == len(expected["scores"]) > 10
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=0, atol=0.02)
    assert torch.equal(found.labels + 1, expected["labels"])


def test_the_91_channels_of_a_torchvision_file_are_dropped_only_if_they_are_ones_own(
    tmp_path: Path,
) -> None:
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    with torch.device("meta"):
        theirs = detection.RetinaNet(backbone, 91)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    torch.save(thin(shapes), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="91 channels is taken for COCO's.* num_classes=90"):
        load_checkpoint(tmp_path / "x.pth", drop_background=True)
    checkpoint = load_checkpoint(tmp_path / "x.pth", drop_background=True, num_classes=90)
    assert (checkpoint.config.num_classes, checkpoint.renewed) == (90, ())
    assert len(checkpoint.tensors["head.class_logits.bias"]) == 9 * 90


# --- What is assumed -----------------------------------------------------------------------------


def assume(monkeypatch: pytest.MonkeyPatch, *fields: str, **values: Any) -> None:
    """Make a family say which fields its files do not have."""
    original = _yhenon.suggest

    def suggest(file: CheckpointFile) -> SuggestedConfig:
        return SuggestedConfig(original(file).config.replace(**values), fields)

    monkeypatch.setattr(_yhenon, "suggest", suggest)


def test_what_a_file_does_not_say_is_logged_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assume(monkeypatch, "min_size", "max_size")
    load_checkpoint(file)
    [message] = caplog.messages
    assert message == (
        "Loaded theirs.pth as a RetinaNet of yhenon/pytorch-retinanet with the backbone resnet18 and 3 "
        "classes without names (pass class_names=). The file does not say these, so they are assumed: "
        "min_size=608, max_size=1024. If the training differed, pass them as arguments."
    )
    caplog.clear()
    load_checkpoint(file, min_size=320)
    [message] = caplog.messages
    assert "assumed: max_size=1024." in message


def test_nothing_is_logged_for_what_is_given_or_published(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assume(monkeypatch, "min_size", "max_size")
    config = load_checkpoint(file, min_size=320, max_size=640).config
    load_checkpoint(file, config)
    load_checkpoint(file, config, num_classes=3)
    published = file.with_name("coco_resnet_50_map_0_335_state_dict.pt")
    load_checkpoint(file.rename(published))
    assert not caplog.messages


# --- focaldet's own tensors ----------------------------------------------------------------------


def test_own_tensors_take_the_config_next_to_them(own: RetinaNet, tmp_path: Path) -> None:
    state = {"state_dict": prefixed("model.", own.state_dict()), "epoch": 3}
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "last.ckpt")
    for place in (folder, folder.parent):
        (place / "config.json").write_text(own.config.to_json())
        assert load_checkpoint(folder / "last.ckpt").config == own.config
        (place / "config.json").unlink()
    for other in (None, '{"model_type": "detr"}', "[", "[" * 10**5):
        if other is not None:
            (folder / "config.json").write_text(other)
        with pytest.raises(CheckpointError, match=r"last\.ckpt'.*no config\.json.* Pass config="):
            load_checkpoint(folder / "last.ckpt")
    (folder / "config.json").write_text('{"format_version": 99, "num_classes": 2}')
    with pytest.raises(CheckpointError, match=r"last\.ckpt'.*format_version 99"):
        load_checkpoint(folder / "last.ckpt")
    (folder / "config.json").write_text(own.config.replace(head_depth=2).to_json())
    with pytest.raises(CheckpointError, match=r"last\.ckpt'.*head_norm or head_depth"):
        RetinaNet.from_pretrained(folder / "last.ckpt", backbone=TinyBackbone())


def test_own_tensors_can_be_loaded_for_other_classes(own: RetinaNet, tmp_path: Path) -> None:
    torch.save(own.state_dict(), tmp_path / "x.pth")
    config = own.config.replace(num_classes=3, class_names=None)
    checkpoint = load_checkpoint(tmp_path / "x.pth", config, num_classes=3)
    assert checkpoint.renewed == ("head.class_logits",)
    same = load_checkpoint(tmp_path / "x.pth", own.config, class_names=own.config.class_names)
    assert (same.renewed, same.config) == ((), own.config)


# --- Folders and the files next to a checkpoint --------------------------------------------------


def test_a_folder_of_a_different_project_is_loaded_from_its_only_checkpoint(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_checkpoint(file)
    (file.parent / "config.json").write_text('{"num_classes": 3}')
    (file.parent / "notes.txt").write_text("")
    assert load_checkpoint(file.parent).config == expected.config
    file.rename(file.with_name("model_final.pth"))
    for name in ("optimizer.bin", "a.pt"):
        file.with_name(name).write_bytes(b"")
    with caplog.at_level(logging.INFO, "focaldet"):
        assert load_checkpoint(file.parent).config == expected.config
    assert "the other checkpoints: a.pt, optimizer.bin" in caplog.text


def test_file_name_chooses_a_file_of_a_folder(file: Path) -> None:
    other = file.with_name("other.pth")
    torch.save(yhenon_state(5), other)
    with pytest.raises(
        CheckpointError, match=r"2 checkpoints: 'other\.pth', 'theirs\.pth'.*file_name="
    ):
        load_checkpoint(file.parent)
    assert load_checkpoint(file.parent, file_name="other.pth").config.num_classes == 5
    assert load_checkpoint(file.parent, file_name="theirs.pth").config.num_classes == 3
    with pytest.raises(FileNotFoundError, match=r"No file 'x\.pth' in .*\(file_name\)"):
        load_checkpoint(file.parent, file_name="x.pth")
    for outside in ("../x.pth", str(file)):
        with pytest.raises(ValueError, match=r"file_name must be within the folder"):
            load_checkpoint(file.parent, file_name=outside)
    with pytest.raises(
        ValueError, match=r"file_name is for a folder or repository, but .* is a file"
    ):
        load_checkpoint(file, file_name="theirs.pth")


def test_weights_of_a_folder_of_focaldet_cannot_be_chosen(own: RetinaNet, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights='ema' was given, but .* only one set"):
        load_checkpoint(tmp_path, weights="ema")


def test_texts_next_to_a_checkpoint_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "owls.pth"
    for name in ("owls.pth", "config.json", "owls.yml", "dump.yaml", "README.md", "other.json"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert texts_beside(path) == {"config.json": "config.json", "owls.yml": "owls.yml"}
    (tmp_path / "owls.yml").unlink()
    assert texts_beside(path) == {"config.json": "config.json", "dump.yaml": "dump.yaml"}
    (tmp_path / "second.pth").write_bytes(b"")
    assert texts_beside(path) == {"config.json": "config.json"}
    assert not caplog.messages
    (tmp_path / "config.json").write_bytes(b"\xff")
    (tmp_path / "config.yaml").write_bytes(b"a" * (_neighbours.MAX_TEXT_SIZE + 1))
    assert texts_beside(path) == {}
    assert caplog.messages == [
        "Ignored config.json next to the checkpoint: it is not UTF-8 text.",
        "Ignored config.yaml next to the checkpoint: it has more than 1048576 bytes.",
    ]


def test_a_family_sees_the_texts_next_to_a_checkpoint(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[CheckpointFile] = []
    original = _yhenon.suggest

    def suggest(file: CheckpointFile) -> SuggestedConfig:
        seen.append(file)
        return original(file)

    monkeypatch.setattr(_yhenon, "suggest", suggest)
    (file.parent / "config.json").write_text(json.dumps({"num_classes": 3}))
    load_checkpoint(file.parent)
    load_checkpoint(file)
    assert [dict(one.beside) for one in seen] == [{"config.json": '{"num_classes": 3}'}] * 2
    assert [one.name for one in seen] == ["theirs.pth"] * 2
    assert all(key in seen[0].tensors for key in yhenon_state())


def test_the_folder_of_a_damaged_config_is_still_focaldets(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0")
    for text in ("{", "[]", "[" * 10**5):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_checkpoint(tmp_path)
