"""Files of torchvision RetinaNets that people train: what their tensors show, and what they don't."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torchvision.models import detection, mobilenet_v2, mobilenet_v3_large
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import (
    BackboneWithFPN,
    mobilenet_backbone,
    resnet_fpn_backbone,
)
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import MobileNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import Checkpoint, CheckpointFile, SuggestedConfig, load_checkpoint
from focaldet.pretrained.families import _torchvision
from tests.helpers.reference_torchvision import (
    assert_same_detections,
    randomise,
    small_retinanet,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def meta_state(**options: Any) -> dict[str, Tensor]:
    """Return the state dict of a torchvision RetinaNet without values, which costs no time."""
    num_classes = options.pop("num_classes", 3)
    with torch.device("meta"):
        state: dict[str, Tensor] = small_retinanet(num_classes, **options).state_dict()
    return state


def suggested(tensors: dict[str, Tensor], **beside: Any) -> SuggestedConfig:
    texts = {"config.json": json.dumps(beside)} if beside else {}
    return _torchvision.suggest(CheckpointFile(tensors, {}, "model.safetensors", texts))


@pytest.mark.parity
@pytest.mark.parametrize(
    "num_classes", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 21))]
)
def test_a_model_that_torchvision_trained_gives_its_detections(
    num_classes: int, tmp_path: Path
) -> None:
    theirs = randomise(small_retinanet(num_classes, min_size=64, max_size=96))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-4)
    boxes = torch.tensor([[4.0, 6, 40, 44], [20, 10, 60, 50]])
    labels = torch.tensor([1, num_classes - 1])
    images = [torch.rand(3, 64, 80), torch.rand(3, 60, 64)]
    theirs.train()
    for _ in range(3):
        losses = theirs(images, [{"boxes": boxes, "labels": labels}] * 2)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    checkpoint = load_checkpoint(tmp_path / "own.pth")
    assert checkpoint.config == RetinaNetConfig.torchvision_v1(num_classes).replace(
        backbone="resnet18", backbone_norm="batch"
    )
    config = checkpoint.config.replace(min_size=64, max_size=96)
    ours = RetinaNet.from_pretrained(tmp_path / "own.pth", config=config)
    with torch.no_grad():
        expected = theirs(images)
        found = ours.detections(ours(images))
    assert min(map(len, found)) >= 10
    assert_same_detections(found, expected)


@pytest.mark.parametrize(
    "backbone",
    [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    ],
)
def test_the_backbone_is_recognised(backbone: str) -> None:
    assert suggested(meta_state(backbone=backbone)).config.backbone == backbone


@pytest.mark.parametrize("backbone", ["wide_resnet50_2", "wide_resnet101_2"])
def test_wide_resnets_are_an_error_with_the_remedy(backbone: str) -> None:
    with pytest.raises(
        CheckpointError, match="not a known ResNet.*128 channels.*backbone='custom'"
    ):
        suggested(meta_state(backbone=backbone))


def test_norms_the_source_of_p6_and_the_head_are_recognised() -> None:
    plain = suggested(meta_state()).config
    assert (plain.backbone_norm, plain.p6_from, plain.head_norm) == ("batch", "p5", None)
    assert (plain.fpn_channels, plain.head_depth, plain.box_loss) == (256, 4, "l1")
    state = meta_state(norm_layer=FrozenBatchNorm2d, p6_channels=512, group_norm=True)
    other = suggested(state)
    config = other.config
    assert (config.backbone_norm, config.p6_from, config.head_norm) == ("frozen", "c5", "group")
    assert (config.head_depth, config.box_loss, config.backbone_norm_eps) == (4, "giou", None)
    assert "backbone_norm_eps" in other.assumed
    assert "backbone_norm_eps" not in suggested(meta_state()).assumed


def test_fields_that_the_tensors_cannot_show_are_assumed() -> None:
    assert suggested(meta_state()).assumed == (
        *("anchor_sizes", "octave_scales", "aspect_ratios"),
        *("min_size", "max_size", "keep_ratio", "image_mean", "image_std"),
        *("score_threshold", "nms_threshold", "pre_nms_top_k", "max_detections"),
    )


@pytest.mark.parametrize(
    ("num_classes", "backbone", "eps"),
    [(91, "resnet50", 0.0), (91, "resnet18", None), (3, "resnet50", None)],
)
def test_an_eps_of_0_is_only_assumed_for_the_published_v1(
    num_classes: int, backbone: str, eps: float | None
) -> None:
    state = meta_state(num_classes=num_classes, backbone=backbone, norm_layer=FrozenBatchNorm2d)
    config = suggested(state).config
    assert config.backbone_norm_eps == eps
    assert config.num_classes == (80 if num_classes == 91 else num_classes)


@pytest.mark.parametrize(
    ("scales", "ratios", "expected"),
    [
        (1, (0.5, 1.0, 2.0), ((1.0,), (0.5, 1.0, 2.0))),
        (1, (1.0,), ((1.0,), (1.0,))),
        (3, (0.5, 1.0, 2.0), RetinaNetConfig.torchvision_v1()),
    ],
)
def test_the_usual_anchors_are_assumed_by_their_number(
    scales: int, ratios: tuple[float, ...], expected: Any
) -> None:
    if isinstance(expected, RetinaNetConfig):
        expected = (expected.octave_scales, expected.aspect_ratios)
    file = CheckpointFile(meta_state(scales=scales, ratios=ratios))
    config = _torchvision.suggest(file).config
    assert (config.octave_scales, config.aspect_ratios) == expected
    assert config.num_classes == 3
    converted = _torchvision.convert(file, config)
    assert len(converted["head.class_logits.bias"]) == 3 * scales * len(ratios)


def test_other_anchors_must_be_passed() -> None:
    file = CheckpointFile(meta_state(scales=2))
    config = _torchvision.suggest(file).config
    assert config.num_classes == 3
    message = r"6 anchors per cell instead of 9 \(3 octave_scales.*Pass the octave_scales="
    with pytest.raises(CheckpointError, match=message):
        _torchvision.convert(file, config)
    converted = _torchvision.convert(file, config.replace(octave_scales=(1.0, 1.26)))
    assert len(converted["head.box_deltas.bias"]) == 24


def test_channels_that_contradict_each_other_are_an_error() -> None:
    state = meta_state()
    state["head.regression_head.bbox_reg.weight"] = torch.empty(28, 256, 3, 3, device="meta")
    with pytest.raises(CheckpointError, match="27 class channels and 28 box channels"):
        suggested(state)


def replaced_class_head(model: Any) -> None:
    model.head.classification_head = detection.retinanet.RetinaNetClassificationHead(256, 9, 3)


def replaced_norms(model: Any) -> None:
    model.head = detection.retinanet.RetinaNetHead(256, 9, 3, norm_layer=nn.BatchNorm2d)


def replaced_box_head(model: Any) -> None:
    model.head.regression_head = detection.retinanet.RetinaNetRegressionHead(
        256, 9, norm_layer=nn.BatchNorm2d
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replaced_class_head, (None, "group", "giou")),
        (replaced_norms, ("batch", "same", "l1")),
        (replaced_box_head, ("group", "batch", "giou")),
    ],
)
def test_heads_with_other_norms_give_torchvisions_detections(
    change: Any, expected: tuple[str | None, str, str], tmp_path: Path
) -> None:
    theirs = small_retinanet(
        3, group_norm=True, norm_layer=FrozenBatchNorm2d, min_size=64, max_size=96
    )
    change(theirs)
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    config = load_checkpoint(tmp_path / "own.pth").config
    assert (config.head_norm, config.head_box_norm, config.box_loss) == expected
    assert config.backbone_norm == "frozen"  # whatever counters the head has
    ours = RetinaNet.from_pretrained(tmp_path / "own.pth", min_size=64, max_size=96)
    images = [torch.rand(3, 64, 80), torch.rand(3, 60, 64)]
    with torch.no_grad():
        found = ours.detections(ours(images))
        assert min(map(len, found)) >= 10
        assert_same_detections(found, theirs.eval()(images))
    back: Any = ours.to_torchvision()
    state, wanted = back.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_a_head_with_fixed_statistics_is_an_error() -> None:
    with torch.device("meta"):
        model = small_retinanet(3)
        model.head = detection.retinanet.RetinaNetHead(256, 9, 3, norm_layer=FrozenBatchNorm2d)
    with pytest.raises(CheckpointError, match="has BatchNorm with fixed statistics, but"):
        suggested(model.state_dict())


def retinanet_on(backbone: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = detection.RetinaNet(backbone, 3).state_dict()
    return state


def test_pyramids_without_a_counterpart_are_errors() -> None:
    with torch.device("meta"):
        default = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        apart = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            returned_layers=[2, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        pooled = mobilenet_backbone(backbone_name="mobilenet_v2", weights=None, fpn=True)
        single = mobilenet_v2().features
        single.out_channels = 1280
        fcos = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        states = [retinanet_on(one) for one in (default, apart, pooled, single)]
    for state, message in zip(
        states,
        (
            "4 levels from the backbone and a max-pooled one, but .*not the default of resnet_fpn",
            "takes maps of 128 and 512 channels, but .* resnet18, of 64, 64, 128, 256 and 512 ",
            "2 levels from the backbone and a max-pooled one",
            r"has no feature pyramid.*fpn_channels=None.*MobileNet\(mobilenet_v2\(\), ",
        ),
        strict=True,
    ):
        assert not _torchvision.missing(state)
        with pytest.raises(CheckpointError, match=message):
            suggested(state)
    with pytest.raises(CheckpointError, match="an FCOS"):
        suggested(fcos)
    normed = meta_state() | {"backbone.fpn.inner_blocks.0.1.weight": torch.empty(256)}
    with pytest.raises(CheckpointError, match="norms after its convolutions"):
        suggested(normed)


@pytest.mark.parametrize(
    ("layers", "levels"),
    [([1, 2, 3, 4], (2, 3, 4, 5, 6, 7)), ([3, 4], (4, 5, 6, 7)), ([4], (5, 6, 7))],
)
def test_the_levels_are_recognised(layers: list[int], levels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        states = [
            retinanet_on(
                resnet_fpn_backbone(
                    backbone_name=name,
                    weights=None,
                    returned_layers=layers,
                    extra_blocks=LastLevelP6P7(256, 256),
                )
            )
            for name in ("resnet18", "resnet50", "resnext101_64x4d")
        ]
    for state in states:
        found = suggested(state)
        assert found.config.levels == levels
        assert found.config.anchor_sizes == tuple(4 * 2**level for level in levels)
        assert "anchor_sizes" in found.assumed


@pytest.mark.parity
@pytest.mark.slow
def test_one_map_of_torchvisions_docstring_loads_with_its_backbone(tmp_path: Path) -> None:
    features = mobilenet_v2().features
    features.out_channels = 1280
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    theirs = detection.RetinaNet(
        features, 3, anchor_generator=anchors, min_size=64, max_size=128, topk_candidates=100
    )
    randomise(theirs, class_bias=-2.0)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    config = RetinaNetConfig.torchvision_v1(3).replace(
        backbone="custom",
        backbone_norm="batch",
        levels=(5,),
        fpn_channels=None,
        anchor_sizes=(32,),
        octave_scales=(1, 2, 4, 8, 16),
        min_size=64,
        max_size=128,
        pre_nms_top_k=100,
    )
    backbone = MobileNet(mobilenet_v2(), (1, 3, 6, 13, 18), levels=(5,))
    ours = RetinaNet.from_pretrained(tmp_path / "own.pth", config=config, backbone=backbone)
    images = [torch.rand(3, 64, 90), torch.rand(3, 120, 64)]
    with torch.no_grad():
        found = ours.detections(ours(images))
        assert min(map(len, found)) >= 10
        assert_same_detections(found, theirs.eval()(images))
    with pytest.raises(CheckpointError, match="no feature pyramid, but config.fpn_channels is 256"):
        RetinaNet.from_pretrained(
            tmp_path / "own.pth", config=config.replace(fpn_channels=256), backbone=backbone
        )


def with_last_maps(network: Any, ends: tuple[int, ...], widths: list[int]) -> BackboneWithFPN:
    layers = {str(end): str(i) for i, end in enumerate(ends)}
    return BackboneWithFPN(network, layers, widths, 256, LastLevelP6P7(256, 256))


@pytest.mark.parametrize("frozen", [True, False])
def test_mobilenets_that_give_the_last_map_of_each_stride_are_recognised(*, frozen: bool) -> None:
    options: Any = {"norm_layer": FrozenBatchNorm2d} if frozen else {}
    with torch.device("meta"):
        v2 = with_last_maps(mobilenet_v2(**options).features, (6, 13, 17), [32, 96, 320])
        v3 = with_last_maps(mobilenet_v3_large(**options).features, (6, 12, 15), [40, 112, 160])
        states = [retinanet_on(v2), retinanet_on(v3)]
    for state, name in zip(states, ("mobilenet_v2", "mobilenet_v3_large"), strict=True):
        found = suggested(state)
        assert found.config.backbone == name
        assert "backbone" in found.assumed
        eps = 1e-5 if frozen and name == "mobilenet_v3_large" else None
        assert found.config.backbone_norm_eps == eps


@pytest.mark.parity
def test_torchvisions_own_mobilenet_levels_need_a_custom_backbone(tmp_path: Path) -> None:
    body = mobilenet_backbone(
        backbone_name="mobilenet_v2",
        weights=None,
        fpn=True,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    theirs = detection.RetinaNet(body, 3, anchor_generator=small_retinanet(3).anchor_generator)
    randomise(theirs, class_bias=-4.6)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    message = (
        r"not a known MobileNet: .* 32, 64 and 160 channels, and the last block is 14.*MobileNet\("
    )
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(tmp_path / "own.pth")
    config = RetinaNetConfig.torchvision_v1(3).replace(backbone="custom", backbone_norm="batch")
    network = MobileNet(mobilenet_v2(), (0, 2, 4, 7, 14))
    ours = RetinaNet.from_pretrained(
        tmp_path / "own.pth", config=config.replace(min_size=96, max_size=160), backbone=network
    )
    theirs.transform.min_size, theirs.transform.max_size = (96,), 160
    images = [torch.rand(3, 80, 120)]
    with torch.no_grad():
        expected = theirs.eval()(images)
        found = ours.detections(ours(images))
    assert len(found[0]) >= 5
    assert_same_detections(found, expected)


# --- MLPerf --------------------------------------------------------------------------------------


def old_spelling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the key names that torchvision had before a renaming."""
    old = {}
    for key, value in state.items():
        renamed = key
        for i in range(4):
            renamed = renamed.replace(f"_head.conv.{i}.0.", f"_head.conv.{2 * i}.")
        for blocks in ("inner_blocks", "layer_blocks"):
            for i in range(3):
                renamed = renamed.replace(f"{blocks}.{i}.0.", f"{blocks}.{i}.")
        old[renamed] = value
    assert len(old) == len(state)
    return old


