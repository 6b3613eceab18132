"""The detector on a GPU, compared with torchvision's: sections of :mod:`tests.benchmarks.gpu`.

Both sides have the same random weights (ResNet-50, FrozenBatchNorm, the first two stages frozen) and the
same images of 800x1333 pixels on the device. "float32" computes convolutions without TF32, "TF32" with
it, which is cuDNN's default; in half precision, unchanged models run under autocast.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor

from focaldet._detector import RetinaNetDetector
from focaldet._streams import Transfers
from tests.benchmarks import gpu_waits
from tests.benchmarks.gpu_timing import Row, compare
from tests.benchmarks.inference import compile_maps
from tests.benchmarks.peer import differences, images_of
from tests.benchmarks.training_step import models_of, stepping, targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from focaldet.retinanet import OptimizedRetinaNet
    from tests.benchmarks.gpu_timing import Setting

    Calls = dict[str, Callable[[], Any]]

DTYPES = {
    "float32": None,
    "TF32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
BOXES = 20  # per image
PHOTOS = 96
PEER, OURS = "torchvision", "focaldet"
IN_ORDER = "plain, in order"  # nothing overlaps, and images are copied from ordinary memory


def size_of(setting: Setting) -> tuple[int, int]:
    return (64, 96) if setting.small else (800, 1333)


def sizes_of_batches(setting: Setting, batches: Sequence[int]) -> Sequence[int]:
    return batches[:1] if setting.small else batches


def precisions(setting: Setting, names: Sequence[str]) -> Sequence[str]:
    """Return the names; for a CPU, only those that it distinguishes and computes at a usual speed."""
    on_cpu = ("float32", "bfloat16")
    return names if setting.device.type == "cuda" else [name for name in names if name in on_cpu]


@functools.cache
def models(setting: Setting) -> dict[str, Any]:
    """Build both sides once, on the device."""
    ours, peer = models_of(size_of(setting), small=setting.small)
    return {PEER: peer.to(setting.device), OURS: ours.to(setting.device)}


@contextlib.contextmanager
def tf32(name: str) -> Iterator[None]:
    """Let cuDNN use TF32, except for the precision "float32"."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name != "float32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def precision(name: str, setting: Setting) -> Iterator[None]:
    dtype, kind = DTYPES[name], setting.device.type
    with (
        tf32(name),
        torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        yield


def batch_of(setting: Setting, images: int) -> tuple[list[Any], list[Any]]:
    size = size_of(setting)
    targets = targets_of(size, BOXES, images)
    moved = [{name: value.to(setting.device) for name, value in t.items()} for t in targets]
    return [image.to(setting.device) for image in images_of(size, images)], moved


def training_calls(setting: Setting, name: str, images: int) -> Calls:
    """Return a training step of each side."""
    sides, (batch, targets) = models(setting), batch_of(setting, images)
    ours, peer = sides[OURS].train(), sides[PEER].train()

    def our_losses() -> Any:
        with precision(name, setting):
            return ours(batch, targets, validate=False).losses

    def their_losses() -> Any:
        with precision(name, setting):
            return peer(batch, targets)

    steps = {PEER: stepping(peer, their_losses), OURS: stepping(ours, our_losses)}
    return {side: functools.partial(in_precision, step, name) for side, step in steps.items()}


def in_precision(step: Callable[[], Any], name: str) -> None:
    """Run a step, whose backward pass needs the setting of TF32 too."""
    with tf32(name):
        step()


def training(setting: Setting) -> Iterator[Row]:
    """Compare a training step: forward, losses, backward, SGD with momentum."""
    for images in sizes_of_batches(setting, (2, 16)):
        for name in precisions(setting, ("bfloat16", "TF32", "float32")):
            for layout in (torch.contiguous_format, torch.channels_last):
                title = f"{images} images, {name}, {str(layout)[6:]}"
                yield Row(title, functools.partial(training_row, setting, name, images, layout))


def training_row(setting: Setting, name: str, images: int, layout: torch.memory_format) -> str:
    sides = models(setting).values()
    try:
        for model in sides:
            model.to(memory_format=layout)
        return compare(training_calls(setting, name, images), setting)
    finally:
        for model in sides:
            model.to(memory_format=torch.contiguous_format).zero_grad(set_to_none=True)


def optimised(
    setting: Setting, name: str, *, compiled: bool = False, graphs: bool = False
) -> OptimizedRetinaNet:
    model: OptimizedRetinaNet = models(setting)[OURS].optimize_for_inference(
        DTYPES[name], cuda_graphs=graphs
    )
    if compiled:
        torch.compiler.reset()  # or else the number of recompilations reaches its limit
        compile_maps(model, backend="eager" if setting.small else "inductor")
    return model


def detection_calls(setting: Setting, name: str, images: int, kinds: Sequence[str]) -> Calls:
    """Return detection from images to boxes, by torchvision and the ``kinds`` of ours."""
    sides, (batch, _) = models(setting), batch_of(setting, images)
    peer = sides[PEER].eval()
    made = {
        "plain": sides[OURS].eval,
        "optimised": functools.partial(optimised, setting, name),
        "graph": functools.partial(optimised, setting, name, graphs=True),
        "compiled": functools.partial(optimised, setting, name, compiled=True),
    }

    def theirs() -> Any:
        with torch.no_grad(), precision(name, setting):
            return peer(batch)

    def ours(model: Any, name: str) -> Any:
        with torch.no_grad(), precision(name, setting):
            return model.detections(model(batch, validate=False))

    calls: Calls = {PEER: theirs}
    for kind in kinds:
        # The copies are in the dtype already, which autocast would only look up again.
        own = name if kind == "plain" or DTYPES[name] is None else "TF32"
        calls[kind] = functools.partial(ours, made[kind](), own)
    return calls


def detection(setting: Setting) -> Iterator[Row]:
    """Compare detection, compiled last because it takes long to begin."""
    names = precisions(setting, ("bfloat16", "float16", "TF32", "float32"))
    batches = sizes_of_batches(setting, (1, 8, 32))
    for kinds in (("plain", "optimised", "graph"), ("compiled",)):
        for images in batches:
            for name in names:
                title = f"{images} images, {name}"
                yield Row(title, functools.partial(detection_row, setting, name, images, kinds))


def detection_row(setting: Setting, name: str, images: int, kinds: Sequence[str]) -> str:
    calls = detection_calls(setting, name, images, kinds)
    text = compare(calls, setting)
    if images == 1:
        expected = [{key: value.cpu() for key, value in each.items()} for each in calls[PEER]()]
        found = [each.to("cpu") for each in calls[kinds[-1]]()]
        share, boxes, scores = differences(found, expected)
        text += f"   {kinds[-1]}: {share:.1%} shared, {boxes:.4f} px, {scores:.1e}"
    return text


def photos(setting: Setting) -> Iterator[Row]:
    """Count images per second from JPEG files to detections on the host; both sides read files."""
    copies = [f"optimised, {name}" for name in precisions(setting, ("bfloat16", "float32"))]
    for images in sizes_of_batches(setting, (8, 1, 32)):
        for kind in (PEER, "plain", IN_ORDER, *copies):
            title = f"{images} images, {kind}"
            yield Row(title, functools.partial(rate, setting, kind, images))


def write_photos(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of 480x640 pixels, every third one upright."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index in range(count):
        coarse = torch.rand(1, 3, 30, 40, generator=generator)
        image = torch.nn.functional.interpolate(coarse, scale_factor=16.0, mode="bilinear")[0]
        paths.append(folder / f"{index:03d}.jpg")
        to_pil_image(image.mT if index % 3 == 0 else image).save(paths[-1], quality=90)
    return paths


def rate(setting: Setting, kind: str, images: int) -> str:
    """Measure one pass over the photos, after a short one."""
    peer = models(setting)[PEER].eval()
    model = models(setting)[OURS].eval()
    if kind.startswith("optimised"):
        model = optimised(setting, kind.split(", ")[1])

    @torch.no_grad()
    def theirs(paths: Sequence[Path]) -> None:
        for start in range(0, len(paths), images):
            read = [to_tensor(Image.open(p).convert("RGB")) for p in paths[start : start + images]]
            for found in peer([image.to(setting.device) for image in read]):
                for value in found.values():
                    value.cpu()

    def ours(paths: Sequence[Path]) -> None:
        model.predict(paths, batch_size=images, progress=False)

    def in_order(paths: Sequence[Path]) -> None:
        with mock.patch.object(RetinaNetDetector, "_transfers", return_value=Transfers()):
            ours(paths)

    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), 4 if setting.small else PHOTOS)
        run = {PEER: theirs, IN_ORDER: in_order}.get(kind, ours)
        run(paths[: 2 * images])
        start = time.perf_counter()
        run(paths)
        return f"{len(paths) / (time.perf_counter() - start):8.1f} images per second"


