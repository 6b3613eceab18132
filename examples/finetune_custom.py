"""Fine-tune a detector on your own dataset in COCO, Pascal VOC, YOLO or CSV format.

python examples/finetune_custom.py train.json val.json --images photos --start runs/r50/best
python examples/finetune_custom.py voc voc --size 320
"""

from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path

import torchvision

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.datasets import AnnotationTable, DetectionDataset, read_annotations, train_transform
from focaldet.datasets.readers import find_reader
from focaldet.pretrained import read_tensors
from focaldet.training import TrainingError, TrainingOptions, train

parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
add = parser.add_argument
add("train", type=Path, help="training data: a .json, .csv or data.yaml file, or a VOC folder")
add("val", type=Path, help="validation data; the split 'val' of a data.yaml or VOC folder is used")
add("--images", type=Path, metavar="FOLDER", help="folder of the images, for COCO and CSV files")
add("--start", metavar="MODEL", help="detector to start from (default: an ImageNet MobileNetV2)")
add("--backbone-weights", type=Path, metavar="FILE", help="MobileNetV2 weights (default: download)")
add("--epochs", type=int, default=24, metavar="N", help="passes over the data (default: 24)")
add("--size", type=int, default=480, help="short side in pixels, without --start (default: 480)")
add("--output", default="finetuned", metavar="RUN", help="run folder (default: finetuned)")


def build(args: Namespace, names: tuple[str, ...]) -> tuple[RetinaNet, float]:
    """Build the detector; return it with a suitable learning rate."""
    if args.start:
        return RetinaNet.from_pretrained(args.start, class_names=names), 1e-4
    config = RetinaNetConfig(num_classes=len(names), class_names=names, backbone="mobilenet_v2")
    config = config.replace(min_size=args.size, max_size=2 * args.size)
    config = config.replace(head_norm="group", box_loss="giou", box_loss_weight=2.0)
    file, online = args.backbone_weights, torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    weights = read_tensors(file) if file else online.get_state_dict()
    return RetinaNet.from_config(config, backbone_weights=weights), 1e-3


def read(path: Path, args: Namespace, split: str) -> AnnotationTable:
    """Read a file, or its part of a data set that holds several."""
    has_splits = find_reader(path).splits(path) is not None
    return read_annotations(path, args.images, split=split if has_splits else None)


if __name__ == "__main__":
    args = parser.parse_args()
    try:
        table, val = read(args.train, args, "train"), DetectionDataset(read(args.val, args, "val"))
        model, lr = build(args, table.class_names)
        scales = [round(model.config.min_size * part) for part in (0.8, 0.9, 1)]
        transform = train_transform(min_sizes=scales, max_size=model.config.max_size)
        recipe = TrainingOptions(epochs=args.epochs, batch_size=4, optimizer="adamw", lr=lr,
            schedule="cosine", clip_norm=10, ema_decay=0.99)  # fmt: skip
        train(model, DetectionDataset(table, transform), val, folder=args.output, options=recipe)
    except (TrainingError, OSError, ValueError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
