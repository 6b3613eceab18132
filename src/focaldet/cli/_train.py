"""Train a detector on a dataset.

With nothing but DATA, the model, the options and the image size are chosen to
suit the data and the machine, and the choices are printed. Every option below
replaces one of them.

If the dataset has no split for validation, a fifth of its images is set apart
for it, the same ones in every run.

Examples:
  focaldet train data                              a sensible model for the data
  focaldet train train.json --val val.json --images photos --output runs/mine
  focaldet train data --start torchvision/retinanet_resnet50_fpn_v2_coco
  focaldet train coco2017 --recipe paper --output runs/r50
  focaldet train --like runs/mine --lr 0.02        the same run with a change
  focaldet train --output runs/mine --resume
  torchrun --nproc-per-node 8 -m focaldet train coco2017 --output runs/r50
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet.cli._arguments import add_device, add_exif, checked_device, named_number

if TYPE_CHECKING:
    import argparse

    from focaldet import RetinaNet
    from focaldet.datasets import AnnotationTable
    from focaldet.training import Recipe, Run

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "train a detector"

_IMAGENET, _NO_WEIGHTS = "imagenet", "none"
_VAL_FRACTION = 0.2
_OUTPUT_VARIABLE = (
    "FOCALDET_TRAIN_OUTPUT"  # tells ranks that Lightning starts which folder was chosen
)

_CONFIG_FIELDS = (
    "backbone", "trainable_stages", "fpn_channels", "head_depth", "head_norm", "head_init",
    "min_size", "max_size", "anchor_sizes", "box_loss", "box_loss_weight", "normalizer",
)  # fmt: skip
_OPTION_FIELDS = (
    "epochs", "batch_size", "accumulate", "optimizer", "lr", "backbone_lr_decay", "schedule",
    "warmup_steps", "weight_decay", "clip_norm", "ema_decay", "patience", "freeze", "sampler",
    "class_weights", "precision", "workers", "on_error", "seed", "checkpoint_every",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        "data",
        type=Path,
        nargs="?",
        metavar="DATA",
        help="dataset: a folder, a COCO .json file, a .csv file, or a YOLO data.yaml (default: that of "
        "the run of --like or --resume)",
    )
    _add_data(parser)
    _add_start(parser)
    _add_model(parser)
    _add_training(parser)
    _add_machine(parser)
    _add_output(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--val", type=Path, metavar="DATA",
        help="dataset for validation (default: the split of DATA for it, or --val-fraction)")  # fmt: skip
    add("--images", type=Path, metavar="FOLDER",
        help="folder of the images (default: looked for near the annotations)")  # fmt: skip
    add_exif(group)
    parser.set_defaults(exif=None)  # that of the run of --like, if there is one
    add("--val-fraction", type=float, metavar="PART",
        help="part of the images to validate on if DATA has no split for it; 0 turns validation off "
        f"(default: {_VAL_FRACTION})")  # fmt: skip
    add("--on-error", choices=["raise", "skip"],
        help="'skip' continues without image files that are missing or unreadable, up to 1 %% of them "
        "(default: raise)")  # fmt: skip
    add("--no-image-check", action="store_true",
        help="do not open every image before the first step, which takes minutes for a million")  # fmt: skip
    add("--min-scale", type=float, metavar="FACTOR",
        help="smallest size of a training image as a fraction of --min-size (default: 0.8, or 1 in the "
        "recipe 'paper')")  # fmt: skip
    add("--vertical-flip", action="store_const", const=0.5,
        help="also mirror images top to bottom, for photos from a microscope or a satellite")  # fmt: skip
    add("--no-horizontal-flip", action="store_const", const=0.0, dest="horizontal_flip",
        help="do not mirror images left to right (default: mirror them, unless the recipe 'small_data' "
        "finds left or right in the name of a class)")  # fmt: skip
    add("--color", action="store_const", const=True, help="also distort the colours of images")
    add("--mosaic", type=float, metavar="P",
        help="probability of showing four images in one, from 0 to 1 (default: 0)")  # fmt: skip


def _add_start(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where to start").add_argument
    add("--recipe", choices=["paper", "small_data"],
        help="'paper' for the paper's settings, 'small_data' for up to a few thousand images "
        "(default: 'paper' for 10,000 images or more on a GPU, otherwise 'small_data')")  # fmt: skip
    add("--start", metavar="MODEL",
        help="detector to fine-tune: a folder, a checkpoint file, a published name (see `focaldet "
        "models`) or a Hugging Face Hub repository (default: a backbone trained on ImageNet)")  # fmt: skip
    add("--like", type=Path, metavar="RUN",
        help="folder of a run to repeat with the changes that are given; DATA is that of the run "
        "unless given")  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "model", "Defaults are those of the recipe, or of the model of --start or --like."
    ).add_argument
    add("--backbone", metavar="NAME",
        help="one of torchvision's, such as resnet50 or mobilenet_v2, or timm/NAME")  # fmt: skip
    add("--backbone-weights", metavar="FILE",
        help="file of classifier weights, 'imagenet' to download them, or 'none' to train from scratch "
        "(default: imagenet)")  # fmt: skip
    add("--trainable-stages", type=int, metavar="N",
        help="number of backbone stages to train, 0 to 5, counted from the last")  # fmt: skip
    add("--fpn-channels", type=int, metavar="N", help="channels of the feature pyramid")
    add("--head-depth", type=int, metavar="N", help="convolutions in each tower of the head")
    add("--head-norm", choices=["none", "group"], help="normalisation in the head")
    add("--head-init", choices=["paper", "fan_in"],
        help="initial weights of the head: 'paper', or 'fan_in' for pyramids with fewer than 256 channels")  # fmt: skip
    add("--min-size", type=int, metavar="PX", help="length of the short side of an image in pixels")
    add("--max-size", type=int, metavar="PX", help="maximum length of the long side in pixels")
    add("--anchor-sizes", type=float, nargs="+", metavar="PX",
        help="anchor sizes of the levels in pixels, five for the usual levels")  # fmt: skip
    add(
        "--box-loss",
        choices=["smooth_l1", "l1", "giou", "diou", "ciou"],
        help="box regression loss",
    )
    add("--box-loss-weight", type=float, metavar="WEIGHT", help="factor of the box regression loss")
    add("--normalizer", choices=["batch", "image", "ema"],
        help="what the losses are divided by: the number of positives in the batch, in each image, or "
        "its moving average")  # fmt: skip


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "training", "Defaults are those of the recipe, or of the run of --like."
    ).add_argument
    add("--epochs", type=int, metavar="N", help="passes over the training data")
    add("--batch-size", type=int, metavar="N", help="images per step on each device")
    add("--accumulate", type=int, metavar="N", help="steps per update of the weights")
    add("--optimizer", choices=["sgd", "adamw"], help="optimizer")
    add("--lr", type=float, metavar="RATE", help="learning rate after the warm-up")
    add("--backbone-lr-decay", type=float, metavar="FACTOR",
        help="ratio of the learning rates of neighbouring backbone stages, e.g. 0.7; the last stage "
        "trains with this factor times --lr (default: 1, the same rate for all)")  # fmt: skip
    add("--schedule", choices=["step", "cosine", "constant"],
        help="learning rate schedule; 'step' divides by 10 after 2/3 and 8/9 of the updates")  # fmt: skip
    add("--warmup", type=int, dest="warmup_steps", metavar="N",
        help="warm-up in updates (default: 500, or a tenth of all updates if that is less)")  # fmt: skip
    add("--weight-decay", type=float, metavar="DECAY", help="weight decay (default: 0.0001)")
    add("--no-norm-decay", action="store_true",
        help="no weight decay for normalisation parameters and biases")  # fmt: skip
    add("--clip", type=float, dest="clip_norm", metavar="NORM", help="maximum gradient norm")
    add("--ema", type=float, dest="ema_decay", metavar="DECAY",
        help="decay of the weight average, e.g. 0.999")  # fmt: skip
    add("--patience", type=int, metavar="N",
        help="stop after N epochs without a higher AP (default: train all epochs)")  # fmt: skip
    add("--freeze", nargs="+", metavar="PART",
        help="parts that do not train, such as backbone or fpn, or a number of backbone stages "
        "(default: none)")  # fmt: skip
    add("--sampler", choices=["shuffle", "repeat_factor"],
        help="'repeat_factor' shows images with rare classes more often (default: shuffle)")  # fmt: skip
    add("--class-weights", nargs="+", type=named_number, metavar="NAME=WEIGHT",
        help="factors of the loss of classes, such as rare=3 (default: 1 for every class)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="random seed (default: 0)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add_device(group)
    add = group.add_argument
    add("--devices", type=int, metavar="N",
        help="devices per machine (default: all GPUs, or 1 for the CPU; under torchrun, as many as it "
        "starts processes)")  # fmt: skip
    add("--nodes", type=int, metavar="N", help="number of machines (default: 1)")
    add("--workers", type=int, metavar="N",
        help="processes per device that read images (default: up to 4, by the number of CPU cores)")  # fmt: skip
    add("--precision", choices=["32-true", "bf16-mixed", "16-mixed", "bf16-true"],
        help="floating-point precision (default: 32-true)")  # fmt: skip


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="FOLDER",
        help="folder of the run, new or empty unless --resume is given (default: runs/NAME after the "
        "dataset, with a number if it exists)")  # fmt: skip
    add("--resume", action="store_true",
        help="resume the run in --output from its last checkpoint; other options are those of the run "
        "unless given")  # fmt: skip
    add("--checkpoint-every", type=int, metavar="N",
        help="updates between checkpoints (default: one checkpoint per epoch)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Choose what is not given, train, and say how to go on."""
    base = _base_run(options)
    notes = {} if base is None or base.recipe is None else base.recipe
    device = checked_device(options.device)
    accelerator = _accelerator(device)
    source = _source(options, base, notes)
    output = _output(options, Path(source["path"]))

    import torch

    from focaldet.datasets import DetectionDataset
    from focaldet.training import recipe, train

    train_table, val_table = _read(source)
    changes = _config_changes(options)
    start = options.start or (None if options.backbone else notes.get("start"))
    weights = options.backbone_weights or notes.get("backbone_weights") or _IMAGENET
    model = None
    if start is not None:
        model = _start_model(start, train_table.class_names, {})
    elif weights == _NO_WEIGHTS:
        changes |= {"backbone_norm": "batch", "trainable_stages": 5}
    elif base is not None and options.backbone_weights:
        changes.setdefault("backbone_norm", "frozen")
    chosen = recipe(
        options.recipe,
        train_table,
        start=None if model is None or base is not None else model.config,
        like=None if base is None else base.folder,
        device=device,
        devices=_count_devices(options, device),
        config_changes=changes,
        option_changes={
            **_option_changes(options),
            "accelerator": accelerator,
            "devices": options.devices or "auto",
            "nodes": options.nodes or 1,
        },
        transform_options=_transform_options(options),
    )
    if _is_first_rank():
        sys.stdout.write(_report(chosen, train_table, val_table, output))
        sys.stdout.flush()
    torch.manual_seed(chosen.options.seed)
    if model is not None and start is not None:
        model = _changed_model(model, start, chosen)
    else:
        model = _new_model(chosen, None if weights == _NO_WEIGHTS else weights)
    train(
        model,
        DetectionDataset(train_table, chosen.train_transform),
        None if val_table is None else DetectionDataset(val_table),
        folder=output,
        options=chosen.options,
        resume=options.resume,
        recipe={**chosen.to_dict(), "data": source, "start": start, "backbone_weights": weights},
    )
    if _is_first_rank():
        sys.stdout.write(f"Try it: focaldet predict {output} PHOTO\n")
    return 0


