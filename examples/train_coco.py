"""Train RetinaNet on COCO 2017 as the paper does: ResNet-50, 800 pixels, SGD, 16 images per update.

    pip install 'focaldet[train]'
    python examples/train_coco.py --data coco2017 --output runs/r50
    torchrun --nproc-per-node 8 examples/train_coco.py --data coco2017 --output runs/r50

COCO is expected in coco2017/{annotations,train2017,val2017}. This script shows how training is done in
Python. `focaldet train` does the same with any dataset, and has many more options.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Waiting threads sleep instead of spinning; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from focaldet import RetinaNet
from focaldet.datasets import DetectionDataset, read_splits
from focaldet.training import TrainingError, recipe, train


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="folder of COCO 2017")
    add("--output", type=Path, required=True, metavar="FOLDER",
        help="folder of the run, which must be new or empty unless --resume is given")  # fmt: skip
    add("--resume", action="store_true", help="resume the run in --output from its last checkpoint")
    add("--backbone", default="resnet50", metavar="NAME", help="backbone (default: resnet50)")
    add("--backbone-weights", default="imagenet", metavar="FILE",
        help="file of classifier weights, or 'imagenet' to download them (default: imagenet)")  # fmt: skip
    add("--min-size", type=int, default=800, metavar="PX",
        help="length of the short side of an image in pixels (default: 800)")  # fmt: skip
    add("--epochs", type=int, default=12, metavar="N",
        help="passes over the training data (default: 12)")  # fmt: skip
    add("--batch-size", type=int, default=2, metavar="N",
        help="images per step on each device; steps are added up to 16 images per update (default: 2)")  # fmt: skip
    add("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"],
        help="floating-point precision (default: 32-true)")  # fmt: skip
    add("--accelerator", default="auto", help="auto, gpu, cpu, ... (default: auto)")
    add("--devices", type=int, metavar="N",
        help="devices per machine (default: all; under torchrun, as many as it starts processes)")  # fmt: skip
    add("--nodes", type=int, default=1, metavar="N", help="number of machines (default: 1)")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes per device that read images (default: the number of CPU cores, up to 4)")  # fmt: skip
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Train a detector."""
    options = parse()
    names = ("batch_size", "precision", "accelerator", "nodes", "workers", "seed")
    devices = options.devices or max(1, torch.cuda.device_count())
    try:
        tables = read_splits(options.data)
        chosen = recipe(
            "paper",
            tables["train"],
            devices=int(os.environ.get("WORLD_SIZE", devices * options.nodes)),
            backbone=options.backbone,
            min_size=options.min_size,
            epochs=options.epochs,
            option_changes={
                "devices": options.devices or "auto",
                **{name: getattr(options, name) for name in names},
            },
        )
        torch.manual_seed(options.seed)
        train(
            RetinaNet.from_config(chosen.config, backbone_weights=options.backbone_weights),
            DetectionDataset(tables["train"], chosen.train_transform),
            DetectionDataset(tables["val"]),
            folder=options.output,
            options=chosen.options,
            resume=options.resume,
            recipe=chosen.to_dict(),
        )
    except KeyError as error:
        sys.exit(f"error: {str(options.data)!r} has no split {error}.")
    except (TrainingError, OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
