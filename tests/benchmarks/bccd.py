"""Blood cells (BCCD) for the accuracy benchmarks: photos, the models of two libraries, one training loop.

This is not a script; `accuracy_bccd` and `losses_bccd` use it. The splits are the official ones:
training uses "trainval" (292 photos), and the 72 photos of "test" are evaluated once, at the end.
Recipes were chosen on "train" and "val".
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import resource
import statistics
import time
from abc import ABC, abstractmethod
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2 import functional as T

from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet.evaluation import evaluate_coco
from focaldet.images import load_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from focaldet.evaluation import CocoResult

HEIGHT, WIDTH = 240, 320
CLASSES = ("RBC", "WBC", "Platelets")
FPN_CHANNELS = 64
TRAINABLE_STAGES = 3


class Split(NamedTuple):
    """Photos at half size as uint8, their targets, and the ground truth in COCO format."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    truth: dict[str, Any]


def read_split(folder: Path, name: str) -> Split:
    truth = json.loads((folder / "coco" / f"{name}.json").read_text())
    category_ids = [category["id"] for category in truth["categories"]]
    images, targets = [], []
    for image in truth["images"]:
        photo = load_image(folder / "voc" / "JPEGImages" / image["file_name"])
        images.append(T.resize(photo, [HEIGHT, WIDTH], antialias=True))
        found = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        x, y, w, h = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4).unbind(1)
        boxes = torch.stack([x, y, x + w, y + h], dim=1) * (WIDTH / image["width"])
        labels = torch.tensor([category_ids.index(a["category_id"]) for a in found])
        targets.append({"boxes": boxes, "labels": labels})
    return Split(images, targets, truth)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training.

    The optimiser is AdamW, with the paper's step schedule. The paper's SGD barely trains an FPN this
    narrow in so few steps, in torchvision as in focaldet, because the initial weights of the towers
    are meant for 256 channels.
    """

    epochs: int
    batch_size: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    warmup: int = 100
    clip: float = 10.0
    ema: float | None = None
    vertical_flip: bool = False


def recommended(epochs: int) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe that did best on "val", and its changes to focaldet's configuration."""
    recipe = Recipe(epochs=epochs, schedule="cosine", ema=0.99, vertical_flip=True)
    changes = {
        "anchor_sizes": (16, 32, 64, 128, 256),  # platelets are 20 pixels wide
        "head_norm": "group",
        "box_loss": "giou",
        "box_loss_weight": 2.0,
    }
    return recipe, changes


class Model(nn.Module, ABC):
    """Interface of the training loop to the RetinaNet of either library."""

    @abstractmethod
    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return the sum of the losses of a batch."""

    @abstractmethod
    def find(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the detections of each image."""


class Focaldet(Model):
    def __init__(self, weights: Path, **changes: Any) -> None:
        super().__init__()
        config = RetinaNetConfig(
            num_classes=len(CLASSES),
            backbone="mobilenet_v2",
            trainable_stages=TRAINABLE_STAGES,
            fpn_channels=FPN_CHANNELS,
            min_size=HEIGHT,
            max_size=WIDTH,
        ).replace(**changes)
        state = torch.load(weights, weights_only=True)
        self.model = RetinaNet.from_config(config, backbone_weights=state)

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        losses: dict[str, Tensor] = self.model(images, targets).losses
        return losses["classification"] + losses["box_regression"]

    def find(self, images: Sequence[Tensor]) -> list[Detections]:
        return self.model.detections(self.model(images))


