"""Trainings for the accuracy benchmarks: RetinaNets of two libraries, one loop that can be resumed.

This is not a script; `accuracy` and `losses_bccd` use it. A `Job` describes one training completely.
Its result is a file with one JSON line, which is renamed into place when it is complete. A training
that is killed continues after its last epoch when it is run again. If only the script is killed, its
trainings stop after the epoch that they are in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import resource
import statistics
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2 import functional as T

import focaldet
from focaldet import Detections, RetinaNet, RetinaNetConfig
from focaldet._atomic import atomic_write, atomic_write_text
from focaldet.boxes import scale_boxes
from focaldet.datasets import (
    AnnotationTable,
    DetectionDataset,
    read_coco,
    read_splits,
    train_transform,
)
from focaldet.datasets._combining import transformed_item
from focaldet.errors import TrainingError
from focaldet.evaluation import evaluate_coco
from focaldet.training import AverageWeights, TrainingOptions
from focaldet.training._lock import locked_folder
from focaldet.training._optimisation import build_optimizer, choose_lr, lr_factor
from focaldet.transforms import resized_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_ENDS = (1, 3, 6, 13, 17)  # of MobileNetV2's features: the last blocks of strides 2, 4, 8, 16, 32


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the photos of a training and of its evaluation are.

    Attributes:
        name: Name in results and tables.
        train, test: COCO files, or the names of splits of ``folder``.
        folder: Folder of the photos for COCO files, or of the dataset for splits.
        one_class: Whether objects of all classes are to be found without telling the classes apart.
    """

    name: str
    train: str
    test: str
    folder: Path | None = None
    one_class: bool = False

    @classmethod
    def parse(cls, text: str, splits: Sequence[str] = ("train", "val")) -> Data:
        """Read ``[NAME=]FOLDER`` or ``[NAME=]TRAIN.json,TEST.json[,PHOTOS]``.

        >>> Data.parse("cells=a/train.json,a/test.json,photos").name
        'cells'
        >>> Data.parse("sets/chess", ("train", "test")).name
        'chess-test'
        """
        name, equals, place = text.rpartition("=")
        train, _, rest = place.partition(",")
        if not rest:
            folder, (train, test) = Path(place), splits
            return cls(
                name=name if equals else f"{folder.resolve().name}-{test}",
                train=train,
                test=test,
                folder=folder,
            )
        test, _, photos = rest.partition(",")
        if not equals:
            raise ValueError(f"DATA {text!r} consists of files, so give it a name: NAME={text}.")
        return cls(name=name, train=train, test=test, folder=Path(photos) if photos else None)

    def read(self) -> tuple[AnnotationTable, AnnotationTable]:
        """Return the annotations for training and for the evaluation."""
        if self.train.endswith(".json"):
            train, test = (read_coco(path, self.folder) for path in (self.train, self.test))
        else:
            assert self.folder is not None
            tables = read_splits(self.folder)
            missing = [split for split in (self.train, self.test) if split not in tables]
            if missing:
                raise ValueError(
                    f"{str(self.folder)!r} has no split {missing[0]!r}, but {', '.join(tables)}. Choose "
                    "others with --splits."
                )
            train, test = tables[self.train], tables[self.test]
        if (train.class_names, train.category_ids) != (test.class_names, test.category_ids):
            raise ValueError(f"The classes of {self.train!r} and {self.test!r} differ.")
        if self.one_class:
            train, test = (_with_one_class(table) for table in (train, test))
        return train, test


def _with_one_class(table: AnnotationTable) -> AnnotationTable:
    labels = np.minimum(table.labels, 0)  # -1, for categories that are not declared, remains
    return dataclasses.replace(table, labels=labels, class_names=("object",), category_ids=(1,))


class Photos(NamedTuple):
    """Photos at the size of the model's input as uint8, with their targets at that size."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    table: AnnotationTable

    @classmethod
    def read(cls, table: AnnotationTable, config: RetinaNetConfig) -> Photos:
        """Read and resize all photos once, with antialiasing, so that all trainings see the same."""
        data = DetectionDataset(table)
        images, targets = [], []
        for index in range(len(data)):
            photo, target = data.read(index)
            old = (int(photo.shape[1]), int(photo.shape[2]))
            new = resized_size(old, config.min_size, config.max_size)
            images.append(T.resize(photo, list(new), antialias=True))
            boxes = scale_boxes(target["boxes"].float(), old, new)
            targets.append({"boxes": boxes, "labels": target["labels"]})
        return cls(images, targets, table)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What all contestants share: the backbone with its weights, and the width of the pyramid."""

    backbone: str = "mobilenet_v2"
    weights: Path | None = None
    fpn_channels: int = 64
    trainable_stages: int = 3

    def state(self) -> dict[str, Tensor]:
        """Return the weights of the backbone."""
        if self.weights is None:
            raise ValueError(
                "A backbone without trained weights learns too little from a few hundred photos. Pass "
                "--weights, a state dict of torchvision's classifier or its features."
            )
        state: dict[str, Tensor] = torch.load(self.weights, weights_only=True)
        return state