def _base_run(options: argparse.Namespace) -> Run | None:
    """Return the run whose settings are used, that of --like or the one to be resumed, if any."""
    if options.resume and options.output is None:
        raise ValueError("--resume needs --output, the folder of the run to be resumed.")
    if options.like is not None and (options.start is not None or options.recipe is not None):
        raise ValueError(
            "--like takes the model and the options of a run, so it cannot be combined with --start or "
            "--recipe."
        )
    folder = options.like
    if folder is None and options.resume and (options.output / "run.json").is_file():
        folder = options.output
        for name in ("start", "recipe"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name} cannot be given to resume the run in {str(folder)!r}, which has started "
                    "already. Leave it out, or choose another --output."
                )
    if folder is None:
        if options.data is None:
            raise ValueError("DATA is required, the dataset to train on (or --like RUN).")
        return None
    from focaldet.training import read_run

    return read_run(folder)


def _source(options: argparse.Namespace, base: Run | None, notes: dict[str, Any]) -> dict[str, Any]:
    """Return which data to read, as values for ``run.json``."""
    known = _known_source(base, notes) if base is not None and options.data is None else {}
    given = {
        "path": options.data,
        "images": options.images,
        "val": options.val,
        "val_fraction": options.val_fraction,
        "exif": options.exif,
    }
    source = {**known, **{name: value for name, value in given.items() if value is not None}}
    source = {"val_fraction": _VAL_FRACTION, "exif": "upright", **source}
    if not 0 <= source["val_fraction"] < 1:
        raise ValueError(
            f"--val-fraction must be at least 0 and less than 1, got {source['val_fraction']}."
        )
    return {
        name: os.path.abspath(value) if isinstance(value, Path) else value  # noqa: PTH100  # keeps links
        for name, value in source.items()
    }


