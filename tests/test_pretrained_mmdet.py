"""What the ``meta`` entry and the names of MMDetection's files say about their models."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close

from focaldet import RetinaNetConfig
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile
from focaldet.pretrained.families import _mmdet
from focaldet.pretrained.families._mmdet_text import evaluate
from tests.helpers import reference_models as plain
from tests.helpers.reference_mmdet import NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

VERSION_1 = """/home/someone/configs/retinanet_r50_fpn_1x.py
# model settings
model = dict(
    type='RetinaNet',
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, out_indices=(0, 1, 2, 3), style='pytorch'),
    neck=dict(type='FPN', start_level=1, add_extra_convs=True, num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=4,
        stacked_convs=4,
        octave_base_scale=4,
        scales_per_octave=3,
        anchor_ratios=[0.5, 1.0, 2.0],
        anchor_strides=[8, 16, 32, 64, 128],
        target_means=[.0, .0, .0, .0],
        target_stds=[1.0, 1.0, 1.0, 1.0],
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=0.11, loss_weight=1.0)))
test_cfg = dict(
    nms_pre=1000, min_bbox_size=0, score_thr=0.1, nms=dict(type='nms', iou_thr=0.6), max_per_img=50)
data_root = 'data/coco/'
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(1000, 600),
        flip=False,
        transforms=[
            dict(type='Resize', keep_ratio=True),
            dict(type='RandomFlip'),
            dict(type='Normalize', **img_norm_cfg),
            dict(type='Pad', size_divisor=64),
            dict(type='ImageToTensor', keys=['img']),
            dict(type='Collect', keys=['img']),
        ])
]
data = dict(
    imgs_per_gpu=2,
    test=dict(ann_file=data_root + 'instances_val2017.json', pipeline=test_pipeline))
"""
VERSION_2 = (
    VERSION_1.replace("num_classes=4", "num_classes=3")
    .replace(
        """octave_base_scale=4,
        scales_per_octave=3,
        anchor_ratios=[0.5, 1.0, 2.0],
        anchor_strides=[8, 16, 32, 64, 128],
        target_means=[.0, .0, .0, .0],
        target_stds=[1.0, 1.0, 1.0, 1.0],""",
        """anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0],
            target_stds=[1.0, 1.0, 1.0, 1.0]),""",
    )
    .replace("iou_thr", "iou_threshold")
)
VERSION_3 = """model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=64),
    backbone=dict(type='ResNet', depth=50, style='caffe'),
    neck=dict(type='FPN', start_level=1, add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=3,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.1,
        nms=dict(type='nms', iou_threshold=0.6), max_per_img=50))
