"""What an evaluation compares: the ground truth and the detections of each rank, and both joined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from focaldet._checks import check_integer, check_range
from focaldet.evaluation._backends import resolve
from focaldet.evaluation._detections import join, read_results
from focaldet.evaluation._ground_truth import checked_ids, read_ground_truth

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from focaldet.evaluation._backends import Backend
    from focaldet.evaluation._detections import DetectionTable, Results
    from focaldet.evaluation._ground_truth import GroundTruth, SupportsToCoco


class Share(NamedTuple):
    """What one rank has read.

    Attributes:
        truth: The ground truth of all images.
        detections: The detections of this rank.
        image_ids: Ids of the images to evaluate. None evaluates all.
        backend: The backend to use.
    """

    truth: GroundTruth
    detections: DetectionTable
    image_ids: list[int] | None
    backend: Backend


def reader(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | SupportsToCoco,
    results: Results,
    *,
    image_ids: Iterable[int] | None,
    category_ids: Sequence[int] | None,
    max_detections: int,
    backend: Backend = "pycocotools",
    checks: Callable[[], None] | None = None,
) -> Callable[[], Share]:
    """Return a function that checks the arguments of an evaluation and reads its inputs.

    The checks are inside, so that an error on one rank is raised on all.
    """

    def read() -> Share:
        check_integer("max_detections", max_detections)
        check_range("max_detections", max_detections, 100)
        if checks is not None:
            checks()
        resolved = resolve(backend)
        wanted = None if image_ids is None else checked_ids("image_ids", image_ids).tolist()
        truth = read_ground_truth(annotations)
        return Share(truth, read_results(results, truth, category_ids), wanted, resolved)

    return read


def join_shares(shares: Sequence[Share]) -> tuple[GroundTruth, DetectionTable]:
    """Join the shares of all ranks, and keep the images to evaluate."""
    truth = shares[0].truth
    detections = join([share.detections for share in shares])
    wanted: list[int] = []
    for share in shares:
        if share.image_ids is None:
            break
        wanted += share.image_ids
    else:
        truth = truth.only(wanted)
    return truth, detections.only(np.isin(detections.image_ids, truth.image_ids))
