"""Compare an exported file with its model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from focaldet.errors import ExportError
from focaldet.export._rounding import Rows, count_decided_by_rounding
from focaldet.images import load_image
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from focaldet.detections import Detections
    from focaldet.evaluation import CocoResult
    from focaldet.export._agreement import Agreement, Tolerances
    from focaldet.export._calibration import Calibration
    from focaldet.export._metadata import ExportMetadata, FilePrecision
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet, RetinaNetOutput

    Outputs = Mapping[str, Tensor]
    Run = Callable[[Tensor, Tensor], Outputs]

__all__ = [
    "BOX_TOLERANCE",
    "SCORE_TOLERANCE",
    "Comparison",
    "ExportReport",
    "compare",
    "noise",
]

BOX_TOLERANCE = 0.02
"""Maximum difference of a file's boxes from the model's, in pixels of the batch."""

SCORE_TOLERANCE = 5e-5
"""Maximum difference of a file's scores from the model's."""

_MAP_TOLERANCE = 1e-3  # of logits and box deltas, relative to the maximum of their map
_SAME_OBJECT = 100  # tolerances; what differs by more is a different detection
_NOISE_SIZE = (192, 256)


@dataclass(frozen=True)
class Comparison:
    """How far a file's results for one batch are from the model's.

    Attributes:
        sizes: ``(height, width)`` of each image in the batch.
        detections: Number of the model's detections in all images. None for a file of maps.
        unmatched: Number of detections that only the model or only the file found, except those that
            rounding decides about.
        box_difference: Maximum difference of matched boxes, in pixels.
        score_difference: Maximum difference of matched scores.
        map_difference: Maximum difference of logits and box deltas, relative to the maximum of their
            map. None for a file of detections.
        decided_by_rounding: Number of detections that only one of them found, because suppression had
            to choose between overlapping boxes whose scores are equal up to rounding, or whose IoU is
            the threshold.

            .. versionadded:: 0.3.0
    """

    sizes: tuple[tuple[int, int], ...]
    detections: int | None = None
    unmatched: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0
    map_difference: float | None = None
    decided_by_rounding: int = 0

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
            return f"{images}: maps within {self.map_difference:.1e} of their maximum"
        if not self.detections and not self.unmatched:
            return f"{images}: no detections to compare; pass a photo with objects as check_image"
        missing = f", {self.unmatched} without a match" if self.unmatched else ""
        if self.decided_by_rounding:
            missing += f", {self.decided_by_rounding} of them affected by rounding"
        return (
            f"{images}: {self.detections} detections{missing}, boxes within "
            f"{self.box_difference:.4f} px, scores within {self.score_difference:.1e}"
        )


@dataclass(frozen=True)
class ExportReport:
    """The result of an export, with a comparison of the file and the model.

    Attributes:
        path: The file that was written.
        opset: ONNX opset. None for a program of ``torch.export``.
        runtime: The runtime that ran the file, with its version.
        comparisons: One comparison per batch. Empty for a file of reduced precision.
        precision: "float32", "float16" or "int8".

            .. versionadded:: 0.3.0
        calibration: How an INT8 file was calibrated. None for other files.

            .. versionadded:: 0.3.0
        agreement: How the detections of a file of reduced precision compare with the model's. None
            for a file in float32.

            .. versionadded:: 0.3.0
        model_result: Average precision of the model on the annotations. None without annotations.

            .. versionadded:: 0.3.0
        file_result: Average precision of the file on the annotations. None without annotations.

            .. versionadded:: 0.3.0
        size: Size of an INT8 file in bytes, and that of the same file in float32. None for other files.

            .. versionadded:: 0.3.0
    """

    path: Path
    opset: int | None
    runtime: str
    comparisons: tuple[Comparison, ...]
    precision: FilePrecision = "float32"
    calibration: Calibration | None = None
    agreement: Agreement | None = None
    model_result: CocoResult | None = None
    file_result: CocoResult | None = None
    size: tuple[int, int] | None = None

    def within(self, tolerances: Tolerances) -> bool:
        """Return whether a file of reduced precision is within the tolerances.

        .. versionadded:: 0.3.0
        """
        loss = 0.0
        if self.model_result is not None and self.file_result is not None:
            loss = self.model_result.ap - self.file_result.ap
        agrees = self.agreement is None or self.agreement.within(tolerances)
        return agrees and not loss > tolerances.average_precision

    def renamed(self, path: Path) -> ExportReport:
        """Return a copy of the report with another path."""
        return dataclasses.replace(self, path=path)

    def __str__(self) -> str:
        opset = f"opset {self.opset}, " if self.opset else ""
        precision = "" if self.precision == "float32" else f"{self.precision}, "
        lines = [f"{self.path}: {precision}{opset}compared with the model in {self.runtime}"]
        lines += map(str, self.comparisons)
        if self.agreement is not None:
            lines.append(str(self.agreement))
        if self.size is not None:
            size, whole = self.size
            lines.append(
                f"{size / 1e6:.1f} MB, {size / whole:.2f} of the {whole / 1e6:.1f} MB in float32"
            )
        if self.model_result is not None:
            lines += [f"model: {self.model_result}", f"file:  {self.file_result}"]
        if self.calibration is not None:
            lines += str(self.calibration).splitlines()
        return "\n  ".join(lines)


@torch.no_grad()
def compare(
    model: RetinaNet, metadata: ExportMetadata, image: ImageSource | None, run: Run
) -> tuple[Comparison, ...]:
    """Run the model and its file on an image, and on two of different sizes if the file allows that.

    Args:
        model: The model, in evaluation mode.
        metadata: The metadata of the file.
        image: The image to run them on. None uses noise.
        run: Returns the file's outputs by name.

    Raises:
        ExportError: If the results differ by more than the tolerances.
    """
    channels = metadata.num_channels
    pixels = (
        noise(channels) if image is None else load_image(image, "check_image", channels=channels)
    )
    pixels = pixels if pixels.is_floating_point() else pixels.float() / 255
    found = tuple(
        _compare_batch(model, metadata, batch, run)
        for batch in _batches(model, metadata, pixels.float())
    )
    if not all(comparison.ok for comparison in found):
        listed = "; ".join(map(str, found))
        raise ExportError(
            f"The exported file gives different results than the model: {listed}. The tolerances are "
            f"{BOX_TOLERANCE} px, {SCORE_TOLERANCE} for scores and {_MAP_TOLERANCE} for maps. Nothing "
            "was written."
        )
    return found


def noise(num_channels: int) -> Tensor:
    """Return an image of coarse and fine noise, in which an untrained network finds objects."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, num_channels, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=_NOISE_SIZE, mode="bilinear")[0]
    return 0.8 * image + 0.2 * torch.rand(num_channels, *_NOISE_SIZE, generator=generator)