def test_mlperfs_model_is_recognised() -> None:
    options: Any = {"backbone": "resnext50_32x4d", "norm_layer": FrozenBatchNorm2d}
    state = meta_state(num_classes=264, **options)
    config = suggested(old_spelling(state)).config
    assert (config.keep_ratio, config.min_size, config.backbone) == (False, 800, "resnext50_32x4d")
    assert config.backbone_norm_eps is None
    assert config.class_names is not None
    assert (config.class_names[0], config.class_names[263]) == ("Airplane", "Zucchini")
    assert list(config.class_names) == sorted(set(config.class_names))
    for other in (state, old_spelling(meta_state(num_classes=263, **options))):
        config = suggested(other).config
        assert config.keep_ratio
        assert config.class_names is None


@pytest.mark.parity
def test_mlperfs_stretched_images_give_torchvisions_detections(tmp_path: Path) -> None:
    theirs = randomise(small_retinanet(5, min_size=96, fixed_size=(96, 96)), class_bias=-4.6)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")
    config = load_checkpoint(tmp_path / "own.pth").config
    config = config.replace(min_size=96, max_size=96, keep_ratio=False)
    ours = RetinaNet.from_pretrained(tmp_path / "own.pth", config=config)
    images = [torch.rand(3, 64, 120), torch.rand(3, 131, 50)]
    with torch.no_grad():
        expected = theirs.eval()(images)
        found = ours.detections(ours(images))
    assert min(map(len, found)) >= 5
    assert_same_detections(found, expected)


