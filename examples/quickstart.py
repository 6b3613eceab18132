"""Train a small RetinaNet on synthetic shapes, then evaluate it, save it, load it and draw detections.

This is also the shortest complete example of training with a plain PyTorch loop. It downloads nothing
and takes about two minutes on two CPU cores.

    pip install '.[train]' && python examples/quickstart.py
"""

from __future__ import annotations

import os

# Make waiting threads sleep instead of spin: on a machine that is busy with other work, spinning slows a
# step down tens of times. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import random
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.evaluation import evaluate_coco

CLASSES = ("circle", "square", "triangle")
SIDE = 128  # width and height of an image in pixels


def draw_scene(rng: random.Random) -> tuple[Image.Image, list[list[float]], list[int]]:
    """Draw one to four shapes without overlap; return the image, boxes (xyxy) and labels."""
    noise = bytes(rng.choices(range(90, 166), k=3 * SIDE * SIDE))
    image = Image.frombytes("RGB", (SIDE, SIDE), noise)
    draw = ImageDraw.Draw(image)
    boxes: list[list[float]] = []
    labels = []
    for _ in range(rng.randint(1, 4)):
        size = rng.randint(18, 56)
        x, y = rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)
        box = [x, y, x + size, y + size]
        if any(x < b[2] and b[0] < x + size and y < b[3] and b[1] < y + size for b in boxes):
            continue
        color = tuple(rng.randint(0, 255) for _ in range(3))
        label = rng.randrange(len(CLASSES))
        inside = (x, y, x + size - 1, y + size - 1)  # Pillow includes the last pixel
        if label == 0:
            draw.ellipse(inside, fill=color)
        elif label == 1:
            draw.rectangle(inside, fill=color)
        else:
            draw.polygon(
                [(x, y + size - 1), (x + size - 1, y + size - 1), (x + size // 2, y)], fill=color
            )
        boxes.append([float(v) for v in box])
        labels.append(label)
    return image, boxes, labels


class Shapes(torch.utils.data.Dataset):
    """Synthetic images and targets, drawn in advance."""

    def __init__(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        self.scenes = [draw_scene(rng) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, boxes, labels = self.scenes[index]
        target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels)}
        return pil_to_tensor(image).float() / 255, target

    def to_coco(self) -> dict:
        """Return the ground truth in COCO format, for the evaluation."""
        annotations = [
            {
                "id": 1000 * image_id + i + 1,
                "image_id": image_id,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for image_id, (_, boxes, labels) in enumerate(self.scenes)
            for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels, strict=True))
        ]
        return {
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
        }


def train(model: RetinaNet, data: Shapes, epochs: int, batch_size: int) -> None:
    """Train with AdamW and a one-cycle schedule."""
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        # The default would stack the images, which in general differ in size.
        collate_fn=lambda items: tuple(zip(*items, strict=True)),
    )
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        for _ in range(epochs):
            for images, targets in loader:
                losses = model(images, targets).losses
                loss = sum(losses.values())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                schedule.step()
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
                bar.update()


def main() -> None:
    """Train, evaluate, save, load and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("quickstart-output"), metavar="FOLDER",
        help="folder to write to (default: quickstart-output)")  # fmt: skip
    add("--epochs", type=int, default=5, metavar="N",
        help="passes over the training images (default: 5)")  # fmt: skip
    add("--batch-size", type=int, default=4, metavar="N", help="images per step (default: 4)")
    add("--train-images", type=int, default=480, metavar="N",
        help="number of training images (default: 480)")  # fmt: skip
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    training = Shapes(options.train_images, seed=options.seed + 1)
    validation = Shapes(100, seed=options.seed + 2)
    model = RetinaNet.from_config(
        RetinaNetConfig(
            num_classes=len(CLASSES),
            class_names=CLASSES,
            backbone="resnet18",
            backbone_norm="batch",  # the backbone is not pretrained
            fpn_channels=64,
            head_depth=2,
            anchor_sizes=(16, 32, 64, 128, 256),  # half the default sizes, for small images
            min_size=SIDE,
            max_size=SIDE,
        )
    )
    started = time.perf_counter()
    train(model, training, options.epochs, options.batch_size)
    print(f"Trained in {time.perf_counter() - started:.0f} s.")

    model.save_pretrained(options.output / "model")
    model = RetinaNet.from_pretrained(options.output / "model")
    found = model.predict([image for image, _, _ in validation.scenes], batch_size=10)
    result = evaluate_coco(validation.to_coco(), dict(enumerate(found)))
    print(result)

    tiles = [
        detections.filter(score_threshold=0.5).draw(image)
        for detections, (image, _, _) in zip(found, validation.scenes, strict=True)
    ][:8]
    picture = Image.new("RGB", (4 * SIDE, 2 * SIDE))
    for i, tile in enumerate(tiles):
        picture.paste(tile, (i % 4 * SIDE, i // 4 * SIDE))
    picture.save(options.output / "detections.png")
    print(f"Saved the model to {options.output / 'model'}.")
    print(f"Saved a picture of the detections to {options.output / 'detections.png'}.")


if __name__ == "__main__":
    main()
