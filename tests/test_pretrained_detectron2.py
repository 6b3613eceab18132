"""Detectron2's files: what is read from the tensors, from the run's settings, and from neither."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from focaldet import AnchorGenerator, RetinaNet
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile, check_fit
from focaldet.pretrained.families import _detectron2
from tests.helpers import reference_models as plain
from tests.helpers.reference_detectron2 import NAMES, Detectron2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from focaldet.config import RetinaNetConfig

SETTINGS = """\
MODEL:
  META_ARCHITECTURE: RetinaNet
  BACKBONE: {FREEZE_AT: 3}
  PIXEL_MEAN: &mean [103.53, 116.28, 123.675]
  PIXEL_STD: [57.375, 57.12, 58.395]
  RESNETS: {STRIDE_IN_1X1: false, NORM: FrozenBN, RES5_DILATION: 1}
  FPN: {FUSE_TYPE: sum, NORM: ''}
  ANCHOR_GENERATOR:
    SIZES: [[32, 48], [64, 96], [128, 192], [256, 384], [512, 768]]
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
    OFFSET: 0.25
  RETINANET:
    NUM_CLASSES: 3
    NORM: ''
    IN_FEATURES: [p3, p4, p5, p6, p7]
    BBOX_REG_LOSS_TYPE: smooth_l1
    BBOX_REG_WEIGHTS: !!python/tuple [10.0, 10.0, 5.0, 5.0]
    SMOOTH_L1_LOSS_BETA: 0.1
    FOCAL_LOSS_ALPHA: 0.3
    FOCAL_LOSS_GAMMA: 1.5
    IOU_THRESHOLDS: (0.3, 0.6)
    PRIOR_PROB: 0.02
    SCORE_THRESH_TEST: 0.1
    NMS_THRESH_TEST: 0.6
    TOPK_CANDIDATES_TEST: 200