def memory(setting: Setting) -> Iterator[Row]:
    """Compare the peaks of memory, weights included, with one side on the device at a time."""
    for what, batches in (("training", (2, 16)), ("detection", (1, 8, 32))):
        for images in sizes_of_batches(setting, batches):
            for name in precisions(setting, ("float32", "bfloat16")):
                title = f"{what}, {images} images, {name}"
                yield Row(title, functools.partial(memory_row, setting, what, name, images))


def memory_row(setting: Setting, what: str, name: str, images: int) -> str:
    return "   ".join(
        f"{side} {peak_of(setting, what, name, images, side)}" for side in (PEER, OURS)
    )


def peak_of(setting: Setting, what: str, name: str, images: int, side: str) -> str:
    """Return the peak of the second of two calls, as text."""
    sides = models(setting)
    other = sides[PEER if side == OURS else OURS]
    other.cpu()
    try:
        if what == "training":
            call = training_calls(setting, name, images)[side]
        else:
            call = detection_calls(setting, name, images, ["plain"])[
                PEER if side == PEER else "plain"
            ]
        call()
        if setting.device.type != "cuda":
            return "not counted on a CPU"
        torch.cuda.reset_peak_memory_stats()
        call()
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        other.to(setting.device)
        for model in sides.values():
            model.zero_grad(set_to_none=True)


