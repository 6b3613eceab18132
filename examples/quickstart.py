"""Train a small RetinaNet on drawn shapes, measure it, save it, load it, draw what it finds.

It is also the shortest honest example of training with a plain PyTorch loop: everything that a
detector needs, nothing hidden. It needs no download and two minutes or so on two CPU cores.

    pip install '.[train]' && python examples/quickstart.py
"""

from __future__ import annotations

import os

# Threads that wait sleep instead of spinning: on a machine that is busy otherwise, spinning makes a
# step take tens of times as long. It must be set before torch is imported.
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
SIDE = 128  # pixels of an image


def draw_scene(rng: random.Random) -> tuple[Image.Image, list[list[float]], list[int]]:
    """Draw one to four shapes that hardly overlap; return image, boxes (xyxy) and labels."""
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
        inside = (x, y, x + size - 1, y + size - 1)  # Pillow's corners are pixels, ours are edges
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
    """Images and targets as RetinaNet takes them, drawn beforehand."""

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
        """Return the ground truth in COCO's form, which the evaluation takes."""
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
        collate_fn=lambda items: tuple(
            zip(*items, strict=True)
        ),  # images differ in size in general
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
    """Run it all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--train-images", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    training = Shapes(options.train_images, seed=options.seed + 1)
    validation = Shapes(100, seed=options.seed + 2)
    model = RetinaNet.from_config(
        RetinaNetConfig(
            num_classes=len(CLASSES),
            class_names=CLASSES,
            backbone="resnet18",
            backbone_norm="batch",  # from scratch: there is nothing yet to freeze
            fpn_channels=64,
            head_depth=2,
            anchor_sizes=(16, 32, 64, 128, 256),  # half the usual, for small images
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
    print(
        f"Saved the model in {options.output / 'model'} and a picture as {options.output / 'detections.png'}."
    )


if __name__ == "__main__":
    main()