INPUT: {FORMAT: BGR, MIN_SIZE_TEST: 1280, MAX_SIZE_TEST: 1300}
TEST: {DETECTIONS_PER_IMAGE: 50}
"""


def state(
    body: plain.Body | None = None, *, classes: int = 3, anchors: int = 9, channels: int = 32
) -> dict[str, Tensor]:
    """Return a state dict on the meta device."""
    shapes = plain.layout(NAMES, body or plain.Body(50), classes=classes, channels=channels)
    for layer, count in ((NAMES.classes, classes * anchors), (NAMES.boxes, 4 * anchors)):
        shapes[f"{layer}.weight"], shapes[f"{layer}.bias"] = (count, channels, 3, 3), (count,)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def cells(sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> dict[str, Tensor]:
    """Return the anchors of all levels as Detectron2 stores them."""
    found = {}
    for level, of_level in enumerate(sizes):
        rows = []
        for size in of_level:
            for ratio in ratios:
                width = (size**2 / ratio) ** 0.5
                rows.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
        found[f"anchor_generator.cell_anchors.{level}"] = torch.tensor(rows)
    return found


def suggest(
    tensors: dict[str, Tensor], *, settings: str = "", extras: Any = None, **beside: str
) -> Any:
    texts = {name.replace("_", "."): text for name, text in beside.items()}
    if settings:
        texts["config.yaml"] = settings
    return _detectron2.suggest(CheckpointFile(tensors, extras or {}, "model_final.pth", texts))


def assert_fits(config: RetinaNetConfig, tensors: dict[str, Tensor], **beside: str) -> None:
    texts = {name.replace("_", "."): text for name, text in beside.items()}
    converted = _detectron2.convert(CheckpointFile(tensors, beside=texts), config)
    with torch.device("meta"), pytest.warns(UserWarning, match="randomly initialised"):
        model = RetinaNet.from_config(config)
    check_fit(model.state_dict(), converted)


def test_the_settings_beside_a_file_give_what_tensors_do_not_show() -> None:
    tensors = state(anchors=6)
    config, assumed = suggest(tensors, settings=SETTINGS)
    assert assumed == ()
    assert (config.num_classes, config.class_names) == (3, None)
    assert (config.min_size, config.max_size, config.max_detections) == (1280, 1300, 50)
    thresholds = (config.score_threshold, config.nms_threshold, config.pre_nms_top_k)
    assert thresholds == (0.1, 0.6, 200)
    assert (config.stride_in_1x1, config.trainable_stages, config.anchor_offset) == (False, 2, 0.25)
    assert config.box_weights == (10.0, 10.0, 5.0, 5.0)
    assert (config.box_loss, config.smooth_l1_beta) == ("smooth_l1", 0.1)
    assert (config.focal_alpha, config.focal_gamma, config.prior) == (0.3, 1.5, 0.02)
    assert (config.negative_threshold, config.positive_threshold) == (0.3, 0.6)
    assert config.image_mean == (0.485, 0.456, 0.406)
    assert config.image_std == (0.229, 0.224, 0.225)
    assert config.anchor_sizes == (32, 64, 128, 256, 512)
    assert (config.octave_scales, config.aspect_ratios) == ((1.0, 1.5), (0.5, 1.0, 2.0))
    assert_fits(config, tensors, config_yaml=SETTINGS)


def test_what_neither_file_nor_settings_say_is_as_in_the_model_zoo_and_named() -> None:
    config, assumed = suggest(state())
    thresholds = ("score_threshold", "pre_nms_top_k", "nms_threshold", "max_detections")
    anchors = ("anchor_sizes", "octave_scales", "aspect_ratios")
    pixels = ("image_mean", "image_std", "min_size", "max_size")
    assert set(assumed) == {*thresholds, *anchors, *pixels, "stride_in_1x1", "box_weights"}
    assert (config.stride_in_1x1, config.size_rounding) == (True, "round_two_step")
    assert (config.min_size, config.max_size, config.box_loss) == (800, 1333, "l1")
    config, assumed = suggest(state(classes=80))
    assert config.class_names == COCO_CLASS_NAMES
    assert "class_names" in assumed


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        ([[s * 2 ** (k / 3) for k in range(3)] for s in (32, 64, 128, 256, 512)], (0.5, 1, 2)),
        ([[s] for s in (16, 32, 64, 128, 256)], (0.25, 1.0, 3.0)),
        ([[8.5, 17], [16, 32], [40, 80], [100, 200], [300, 600]], (1.0,)),
        ([[32, 64, 128, 256, 512]] * 5, (0.5, 1.0, 2.0)),  # Detectron2's own default
        ([[40, 20], [80, 40], [160, 80], [320, 160], [640, 320]], (2.0, 0.333, 1.0, 0.7)),
    ],
)
def test_stored_anchors_give_sizes_scales_and_ratios_exactly(sizes: Any, ratios: Any) -> None:
    stored = cells(sizes, ratios)
    num_scales, num_ratios = len(sizes[0]), len(ratios)
    tensors = state(anchors=num_scales * num_ratios)
    config, assumed = suggest(tensors | stored)
    assert not {"anchor_sizes", "octave_scales", "aspect_ratios"} & set(assumed)
    assert config.aspect_ratios == ratios
    generator = AnchorGenerator(
        config.anchor_sizes,
        octave_scales=config.octave_scales,
        aspect_ratios=config.aspect_ratios,
    )
    for level, theirs in enumerate(stored.values()):
        ours = generator.cell_anchors(level).view(num_ratios, num_scales, 4).transpose(0, 1)
        assert_close(ours.reshape(-1, 4), theirs, rtol=1e-6, atol=0)
    if sizes[0] == [32, 64, 128, 256, 512]:
        assert config.octave_scales == (1, 2, 4, 8, 16)
    assert_fits(config, tensors | stored)


def test_the_anchors_of_the_model_zoo_are_recognised() -> None:
    made = Detectron2({}, 50)
    stored = {
        f"anchor_generator.cell_anchors.{level}": made.anchors(level, 1, 1).float()
        for level in range(5)
    }
    config, _ = suggest(state() | stored)
    default = suggest(state()).config
    for field in ("anchor_sizes", "octave_scales", "aspect_ratios"):
        assert getattr(config, field) == getattr(default, field)


def test_class_and_box_layers_follow_the_order_of_any_number_of_anchors() -> None:
    tensors = plain.filled(plain.layout(NAMES, plain.Body(18), classes=1))
    for layer, per in ((NAMES.classes, 1), (NAMES.boxes, 4)):
        tensors[f"{layer}.weight"] = torch.zeros(6 * per, 32, 3, 3)
        tensors[f"{layer}.bias"] = torch.arange(6.0).repeat_interleave(per)
    stored = cells([[s, 2 * s] for s in (8, 16, 32, 64, 128)], (0.5, 1.0, 2.0))
    file = CheckpointFile(tensors | stored)
    config = _detectron2.suggest(file).config
    converted = _detectron2.convert(file, config)
    # Anchor r * 2 + s here is anchor s * 3 + r there.
    assert converted["head.class_logits.bias"].tolist() == [0, 3, 1, 4, 2, 5]
    assert converted["head.box_deltas.bias"].view(6, 4)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.zeros(9, 4) + 4}, r"cell_anchors\.2 is .* not every combination"),
        ({2: cells([[32, 40, 51]], (0.5, 1.0, 2.0)).popitem()[1][:7]}, "not every combination"),
        ({2: cells([[32, 40, 51]], (0.5, 1.0, 2.0)).popitem()[1]}, "the same multiples"),
        ({2: cells([[128, 160, 200]], (0.5, 1.0, 3.0)).popitem()[1]}, "the same aspect ratios"),
        ({2: None}, r"some levels only, without anchor_generator\.cell_anchors\.2"),
        ({2: torch.zeros(9)}, r"shape \[A, 4\], got \[9\]"),
    ],
)
def test_anchors_that_no_config_describes_are_errors(change: Any, message: str) -> None:
    stored = cells([[s, 1.25 * s, 1.5625 * s] for s in (32, 64, 128, 256, 512)], (0.5, 1.0, 2.0))
    for level, value in change.items():
        key = f"anchor_generator.cell_anchors.{level}"
        del stored[key]
        stored |= {} if value is None else {key: value}
    with pytest.raises(CheckpointError, match=message):
        suggest(state() | stored)


def test_a_number_of_anchors_that_nothing_describes_is_an_error() -> None:
    message = "12 anchors per cell.* neither the file nor a config.yaml.* pass config="
    with pytest.raises(CheckpointError, match=message):
        suggest(state(anchors=12))
    assert suggest(state(anchors=3)).config.octave_scales == (1.0,)
    with pytest.raises(CheckpointError, match="has 9 anchors per cell, but 6 are described"):
        suggest(state(), settings=SETTINGS)
    config = suggest(state()).config
    with pytest.raises(CheckpointError, match="9 anchors per cell: .* octave_scales"):
        _detectron2.convert(CheckpointFile(state(anchors=3)), config)


def test_sizes_that_would_have_to_be_run_are_assumed_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = re.sub(r"SIZES: \[.*", "SIZES: !!python/object/apply:eval ['1 / 0']", SETTINGS)
    with caplog.at_level(logging.WARNING, "focaldet"):
        _, assumed = suggest(state(), settings=settings)
    assert "anchor_sizes" in assumed
    assert "MODEL.ANCHOR_GENERATOR.SIZES in config.yaml is not a list" in caplog.text


# --- Pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (57.375, 57.12, 58.395), (3.0, 4.0, 5.0)])
def test_any_pixel_values_give_the_same_first_layer(order: str, stored: bool, std: Any) -> None:
    tensors = plain.filled(plain.layout(NAMES, plain.Body(18), classes=3))
    mean = (90.0, 100.0, 110.0)
    settings = f"MODEL: {{RETINANET: {{}}, PIXEL_MEAN: {list(mean)}, PIXEL_STD: {list(std)}}}\n"
    if stored:
        settings = "MODEL: {RETINANET: {}}\n"
        tensors["pixel_mean"] = torch.tensor(mean).view(3, 1, 1)
        tensors["pixel_std"] = torch.tensor(std).view(3, 1, 1)
    settings += f"INPUT: {{FORMAT: {order}}}\n"
    file = CheckpointFile(tensors, beside={"config.yaml": settings})
    config, assumed = _detectron2.suggest(file)
    assert not {"image_mean", "image_std"} & set(assumed)
    converted = _detectron2.convert(file, config)
    image = torch.randint(0, 256, (3, 9, 9)).double()  # red, green, blue
    theirs = image if order == "RGB" else image.flip(0)
    theirs = (theirs - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    ours = (image / 255 - torch.tensor(config.image_mean).double()[:, None, None]) / torch.tensor(
        config.image_std
    ).double()[:, None, None]
    weight = tensors["backbone.bottom_up.stem.conv1.weight"].double()
    assert_close(
        F.conv2d(ours[None], converted["backbone.conv1.weight"].double(), padding=3),
        F.conv2d(theirs[None], weight, padding=3),
        rtol=1e-5,
        atol=1e-4,
    )


def test_the_order_of_the_colours_shows_in_the_usual_mean_or_is_assumed_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def config_of(mean: Any) -> RetinaNetConfig:
        pixels = {"pixel_mean": torch.tensor(mean), "pixel_std": torch.ones(3)}
        config: RetinaNetConfig = suggest(state() | pixels).config
        return config

    with caplog.at_level(logging.WARNING, "focaldet"):
        assert config_of([103.53, 116.28, 123.675]).image_mean == (0.485, 0.456, 0.406)
        assert config_of([123.675, 116.28, 103.53]).image_mean == (0.485, 0.456, 0.406)
        assert not caplog.records
        assert config_of([0.0, 51.0, 255.0]).image_mean == (1.0, 0.2, 0.0)
    assert "no config.yaml gives INPUT.FORMAT; BGR images are assumed" in caplog.text


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"pixel_mean": [0.0]}, r"pixel_mean is \[0\.0\], but must be three numbers"),
        ({"pixel_std": [1.0, 0, 1]}, r"pixel_std is .* must be above 0"),
        ({"pixel_mean": [0.0, float("nan"), 0]}, "pixel_mean is .*nan.* three numbers"),
    ],
)
def test_unusable_pixel_values_are_errors(pixels: Any, message: str) -> None:
    tensors = {key: torch.tensor(value) for key, value in pixels.items()}
    with pytest.raises(CheckpointError, match=message):
        suggest(state() | tensors)


def test_pixel_values_that_contradict_the_settings_are_an_error() -> None:
    pixels = {"pixel_mean": torch.tensor([1.0, 2, 3])}
    with pytest.raises(CheckpointError, match=r"pixel_mean is .* but MODEL.PIXEL_MEAN in config.y"):
        suggest(state(anchors=6) | pixels, settings=SETTINGS)


# --- Backbones and heads -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "name", "stride", "std"),
    [
        (plain.Body(18), "resnet18", False, 0.229),
        (plain.Body(34), "resnet34", False, 0.229),
        (plain.Body(152), "resnet152", True, 0.229),
        (plain.Body(101, 32, 8), "resnext101_32x8d", False, 58.395 / 255),
    ],
)
def test_other_backbones_have_their_usual_strides_and_pixels(
    body: plain.Body, name: str, stride: bool, std: float
) -> None:
    config, assumed = suggest(state(body))
    assert (config.backbone, config.stride_in_1x1) == (name, stride)
    assert ("stride_in_1x1" in assumed) is (body.depth >= 50)
    assert config.image_std[0] == pytest.approx(std)
    assert_fits(config, state(body))


def with_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with a norm between each convolution of the towers and its ReLU."""
    found = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(head\.\w+_subnet)\.(\d)\.(\w+)", key)
        if match is None:
            found[key] = value
            continue
        index = int(match[2]) // 2 * 3
        found[f"{match[1]}.{index}.{match[3]}"] = value
        found[f"{match[1]}.{index + 1}.{match[3]}"] = 1 + torch.rand_like(
            value[:, 0, 0, 0] if value.ndim > 1 else value
        )
    return found


