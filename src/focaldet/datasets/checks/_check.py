"""The doctor for data sets: what is wrong with one, before it costs a training run."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from focaldet.config import RetinaNetConfig
    from focaldet.datasets._table import AnnotationTable

__all__ = ["check_dataset"]

_MOST_THREADS = 8


def check_dataset(
    table: AnnotationTable,
    *,
    config: RetinaNetConfig | None = None,
    strides: Sequence[int] = (8, 16, 32),
    images: Literal["decode", "headers", "none"] = "decode",
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> DatasetReport:
    """Look for what is wrong with a data set, with file and annotation id.

    Images: missing, damaged, of another size than annotated, listed twice, the same under two names,
    without objects. Boxes: NaN, without area, outside their image, annotated twice, or all read in
    the wrong format. Categories: not declared, never used. With a configuration, also which objects
    its anchors can reach. :data:`~focaldet.datasets.checks._report.KINDS` lists every kind.

    Args:
        table: what a reader such as :func:`~focaldet.datasets.read_coco` returned.
        config: of the model to be trained. Each object is resized as the model does and held against
            every anchor, its image alone in the batch; with ``anchor_mode="torchvision"`` anchors
            move a little with the batch's padding.
        strides: of C3, C4 and C5 of that model's backbone; all of focaldet's own have the default.
        images: "decode" reads every image wholly, which alone finds one that is cut short;
            "headers" reads sizes only; "none" opens no file.
        workers: threads that read images; None takes one a CPU core, 8 at most.
        progress: called now and then with how many images were read, of how many.

    Raises:
        ValueError: another word for ``images``, or ``workers`` below 1.

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
    >>> print(check_dataset(table, images="none").findings[0])
    a.jpg, image 1, annotation 7: x1 y1 x2 y2 = 10 20 10 50, width 0, height 30
    """
    check_choice("images", images, ("decode", "headers", "none"))
    if workers is None:
        workers = min(_MOST_THREADS, os.cpu_count() or 1)
    check_range("workers", workers, 1)
    findings: list[Finding] = []
    sizes = table.image_sizes
    if images == "none":
        findings += images_of_unknown_size(table)
    else:
        found, real_sizes = image_findings(
            table, decode=images == "decode", workers=workers, progress=progress
        )
        findings += found
        # Boxes are held against the size that they were drawn in; that it is wrong is said above.
        sizes = np.where((sizes > 0).all(1, keepdims=True), sizes, real_sizes)
    findings += duplicate_images(table)
    findings += images_without_objects(table)
    findings += format_findings(table, sizes)
    findings += box_findings(table, sizes)
    findings += annotation_findings(table)
    anchors = None
    if config is not None:
        from focaldet.datasets.checks._anchors import anchor_reach  # imports torchvision

        findings += _class_findings(table, config)
        unreached, anchors = anchor_reach(table, sizes, config, strides)
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


def _class_findings(table: AnnotationTable, config: RetinaNetConfig) -> Iterator[Finding]:
    names = config.class_names
    if config.num_classes != len(table.class_names):
        message = f"{config.num_classes} in the model, {len(table.class_names)} in the data set"
        yield Finding(kind="class-mismatch", message=message)
    elif names is not None and names != table.class_names:
        pairs = enumerate(zip(names, table.class_names, strict=True))
        label, (model, data) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        message = f"label {label} is {model!r} in the model, {data!r} in the data set"
        yield Finding(kind="class-mismatch", message=message)
