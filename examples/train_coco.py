"""Train RetinaNet on COCO 2017, or on your own dataset in COCO, Pascal VOC, YOLO or CSV format.

    pip install '.[train]'
    python examples/train_coco.py --data coco2017 --output runs/r50

COCO is expected in coco2017/{annotations,train2017,val2017}. For your own dataset:

    python examples/train_coco.py --train train.json --val val.json --images photos --output runs/mine

The defaults are the paper's: ResNet-50, 800 pixels, SGD, and a learning rate of 0.01 for 16 images
per update, scaled with their number. On several GPUs:

    torchrun --nproc-per-node 8 examples/train_coco.py --data coco2017 --output runs/r50
"""

from __future__ import annotations

import os

# Waiting threads sleep instead of spinning; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path
from urllib.error import URLError

import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import BACKBONES
from focaldet.datasets import (
    AnnotationTable,
    DetectionDataset,
    read_annotations,
    read_coco,
    train_transform,
)
from focaldet.datasets.readers import find_reader
from focaldet.pretrained import read_tensors
from focaldet.training import TrainingError, TrainingOptions, train


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, metavar="FOLDER", help="folder of COCO 2017")
    add("--train", type=Path, metavar="PATH",
        help="training annotations of your own dataset: a COCO .json file, a .csv file, a YOLO "
        "data.yaml, or a Pascal VOC folder")  # fmt: skip
    add("--val", type=Path, metavar="PATH",
        help="validation annotations of your own dataset (default: no validation)")  # fmt: skip
    add("--splits", nargs=2, default=("train", "val"), metavar=("TRAIN", "VAL"),
        help="names of the splits of a data.yaml or Pascal VOC folder (default: train val)")  # fmt: skip
    add("--images", type=Path, metavar="FOLDER",
        help="folder of the images of your own dataset, for COCO and CSV files")  # fmt: skip
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, metavar="N",
        help=f"processes per GPU that read images (default: {workers}, the number of CPU cores up to "
        "4)")  # fmt: skip
    add("--on-error", default="raise", choices=["raise", "skip"],
        help="'skip' continues without image files that are missing or unreadable, up to 1 %% of them "
        "(default: raise)")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet50", choices=sorted(BACKBONES), metavar="NAME",
        help=f"one of {', '.join(sorted(BACKBONES))} (default: resnet50)")  # fmt: skip
    add("--backbone-weights", default="imagenet", metavar="FILE",
        help="file of classifier weights, 'imagenet' to download those of torchvision, or 'none' to "
        "train from scratch (default: imagenet)")  # fmt: skip
    add("--trainable-stages", type=int, default=3, metavar="N",
        help="number of backbone stages to train, 0 to 5, counted from the last (default: 3)")  # fmt: skip
    add("--fpn-channels", type=int, default=256, metavar="N",
        help="channels of the feature pyramid (default: 256)")  # fmt: skip
    add("--head-depth", type=int, default=4, metavar="N",
        help="convolutions in each tower of the head (default: 4)")  # fmt: skip
    add("--head-norm", default="none", choices=["none", "group"],
        help="normalisation in the head; 'group' helps on small datasets (default: none)")  # fmt: skip
    add("--min-size", type=int, default=800, metavar="PX",
        help="length of the short side of an image in pixels (default: 800)")  # fmt: skip
    add("--max-size", type=int, default=1333, metavar="PX",
        help="maximum length of the long side in pixels (default: 1333)")  # fmt: skip
    add("--anchor-sizes", type=float, nargs=5, default=(32, 64, 128, 256, 512), metavar="PX",
        help="anchor sizes of the five levels in pixels (default: 32 64 128 256 512)")  # fmt: skip
    add("--box-loss", default="smooth_l1", choices=["smooth_l1", "l1", "giou"],
        help="box regression loss (default: smooth_l1)")  # fmt: skip
    add("--box-loss-weight", type=float, default=1.0, metavar="WEIGHT",
        help="factor of the box regression loss (default: 1)")  # fmt: skip
    add("--normalizer", default="batch", choices=["batch", "image", "ema"],
        help="what the losses are divided by: the number of positives in the batch, in each image, or "
        "its moving average (default: batch)")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=12, metavar="N",
        help="passes over the training data (default: 12)")  # fmt: skip
    add("--batch-size", type=int, default=2, metavar="N",
        help="images per step on each GPU (default: 2)")  # fmt: skip
    add("--accumulate", type=int, default=1, metavar="N",
        help="steps per update of the weights (default: 1)")  # fmt: skip
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="optimizer (default: sgd)")
    add("--lr", type=float,
        help="learning rate (default: 0.01, or 0.0001 for adamw, times images per update / 16)")  # fmt: skip
    add("--schedule", default="step", choices=["step", "cosine", "constant"],
        help="learning rate schedule; 'step' divides by 10 after 2/3 and 8/9 of the updates (default: "
        "step)")  # fmt: skip
    add("--warmup", type=int, metavar="N",
        help="warm-up in updates (default: 500, or a tenth of all updates if that is less)")  # fmt: skip
    add("--weight-decay", type=float, default=1e-4, metavar="DECAY",
        help="weight decay (default: 0.0001)")  # fmt: skip
    add("--no-norm-decay", action="store_true",
        help="no weight decay for normalisation parameters and biases")  # fmt: skip
    add("--clip", type=float, metavar="NORM", help="maximum gradient norm (default: no clipping)")
    add("--ema", type=float, metavar="DECAY",
        help="decay of the weight average, e.g. 0.999 (default: no averaging)")  # fmt: skip
    add("--multi-scale", action="store_true",
        help="resize training images to short sides of 0.8 to 1 times --min-size")  # fmt: skip
    add("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"],
        help="floating-point precision (default: 32-true)")  # fmt: skip
    add("--accelerator", default="auto", help="auto, gpu, cpu, ... (default: auto)")
    add("--devices", type=int, metavar="N", help="GPUs per machine (default: all)")
    add("--nodes", type=int, default=1, metavar="N", help="number of machines (default: 1)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, metavar="FOLDER",
        help="folder of the run, which must be new or empty unless --resume is given")  # fmt: skip
    add("--resume", action="store_true", help="resume the run in --output from its last checkpoint")
    add("--checkpoint-every", type=int, metavar="N",
        help="updates between checkpoints (default: one checkpoint per epoch)")  # fmt: skip
    options = parser.parse_args()
    if (options.data is None) == (options.train is None):
        parser.error("pass either --data or --train")
    return options


