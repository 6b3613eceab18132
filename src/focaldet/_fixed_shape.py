"""Post-processing of a whole batch with tensors whose shapes do not depend on their values.

This is the formulation for accelerators, ``torch.compile`` and export. A CPU is faster with the one in
:mod:`focaldet.postprocess`, which skips whatever scores too low. Here, rejected rows keep their place with
a score of 0, so the host never has to know how many there are, except for non-maximum suppression. The
steps after the choice of the best predictions handle all levels and images at once, because both an
accelerator and an exporter pay for each operation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from focaldet._torchvision import torchvision
from focaldet.boxes import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.box_coder import BoxCoder, CornerBoxCoder

__all__ = [
    "AnchorsAt",
    "FixedShapeDetections",
    "Places",
    "RunAsGraph",
    "Scaling",
    "fixed_shape_detections",
]

# torchvision's CUDA kernel stores one bit for each pair of boxes.
_MAX_MASK_BYTES = 2**28


class FixedShapeDetections(NamedTuple):
    """The detections of a batch in tensors of fixed shapes, best score first.

    Attributes:
        boxes: ``[B, D, 4]``, xyxy. Empty rows are 0.
        scores: ``[B, D]``. Empty rows are 0.
        labels: ``[B, D]``, int64. Empty rows are -1.
        counts: ``[B]``, int64, the number of filled rows of each image, which come first.

    .. versionadded:: 0.3.0
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


class Places(NamedTuple):
    """Where the N candidates of each image are.

    Attributes:
        level: ``[N]``, int64, the index of the level.
        anchor: ``[B, N]``, int64, the anchor within the cell.
        row: ``[B, N]``, int64, the row of the cell.
        column: ``[B, N]``, int64, the column of the cell.
    """

    level: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor


class AnchorsAt(Protocol):
    """Computes anchors where they are needed, for graphs in which sizes are dynamic."""

    def __call__(self, places: Places) -> Tensor:
        """Return ``[B, N, 4]``, xyxy."""


class _Options(Protocol):
    """The arguments of :class:`focaldet.postprocess.PostProcess` that are used here."""

    box_coder: BoxCoder | CornerBoxCoder
    pre_nms_top_k: int | None
    nms_threshold: float
    class_agnostic_nms: bool
    drop_empty: bool
    inclusive_corners: bool
    scale_before_nms: bool
    first_stride: int

    @property
    def clip_to(self) -> str | None: ...


class _Maps(NamedTuple):
    """The arguments of :func:`fixed_shape_detections` that candidates are chosen from."""

    logits: Sequence[Tensor]
    box_deltas: Sequence[Tensor]
    anchors: Sequence[Tensor] | AnchorsAt
    thresholds: Sequence[float] | Tensor
    labels: Tensor | None
    min_cells: Sequence[int] | None


class _Rows(NamedTuple):
    """Candidates of each image. The score of a rejected one is 0."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def best(self, count: int) -> _Rows:
        """Return the ``count`` rows with the highest scores."""
        scores, best = self.scores.topk(count)
        boxes = self.boxes.gather(1, best[..., None].expand(-1, -1, 4))
        return _Rows(boxes, scores, self.labels.gather(1, best))


class _Separated(NamedTuple):
    """Everything before non-maximum suppression, which is the first step that depends on values.

    Attributes:
        boxes: ``[B, N, 4]``, of the candidates.
        scores: ``[B, N]``. The score of a rejected candidate is 0.
        labels: ``[B, N]``.
        compared: ``[B * N + 2, 4]``, the boxes of each class and image in a place of their own, and two
            more.
        compared_scores: ``[B * N + 2]``.
        limits: ``[B, 1, 4]``, the ``(x, y, x, y)`` to which boxes are clipped.
        logits: ``[B, M]``, the best of all levels.
        cut: Which images have candidates that were left out of a level, ``[B]`` bool. None if there can be
            none.
        left_out: Which images have candidates that were left out, ``[B]`` bool, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    compared: Tensor
    compared_scores: Tensor
    limits: Tensor
    logits: Tensor
    cut: Tensor | None
    left_out: Tensor | None


