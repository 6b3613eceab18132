"""Fine-tune a detector on your own dataset in COCO, Pascal VOC, YOLO or CSV format.

python examples/finetune_custom.py train.json val.json --images photos --start runs/r50/best
python examples/finetune_custom.py voc voc --size 320

`focaldet train` does the same and has more options.
"""

from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

from focaldet import RetinaNet
from focaldet.datasets import AnnotationTable, DetectionDataset, read_splits
from focaldet.training import TrainingError, recipe, train

parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
add = parser.add_argument
add("train", type=Path, help="training data: a .json, .csv or data.yaml file, or a folder")
add("val", type=Path, help="validation data; if it has several splits, 'val' is used")
add("--images", type=Path, metavar="FOLDER", help="folder of the images, for COCO and CSV files")
add("--start", metavar="MODEL", help="detector to start from (default: an ImageNet backbone)")
add("--backbone-weights", default="imagenet", metavar="FILE",
    help="weights of the backbone, without --start (default: download)")  # fmt: skip
add("--backbone", default="mobilenet_v2", metavar="NAME", help="default: mobilenet_v2")
add("--epochs", type=int, metavar="N", help="passes over the data (default: chosen by its size)")
add("--size", type=int, help="short side in pixels (default: chosen by the data)")
add("--output", default="finetuned", metavar="RUN", help="run folder (default: finetuned)")


def read(path: Path, images: Path | None, split: str) -> AnnotationTable:
    """Read a dataset of one split, or one split of several."""
    tables = read_splits(path, images)
    if split in tables or "all" in tables:
        return tables.get(split) or tables["all"]
    raise ValueError(f"{str(path)!r} has no split {split!r}, but {', '.join(tables)}.")


if __name__ == "__main__":
    args = parser.parse_args()
    try:
        table, val = read(args.train, args.images, "train"), read(args.val, args.images, "val")
        sizes = {"min_size": args.size, "epochs": args.epochs}
        if args.start:
            model = RetinaNet.from_pretrained(args.start, class_names=table.class_names)
            chosen = recipe("small_data", table, start=model.config, epochs=args.epochs)
        else:
            chosen = recipe("small_data", table, backbone=args.backbone, **sizes)
            model = RetinaNet.from_config(chosen.config, backbone_weights=args.backbone_weights)
        print(chosen)
        data = DetectionDataset(table, chosen.train_transform), DetectionDataset(val)
        train(model, *data, folder=args.output, options=chosen.options, recipe=chosen.to_dict())
    except (TrainingError, OSError, ValueError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")