def test_heads_with_group_norm_compute_the_same() -> None:
    tensors = with_norms(plain.filled(plain.layout(NAMES, plain.Body(18), classes=2, channels=64)))
    file = CheckpointFile(tensors)
    config, assumed = _detectron2.suggest(file)
    assert (config.head_norm, config.head_depth) == ("group_with_bias", 4)
    assert "head_norm" in assumed
    said = "MODEL: {RETINANET: {NORM: GN}}"
    assert "head_norm" not in suggest(tensors, settings=said).assumed
    with pytest.warns(UserWarning, match="randomly initialised"):
        model = RetinaNet.from_config(config).double()
    model.load_state_dict(_detectron2.convert(file, config))
    features = torch.randn(1, 64, 5, 7, dtype=torch.float64)
    x = features
    double = {key: value.double() for key, value in tensors.items()}
    for index in range(0, 12, 3):
        layer, norm = (f"head.cls_subnet.{place}" for place in (index, index + 1))
        x = F.conv2d(x, double[f"{layer}.weight"], double[f"{layer}.bias"], padding=1)
        x = F.group_norm(x, 32, double[f"{norm}.weight"], double[f"{norm}.bias"]).relu()
    theirs = F.conv2d(x, double["head.cls_score.weight"], double["head.cls_score.bias"], padding=1)
    with torch.no_grad():
        [ours], _ = model.head([features])
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert_close(ours.view(9, 2, -1), theirs.view(9, 2, -1)[order], rtol=0, atol=1e-9)