class Scaling(NamedTuple):
    """How boxes are scaled to the input images.

    Attributes:
        function: Scales boxes ``[B, N, 4]`` by the factors.
        factors: ``[B, 2]``.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    factors: Tensor

    def __call__(self, boxes: Tensor) -> Tensor:
        return self.function(boxes, self.factors)


class RunAsGraph(Protocol):
    """Runs a function whose operations depend only on the shapes of its inputs."""

    def __call__(
        self, function: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return ``function(*inputs)``."""


def fixed_shape_detections(
    options: _Options,
    logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Sequence[Tensor] | AnchorsAt,
    sizes: Tensor,
    *,
    thresholds: Sequence[float] | Tensor,
    max_detections: int | None,
    labels: Tensor | None = None,
    scale: Scaling | None = None,
    min_cells: Sequence[int] | None = None,
    find_incomplete: bool = False,
    run: RunAsGraph | None = None,
) -> tuple[FixedShapeDetections, Tensor | None]:
    """Implement :meth:`focaldet.postprocess.PostProcess.fixed_shape`.

    Args:
        options: The post-processing, whose ``clip_to`` refers to ``sizes``.
        logits: ``[B, A * K, H, W]`` per level.
        box_deltas: ``[B, A * 4, H, W]`` per level.
        anchors: ``[H * W * A, 4]`` per level, or a function.
        sizes: ``[B, 2]``, the (height, width) that boxes are clipped to.
        thresholds: The score threshold of each level.
        max_detections: Number of rows, D. None keeps all candidates.
        labels: ``[K']``, int64, the labels to keep, sorted. None keeps all.
        scale: Scales boxes to the input images; ``options`` determines at which step. None leaves them
            in pixels of the batch.
        min_cells: The minimum number of cells of each level. It matters for dynamic sizes: a level that
            may have fewer than ``pre_nms_top_k`` values is padded.
        find_incomplete: Whether to also return which images are incomplete, ``[B]`` bool. Non-maximum
            suppression takes memory that is quadratic in the number of boxes of the whole batch. So in a
            large batch only the best candidates of each image take part, which gives the same detections
            unless fewer than D of them are kept while others were left out. Images with NaN in the logits
            count as incomplete too, because NaN displaces other candidates.
        run: Runs the steps before suppression. It requires tensors for ``anchors`` and ``thresholds``.
            None runs them directly.
    """
    maps = _Maps(logits, box_deltas, anchors, thresholds, labels, min_cells)
    if run is None:
        found = _separate(options, maps, sizes, scale)
    else:
        found = _separate_by(run, options, maps, sizes, scale)
    cut, left_out = found.cut, found.left_out
    rows = _Rows(found.boxes, found.scores, found.labels)
    kept = _kept(options, found)
    num_rows = rows.scores.shape[1] if max_detections is None else max_detections
    rows = rows._replace(scores=rows.scores * kept).best(min(num_rows, rows.scores.shape[1]))
    incomplete = None
    if find_incomplete:
        incomplete = found.logits.isnan().any(dim=1)
        if left_out is not None:
            incomplete |= left_out & _has_too_few(rows.scores, max_detections)
        if cut is not None and options.drop_empty:
            # Boxes that were dropped may have displaced some.
            incomplete |= cut
    if options.clip_to == "image_after_nms":
        rows = _clip(options, rows, found.limits)
        if options.drop_empty:
            rows = rows.best(rows.scores.shape[1])  # moves dropped boxes to the end
    boxes, scores, classes = rows
    if scale is not None and options.clip_to != "original":
        boxes = scale(boxes)
    empty = scores <= 0
    detections = FixedShapeDetections(
        boxes.masked_fill(empty[..., None], 0.0),
        scores,
        classes.masked_fill(empty, -1),
        (scores > 0).sum(dim=1),
    )
    return detections, incomplete


