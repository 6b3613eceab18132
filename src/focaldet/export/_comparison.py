"""Comparing a written file with the model that it was made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.errors import ExportError
from focaldet.export._errors import explaining, hushed
from focaldet.images import load_image
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from focaldet.detections import Detections
    from focaldet.export._metadata import FileFacts
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

    Outputs = Mapping[str, Tensor]
    Run = Callable[[Tensor, Tensor], Outputs]

__all__ = [
    "BOX_TOLERANCE",
    "SCORE_TOLERANCE",
    "Comparison",
    "ExportReport",
    "check_program",
    "compare",
]

BOX_TOLERANCE = 0.02
"""How far the boxes of a file may lie from the model's, in pixels of the batch."""

SCORE_TOLERANCE = 5e-5
"""How far the scores of a file may lie from the model's."""

_MAP_TOLERANCE = 1e-3  # of logits and box deltas, relative to the greatest of a map
_SAME_OBJECT = 100  # tolerances; what lies farther off is another detection
_DRAWN_SIZE = (192, 256)


@dataclass(frozen=True)
class Comparison:
    """How far a file's results for one batch are from the model's.

    Attributes:
        sizes: ``(height, width)`` of each image in the batch.
        detections: of the model, in all images; None for a file of maps.
        unmatched: detections of either side that the other has not, scores near a cut left out.
        box_difference: greatest of detections that both have, in pixels.
        score_difference: greatest of detections that both have.
        map_difference: greatest of logits and box deltas relative to their map's greatest; None for a
            file of detections.
    """

    sizes: tuple[tuple[int, int], ...]
    detections: int | None = None
    unmatched: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0
    map_difference: float | None = None

    @property
    def ok(self) -> bool:
        """Whether everything is within tolerance."""
        return (
            self.unmatched == 0
            and self.box_difference <= BOX_TOLERANCE
            and self.score_difference <= SCORE_TOLERANCE
            and (self.map_difference is None or self.map_difference <= _MAP_TOLERANCE)
        )

    def __str__(self) -> str:
        images = " and ".join(f"{height}x{width}" for height, width in self.sizes)
        if self.map_difference is not None:
            return f"{images}: maps within {self.map_difference:.1e} of their greatest values"
        if not self.detections and not self.unmatched:
            return f"{images}: nothing found by either; give a photo with objects as `check_image`"
        missing = f", {self.unmatched} found by one alone" if self.unmatched else ""
        return (
            f"{images}: {self.detections} detections{missing}, boxes within "
            f"{self.box_difference:.4f} px, scores within {self.score_difference:.1e}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the model.

    Attributes:
        path: of the file.
        opset: of ONNX; None for a program of ``torch.export``.
        runtime: that ran the file, with its version.
        comparisons: one a batch.
    """

    path: Path
    opset: int | None
    runtime: str
    comparisons: tuple[Comparison, ...]

    def renamed(self, path: Path) -> ExportReport:
        """Return the report for the file's last name."""
        return dataclasses.replace(self, path=path)

    def __str__(self) -> str:
        opset = f"opset {self.opset}, " if self.opset else ""
        lines = [f"{self.path}: {opset}compared with the model in {self.runtime}"]
        return "\n".join(lines + [f"  {comparison}" for comparison in self.comparisons])


def check_program(
    path: Path, model: RetinaNet, facts: FileFacts, image: ImageSource | None
) -> ExportReport:
    """Load a program of ``torch.export`` and compare it with its model."""
    with explaining("Loading the program"), hushed(), path.open("rb") as file:
        function = torch.export.load(file).module()

    def run(images: Tensor, sizes: Tensor) -> Outputs:
        with explaining("Running the program"), torch.no_grad():
            outputs = function(*(images, sizes)[: len(facts.inputs)])
        return dict(zip(facts.outputs, outputs, strict=True))

    comparisons = compare(model, facts, image, run)
    return ExportReport(path, None, f"torch {torch.__version__}", comparisons)


@torch.no_grad()
def compare(
    model: RetinaNet, facts: FileFacts, image: ImageSource | None, run: Run
) -> tuple[Comparison, ...]:
    """Run the model and its file on an image; on two of unlike sizes too, if the file takes them.

    Args:
        model: in evaluation mode.
        facts: of the file.
        image: to run them on; None draws one.
        run: gives the file's outputs by name.

    Raises:
        ExportError: they differ by more than rounding.
    """
    pixels = _drawn_image() if image is None else load_image(image, "check_image")
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
    found = tuple(
        _compare_batch(model, facts, batch, run) for batch in _batches(model, facts, pixels.float())
    )
    if not all(comparison.ok for comparison in found):
        listed = "; ".join(map(str, found))
        raise ExportError(
            f"The exported file does not give what the model gives, within {BOX_TOLERANCE} px and "
            f"{SCORE_TOLERANCE}: {listed}. Nothing was written."
        )
    return found


def _drawn_image() -> Tensor:
    """Draw coarse and fine noise, in which an untrained network sees objects as well as in any."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=_DRAWN_SIZE, mode="bilinear")[0]
    return 0.8 * image + 0.2 * torch.rand(3, *_DRAWN_SIZE, generator=generator)


def _batches(model: RetinaNet, facts: FileFacts, image: Tensor) -> list[ImageBatch]:
    """Prepare the image alone, and with its upper half."""
    if facts.fixed_shape is None:
        half = image[:, : max(1, image.shape[1] // 2)]
        return [model.preprocess([image]), model.preprocess([image, half])]
    batch, height, width = facts.fixed_shape
    prepared = model.preprocess([image])
    cut = prepared.tensor[..., :height, :width]
    canvas = cut.new_zeros(batch, 3, height, width)
    canvas[:, :, : cut.shape[2], : cut.shape[3]] = cut
    [(own_height, own_width)] = prepared.sizes
    size = (min(own_height, height), min(own_width, width))
    return [ImageBatch(canvas, [size] * batch, [size] * batch)]


def _compare_batch(model: RetinaNet, facts: FileFacts, batch: ImageBatch, run: Run) -> Comparison:
    outputs = run(batch.tensor, torch.tensor(batch.sizes))
    logits, box_deltas = model.forward_maps(batch.tensor)
    sizes = tuple(batch.sizes)
    if facts.kind == "maps":
        pairs = zip(facts.outputs, [*logits, *box_deltas], strict=True)
        return Comparison(
            sizes, map_difference=max(_relative(outputs[name], level) for name, level in pairs)
        )
    anchors = model.anchor_generator(
        [(level.shape[2], level.shape[3]) for level in logits],
        (batch.tensor.shape[2], batch.tensor.shape[3]),
    )
    expected = model.postprocess(logits, box_deltas, anchors, batch.sizes)
    return _compare_detections(model, sizes, expected, outputs)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _compare_detections(
    model: RetinaNet,
    sizes: tuple[tuple[int, int], ...],
    expected: Sequence[Detections],
    outputs: Outputs,
) -> Comparison:
    unmatched, box_difference, score_difference = 0, 0.0, 0.0
    for index, theirs in enumerate(expected):
        count = int(outputs["count"][index])
        boxes, scores, labels = (
            outputs[name][index][:count] for name in ("boxes", "scores", "labels")
        )
        cut = _cut(model, theirs)
        free = torch.ones_like(labels, dtype=torch.bool)
        for box, score, label in zip(theirs.boxes, theirs.scores, theirs.labels, strict=True):
            apart = (boxes - box).abs().amax(dim=1) / BOX_TOLERANCE
            apart = torch.maximum(apart, (scores - score).abs() / SCORE_TOLERANCE)
            apart[~free | (labels != label)] = torch.inf
            nearest = int(apart.argmin()) if len(apart) else -1
            within = float(apart[nearest]) if len(apart) else torch.inf
            if within > _SAME_OBJECT or (within > 1 and not _is_above(score, cut)):
                unmatched += _is_above(score, cut)
                continue
            free[nearest] = False
            box_difference = max(box_difference, float((boxes[nearest] - box).abs().max()))
            score_difference = max(score_difference, float((scores[nearest] - score).abs()))
        unmatched += sum(_is_above(score, cut) for score in scores[free])
    return Comparison(sizes, sum(map(len, expected)), unmatched, box_difference, score_difference)


def _cut(model: RetinaNet, detections: Detections) -> float:
    """Return the score below which a detection may be missing."""
    full = len(detections) == model.postprocess.max_detections
    last = float(detections.scores[-1]) if full else 0.0
    return max(last, model.postprocess.score_threshold)


def _is_above(score: Tensor, cut: float) -> int:
    return int(float(score) > cut + 2 * SCORE_TOLERANCE)