def _batches(model: RetinaNet, metadata: ExportMetadata, image: Tensor) -> list[ImageBatch]:
    """Return a batch with only the image, and one with the image and its upper half."""
    if metadata.fixed_shape is None:
        half = image[:, : max(1, image.shape[1] // 2)]
        return [model.preprocess([image]), model.preprocess([image, half])]
    batch, height, width = metadata.fixed_shape
    prepared = model.preprocess([image])
    cut = prepared.tensor[..., :height, :width]
    canvas = cut.new_zeros(batch, metadata.num_channels, height, width)
    canvas[:, :, : cut.shape[2], : cut.shape[3]] = cut
    [(image_height, image_width)] = prepared.sizes
    size = (min(image_height, height), min(image_width, width))
    return [ImageBatch(canvas, [size] * batch, [size] * batch)]


def _compare_batch(
    model: RetinaNet, metadata: ExportMetadata, batch: ImageBatch, run: Run
) -> Comparison:
    outputs = run(batch.tensor, torch.tensor(batch.sizes))
    expected: RetinaNetOutput = model(batch)
    sizes = tuple(batch.sizes)
    if metadata.kind == "maps":
        pairs = zip(metadata.outputs, [*expected.logits, *expected.box_deltas], strict=True)
        return Comparison(
            sizes, map_difference=max(_relative(outputs[name], level) for name, level in pairs)
        )
    detections = model.postprocess(
        expected.logits, expected.box_deltas, expected.anchors, expected.sizes
    )
    return _compare_detections(model, sizes, detections, outputs)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _compare_detections(
    model: RetinaNet,
    sizes: tuple[tuple[int, int], ...],
    expected: Sequence[Detections],
    outputs: Outputs,
) -> Comparison:
    unmatched, decided_by_rounding, box_difference, score_difference = 0, 0, 0.0, 0.0
    for index, ours in enumerate(expected):
        count = int(outputs["count"][index])
        boxes, scores, labels = (
            outputs[name][index][:count] for name in ("boxes", "scores", "labels")
        )
        threshold = max(_lowest_kept_score(model, found) for found in (ours.scores, scores))
        unused = torch.ones_like(labels, dtype=torch.bool)
        lone: list[int] = []
        rows = zip(ours.boxes, ours.scores, ours.labels, strict=True)
        for row, (box, score, label) in enumerate(rows):
            distance = (boxes - box).abs().amax(dim=1) / BOX_TOLERANCE
            distance = torch.maximum(distance, (scores - score).abs() / SCORE_TOLERANCE)
            distance[~unused | (labels != label)] = torch.inf
            nearest = int(distance.argmin()) if len(distance) else -1
            within = float(distance[nearest]) if len(distance) else torch.inf
            if within > _SAME_OBJECT or (within > 1 and not _is_above(score, threshold)):
                if _is_above(score, threshold):
                    lone.append(row)
                continue
            unused[nearest] = False
            box_difference = max(box_difference, float((boxes[nearest] - box).abs().max()))
            score_difference = max(score_difference, float((scores[nearest] - score).abs()))
        of_file = unused.nonzero()[:, 0].tolist()
        of_file = [row for row in of_file if _is_above(scores[row], threshold)]
        sides = (Rows(ours.boxes, ours.scores, ours.labels), Rows(boxes, scores, labels))
        decided = count_decided_by_rounding(
            model.postprocess,
            sides,
            (sides[0].take(lone), sides[1].take(of_file)),
            2 * SCORE_TOLERANCE,
        )
        decided_by_rounding += decided
        unmatched += len(lone) + len(of_file) - decided
    return Comparison(
        sizes,
        sum(map(len, expected)),
        unmatched,
        box_difference,
        score_difference,
        decided_by_rounding=decided_by_rounding,
    )


def _lowest_kept_score(model: RetinaNet, scores: Tensor) -> float:
    """Return the score below which a detection may be missing."""
    full = len(scores) and len(scores) == model.postprocess.max_detections
    last = float(scores[-1]) if full else 0.0
    return max(last, model.postprocess.score_threshold)


def _is_above(score: Tensor, threshold: float) -> bool:
    return float(score) > threshold + 2 * SCORE_TOLERANCE