def test_heads_with_other_norms_are_errors_that_name_them() -> None:
    per_level = {"head.cls_subnet.1.0.running_mean": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"BatchNorm \('head\.cls_subnet\.1\.0\.running_mean"):
        suggest(state() | per_level)
    with pytest.raises(
        CheckpointError, match="RETINANET.NORM in config.yaml is 'LN', but only '' or"
    ):
        suggest(state(), settings="MODEL: {RETINANET: {NORM: LN}}")


# --- Settings and names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("FUSE_TYPE: sum", "FUSE_TYPE: avg", r"MODEL\.FPN\.FUSE_TYPE .* 'avg', but only 'sum'"),
        ("FrozenBN", "GN", r"MODEL\.RESNETS\.NORM in config\.yaml is 'GN'"),
        ("RES5_DILATION: 1", "RES5_DILATION: 2", r"RES5_DILATION .* is 2, but only 1"),
        ("[p3, p4, p5, p6, p7]", "[p3, p4]", "IN_FEATURES"),
        ("META_ARCHITECTURE: RetinaNet", "META_ARCHITECTURE: FCOS", "META_ARCHITECTURE"),
        ("FORMAT: BGR", "FORMAT: YUV-BT.601", "'BGR' or 'RGB'"),
        ("NUM_CLASSES: 3", "NUM_CLASSES: 4", "NUM_CLASSES .* is 4, but the head has 3 classes"),
        ("MIN_SIZE_TEST: 1280", "MIN_SIZE_TEST: 0", "does not resize images"),
        ("MIN_SIZE_TEST: 1280", "MIN_SIZE_TEST: [1]", r"a number, got \[1\]"),
        ("MIN_SIZE_TEST: 1280", "MIN_SIZE_TEST: 7.5", "an integer, got 7.5"),
        ("MIN_SIZE_TEST: 1280", "MIN_SIZE_TEST: .inf", "a finite number, got inf"),
        ("MIN_SIZE_TEST: 1280", "MIN_SIZE_TEST: big", "a number, got 'big'"),
        ("STRIDE_IN_1X1: false", "STRIDE_IN_1X1: 1", "true or false, got 1"),
        ("LOSS_TYPE: smooth_l1", "LOSS_TYPE: 1", "a text, got 1"),
        ("(0.3, 0.6)", "0.5", "a list of 2 numbers, got 0.5"),
        ("(0.3, 0.6)", "(0.5", "a list of 2 numbers, got '"),
        ("MODEL:", "MODEL: [", "Cannot read config.yaml as YAML"),
        ("MODEL:", "[" * 5000, "Cannot read config.yaml as YAML .*nested too deeply"),
    ],
)
def test_settings_that_contradict_or_are_not_supported_are_errors(
    old: str, new: str, message: str
) -> None:
    assert old in SETTINGS
    with pytest.raises(CheckpointError, match=message):
        suggest(state(anchors=6), settings=SETTINGS.replace(old, new, 1))


