"""Fine-tune a detector on data of your own: COCO, Pascal VOC, YOLO or CSV.

python examples/finetune_custom.py train.json val.json --images photos --start retinanet_folder

--start keeps all of a pretrained detector but the layer that names the classes. Without it only
the backbone is pretrained: on ImageNet, from torchvision or a file (--backbone-weights).
"""

from __future__ import annotations

from argparse import ArgumentParser, RawTextHelpFormatter
from pathlib import Path

import torchvision

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.datasets import DetectionDataset, read_annotations, train_transform
from focaldet.pretrained.reading import read_tensors
from focaldet.training import TrainingOptions, train

parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
parser.add_argument("train", type=Path, help="annotations to train on")
parser.add_argument("val", type=Path, help="annotations to validate on")
parser.add_argument("--images", type=Path, help="folder of the images")
parser.add_argument("--start", help="a pretrained detector")
parser.add_argument("--backbone-weights", type=Path, help="of MobileNetV2, in a file")
parser.add_argument("--epochs", type=int, default=24)
parser.add_argument("--size", type=int, default=480, help="short side in pixels (default: 480)")
parser.add_argument("--output", type=Path, default=Path("finetuned"))


def main() -> None:
    """Run it."""
    args = parser.parse_args()
    table = read_annotations(args.train, args.images)
    if args.start:
        model = RetinaNet.from_pretrained(args.start, class_names=table.class_names)
    else:
        config = RetinaNetConfig(num_classes=len(table.class_names), class_names=table.class_names)
        config = config.replace(backbone="mobilenet_v2", min_size=args.size, max_size=2 * args.size)
        imagenet = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
        file = args.backbone_weights
        weights = read_tensors(file) if file else imagenet.get_state_dict()
        model = RetinaNet.from_config(config, backbone_weights=weights)
    scales = [round(model.config.min_size * part) for part in (0.8, 0.9, 1)]
    transform = train_transform(min_sizes=scales, max_size=model.config.max_size)
    train(
        model,
        DetectionDataset(table, transform),
        DetectionDataset(read_annotations(args.val, args.images)),
        folder=args.output,
        options=TrainingOptions(
            epochs=args.epochs, batch_size=8, schedule="cosine", clip_norm=10, ema_decay=0.999
        ),
    )


if __name__ == "__main__":
    main()