def _known_source(base: Run, notes: dict[str, Any]) -> dict[str, Any]:
    source = notes.get("data")
    if isinstance(source, dict) and "path" in source:
        return source
    parts = {part: base.data.get(part) or {} for part in ("train", "val")}
    if "source" not in parts["train"]:
        raise ValueError(
            f"The run in {str(base.folder)!r} does not say which data it was trained on. Pass DATA."
        )
    found = {"path": parts["train"]["source"], "val_fraction": 0.0}
    if "source" in parts["val"]:
        found["val"] = parts["val"]["source"]
    if Path(found["path"]).suffix.lower() in (".json", ".csv") and "image_folder" in parts["train"]:
        found["images"] = parts["train"]["image_folder"]
    return found


def _read(source: dict[str, Any]) -> tuple[AnnotationTable, AnnotationTable | None]:
    """Read the training and validation data, and split it if there is none for validation."""
    from focaldet.datasets import read_splits, split_dataset

    images, exif = source.get("images"), source["exif"]
    tables = read_splits(source["path"], images, exif=exif)
    train_table = tables.get("train", tables.get("all"))
    if train_table is None:
        raise ValueError(
            f"{source['path']!r} has no split 'train', but {_listed(tables)}. Pass the annotations to "
            "train on."
        )
    if source.get("val") is not None:
        val_tables = read_splits(source["val"], images, exif=exif)
        val_table = val_tables.get("val", val_tables.get("all"))
        if val_table is None:
            raise ValueError(
                f"--val {source['val']!r} has no split 'val', but {_listed(val_tables)}. Pass the "
                "annotations to validate on."
            )
        return train_table, val_table
    if "val" in tables:
        return train_table, tables["val"]
    fraction = source["val_fraction"]
    if not fraction:
        return train_table, None
    # The seed is not that of the run, so that runs with different seeds validate on the same images.
    parts = split_dataset(train_table, {"train": 1 - fraction, "val": fraction}, seed=0)
    return parts["train"], parts["val"]