def _separate(options: _Options, maps: _Maps, sizes: Tensor, scale: Scaling | None) -> _Separated:
    """Choose and decode the candidates, and prepare them for suppression."""
    logits = maps.logits[0]
    batch = logits.shape[0]
    cap = None if _is_dynamic(batch) else math.isqrt(8 * _MAX_MASK_BYTES) // batch
    rows, values, cut = _candidates(options, maps, cap)
    if scale is not None and options.clip_to == "original":
        rows = rows._replace(boxes=scale(rows.boxes))
    limits = _limits(options, sizes, logits).to(rows.boxes)
    if options.clip_to != "image_after_nms":
        rows = _clip(options, rows, limits)
    left_out = cut
    if cap is not None and rows.scores.shape[1] > cap:
        rows = rows.best(cap)
        left_out = rows.scores[:, -1] > 0
    num_classes = logits.shape[1] * 4 // maps.box_deltas[0].shape[1]
    compared = _in_a_grid(options, *_to_compare(options, rows, limits, scale), num_classes)
    return _Separated(*rows, *compared, limits, values, cut, left_out)


def _separate_by(
    run: RunAsGraph, options: _Options, maps: _Maps, sizes: Tensor, scale: Scaling | None
) -> _Separated:
    """Call :func:`_separate` with all tensors as inputs of one function."""
    anchors, thresholds, labels = maps.anchors, maps.thresholds, maps.labels
    assert not callable(anchors)  # noqa: S101  # as fixed_shape_detections requires
    assert isinstance(thresholds, Tensor)  # noqa: S101
    num_levels = len(maps.logits)

    def separate(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, box_deltas, anchors = (inputs[i * num_levels :][:num_levels] for i in range(3))
        new_thresholds, new_sizes, *others = inputs[3 * num_levels :]
        new_scale = None if scale is None else scale._replace(factors=others.pop(0))
        new_labels = None if labels is None else others.pop(0)
        new_maps = _Maps(logits, box_deltas, anchors, new_thresholds, new_labels, maps.min_cells)
        return _separate(options, new_maps, new_sizes, new_scale)

    inputs = [*maps.logits, *maps.box_deltas, *anchors, thresholds, sizes]
    if scale is not None:
        inputs.append(scale.factors)
    if labels is not None:
        inputs.append(labels)
    found: Any = run(separate, inputs)
    return _Separated(*found)


def _is_dynamic(size: object) -> bool:
    """Return whether a size is a symbol, while a graph with dynamic sizes is traced."""
    return not isinstance(size, int)


def _has_too_few(scores: Tensor, max_detections: int | None) -> Tensor:
    """Return which images have fewer detections than the limit, ``[B]``."""
    if scores.shape[1] == max_detections:
        return scores[:, -1] <= 0
    return torch.ones_like(scores[:, 0], dtype=torch.bool)


def _to_compare(
    options: _Options, rows: _Rows, limits: Tensor, scale: Scaling | None
) -> tuple[_Rows, Tensor | None]:
    """Return the rows with the boxes to compare, and their highest coordinate if none is below 0."""
    if scale is not None and options.scale_before_nms:
        return rows._replace(boxes=scale(rows.boxes)), None
    clipped = options.clip_to not in (None, "image_after_nms")
    return rows, limits.max() if clipped else None


def _candidates(
    options: _Options, maps: _Maps, cap: int | None
) -> tuple[_Rows, Tensor, Tensor | None]:
    """Return the best predictions of each level and their logits.

    The last result is which images have more predictions above the threshold in a level, of which only
    ``cap`` are returned, ``[B]`` bool. It is None if no level has more.
    """
    logits, box_deltas, anchors, thresholds, labels, min_cells = maps
    num_anchors = box_deltas[0].shape[1] // 4
    if labels is not None:
        first = torch.arange(num_anchors, device=labels.device) * (
            logits[0].shape[1] // num_anchors
        )
        channels = (first[:, None] + labels).flatten()
        logits = [level.index_select(1, channels) for level in logits]
    num_classes = logits[0].shape[1] // num_anchors
    best, cut_levels = [], []
    for level, scored in enumerate(logits):
        count = options.pre_nms_top_k
        if cap is not None and (count is None or count > cap):
            count = cap
            if scored[0].numel() > cap:
                cut_levels.append(level)
        assert count is not None  # noqa: S101  # graphs with dynamic sizes have a limit
        fewest = scored.shape[1] * (1 if min_cells is None else min_cells[level])
        best.append(_best_of_level(scored, count, fewest))
    values = torch.cat([value for value, _ in best], dim=1)
    index = torch.cat([index for _, index in best], dim=1)
    counts = [value.shape[1] for value, _ in best]

    def of_level(numbers: Sequence[int]) -> Tensor:
        """Return the number of each candidate's level, ``[N]``, without a copy from the host."""
        return torch.cat(
            [index.new_full((count,), one) for one, count in zip(numbers, counts, strict=True)]
        )

    cells = of_level([level.shape[2] * level.shape[3] for level in logits])
    channel = index // cells
    cell = index - channel * cells  # not "%", which becomes several operations in ONNX
    anchor = channel // num_classes
    classes = channel - anchor * num_classes
    delta = torch.arange(4, device=index.device)
    at = (anchor[..., None] * 4 + delta) * cells[:, None] + cell[..., None]
    deltas = torch.cat(
        [
            level.flatten(1).gather(1, part)
            for level, part in zip(
                box_deltas,
                torch.split(at.flatten(1), [4 * count for count in counts], dim=1),
                strict=True,
            )
        ],
        dim=1,
    ).view(at.shape)
    if callable(anchors):
        width = of_level([level.shape[3] for level in logits])
        row = cell // width
        place = Places(of_level(range(len(counts))), anchor, row, cell - row * width)
        chosen = anchors(place)
    else:
        starts = [0]
        for level_anchors in anchors:
            starts.append(starts[-1] + len(level_anchors))
        chosen = torch.cat(list(anchors))[of_level(starts[:-1]) + cell * num_anchors + anchor]
    boxes = options.box_coder.decode(
        at_least_float32(deltas).flatten(0, 1), at_least_float32(chosen).flatten(0, 1)
    ).view(at.shape)
    scores = at_least_float32(values).sigmoid()
    above = scores > _threshold(thresholds, scores, counts)
    scores = torch.where(above, scores, scores.new_zeros(()))
    if labels is not None:
        classes = labels[classes]
    cut = None
    if cut_levels:
        last = torch.split(scores, counts, dim=1)
        cut = torch.stack([last[level][:, -1] > 0 for level in cut_levels]).any(dim=0)
    return _Rows(boxes, scores, classes), values, cut


def _best_of_level(logits_BCHW: Tensor, count: int, fewest: int) -> tuple[Tensor, Tensor]:
    """Return the highest logits of each image and their indices in channel, row and column order.

    Args:
        logits_BCHW: The logits of one level. They are not copied, contiguous or channels_last.
        count: Number of values. A level with fewer gives all, or padding if its size is dynamic.
        fewest: The minimum number of values of a level whose size is dynamic.
    """
    _, channels, height, width = logits_BCHW.shape
    total = channels * height * width
    if _is_dynamic(total):
        flat = logits_BCHW.flatten(1)
        if fewest >= count:
            return flat.topk(count)
        values, index = nn.functional.pad(flat, (0, count), value=-math.inf).topk(count)
        return values, index.clamp(max=total - 1)  # padding has a score of 0 wherever it is
    count = min(count, total)
    if logits_BCHW.stride(1) != 1:
        return logits_BCHW.flatten(1).topk(count)
    values, index = logits_BCHW.permute(0, 2, 3, 1).flatten(1).topk(count)
    cell = index // channels
    return values, (index - cell * channels) * (height * width) + cell


def _threshold(
    thresholds: Sequence[float] | Tensor, scores: Tensor, counts: Sequence[int]
) -> Tensor | float:
    """Return the threshold of each candidate, or one number if it is the same for all levels."""
    if not isinstance(thresholds, Tensor) and len(set(thresholds)) == 1:
        return thresholds[0]
    return torch.cat(
        [
            one.to(scores).expand(count)
            if isinstance(one, Tensor)
            else scores.new_full((count,), one)
            for one, count in zip(thresholds, counts, strict=True)
        ]
    )


def _limits(options: _Options, sizes: Tensor, logits_BCHW: Tensor) -> Tensor:
    """Return the ``(x, y, x, y)`` to which the boxes of each image are clipped, ``[B, 1, 4]``."""
    if options.clip_to == "batch":
        height, width = (side * options.first_stride for side in logits_BCHW.shape[-2:])
        one = torch.ones_like(sizes[:, 0])
        sizes = torch.stack((one * height, one * width), dim=1)
    return sizes.flip(1).repeat(1, 2)[:, None]


def _clip(options: _Options, rows: _Rows, limits: Tensor) -> _Rows:
    boxes, scores, labels = rows
    if options.inclusive_corners and options.clip_to is not None:
        last = _zeros_and_ones(boxes)
        boxes = torch.minimum((boxes - last).clamp(min=0), limits - 1) + last
    elif options.clip_to is not None:
        last_pixel = options.clip_to == "last_pixel"
        boxes = torch.minimum(boxes.clamp(min=0), limits - 1 if last_pixel else limits)
    if options.drop_empty:
        has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        scores = torch.where(has_area, scores, scores.new_zeros(()))
    return _Rows(boxes, scores, labels)


def _zeros_and_ones(boxes: Tensor) -> Tensor:
    """Return (0, 0, 1, 1) without a copy from the host."""
    return (torch.arange(4, device=boxes.device) > 1).to(boxes.dtype)


@torch.no_grad()
def _in_a_grid(
    options: _Options, rows: _Rows, bound: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return the boxes to suppress and their scores, those of all images in a row, and two more.

    The boxes of each class and image are moved to their own cell of a grid, so that one call handles
    the whole batch. The grid is nearly square, so that float32 keeps the boxes exact enough.

    Args:
        options: The post-processing.
        rows: The candidates, with the boxes to compare.
        bound: The highest coordinate, if none is below 0. None finds both limits.
        num_classes: K.
    """
    boxes, scores, labels = rows
    batch = scores.shape[0]
    if options.class_agnostic_nms:
        labels, num_classes = torch.zeros_like(labels), 1
    alive = (scores > 0)[..., None]
    extent = bound
    if extent is None:
        filled = torch.where(alive, boxes, boxes.new_zeros(()))
        low = filled.min()
        boxes, extent = boxes - low, filled.max() - low
    columns = math.ceil(math.sqrt(num_classes * (1 if _is_dynamic(batch) else batch)))
    cell = labels + torch.arange(batch, device=labels.device)[:, None] * num_classes
    row = cell // columns
    column = cell - row * columns
    corner = torch.stack((column, row, column, row), dim=-1) * (extent + 1)
    # Rejected rows share a box that overlaps no other. Together with an additional box there are always
    # two that are kept, because torchvision tells torch.export that suppression keeps at least two.
    nowhere = _zeros_and_ones(boxes) - 2
    separated = torch.where(alive, boxes + corner, nowhere).flatten(0, 1)
    separated = torch.cat((separated, torch.stack((nowhere, nowhere - 2))))
    flat = nn.functional.pad(scores.flatten(), (0, 2))
    return separated, flat


@torch.no_grad()
def _kept(options: _Options, found: _Separated) -> Tensor:
    """Return 1 for candidates that are kept, and 0 for those that a better one suppresses, ``[B, N]``."""
    flat = found.compared_scores
    keep = torchvision.ops.nms(found.compared, flat, options.nms_threshold)
    kept = torch.zeros_like(flat).index_fill(0, keep, 1.0)
    return kept[:-2].view(found.scores.shape)