def synchronisations(setting: Setting) -> Iterator[Row]:
    """Count how often the host waits for the GPU. Without one, fake tensors count forward and losses."""
    for what, batches in (("training", (2, 16)), ("detection", (1, 8, 32))):
        for images in sizes_of_batches(setting, batches):
            title = f"{what}, {images} images"
            yield Row(title, functools.partial(waits_row, setting, what, images))


def waits_row(setting: Setting, what: str, images: int) -> str:
    if setting.device.type != "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are random
            counts = [fake_waits(what, side, images) for side in ("torchvision", "ours")]
        return f"{PEER} {counts[0]}   {OURS} {counts[1]} (fake tensors)"
    if what == "training":
        calls = training_calls(setting, "bfloat16", images)
    else:
        calls = detection_calls(setting, "bfloat16", images, ["optimised"])
    found = [waits_of(call) for call in calls.values()]
    places = ", ".join(f"{place} {count}" for place, count in found[1].items())
    return f"{PEER} {found[0].total()}   {OURS} {found[1].total()} ({places or 'none'})"


def fake_waits(what: str, side: str, images: int) -> int:
    if what == "training":
        return gpu_waits.training_step(side, images, BOXES)[0]
    return gpu_waits.detection(side, images)[0]


def waits_of(function: Callable[[], object]) -> Counter[str]:
    """Count the waits of the third call by file and line."""
    function()
    function()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}"
        for each in caught
        if "called a synchronizing CUDA operation" in str(each.message)
    )