class Torchvision(Model):
    """The RetinaNet class with its defaults, as a user of torchvision would build it."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        body = mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d).features
        body.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        ends = (1, 3, 6, 13, 17)  # the last blocks of strides 2, 4, 8, 16, 32
        for parameter in body[: ends[4 - TRAINABLE_STAGES] + 1].parameters():
            parameter.requires_grad_(requires_grad=False)
        pyramid = BackboneWithFPN(
            body,
            return_layers={str(end): str(i) for i, end in enumerate(ends[2:])},
            in_channels_list=[32, 96, 320],
            out_channels=FPN_CHANNELS,
            extra_blocks=LastLevelP6P7(FPN_CHANNELS, FPN_CHANNELS),
        )
        # torchvision's labels start at 1.
        self.model = TorchvisionRetinaNet(
            pyramid, len(CLASSES) + 1, min_size=HEIGHT, max_size=WIDTH
        )

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
        losses: dict[str, Tensor] = self.model(list(images), shifted)
        return losses["classification"] + losses["bbox_regression"]

    def find(self, images: Sequence[Tensor]) -> list[Detections]:
        return [
            Detections(
                found["boxes"], found["scores"], found["labels"] - 1, image_size=(HEIGHT, WIDTH)
            )
            for found in self.model(list(images))
        ]


class Outcome(NamedTuple):
    """Result of one training.

    Attributes:
        result: COCO evaluation of the trained model.
        step: Median CPU time of a training step in seconds.
        peak: Peak resident memory of the process during training in MiB.
    """

    result: CocoResult
    step: float
    peak: float


def train(model: Model, data: Split, recipe: Recipe, seed: int) -> tuple[Model, float]:
    """Train; return the model to evaluate (with averaged weights if requested) and seconds per step."""
    torch.manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = len(data.images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(step, steps * recipe.epochs, recipe)
    )
    average = None
    if recipe.ema is not None:
        average = AveragedModel(
            model,
            multi_avg_fn=get_ema_multi_avg_fn(recipe.ema),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )
    times = []
    for _ in range(recipe.epochs):
        model.train()
        order = torch.randperm(len(data.images)).tolist()
        for first in range(0, steps * recipe.batch_size, recipe.batch_size):
            batch = [_augmented(data, i, recipe) for i in order[first : first + recipe.batch_size]]
            started = time.process_time()
            loss = model.losses([image for image, _ in batch], [target for _, target in batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            times.append(time.process_time() - started)
            schedule.step()
            if average is not None:
                average.update_parameters(model)
    best = model if average is None else average.module
    assert isinstance(best, Model)
    return best, statistics.median(times)


def _factor(step: int, steps: int, recipe: Recipe) -> float:
    """Return the learning rate at a step as a fraction of the maximum."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    return 0.1 ** sum(step >= steps * at for at in (2 / 3, 8 / 9))  # the paper: 60k and 80k of 90k


def _augmented(data: Split, index: int, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    image, target = data.images[index].float() / 255, data.targets[index]
    boxes = target["boxes"]
    x1, y1, x2, y2 = boxes.unbind(1)
    if torch.rand(()) < 0.5:
        image, x1, x2 = image.flip(2), WIDTH - x2, WIDTH - x1
    if recipe.vertical_flip and torch.rand(()) < 0.5:
        image, y1, y2 = image.flip(1), HEIGHT - y2, HEIGHT - y1
    return image, {"boxes": torch.stack([x1, y1, x2, y2], dim=1), "labels": target["labels"]}


@torch.no_grad()
def measure(model: Model, data: Split) -> CocoResult:
    """Evaluate the detections in all photos."""
    model.eval()
    found = {}
    for image, record in zip(data.images, data.truth["images"], strict=True):
        (detections,) = model.find([image.float() / 255])
        scale = record["width"] / WIDTH
        found[record["id"]] = dataclasses.replace(
            detections,
            boxes=detections.boxes * scale,
            image_size=(record["height"], record["width"]),
        )
    return evaluate_coco(data.truth, found)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, which runs in its own process so that its memory can be measured."""

    folder: Path
    weights: Path
    seed: int
    recipe: Recipe
    changes: dict[str, Any] | None
    """Changes to focaldet's configuration. None trains torchvision's model."""
    splits: tuple[str, str] = ("trainval", "test")


def run(job: Job) -> Outcome:
    """Train on one split and evaluate on the other."""
    torch.set_num_threads(1)
    training = read_split(job.folder, job.splits[0])
    torch.manual_seed(job.seed)
    model: Model
    if job.changes is None:
        model = Torchvision(job.weights)
    else:
        model = Focaldet(job.weights, **job.changes)
    best, step = train(model, training, job.recipe, job.seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return Outcome(measure(best, read_split(job.folder, job.splits[1])), step, peak)


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    """Run the trainings in order, each in its own process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        yield from pool.map(run, jobs)