def read_part(path: Path, images: Path | None, split: str) -> AnnotationTable:
    """Read a file, or one part of a folder or data.yaml that holds several."""
    has_splits = find_reader(path).splits(path) is not None
    return read_annotations(path, images, split=split if has_splits else None)


def load_data(options: argparse.Namespace) -> tuple[DetectionDataset, DetectionDataset | None]:
    """Read the annotations; images are read during training."""
    sizes = [options.min_size]
    if options.multi_scale:
        sizes = [round(options.min_size * part / 25) for part in range(20, 26)]
    transform = train_transform(min_sizes=sizes, max_size=options.max_size)
    if options.data is not None:
        tables = [
            read_coco(
                options.data / "annotations" / f"instances_{split}2017.json",
                options.data / f"{split}2017",
            )
            for split in ("train", "val")
        ]
    else:
        parts = zip((options.train, options.val), options.splits, strict=True)
        tables = [read_part(path, options.images, split) for path, split in parts if path]
    train_data = DetectionDataset(tables[0], transform)
    return train_data, DetectionDataset(tables[1]) if len(tables) > 1 else None


def build_model(options: argparse.Namespace, class_names: tuple[str, ...]) -> RetinaNet:
    """Build the detector, with the weights of its backbone."""
    weights = None
    if options.backbone_weights == "imagenet":
        import torchvision

        entry = torchvision.models.get_model_weights(options.backbone).IMAGENET1K_V1
        try:
            weights = entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except URLError as error:
            raise OSError(
                f"Cannot download {entry.url} ({error.reason}). Download it elsewhere and pass the "
                "file with --backbone-weights."
            ) from error
    elif options.backbone_weights != "none":
        weights = read_tensors(Path(options.backbone_weights))
    torch.manual_seed(options.seed)
    config = RetinaNetConfig(
        num_classes=len(class_names),
        class_names=class_names,
        backbone=options.backbone,
        backbone_norm="batch" if weights is None else "frozen",
        trainable_stages=options.trainable_stages,
        fpn_channels=options.fpn_channels,
        head_depth=options.head_depth,
        head_norm=None if options.head_norm == "none" else options.head_norm,
        anchor_sizes=tuple(options.anchor_sizes),
        box_loss=options.box_loss,
        box_loss_weight=options.box_loss_weight,
        normalizer=options.normalizer,
        min_size=options.min_size,
        max_size=options.max_size,
    )
    return RetinaNet.from_config(config, backbone_weights=weights)


def main() -> None:
    """Train a detector."""
    options = parse()
    try:
        train_data, val_data = load_data(options)
        train(
            build_model(options, train_data.class_names),
            train_data,
            val_data,
            folder=options.output,
            resume=options.resume,
            options=TrainingOptions(
                epochs=options.epochs,
                batch_size=options.batch_size,
                accumulate=options.accumulate,
                optimizer=options.optimizer,
                lr=options.lr,
                weight_decay=options.weight_decay,
                decay_norm_and_bias=not options.no_norm_decay,
                schedule=options.schedule,
                warmup_steps=options.warmup,
                clip_norm=options.clip,
                ema_decay=options.ema,
                precision=options.precision,
                accelerator=options.accelerator,
                devices=options.devices or "auto",
                nodes=options.nodes,
                workers=options.workers,
                on_error=options.on_error,
                seed=options.seed,
                checkpoint_every=options.checkpoint_every,
            ),
        )
    except (TrainingError, OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