def _listed(names: Any) -> str:
    return " and ".join(map(repr, names)) or "none at all"


def _accelerator(device: str) -> str:
    kind, _, index = device.partition(":")
    if index:
        raise ValueError(
            f"--device {device} cannot be used for training. Use --device {kind}, and choose the GPUs "
            f"with the environment variable CUDA_VISIBLE_DEVICES={index}."
        )
    return "gpu" if kind == "cuda" else kind


def _count_devices(options: argparse.Namespace, device: str) -> int:
    """Return the number of devices of all machines."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    devices: int | None = options.devices
    nodes: int = options.nodes or 1
    if devices is None:
        import torch

        devices = torch.cuda.device_count() if device == "cuda" else 1
    return max(1, devices) * nodes


def _is_first_rank() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _output(options: argparse.Namespace, data: Path) -> Path:
    """Return the folder of the run, a new one if none is given."""
    if options.output is not None:
        return Path(options.output)
    if "LOCAL_RANK" in os.environ and _OUTPUT_VARIABLE in os.environ:  # Lightning has started it
        return Path(os.environ[_OUTPUT_VARIABLE])
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("SLURM_NTASKS", "1") != "1":
        raise ValueError("--output is required where several processes train together.")
    stem = data.parent.name if data.name in ("data.yaml", "data.yml") else data.stem
    name = stem or "run"
    folder, number = Path("runs", name), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{name}-{number}")
    os.environ[_OUTPUT_VARIABLE] = str(folder)
    return folder


def _config_changes(options: argparse.Namespace) -> dict[str, Any]:
    changes = {
        name: value for name in _CONFIG_FIELDS if (value := getattr(options, name)) is not None
    }
    if "head_norm" in changes and changes["head_norm"] == "none":
        changes["head_norm"] = None
    if "anchor_sizes" in changes:
        changes["anchor_sizes"] = tuple(changes["anchor_sizes"])
    return changes


def _option_changes(options: argparse.Namespace) -> dict[str, Any]:
    changes = {
        name: value for name in _OPTION_FIELDS if (value := getattr(options, name)) is not None
    }
    if options.no_norm_decay:
        changes["decay_norm_and_bias"] = False
    if "class_weights" in changes:
        changes["class_weights"] = dict(changes["class_weights"])
    if options.no_image_check:
        changes["check_images"] = False
    if "freeze" in changes:
        parts = changes["freeze"]
        is_count = len(parts) == 1 and parts[0].isdecimal()
        changes["freeze"] = int(parts[0]) if is_count else tuple(parts)
    return changes


def _transform_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("min_scale", "horizontal_flip", "vertical_flip", "color", "mosaic")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _report(
    chosen: Recipe, train_table: AnnotationTable, val_table: AnnotationTable | None, output: Path
) -> str:
    val = "no validation" if val_table is None else f"{len(val_table):,} for validation"
    classes = len(train_table.class_names)
    data = f"Data: {len(train_table):,} images for training, {val}; classes: {classes}."
    return "\n".join([data, *chosen.reasons, f"Output: {output}", ""])


def _start_model(source: str, names: tuple[str, ...], changes: dict[str, Any]) -> RetinaNet:
    from focaldet import RetinaNet

    return RetinaNet.from_pretrained(source, class_names=names, **changes)


def _changed_model(model: RetinaNet, source: str, chosen: Recipe) -> RetinaNet:
    """Return the model with the chosen config, loading it again if the config changes it."""
    old, new = (json.loads(config.to_json()) for config in (model.config, chosen.config))
    names = [name for name in new if new[name] != old[name] and name != "num_classes"]
    changes = {name: getattr(chosen.config, name) for name in names if name != "class_names"}
    if not changes:
        return model
    class_names = chosen.config.class_names or ()
    return _start_model(source, class_names, changes)


def _new_model(chosen: Recipe, weights: str | None) -> RetinaNet:
    from focaldet import RetinaNet
    from focaldet.errors import DownloadError

    try:
        return RetinaNet.from_config(chosen.config, backbone_weights=weights)
    except DownloadError as error:
        raise DownloadError(
            f"{error} Or pass --backbone-weights with another file, or 'none' to train from scratch."
        ) from error
