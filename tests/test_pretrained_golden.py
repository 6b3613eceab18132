"""Checkpoints that earlier versions wrote still give the same results.

A golden folder is never rewritten. The config.json of `format_1` lacks the options that were added
later; its scores are all 1 in float32. The one of `format_1_mixed` has all options of its time, most of
them not at their defaults, and its scores are clearly different from each other. To write a new folder:

    python -m tests.test_pretrained_golden tests/golden/format_2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.config import FORMAT_VERSION
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).with_name("golden")
FOLDERS = sorted(GOLDEN.glob("format_*"))
MIXED = GOLDEN / "format_1_mixed"

CLEAR = 1e-3  # minimum difference between consecutive scores

MIXED_CONFIG = TINY_CONFIG.replace(
    p6_from="p5",
    p7_relu=False,
    head_depth=2,
    anchor_sizes=(12, 24, 48, 96, 192),
    octave_scales=(1.0, 1.5),
    aspect_ratios=(0.5, 1.0, 2.0),
    anchor_offset=0.25,
    anchor_mode="rounded",
    anchor_plus_one=True,
    box_weights=(2.0, 2.0, 1.5, 1.5),
    log_scale_clamp="both",
    force_match_floor=0.2,
    box_loss="giou",
    normalizer="image",
    score_threshold=0.1,
    pre_nms_top_k=200,
    nms_threshold=0.4,
    clip_to="image_after_nms",
    drop_empty=True,
    inclusive_corners=True,
    uniform_rescale=True,
    image_mean=(0.4, 0.5, 0.6),
    image_std=(0.2, 0.25, 0.3),
    size_divisor=64,
    size_rounding="round",
    antialias=True,
    always_pad=True,
)


def load_golden(folder: Path) -> tuple[RetinaNet, dict[str, Tensor]]:
    """Return the model of a golden folder, and the results that it should give."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    return RetinaNet.from_pretrained(folder, backbone=TinyBackbone()), load_file(
        folder / "expected.safetensors"
    )


def test_there_is_a_golden_checkpoint_of_the_current_format() -> None:
    assert f"format_{FORMAT_VERSION}" in {folder.name for folder in FOLDERS}
    assert all((folder / "expected.safetensors").is_file() for folder in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_options_in_an_old_config_are_kept_and_others_have_their_defaults(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert folder.name.split("_")[1] == str(written.pop("format_version"))
    config = json.loads(load_golden(folder)[0].config.to_json())
    assert {key: config[key] for key in written} == written
    defaults = json.loads(RetinaNetConfig(num_classes=2).to_json())
    added = config.keys() - written.keys()
    assert {key: config[key] for key in added} == {key: defaults[key] for key in added}


def test_the_oldest_config_lacks_options_that_the_mixed_one_has() -> None:
    oldest = json.loads((GOLDEN / "format_1" / "config.json").read_text())
    mixed = json.loads((MIXED / "config.json").read_text())
    later = {"stride_in_1x1", "anchor_plus_one", "clip_to", "size_rounding"}
    assert later <= mixed.keys()
    assert not later & oldest.keys()


def test_the_oldest_checkpoint_still_gives_the_same_maps() -> None:
    model, expected = load_golden(GOLDEN / "format_1")
    image = (torch.arange(3 * 64 * 96) * 37 % 256 / 255).reshape(3, 64, 96)
    with torch.no_grad():
        output = model([image])
    for level, (logits, deltas) in enumerate(zip(output.logits, output.box_deltas, strict=True)):
        assert_close(logits, expected[f"logits.{level}"], rtol=1e-4, atol=1e-5)
        assert_close(deltas, expected[f"deltas.{level}"], rtol=1e-4, atol=1e-5)
    [found] = model.detections(output)
    assert_close(
        found.scores, expected["scores"], rtol=1e-4, atol=1e-5
    )  # all equal, in no particular order


def is_clear(scores: Tensor, boxes: Tensor, labels: Tensor) -> bool:
    """Return whether there are 20 objects of both classes and many sizes, with different scores."""
    if len(scores) != 20 or len(set(labels.tolist())) != 2:
        return False
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    gaps = scores[:-1] - scores[1:]
    return bool((gaps > CLEAR).all() and scores[0] < 0.99 and sides.max() > 6 * sides.min())


def test_the_mixed_checkpoint_still_gives_the_same_detections() -> None:
    model, expected = load_golden(MIXED)
    assert is_clear(expected["scores"], expected["boxes"], expected["labels"])
    [found] = model.predict(expected["image"])
    assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    assert_close(found.labels, expected["labels"], rtol=0, atol=0)
    assert_close(found.boxes, expected["boxes"], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"anchor_offset": 0.5},
        {"anchor_mode": "exact"},
        {"anchor_plus_one": False},
        {"box_weights": (1.0, 1.0, 1.0, 1.0)},
        {"pre_nms_top_k": 10},
        {"nms_threshold": 0.7},
        {"clip_to": "image"},
        {"inclusive_corners": False},
        {"uniform_rescale": False},
        {"image_mean": (0.5, 0.5, 0.5)},
        {"size_divisor": 16},
        {"size_rounding": "floor"},
        {"antialias": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_mixed_checkpoint_would_show_the_loss_of_an_option(change: dict[str, Any]) -> None:
    _, expected = load_golden(MIXED)
    config = RetinaNetConfig.from_json((MIXED / "config.json").read_text()).replace(**change)
    [other] = RetinaNet.from_pretrained(MIXED, config=config, backbone=TinyBackbone()).predict(
        expected["image"]
    )
    assert other.scores.numel() != 20 or bool(
        ((other.boxes - expected["boxes"]).abs() > 1e-2).any()
        | ((other.scores - expected["scores"]).abs() > 1e-4).any()
    )


def random_model(seed: int) -> tuple[RetinaNet, Tensor]:
    """Return a random model and an image that is larger than its input."""
    torch.manual_seed(seed)
    image = torch.randint(256, (3, 12, 19), dtype=torch.uint8)
    model = RetinaNet.from_config(MIXED_CONFIG, backbone=TinyBackbone()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
            if name == "head.box_deltas.weight":
                parameter.mul_(0.5)
            if name == "head.class_logits.weight":
                parameter.mul_(0.4)  # no score near 1
            if name == "head.class_logits.bias":
                parameter.fill_(-1.0)
    return model, image.repeat_interleave(6, 1).repeat_interleave(6, 2)


def write_golden(folder: Path) -> None:
    """Write the first random model with clearly different scores, an image, and the detections."""
    from safetensors.torch import save_file

    seed = 0
    model, image = random_model(seed)
    [found] = model.predict(image)
    while not is_clear(found.scores, found.boxes, found.labels):
        seed += 1
        model, image = random_model(seed)
        [found] = model.predict(image)
    model.save_pretrained(folder)
    expected = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    save_file(
        {key: value.contiguous() for key, value in expected.items()} | {"image": image},
        folder / "expected.safetensors",
    )


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
