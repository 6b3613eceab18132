"""Run all checks of a dataset and collect their findings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np

from focaldet._checks import check_choice, check_range
from focaldet.datasets.checks._boxes import (
    annotation_findings,
    box_findings,
    box_sizes,
    class_counts,
    format_findings,
)
from focaldet.datasets.checks._images import (
    duplicate_images,
    image_findings,
    images_of_unknown_size,
    images_without_objects,
)
from focaldet.datasets.checks._report import KINDS, DatasetReport, Finding
from focaldet.errors import AnnotationError, UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.datasets._table import AnnotationTable

__all__ = ["check_dataset"]

_MAX_THREADS = 8


def check_dataset(
    table: AnnotationTable,
    *,
    config: RetinaNetConfig | None = None,
    strides: Sequence[int] | None = None,
    images: Literal["decode", "headers", "none"] = "decode",
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    problems: Iterable[Exception] = (),
) -> DatasetReport:
    """Look for mistakes in a dataset.

    Images: missing, damaged, a size that differs from the annotated one, listed twice, the same
    content under two names, without objects. Boxes: NaN, without area, outside their image, annotated
    twice, or all read in the wrong format. Categories: not declared, never used. With a configuration,
    also the objects that its anchors cannot reach. :data:`~focaldet.datasets.checks.KINDS` lists every
    kind of finding.

    Args:
        table: Annotations from a reader such as :func:`~focaldet.datasets.read_coco`.
        config: Configuration of the model to be trained. Each object is resized as the model does and
            compared with every anchor, as if its image were alone in the batch. With
            ``anchor_mode="torchvision"``, the anchors shift slightly with the padding of the batch.
        strides: Strides of the maps of the model's backbone, one for each of the config's levels up to
            5. None uses ``2**level``, which all backbones of focaldet have.
        images: "decode" reads every image completely, which is the only way to find truncated files.
            "headers" reads only their sizes. "none" opens no file.
        workers: Number of threads that read images. None uses one per CPU core, at most 8.
        progress: Called from time to time with the number of images read so far and the total.
        problems: Errors and warnings that a reader reported, to be listed with the findings. Use
            ``problems = []`` and ``read_annotations(..., report=problems.append)``.

            .. versionadded:: 0.3.0

    Raises:
        ValueError: If ``images`` is unknown or ``workers`` is less than 1.

    >>> from pathlib import Path
    >>> from focaldet.datasets import AnnotationTable
    >>> table = AnnotationTable(
    ...     source=Path("cells.json"),
    ...     image_folder=Path("cells"),
    ...     file_names=["a.jpg"],
    ...     image_ids=np.array([1]),
    ...     image_sizes=np.array([[480, 640]], np.int32),
    ...     class_names=("cell",),
    ...     category_ids=(1,),
    ...     boxes=np.array([[10.0, 20.0, 10.0, 50.0]]),
    ...     labels=np.array([0]),
    ...     areas=np.array([0.0]),
    ...     crowd=np.array([False]),
    ...     annotation_ids=np.array([7]),
    ...     image_indices=np.array([0]),
    ... )
    >>> print(check_dataset(table, images="none").findings[-1])
    a.jpg, image 1, annotation 7: x1 y1 x2 y2 = 10 20 10 50, width 0, height 30
    """
    check_choice("images", images, ("decode", "headers", "none"))
    if workers is None:
        workers = min(_MAX_THREADS, os.cpu_count() or 1)
    check_range("workers", workers, 1)
    findings = [_reported(problem) for problem in problems]
    if reason := table.why_nothing_to_learn():
        findings.append(Finding(kind="nothing-to-learn", message=reason))
    sizes = table.image_sizes
    if images == "none":
        findings += images_of_unknown_size(table)
    else:
        found, real_sizes = image_findings(
            table, decode=images == "decode", workers=workers, progress=progress
        )
        findings += found
        # Boxes are compared with the size for which they were annotated. If that size is wrong,
        # image_findings reports it.
        sizes = np.where((sizes > 0).all(1, keepdims=True), sizes, real_sizes)
    findings += duplicate_images(table)
    findings += images_without_objects(table)
    findings += format_findings(table, sizes)
    findings += box_findings(table, sizes)
    findings += annotation_findings(table)
    anchors = None
    if config is not None:
        from focaldet.datasets.checks._anchors import measure_anchor_reach  # imports torchvision

        findings += _class_findings(table, config)
        if strides is None:
            strides = [2**level for level in config.map_levels]
        unreached, anchors = measure_anchor_reach(table, sizes, config, strides)
        findings += unreached
    order = {kind: place for place, kind in enumerate(KINDS)}
    return DatasetReport(
        source=table.source,
        num_images=len(table.image_ids),
        num_boxes=len(table.boxes),
        num_crowds=int(table.crowd.sum()),
        findings=tuple(sorted(findings, key=lambda finding: order[finding.kind])),
        classes=class_counts(table),
        box_sizes=box_sizes(table),
        anchors=anchors,
    )


def _reported(problem: Exception) -> Finding:
    if isinstance(problem, Warning):
        kind = "annotation-doubtful"
    elif isinstance(problem, UnreadableImageError):
        kind = "image-unreadable"
    elif isinstance(problem, FileNotFoundError) and not isinstance(problem, AnnotationError):
        kind = "image-missing"
    else:
        kind = "annotation-unreadable"
    return Finding(kind=kind, message=str(problem))


def _class_findings(table: AnnotationTable, config: RetinaNetConfig) -> Iterator[Finding]:
    names = config.class_names
    if config.num_classes != len(table.class_names):
        message = (
            f"number of classes: {config.num_classes} in the model, {len(table.class_names)} in the "
            "dataset"
        )
        yield Finding(kind="class-mismatch", message=message)
    elif names is not None and names != table.class_names:
        pairs = enumerate(zip(names, table.class_names, strict=True))
        label, (model, data) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        message = f"label {label} is {model!r} in the model and {data!r} in the dataset"
        yield Finding(kind="class-mismatch", message=message)