test_cfg = dict(type='TestLoop')
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(1000, 600), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path'))]))
"""
PUBLISHED = "retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth"


def state(
    *, depth: int = 50, classes: int = 3, numbers: bool = False, old: bool = False
) -> dict[str, Tensor]:
    """Return a state dict, on the meta device unless numbers are needed."""
    shapes = plain.layout(NAMES, plain.Body(depth), classes=classes)
    tensors = plain.filled(shapes) if numbers else {}
    for key, shape in shapes.items():
        name = key.replace("_convs.0.conv.", "_convs.0.") if old and "bbox_head" in key else key
        tensors[name] = (
            tensors.pop(key, torch.empty(0)) if numbers else torch.empty(shape, device="meta")
        )
    return tensors


def file_of(
    meta: object = None,
    *,
    name: str = "mine.pth",
    tensors: Mapping[str, Tensor] | None = None,
) -> CheckpointFile:
    extras = {} if meta is None else {"meta": meta}
    return CheckpointFile(state() if tensors is None else tensors, extras, name)


def config_of(text: str, **options: Any) -> RetinaNetConfig:
    return _mmdet.suggest(file_of({"config": text}, **options)).config


@pytest.mark.parametrize(
    ("key", "text"), [("config", VERSION_1), ("config", VERSION_2), ("cfg", VERSION_3)]
)
def test_the_configuration_of_every_version_is_read(key: str, text: str) -> None:
    config, assumed = _mmdet.suggest(file_of({key: text}))
    assert (config.min_size, config.max_size, config.size_divisor) == (600, 1000, 64)
    assert (config.score_threshold, config.nms_threshold) == (0.1, 0.6)
    assert (config.pre_nms_top_k, config.max_detections) == (1000, 50)
    assert config.anchor_sizes == RetinaNetConfig.anchor_sizes
    assert config.octave_scales == RetinaNetConfig.octave_scales
    assert config.image_mean == RetinaNetConfig.image_mean
    assert config.image_std == RetinaNetConfig.image_std
    assert config.stride_in_1x1 is (text is VERSION_3)
    assert assumed == ("class_names",)
    is_version_1 = text is VERSION_1
    assert (config.anchor_mode == "inclusive_rounded") is is_version_1
    assert config.anchor_offset == 0.5 * is_version_1
    assert (
        config.inclusive_corners
        is config.scale_before_nms
        is config.uniform_rescale
        is is_version_1
    )
    assert config.drop_empty is not is_version_1
    assert config.box_loss == ("l1" if text is VERSION_3 else "smooth_l1")


def test_everything_that_tensors_do_not_show_is_assumed_without_a_configuration() -> None:
    config, assumed = _mmdet.suggest(file_of(tensors=state(classes=80)))
    assert config.class_names == COCO_CLASS_NAMES
    assert {"class_names", "stride_in_1x1", "anchor_sizes", "min_size", "image_std"} < set(assumed)
    assert {"num_classes", "backbone", "head_depth"}.isdisjoint(assumed)


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("cat", "dog", "owl")},
        {"CLASSES": ["cat", "dog", "owl"]},
        {"dataset_meta": {"classes": ("cat", "dog", "owl"), "palette": []}},
        {"dataset_meta": {"CLASSES": ("cat", "dog", "owl")}},
        {"classes": ("cat", "dog", "owl")},
    ],
)
def test_class_names_are_read(meta: Any) -> None:
    config, assumed = _mmdet.suggest(file_of(meta))
    assert config.class_names == ("cat", "dog", "owl")
    assert "class_names" not in assumed


def test_class_names_of_the_file_are_preferred_to_those_of_coco() -> None:
    names = tuple(f"class {i}" for i in range(80))
    config = _mmdet.suggest(file_of({"CLASSES": names}, tensors=state(classes=80))).config
    assert config.class_names == names


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"CLASSES": ("cat", "dog")}, "names 2 classes, but its head has 3"),
        ({"CLASSES": (1, 2, 3)}, r"list of strings, but are \(1, 2, 3\).*class_names="),
        (
            {"config": VERSION_2.replace("num_classes=3", "num_classes=4")},
            "num_classes is 4.* 3 classes",
        ),
        (
            {"config": VERSION_1.replace("num_classes=4", "num_classes=3")},
            "num_classes is 3.* 3 classes",
        ),
        (
            {"config": VERSION_2.replace("stacked_convs=4", "stacked_convs=3")},
            "stacked_convs is 3.* 4 l",
        ),
    ],
)
def test_what_contradicts_the_tensors_is_an_error(meta: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _mmdet.suggest(file_of(meta))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type='RetinaNet'", "type='FSAF'", r"model\.type is 'FSAF'.*Only 'RetinaNet'"),
        ("type='RetinaHead'", "type='ATSSHead'", r"bbox_head\.type is 'ATSSHead'"),
        ("type='FPN'", "type='PAFPN'", r"neck\.type is 'PAFPN'"),
        (
            "type='FPN'",
            "type='FPN', upsample_cfg=dict(mode='bilinear')",
            "upsample_cfg.mode is 'bilinear'",
        ),
        ("add_extra_convs=True", "add_extra_convs='on_lateral'", "add_extra_convs is 'on_lateral'"),
        ("depth=50", "depth=50, dilations=(1, 1, 1, 2)", r"dilations is \(1, 1, 1, 2\)"),
        ("type='AnchorGenerator'", "type='LegacyAnchorGenerator'", "LegacyAnchor.* half a pixel"),
        ("strides=[8, ", "strides=[4, ", r"strides of anchors is \(4.*Only \(8, 16"),
        ("strides=[8, ", "scale_major=False, strides=[8, ", "scale_major is False"),
        ("strides=[8, ", "centers=[(0, 0)], strides=[8, ", "centers is"),
        (
            "type='DeltaXYWHBBoxCoder'",
            "type='TBLRBBoxCoder'",
            r"bbox_coder\.type is 'TBLRBBoxCoder'",
        ),
        ("target_stds=[1.0", "clip_border=False, target_stds=[1.0", "clip_border is False"),
        ("target_stds=[1.0, ", "target_stds=[", r"target_stds is \[1\.0, 1\.0, 1\.0\].* 4 numbers"),
        ("use_sigmoid=True", "use_sigmoid=False", "use_sigmoid is False"),
        ("type='nms'", "type='soft_nms'", "nms.type is 'soft_nms'"),
        ("score_thr=0.1", "score_thr='low'", "score_thr is 'low'.* a number"),
        ("score_thr=0.1", "score_thr=2", r"score_threshold must be .* 2"),
        ("score_thr=0.1", "score_thr=f(0.1)", "score_thr is an expression.* pass config="),
        ("keep_ratio=True", "keep_ratio=False", "keep_ratio of Resize.* is False"),
        (
            "keep_ratio=True",
            "keep_ratio=True, interpolation='bicubic'",
            "interpolation of .* 'bicubic'",
        ),
        ("(1000, 600)", "[(1000, 600), (1333, 800)]", "scale of Resize .* one pair"),
        ("(1000, 600)", "0.5", "scale of Resize .* is 0.5"),
        ("size_divisor=64", "size=(640, 640)", "size of Pad"),
        ("dict(type='RandomFlip')", "dict(type='Rotate')", "step of the test pipeline is 'Rotate'"),
        ("std=[58.395, ", "std=[0, ", "std of Normalize .* above 0"),
        ("std=[58.395, ", "std=[", "std of Normalize .* 3 numbers"),
    ],
)
def test_options_without_a_counterpart_are_errors_that_name_them(
    old: str, new: str, message: str
) -> None:
    assert old in VERSION_2
    file = file_of({"config": VERSION_2.replace(old, new, 1)})
    with pytest.raises(CheckpointError, match=message):
        _mmdet.convert(file, _mmdet.suggest(file).config)


@pytest.mark.parametrize(
    ("old", "new", "fields"),
    [
        ("add_extra_convs=True", "add_extra_convs='on_output'", {"p6_from": "p5"}),
        (
            "add_extra_convs=True",
            "add_extra_convs=True, extra_convs_on_inputs=False, relu_before_extra_convs=True",
            {"p6_from": "p5", "p7_relu": True},
        ),
        ("strides=[8, ", "center_offset=0.5, strides=[8, ", {"anchor_offset": 0.5}),
        ("octave_base_scale=4", "octave_base_scale=2", {"anchor_sizes": (16, 32, 64, 128, 256)}),
        (
            "octave_base_scale=4, scales_per_octave=3",
            "scales=[2.0, 4.0, 5.0], base_sizes=[8, 16, 32, 64, 100]",
            {"anchor_sizes": (8, 16, 32, 64, 100), "octave_scales": (2.0, 4.0, 5.0)},
        ),
        ("ratios=[0.5, 1.0, 2.0]", "ratios=[0.3, 1.0, 3.0]", {"aspect_ratios": (0.3, 1.0, 3.0)}),
        ("nms_pre=1000", "nms_pre=-1", {"pre_nms_top_k": None}),
        ("nms_pre=1000, min_bbox_size=0, ", "", {"pre_nms_top_k": None, "drop_empty": False}),
        ("max_per_img=50", "max_per_img=-1", {"max_detections": None}),
        ("type='nms'", "type='nms', class_agnostic=True", {"class_agnostic_nms": True}),
        ("dict(type='Pad', size_divisor=64),", "", {"size_divisor": 1}),
        ("alpha=0.25", "alpha=0.5", {"focal_alpha": 0.5}),
        ("type='SmoothL1Loss', beta=0.11", "type='GIoULoss'", {"box_loss": "giou"}),
        (
            "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]",
            "mean=[0, 51, 102], std=[255, 51, 25.5]",
            {"image_mean": (0.0, 0.2, 0.4), "image_std": (1.0, 0.2, 0.1)},
        ),
        (
            "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True",
            "mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False",
            {"image_mean": (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)},
        ),
    ],
)
def test_other_options_are_read(old: str, new: str, fields: dict[str, Any]) -> None:
    assert old in VERSION_2
    config = config_of(VERSION_2.replace(old, new, 1))
    assert {name: getattr(config, name) for name in fields} == fields


def test_the_number_of_anchors_per_cell_follows_the_configuration() -> None:
    tensors = state()
    tensors[f"{NAMES.classes}.weight"] = torch.empty(4 * 3, 32, 3, 3, device="meta")
    tensors[f"{NAMES.boxes}.weight"] = torch.empty(4 * 4, 32, 3, 3, device="meta")
    text = VERSION_2.replace("scales_per_octave=3", "scales_per_octave=2")
    text = text.replace("ratios=[0.5, 1.0, 2.0]", "ratios=[0.5, 1.0]")
    config = config_of(text, tensors=tensors)
    assert (config.octave_scales, config.num_classes) == ((1.0, 2**0.5), 3)
    with pytest.raises(CheckpointError, match="4 anchors per cell.* 27 class channels"):
        config_of(text)


# --- Conversion ----------------------------------------------------------------------------------


def test_target_stds_and_means_are_folded_into_the_box_layer() -> None:
    tensors = state(numbers=True)
    text = VERSION_2.replace("target_means=[.0, .0, .0, .0]", "target_means=[0.5, 0, 0, -1.0]")
    text = text.replace("target_stds=[1.0, 1.0, 1.0, 1.0]", "target_stds=[0.1, 0.1, 0.2, 0.2]")
    file = file_of({"config": text}, tensors=tensors)
    converted = _mmdet.convert(file, _mmdet.suggest(file).config)
    stds, means = torch.tensor([0.1, 0.1, 0.2, 0.2]), torch.tensor([0.5, 0.0, 0.0, -1.0])
    weight, bias = tensors[f"{NAMES.boxes}.weight"], tensors[f"{NAMES.boxes}.bias"]
    assert_close(
        converted["head.box_deltas.weight"].view(9, 4, -1), weight.view(9, 4, -1) * stds[:, None]
    )
    assert_close(converted["head.box_deltas.bias"].view(9, 4), bias.view(9, 4) * stds + means)


def test_free_anchor_files_are_recognised_by_their_name_without_a_configuration() -> None:
    tensors = state(numbers=True, depth=18)
    name = "retinanet_free_anchor_r50_fpn_1x_coco_20200130-0f67375f.pth"
    file = file_of(name=name, tensors=tensors)
    converted = _mmdet.convert(file, _mmdet.suggest(file).config)["head.box_deltas.bias"]
    ratio = converted / tensors[f"{NAMES.boxes}.bias"]
    assert_close(ratio[:4], torch.tensor([0.1, 0.1, 0.2, 0.2]))


def test_the_order_and_scale_of_channels_follow_the_configuration() -> None:
    tensors = state(numbers=True)
    key, stem = "backbone.conv1.weight", tensors["backbone.conv1.weight"]
    text = VERSION_2.replace(
        "std=[58.395, 57.12, 57.375], to_rgb=True", "std=[51, 51, 102], to_rgb=False"
    )
    file = file_of({"config": text}, tensors=tensors)
    config = _mmdet.suggest(file).config
    assert config.image_std == (0.4, 0.2, 0.2)  # red is the last of the file's channels
    assert_close(_mmdet.convert(file, config)[key], stem.flip(1))
    unit = config.replace(image_std=(1 / 255,) * 3)
    factor = torch.tensor([1 / 102, 1 / 51, 1 / 51])[:, None, None]
    assert_close(_mmdet.convert(file, unit)[key], stem.flip(1) * factor)


def test_buffers_of_the_ghm_loss_are_dropped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    tensors = state() | {
        "bbox_head.loss_cls.edges": torch.zeros(31),
        "bbox_head.loss_cls.acc_sum": torch.zeros(30),
        "bbox_head.loss_bbox.edges": torch.zeros(11),
    }
    file = file_of(tensors=tensors)
    with caplog.at_level(logging.INFO, logger="focaldet"):
        converted = _mmdet.convert(file, _mmdet.suggest(file).config)
    assert not [key for key in converted if "loss" in key]
    [record] = caplog.records
    assert "Dropped 3 buffers of the loss" in record.getMessage()
    assert "bbox_head.loss_cls.acc_sum" in record.getMessage()


# --- Version 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("meta", "name", "old", "is_version_1"),
    [
        (None, "retinanet_r50_fpn_1x_20181125-7b0c2548.pth", False, True),
        (None, "retinanet_x101_32x4d_fpn_1x_20190501-967812ba.pth", False, True),
        (None, PUBLISHED, False, False),
        ({"mmdet_version": "1.0rc0+6a64abf"}, PUBLISHED, False, False),
        ({"mmdet_version": "1.1"}, "pisa_retinanet_r50_fpn_1x_coco-76409952.pth", False, False),
        ({"mmdet_version": "1.2.0"}, "mine.pth", False, True),
        ({"mmdet_version": "0.6.0"}, "mine.pth", False, True),
        ({"mmdet_version": "2.0.0"}, "retinanet_r50_fpn_1x_20181125-7b0c2548.pth", False, False),
        ({"mmdet_version": "3.3.0"}, "mine.pth", False, False),
        ({"mmdet_version": 1}, "mine.pth", False, False),
        (None, "mine.pth", True, True),
        (None, "mine.pth", False, False),
        ({"config": VERSION_1, "mmdet_version": "2.0.0"}, "mine.pth", False, True),
        ({"config": VERSION_2, "mmdet_version": "1.0.0"}, "mine.pth", False, False),
    ],
)
def test_files_of_version_1_are_recognised(
    meta: Any, name: str, old: bool, is_version_1: bool
) -> None:
    config = _mmdet.suggest(file_of(meta, name=name, tensors=state(old=old))).config
    assert (config.anchor_mode == "inclusive_rounded") is is_version_1
    assert config.log_scale_clamp == "both"


# --- The text ------------------------------------------------------------------------------------


def test_expressions_of_literals_and_earlier_names_are_evaluated() -> None:
    text = "a = 2\nb = dict(c=a * 3 - 1, **dict(d='x' + 'y'))\ne = {'f': [b, (None, -0.5)], 3: 4}"
    assert evaluate(text) == {
        "a": 2,
        "b": {"c": 5, "d": "xy"},
        "e": {"f": [{"c": 5, "d": "xy"}, (None, -0.5)]},
    }


def test_settings_of_base_files_are_merged() -> None:
    base = "model = dict(neck=dict(type='FPN', num_outs=5), head=dict(a=1, b=2))\n"
    text = (
        base + "_base_ = './base.py'\nmodel = dict(head=dict(b=3), neck=dict(_delete_=True, c=4))"
    )
    assert evaluate(text)["model"] == {"neck": {"_delete_": True, "c": 4}, "head": {"a": 1, "b": 3}}


def test_nothing_in_a_configuration_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    call = f"open({str(trace)!r}, 'w').write('ran')"
    text = f"import os\na = {call}\n{call}\nb = [{call} for x in 'ab']\nc = lambda: {call}\nd = a\ne = 1\ne += 1"
    found = evaluate(text)
    assert set(map(repr, found.values())) == {"an expression"}
    assert set(found) == {"a", "b", "c", "d", "e"}
    config_of(VERSION_2 + text)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model = dict(", "line 1 is not Python source"),
        ("x = 1\ny = = 2", "line 2 is not Python source"),
        ("x = '\0'", "not Python source"),
        ("x = " + "[" * 5000 + "]" * 5000, "line 1 is not Python source|nested too deeply"),
        ("x = " + "-" * 100_000 + "1", "nested too deeply"),
        ("x = " + "1 + " * 100_000 + "1", "nested too deeply"),
        ("x = " + "[" * 150 + "]" * 150, "nested too deeply"),
        ("x = 1\n" * 300_000, "has 1800000 characters"),
        (
            "a = dict("
            + ", ".join(f"k{i}=1" for i in range(1000))
            + ")\n"
            + "b = dict(**a)\n" * 200,
            "nested too deeply",
        ),
    ],
    ids=["cut", "syntax", "null", "brackets", "signs", "sums", "lists", "long", "copies"],
)
def test_unreadable_texts_are_reported_and_the_rest_is_assumed(
    text: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=reason):
        evaluate(text)
    file = file_of({"config": text + "\n# style='caffe'"})
    config, assumed = _mmdet.suggest(file)
    assert config.stride_in_1x1
    assert "min_size" in assumed
    _mmdet.convert(file, config)
    [record] = caplog.records
    assert "'mine.pth' cannot be read, because" in record.getMessage()


def test_values_do_not_grow_without_bound() -> None:
    text = "a = 'xxxxxxxxxx'\nb = 10.0\n" + "a = a + a\nb = b * b\n" * 60
    found = evaluate(text)
    assert [repr(value) for value in found.values()] == ["an expression"] * 2