# --- DeepForest ----------------------------------------------------------------------------------

DEEPFOREST = {
    "num_classes": 3,
    "label_dict": {"Tree": 1, "Bird": 0, "Cow": 2},
    "nms_thresh": 0.05,
    "score_thresh": 0.1,
    "detections_per_img": 200,
    "topk_candidates": 500,
}


def test_deepforests_config_gives_names_and_thresholds(caplog: pytest.LogCaptureFixture) -> None:
    found = suggested(meta_state(), **DEEPFOREST)
    config = found.config
    assert config.class_names == ("Bird", "Tree", "Cow")  # by their values
    assert (config.nms_threshold, config.score_threshold) == (0.05, 0.1)
    assert (config.max_detections, config.pre_nms_top_k) == (200, 500)
    assert not {"nms_threshold", "score_threshold", "max_detections", "pre_nms_top_k"} & {
        *found.assumed
    }
    assert "min_size" in found.assumed
    assert not caplog.records


def test_other_fields_of_the_config_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        found = suggested(
            meta_state(), id2label={"0": "a", "2": "c", "1": "b"}, patch_size=400, x=1
        )
    assert found.config.class_names == ("a", "b", "c")
    assert "Ignored 2 fields of config.json next to 'model.safetensors'" in caplog.text
    assert "'patch_size', 'x'" in caplog.text


