"""Recipes: what is chosen for which data and machine, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focaldet import RetinaNetConfig
from focaldet.datasets import AnnotationTable
from focaldet.training import Recipe, TrainingOptions, recipe


def table(images: int = 292, *, size: tuple[int, int] = (480, 640), side: float = 60) -> Any:
    """Return a table of images of one size, each with one square object."""
    boxes = np.tile([10.0, 10.0, 10 + side, 10 + side], (images, 1))
    return AnnotationTable(
        source=Path("data"),
        image_folder=Path("photos"),
        file_names=[f"{i}.jpg" for i in range(images)],
        image_ids=np.arange(images),
        image_sizes=np.tile(np.asarray(size, np.int32), (images, 1)),
        class_names=("cat", "owl"),
        category_ids=(1, 2),
        boxes=boxes,
        labels=np.arange(images) % 2,
        areas=np.full(images, side**2),
        crowd=np.zeros(images, np.bool_),
        annotation_ids=np.arange(images),
        image_indices=np.arange(images),
    )


def reasons(chosen: Recipe) -> str:
    return " ".join(chosen.reasons)


def test_the_paper_is_the_defaults_of_the_library() -> None:
    chosen = recipe("paper", table(), device="cuda", devices=8)
    assert chosen.config == RetinaNetConfig.paper(2, ("cat", "owl"))
    assert chosen.options == TrainingOptions(batch_size=2, workers=chosen.options.workers)
    [flip, resize, *_] = chosen.train_transform.transforms
    assert type(flip).__name__ == "RandomHorizontalFlip"
    assert (resize.min_size, resize.max_size) == ([800], 1333)


@pytest.mark.parametrize("devices", [1, 2, 4, 16])
def test_the_paper_has_16_images_per_update(devices: int) -> None:
    options = recipe("paper", table(), device="cpu", devices=devices).options
    assert options.batch_size * options.accumulate * devices == 16
    assert options.batch_size <= 2


def test_a_batch_size_of_the_paper_keeps_the_images_per_update() -> None:
    options = recipe("paper", table(), device="cpu", option_changes={"batch_size": 4}).options
    assert (options.batch_size, options.accumulate) == (4, 4)


def test_small_data_is_what_the_accuracy_page_recommends() -> None:
    chosen = recipe("small_data", table(292), device="cpu")
    config, options = chosen.config, chosen.options
    assert (config.backbone, config.fpn_channels) == ("mobilenet_v2", 64)
    assert (config.head_norm, config.box_loss, config.box_loss_weight) == ("group", "giou", 2.0)
    assert config.head_init == "fan_in"
    assert (options.optimizer, options.lr, options.schedule) == ("adamw", 1e-3, "cosine")
    assert (options.clip_norm, options.ema_decay) == (10.0, 0.99)
    assert (options.epochs, options.batch_size) == (25, 4)


@pytest.mark.parametrize(
    ("images", "device", "name", "why"),
    [
        (9_999, "cuda", "small_data", "only 9,999 images (fewer than 10,000)"),
        (10_000, "cuda", "paper", "there is a GPU and the data has 10,000 images"),
        (10_000, "cpu", "small_data", "because there is no GPU"),
    ],
)
def test_the_recipe_follows_from_the_data_and_the_machine(
    images: int, device: str, name: str, why: str
) -> None:
    chosen = recipe(data=table(images), device=device)
    assert chosen.name == name
    assert why in reasons(chosen)


def test_a_gpu_gets_a_resnet_and_larger_images() -> None:
    chosen = recipe("small_data", table(size=(900, 1200)), device="cuda")
    config = chosen.config
    assert (config.backbone, config.fpn_channels) == ("resnet50", 256)
    assert (config.min_size, config.max_size) == (800, 1333)
    assert chosen.options.lr == 1e-4


@pytest.mark.parametrize(("size", "short"), [((480, 640), 320), ((150, 90), 96), ((20, 20), 32)])
def test_images_are_not_enlarged_without_a_gpu(size: tuple[int, int], short: int) -> None:
    config = recipe("small_data", table(size=size), device="cpu").config
    assert (config.min_size, config.max_size) == (short, round(short * 1333 / 800))


def test_images_of_unknown_size_get_the_usual_one() -> None:
    assert recipe("small_data", table(size=(0, 0)), device="cpu").config.min_size == 320


@pytest.mark.parametrize(("images", "epochs"), [(5, 100), (292, 25), (20_000, 12)])
def test_the_number_of_epochs_follows_from_the_number_of_images(images: int, epochs: int) -> None:
    chosen = recipe("small_data", table(images), device="cpu")
    assert chosen.options.epochs == epochs


def test_anchors_are_chosen_for_the_objects_at_the_input_size() -> None:
    small, large = (recipe("small_data", table(side=side), device="cpu") for side in (30, 60))
    assert list(large.config.anchor_sizes) == [32, 64, 128, 256, 512]
    assert "Anchors of the default sizes, because they reach 100.0% of the objects" in reasons(
        large
    )
    smallest = small.config.anchor_sizes[0]
    assert smallest < 30  # 30 * 320 / 480 = 20 pixels
    assert small.config.anchor_sizes == tuple(
        pytest.approx(smallest * 2**level, rel=0.01) for level in range(5)
    )
    assert small.config.aspect_ratios == (0.5, 1.0, 2.0)
    assert (
        "they reach 100.0% and the default ones 0.0% of the objects with an IoU of 0.5"
        in reasons(small)
    )


@pytest.mark.parametrize(
    "changes", [{"anchor_sizes": (8,) * 5}, {"aspect_ratios": (1.0,)}, {"assigner": "atss"}]
)
def test_anchors_are_not_changed_if_the_caller_says_them_or_matches_otherwise(
    changes: dict[str, Any],
) -> None:
    default = RetinaNetConfig(num_classes=2)
    chosen = recipe("small_data", table(side=30), device="cpu", config_changes=changes).config
    assert chosen.anchor_sizes == changes.get("anchor_sizes", default.anchor_sizes)
    assert chosen.aspect_ratios == changes.get("aspect_ratios", default.aspect_ratios)


def test_a_few_or_degenerate_objects_do_not_change_the_anchors() -> None:
    few = recipe("small_data", table(19, side=30), device="cpu")
    flat = recipe("small_data", table(100, side=0), device="cpu")
    for chosen, count in ((few, 19), (flat, 0)):
        assert chosen.config.anchor_sizes == RetinaNetConfig(num_classes=2).anchor_sizes
        assert f"the data has only {count} objects of a known size" in reasons(chosen)


def test_the_sizes_of_the_transform_are_those_of_the_config() -> None:
    chosen = recipe("small_data", table(), device="cpu", min_size=200)
    resize = chosen.train_transform.transforms[1]
    assert (max(resize.min_size), min(resize.min_size)) == (200, 160)
    assert resize.max_size == chosen.config.max_size == round(200 * 1333 / 800)


def test_what_the_caller_says_is_not_changed() -> None:
    chosen = recipe(
        "small_data",
        table(),
        device="cpu",
        backbone="resnet18",
        epochs=3,
        config_changes={"box_loss": "l1", "max_size": 400},
        option_changes={"lr": 0.5, "batch_size": 8},
        transform_options={"min_scale": 1.0, "vertical_flip": 0.5},
    )
    assert (chosen.config.backbone, chosen.config.box_loss) == ("resnet18", "l1")
    assert chosen.config.max_size == 400
    options = chosen.options
    assert (options.epochs, options.lr, options.batch_size) == (3, 0.5, 8)
    names = [type(step).__name__ for step in chosen.train_transform.transforms]
    assert "RandomVerticalFlip" in names
    assert chosen.to_dict()["transform_options"] == {"min_scale": 1.0, "vertical_flip": 0.5}


def test_a_trained_detector_keeps_its_network_and_image_size() -> None:
    start = RetinaNetConfig(num_classes=80, backbone="resnet34", min_size=600, max_size=1000)
    chosen = recipe("small_data", table(), start=start, device="cpu")
    assert chosen.config == start.replace(num_classes=2, class_names=("cat", "owl"))
    assert (chosen.options.optimizer, chosen.options.lr) == ("adamw", 1e-4)
    assert "keeps its network (resnet34) and image size (600/1000" in reasons(chosen)
    smaller = recipe("small_data", table(), start=start, device="cpu", min_size=300).config
    assert (smaller.min_size, smaller.max_size) == (300, 500)


def test_the_reasons_are_sentences() -> None:
    for device in ("cpu", "cuda"):
        lines = str(recipe(data=table(), device=device)).splitlines()
        assert len(lines) >= 4
        assert all(line[0].isupper() and line.endswith(".") for line in lines), lines


def test_each_choice_is_explained() -> None:
    lines = recipe("small_data", table(292), device="cpu").reasons
    assert lines[0] == "Recipe 'small_data', as requested. The data has 292 images."
    assert lines[3:] == (
        "Anchors of the default sizes, because they reach 100.0% of the objects with an IoU of 0.5 or more.",
        "The first 2 of 5 stages of the backbone are frozen, as is usual with pretrained weights.",
        "Updates use 4 images, so that there are many updates even with few images.",
        "Epochs: 25, because 292 images make 73 updates per epoch, and this recipe aims at 1,800 in all.",
        "Learning rate: 0.001, which was tried with AdamW and this backbone.",
        (
            "Images are mirrored left to right at random, and not top to bottom, because most scenes have "
            "an upright direction."
        ),
        "Training a mobilenet_v2 at 320 pixels for 25 epochs, about 1,825 updates of 4 images.",
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            {"epochs": 7, "option_changes": {"lr": 0.02, "batch_size": 2}},
            (
                "Epochs: 7, as requested.",
                "Learning rate: 0.02, as requested.",
                "Updates use 2 images, as",
            ),
        ),
        ({"device": "cuda"}, ("Learning rate: 0.0001, the usual one for AdamW.",)),
        ({"config_changes": {"trainable_stages": 5}}, ("All stages of the backbone train.",)),
        ({"option_changes": {"freeze": ("fpn",)}}, ("Frozen, as requested: ('fpn',).",)),
        (
            {"option_changes": {"lr": None}},
            ("Learning rate: the optimizer's default, as requested.",),
        ),
        ({"start": RetinaNetConfig(num_classes=9)}, ("0.0001, because a trained detector needs",)),
        ({"option_changes": {"optimizer": "sgd"}}, ("0.001, which is meant for AdamW, so set",)),
        (
            {"transform_options": {"vertical_flip": 0.5}},
            ("Images are mirrored left to right and top to bottom at random, as requested.",),
        ),
        (
            {"transform_options": {"horizontal_flip": 0.0, "vertical_flip": 0.5}},
            ("Images are mirrored top to bottom at random, as requested.",),
        ),
    ],
)
def test_the_explanations_follow_what_the_caller_says(
    arguments: dict[str, Any], lines: tuple[str, ...]
) -> None:
    said = reasons(recipe("small_data", table(), **{"device": "cpu", **arguments}))
    assert [line for line in lines if line not in said] == []


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (("turn left", "turn_right"), False),
        (("hand-R", "LeftHand"), False),
        (("leftover", "bright"), True),
        (("left2", "copyright"), False),
    ],
)
def test_images_are_not_mirrored_if_a_class_is_on_one_side(
    names: tuple[str, str], *, mirrored: bool
) -> None:
    data = dataclasses.replace(table(), class_names=names)
    chosen = recipe("small_data", data, device="cpu")
    first = type(chosen.train_transform.transforms[0]).__name__
    assert (first == "RandomHorizontalFlip") == mirrored
    assert chosen.transform_options == ({} if mirrored else {"horizontal_flip": 0.0})
    assert (
        "not mirrored, because left and right differ in the class" in reasons(chosen)
    ) != mirrored
    kept = recipe("small_data", data, device="cpu", transform_options={"horizontal_flip": 0.5})
    assert type(kept.train_transform.transforms[0]).__name__ == "RandomHorizontalFlip"


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="data is required"):
        recipe("paper")
    with pytest.raises(ValueError, match="Unknown name 'papers'; choose 'paper' or 'small_data'"):
        recipe("papers", table())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'data' has no images"):
        recipe(data=table(0))
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        recipe(data=table(), device="cpu", epochs=0)
    with pytest.raises(TypeError, match="colour"):
        recipe(data=table(), device="cpu", config_changes={"colour": 1})
    for name in ("paper", "small_data"):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            recipe(name, table(), device="cpu", option_changes={"batch_size": 0})
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        recipe(data=table(), device="cpu", option_changes={"accumulate": 0})
    with pytest.raises(TypeError, match="like cannot be combined with name or start"):
        recipe("paper", table(), like="run")
    with pytest.raises(FileNotFoundError, match="No such folder: 'none'"):
        recipe(data=table(), like="none")