def test_numbers_that_yaml_takes_for_texts_are_read() -> None:
    settings = SETTINGS.replace("SCORE_THRESH_TEST: 0.1", "SCORE_THRESH_TEST: 1e-2")
    assert suggest(state(anchors=6), settings=settings).config.score_threshold == 0.01


def test_settings_run_nothing_and_are_bounded() -> None:
    calls = SETTINGS + "X: !!python/object/apply:os.system ['exit 1']\n"
    assert suggest(state(anchors=6), settings=calls).config.min_size == 1280
    laughs = "A: &a {x: 1}\n" + "".join(
        f"{chr(66 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}\n"
        for i in range(12)
    )
    assert suggest(state(anchors=6), settings=SETTINGS + laughs).config.min_size == 1280
    with pytest.raises(CheckpointError, match="too many for the settings of a training run"):
        suggest(state(anchors=6), settings=SETTINGS + "#" * (1 << 18))


def test_other_yaml_files_are_not_taken_for_settings() -> None:
    assert "min_size" in suggest(state(), settings="names: [a, b]\n").assumed
    assert "min_size" in suggest(state(), settings="RETINANET: 3\n").assumed


def test_a_loss_that_is_not_supported_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for loss, expected in (("giou", "giou"), ("diou", "l1")):
        settings = SETTINGS.replace("LOSS_TYPE: smooth_l1", f"LOSS_TYPE: {loss}")
        with caplog.at_level(logging.WARNING, "focaldet"):
            assert suggest(state(anchors=6), settings=settings).config.box_loss == expected
        assert ("'diou', which is not supported" in caplog.text) is (loss == "diou")


@pytest.mark.parametrize(
    "extras",
    [{"metadata": {"thing_classes": ["a", "b", "c"]}}, {"thing_classes": ("a", "b", "c")}],
)
def test_class_names_are_read_from_the_file_or_its_neighbour(extras: Any) -> None:
    assert suggest(state(), extras=extras).config.class_names == ("a", "b", "c")
    text = json.dumps(extras)
    assert suggest(state(), metadata_json=text).config.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"thing_classes": ["a"]}', "thing_classes in config.json has 1 names, but .* 3 classes"),
        ('{"thing_classes": "abc"}', "a list of names, got 'abc'"),
        ('{"thing_classes": [1, 2, 3]}', "a list of names"),
        ('{"thing_classes": [', "config.json is not valid JSON"),
        ('{"thing_classes": ' + "[" * 100_000, "config.json is not valid JSON"),
    ],
)
def test_wrong_class_names_are_errors(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        suggest(state(), config_json=text)