class Model(nn.Module, ABC):
    """Interface of the training loop to the RetinaNet of either library.

    Attributes:
        model: The RetinaNet.
    """

    model: nn.Module

    @abstractmethod
    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return the sum of the losses of a batch."""

    @abstractmethod
    def find(self, image: Tensor) -> Detections:
        """Return the detections of an image."""


class Focaldet(Model):
    model: RetinaNet

    def __init__(self, config: RetinaNetConfig, network: Network) -> None:
        super().__init__()
        self.model = RetinaNet.from_config(config, backbone_weights=network.state())

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        losses: dict[str, Tensor] = self.model(images, targets, resize=False).losses
        return torch.stack(list(losses.values())).sum()

    def find(self, image: Tensor) -> Detections:
        (found,) = self.model.detections(self.model([image], resize=False))
        return found


class Torchvision(Model):
    """The RetinaNet class with its defaults, as a user of torchvision would build it."""

    model: TorchvisionRetinaNet

    def __init__(self, config: RetinaNetConfig, network: Network) -> None:
        super().__init__()
        body, layers, channels = _torchvision_body(network)
        pyramid = BackboneWithFPN(
            body,
            return_layers={layer: str(i) for i, layer in enumerate(layers)},
            in_channels_list=channels,
            out_channels=network.fpn_channels,
            extra_blocks=LastLevelP6P7(network.fpn_channels, network.fpn_channels),
        )
        # torchvision's labels start at 1.
        self.model = TorchvisionRetinaNet(
            pyramid, config.num_classes + 1, min_size=config.min_size, max_size=config.max_size
        )

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Tensor:
        shifted = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
        losses: dict[str, Tensor] = self.model(list(images), shifted)
        return torch.stack(list(losses.values())).sum()

    def find(self, image: Tensor) -> Detections:
        (found,) = self.model([image])
        size = (int(image.shape[1]), int(image.shape[2]))
        return Detections(found["boxes"], found["scores"], found["labels"] - 1, image_size=size)


def _torchvision_body(network: Network) -> tuple[nn.Module, list[str], list[int]]:
    """Return torchvision's backbone, partly frozen, with the names and channels of C3 to C5."""
    build = getattr(torchvision.models, network.backbone)
    body = build(weights=None, norm_layer=FrozenBatchNorm2d)
    state = network.state()
    if network.backbone == "mobilenet_v2":
        body = body.features
        stages = [nn.Sequential(*body[: end + 1]) for end in _ENDS]
        layers, channels = [str(end) for end in _ENDS[2:]], [32, 96, 320]
    else:
        del body.fc
        stages = [
            nn.Sequential(body.conv1, body.bn1),
            *(body.get_submodule(f"layer{i}") for i in range(1, 5)),
        ]
        layers = ["layer2", "layer3", "layer4"]
        channels = [body.inplanes // 4, body.inplanes // 2, body.inplanes]
    own = body.state_dict().keys()
    prefix = "features." if any(name.startswith("features.") for name in state) else ""
    fitting = {name: state[prefix + name] for name in own if prefix + name in state}
    if missing := own - fitting.keys():
        raise ValueError(
            f"{str(network.weights)!r} does not fit torchvision's {network.backbone}: it has no "
            f"{min(missing)!r}."
        )
    body.load_state_dict(fitting)
    for stage in stages[: 5 - network.trainable_stages]:
        stage.requires_grad_(requires_grad=False)
    return body, layers, channels


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training with its evaluation.

    Attributes:
        variant: Name in results and tables.
        library: Whose model is trained. Of the config, torchvision's takes only the number of classes
            and the size of the images.
        options: Only the epochs, the batch size, and the options of the optimiser count.
        transform: Options of ``train_transform``.
        output: Folder of the results.
        threads: Number of threads.
    """

    data: Data
    network: Network
    variant: str
    library: Literal["focaldet", "torchvision"]
    config: RetinaNetConfig
    options: TrainingOptions
    transform: dict[str, Any]
    output: Path
    threads: int = 1

    @property
    def name(self) -> str:
        """The name of the result's file."""
        size = f"{self.network.backbone}-{self.config.min_size}"
        return f"{self.data.name}_{size}_{self.options.epochs}ep_{self.variant}_{self.options.seed}"

    @property
    def result_file(self) -> Path:
        return self.output / f"{self.name}.json"

    def settings(self) -> dict[str, Any]:
        """Return all that the result depends on, other than the photos and the versions."""
        fields = (
            *("epochs", "batch_size", "optimizer", "lr", "weight_decay", "decay_norm_and_bias"),
            *("schedule", "warmup_steps", "clip_norm", "ema_decay", "seed"),
        )
        options = {field: getattr(self.options, field) for field in fields}
        # Newer options are left out at their defaults, so that older results stay valid.
        options |= {
            field: value
            for field in ("backbone_lr_decay",)
            if (value := getattr(self.options, field)) != getattr(TrainingOptions, field)
        }
        config = json.loads(self.config.to_json())
        network = {
            "backbone": self.network.backbone,
            "fpn_channels": self.network.fpn_channels,
            "trainable_stages": self.network.trainable_stages,
        }
        settings = {
            "library": self.library,
            "network": network,
            "config": config,
            "options": options,
            "transform": self.transform,
        }
        restored: dict[str, Any] = json.loads(json.dumps(settings))  # lists instead of tuples
        return restored

    def result(self) -> dict[str, Any] | None:
        """Return the finished result, or None if there is none, or only one with other settings."""
        if not self.result_file.exists():
            return None
        [record] = read_records(self.result_file)
        return record if self.has_settings(record["settings"]) else None

    def has_settings(self, settings: dict[str, Any]) -> bool:
        """Return whether these are the settings of this training.

        Fields of the config that did not exist when they were written have their defaults.
        """
        defaults = json.loads(RetinaNetConfig(num_classes=1).to_json())
        return {**settings, "config": {**defaults, **settings["config"]}} == self.settings()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the results in a folder, or in a file of JSON lines.

    Raises:
        FileNotFoundError: If there is no such folder or file.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [
        json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()
    ]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write results to a file of JSON lines. They hold no paths."""
    atomic_write_text(path, "\n".join(map(json.dumps, records)))


def adopt(jobs: Sequence[Job], records: Sequence[dict[str, Any]]) -> int:
    """Write the results of trainings that were finished elsewhere; return their number.

    The data are compared by name only.
    """
    adopted = 0
    for job in jobs:
        for record in records:
            same = (record["data"], record["variant"]) == (job.data.name, job.variant)
            if same and job.has_settings(record["settings"]) and job.result() is None:
                job.output.mkdir(parents=True, exist_ok=True)
                atomic_write_text(job.result_file, json.dumps(record))
                adopted += 1
    return adopted


class Progress(NamedTuple):
    """A training after some epochs: everything that changes in it."""

    model: Model
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer

    def save(self, path: Path, job: Job, epoch: int, times: list[float], spent: float) -> None:
        """Write a checkpoint in place of the last one."""
        content = {
            "settings": json.dumps(job.settings()),
            "epoch": epoch,
            "times": times,
            "spent": spent,
            "random": torch.get_rng_state(),
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_write(path) as temporary:
            torch.save(content, temporary)

    def restore(self, path: Path, job: Job) -> tuple[int, list[float], float]:
        """Restore a checkpoint; return its epoch, the time of each step, and the CPU time of all."""
        if not path.exists():
            return 0, [], 0.0
        content = torch.load(path, weights_only=True)
        if not job.has_settings(json.loads(content["settings"])):
            print(f"{job.name}: its checkpoint has other settings; starting again.", flush=True)
            return 0, [], 0.0
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        torch.set_rng_state(content["random"])
        return content["epoch"], content["times"], content["spent"]


def train(job: Job, photos: Photos, checkpoint: Path) -> tuple[Model, list[float], float]:
    """Train, or continue to train.

    Returns:
        The model to evaluate (with averaged weights if the options ask for that), the CPU time of each
        step, and the CPU time of all epochs.
    """
    options = job.options
    torch.manual_seed(options.seed)
    kind = Torchvision if job.library == "torchvision" else Focaldet
    model: Model = kind(job.config, job.network)
    lr, _ = choose_lr(options, options.batch_size)
    optimizer = build_optimizer(model.model, options, lr)
    average = None
    if options.ema_decay is not None:
        average = AveragedModel(
            model, avg_fn=AverageWeights(options.ema_decay).average, use_buffers=True
        )
    transform = train_transform(job.config, **job.transform)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch_size = min(options.batch_size, len(photos.images))
    steps = len(photos.images) // batch_size  # the rest of a batch is left out, so all are equal
    progress = Progress(model, average, optimizer)
    torch.manual_seed(
        options.seed
    )  # the photos are in the same order, whatever the model has drawn
    first, times, spent = progress.restore(checkpoint, job)
    for epoch in range(first, options.epochs):
        started_epoch = time.process_time()
        model.train()
        order = torch.randperm(len(photos.images)).tolist()
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            batch = [_transformed(photos, row, transform) for row in rows]
            started = time.process_time()
            factor = lr_factor(
                epoch * steps + step,
                steps * options.epochs,
                schedule=options.schedule,
                warmup_steps=options.warmup_steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr * factor * group.get("lr_factor", 1.0)
            loss = model.losses([image for image, _ in batch], [target for _, target in batch])
            if not loss.isfinite():
                raise TrainingError(f"{job.name}: the loss is {loss.item()} in epoch {epoch + 1}.")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, options.clip_norm)
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
            times.append(time.process_time() - started)
        spent += time.process_time() - started_epoch
        progress.save(checkpoint, job, epoch + 1, times, spent)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise TrainingError("the script has been killed; run it again to continue.")
    best = model if average is None else average.module
    assert isinstance(best, Model)
    return best, times, spent


def _transformed(photos: Photos, row: int, transform: Any) -> tuple[Tensor, dict[str, Tensor]]:
    image, target = transformed_item(
        transform, row, len(photos.images), lambda i: (photos.images[i], photos.targets[i])
    )
    return image.float() / 255, target


@torch.no_grad()
def measure(model: Model, photos: Photos) -> tuple[float, ...]:
    """Return COCO's numbers for the detections in all photos."""
    model.eval()
    found = {}
    sizes = DetectionDataset(photos.table).sizes.tolist()
    for image, size, image_id in zip(
        photos.images, sizes, photos.table.image_ids.tolist(), strict=True
    ):
        detections = model.find(image.float() / 255)
        now, original = (int(image.shape[1]), int(image.shape[2])), (size[0], size[1])
        found[image_id] = dataclasses.replace(
            detections,
            boxes=scale_boxes(detections.boxes, now, original),
            image_size=original,
        )
    return evaluate_coco(photos.table, found).stats


def run(job: Job) -> dict[str, Any] | None:
    """Train, evaluate, and write the result, unless it exists or another process works on it."""
    finished = job.result()
    if finished is not None:
        return finished
    torch.set_num_threads(job.threads)
    folder = job.output / "unfinished" / job.name
    try:
        with locked_folder(folder):
            finished = job.result()
            if finished is None:
                finished = _run(job, folder / "last.ckpt")
            (folder / "last.ckpt").unlink(missing_ok=True)
    except TrainingError as error:
        print(f"{job.name}: {error}", flush=True)
        return None
    with contextlib.suppress(
        OSError
    ):  # not empty, if another process has just begun to wait for it
        folder.rmdir()
    return finished


def _run(job: Job, checkpoint: Path) -> dict[str, Any]:
    if job.result_file.exists():
        print(f"{job.name}: its result has other settings; training again.", flush=True)
    train_table, test_table = job.data.read()
    photos = Photos.read(train_table, job.config)
    model, times, spent = train(job, photos, checkpoint)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    started = time.process_time()
    stats = measure(model, Photos.read(test_table, job.config))
    record = {
        "data": job.data.name,
        "images": [len(train_table), len(test_table)],
        "objects": [len(train_table.boxes), len(test_table.boxes)],
        "variant": job.variant,
        "epochs": job.options.epochs,
        "seed": job.options.seed,
        "stats": list(stats),
        "step_seconds": statistics.median(times),
        "train_seconds": spent,
        "test_seconds": time.process_time() - started,
        "peak_mib": peak,
        "threads": job.threads,
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "focaldet": focaldet.__version__,
        },
        "settings": job.settings(),
    }
    atomic_write_text(job.result_file, json.dumps(record))
    return record


def run_all(jobs: Sequence[Job], processes: int = 1) -> Iterator[dict[str, Any] | None]:
    """Run the trainings in order, each in its own process so that its memory can be measured."""
    for job in jobs:
        job.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        results = [job.result() or pool.submit(run, job) for job in jobs]
        try:
            for result in results:
                yield result.result() if isinstance(result, Future) else result
        finally:  # after an error, do not begin the trainings that are left
            pool.shutdown(cancel_futures=True)


def summary(record: dict[str, Any]) -> str:
    """Return a line about one result."""
    numbers = "  ".join(
        f"{name} {value:.3f}" for name, value in zip(STATS[:3], record["stats"], strict=False)
    )
    return (
        f"{numbers}  {record['step_seconds']:.3f} s CPU per step, {record['train_seconds']:.0f} s in "
        f"all, {record['peak_mib']:.0f} MiB"
    )