def test_the_classes_of_a_training_checkpoint_are_read() -> None:
    extras = {"label_dict": {"b": 1, "a": 0, "c": 2}}
    found = _torchvision.suggest(CheckpointFile(meta_state(), extras, "last.ckpt"))
    assert found.config.class_names == ("a", "b", "c")
    wrong = CheckpointFile(meta_state(), {"label_dict": {"b": 1}}, "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"label_dict of 'last\.ckpt' must have the labels 0 to 2"
    ):
        _torchvision.suggest(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "num_classes is 2 in config.json.* head .* has 3 classes"),
        ({"num_classes": True}, "num_classes is True"),
        ({"label_dict": ["Tree"]}, r"label_dict.* name of each class to its label, got \['Tree'\]"),
        ({"label_dict": {"Tree": 0}}, "label_dict .* the labels 0 to 2 once each"),
        ({"label_dict": {"a": 0, "b": 1, "c": 1}}, "label_dict .* the labels 0 to 2 once each"),
        ({"label_dict": {"a": 0, "b": True, "c": 2}}, "label_dict .* the labels 0 to 2 once each"),
        ({"label_dict": None, "id2label": {"0": 1}}, "id2label .* each label to the name"),
        ({"label_dict": None, "id2label": {"x": "a"}}, "id2label .* the labels 0 to 2 once each"),
        ({"nms_thresh": 1.5}, r"nms_thresh is 1.5 in config.json.*\[0, 1\]"),
        ({"score_thresh": "low"}, "score_thresh is 'low' .*number"),
        ({"score_thresh": float("nan")}, "score_thresh is nan"),
        ({"detections_per_img": 0}, "detections_per_img is 0 .*max_detections"),
        ({"topk_candidates": 10.5}, "topk_candidates is 10.5 .*integer"),
    ],
)
def test_wrong_values_of_the_config_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        suggested(meta_state(), **(DEEPFOREST | change))
    assert "pass config=" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, "[1]"])
def test_a_config_that_is_not_a_json_object_is_an_error(text: str) -> None:
    file = CheckpointFile(meta_state(), {}, "model.safetensors", {"config.json": text})
    with pytest.raises(CheckpointError, match="config.json next to 'model.safetensors' "):
        _torchvision.suggest(file)


def test_focaldets_own_config_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    own = json.loads(RetinaNetConfig(num_classes=7).to_json())
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        assert suggested(meta_state(), **own).config.num_classes == 3
    assert "it describes a checkpoint of focaldet" in caplog.text


def test_a_checkpoint_with_a_suggested_config_fits_its_model() -> None:
    file = CheckpointFile(meta_state(group_norm=True, p6_channels=512, scales=1))
    config = _torchvision.suggest(file).config
    checkpoint = Checkpoint(config, _torchvision.convert(file, config))
    with torch.device("meta"):
        wanted = RetinaNet.from_config(config).state_dict()
    assert {k: v.shape for k, v in checkpoint.tensors.items()} == {
        k: v.shape for k, v in wanted.items()
    }
