"""Train RetinaNet on COCO 2017, or on data of your own in COCO, Pascal VOC, YOLO or CSV form.

    pip install '.[train]'
    python examples/train_coco.py --data coco2017 --output runs/r50

COCO is expected as coco2017/{annotations,train2017,val2017}. For other data:

    python examples/train_coco.py --train train.json --val val.json --images photos --output runs/mine

The defaults are the paper's: ResNet-50, 800 pixels, SGD, a learning rate of 0.01 for 16 images that
is scaled with the batch. On several GPUs: torchrun --nproc-per-node 8 examples/train_coco.py ...
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep: before torch

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
from focaldet.pretrained._reading import read_tensors
from focaldet.training import TrainingError, TrainingOptions, train


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="folder of COCO 2017")
    add("--train", type=Path, metavar="PATH",
        help="your own annotations to train on: a COCO .json, a .csv, a YOLO data.yaml, or a folder "
        "of Pascal VOC")  # fmt: skip
    add("--val", type=Path, metavar="PATH", help="your own annotations to validate on")
    add("--splits", nargs=2, default=("train", "val"), metavar=("TRAIN", "VAL"),
        help="what the two parts of a folder or data.yaml are called (default: train val)")  # fmt: skip
    add("--images", type=Path, help="folder of your own images (COCO and CSV)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers,
        help=f"processes a GPU that read images (default: {workers}; at most 4, one a core)")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet50", choices=sorted(BACKBONES), metavar="NAME",
        help=f"one of {', '.join(sorted(BACKBONES))} (default: resnet50)")  # fmt: skip
    add("--backbone-weights", default="imagenet", metavar="FILE",
        help="classifier weights in a file; 'imagenet' downloads torchvision's (default), 'none' "
        "trains from scratch")  # fmt: skip
    add("--trainable-stages", type=int, default=3, metavar="N",
        help="of the backbone's five, from the last back (default: 3)")  # fmt: skip
    add("--fpn-channels", type=int, default=256, metavar="N", help="default: 256")
    add("--head-depth", type=int, default=4, metavar="N",
        help="convolutions of a tower (default: 4)")  # fmt: skip
    add("--head-norm", default="none", choices=["none", "group"],
        help="norm of the towers; 'group' helps on small data sets (default: none)")  # fmt: skip
    add("--min-size", type=int, default=800, help="short side in pixels (default: 800)")
    add("--max-size", type=int, default=1333, help="longest long side (default: 1333)")
    add("--anchor-sizes", type=float, nargs=5, default=(32, 64, 128, 256, 512), metavar="PX",
        help="of the five levels (default: 32 64 128 256 512)")  # fmt: skip
    add("--box-loss", default="smooth_l1", choices=["smooth_l1", "l1", "giou"],
        help="default: smooth_l1")  # fmt: skip
    add("--box-loss-weight", type=float, default=1.0, metavar="W", help="default: 1")
    add("--normalizer", default="batch", choices=["batch", "image", "ema"],
        help="what losses are divided by: positives of the batch, of each image, or their running "
        "mean (default: batch)")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=12, help="default: 12")
    add("--batch-size", type=int, default=2, help="images a step on each GPU (default: 2)")
    add("--accumulate", type=int, default=1, help="steps an update (default: 1)")
    add("--optimizer", default="sgd", choices=["sgd", "adamw"], help="default: sgd")
    add("--lr", type=float, help="default: 0.01 (adamw: 0.0001) x images an update / 16")
    add("--schedule", default="step", choices=["step", "cosine", "constant"],
        help="step divides by 10 after 2/3 and 8/9 of the run (default)")  # fmt: skip
    add("--warmup", type=int, metavar="N", help="updates (default: 500, or a tenth of the run)")
    add("--weight-decay", type=float, default=1e-4, help="default: 0.0001")
    add("--no-norm-decay", action="store_true", help="no weight decay on norms and biases")
    add("--clip", type=float, metavar="NORM", help="clip the gradient's norm")
    add("--ema", type=float, metavar="DECAY", help="average the weights, as with 0.999")
    add("--multi-scale", action="store_true",
        help="train at short sides of 0.8 to 1 times --min-size")  # fmt: skip
    add("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"],
        help="default: 32-true")  # fmt: skip
    add("--accelerator", default="auto", help="auto (default), gpu, cpu ...")
    add("--devices", type=int, help="GPUs on this machine (default: all)")
    add("--nodes", type=int, default=1, help="machines (default: 1)")
    add("--seed", type=int, default=0, help="default: 0")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="folder of the run, new or empty")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--checkpoint-every", type=int, metavar="N",
        help="updates between checkpoints (default: at each epoch's end only)")  # fmt: skip
    options = parser.parse_args()
    if (options.data is None) == (options.train is None):
        parser.error("give either --data or --train")
    return options


def read_part(path: Path, images: Path | None, split: str) -> AnnotationTable:
    """Read a file, or one part of a folder or data.yaml that holds several."""
    has_splits = find_reader(path).splits(path) is not None
    return read_annotations(path, images, split=split if has_splits else None)


def load_data(options: argparse.Namespace) -> tuple[DetectionDataset, DetectionDataset | None]:
    """Read the annotations; images are read as they are needed."""
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
    """Build the detector on its backbone's weights."""
    weights = None
    if options.backbone_weights == "imagenet":
        import torchvision

        entry = torchvision.models.get_model_weights(options.backbone).IMAGENET1K_V1
        try:
            weights = entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
        except URLError as error:
            remedy = f"Download {entry.url} elsewhere and give the file with --backbone-weights"
            raise OSError(
                f"There is no way to torchvision's weights ({error}). {remedy}."
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
    """Run it."""
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
                seed=options.seed,
                checkpoint_every=options.checkpoint_every,
            ),
        )
    except (TrainingError, OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
