"""What the calibration of an INT8 file found, as its report and metadata keep it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from focaldet._checks import is_number, shortened

__all__ = ["Calibration", "LayerGroup"]


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Convolutions that are computed in INT8 together or not at all.

    Attributes:
        name: Where they are in the model, such as "backbone.layer1" or "head.class_tower".
        convolutions: Number of convolutions. One that runs on five levels counts five times.
        score_error: Error of the scores if only this group is in INT8: the mean difference over the
            best candidates of the calibration images, weighted by their scores.
        box_error: The same for boxes, as 1 - IoU.
        precision: "int8", or "float32" if the group was left in floating point.

    .. versionadded:: 0.3.0
    """

    name: str
    convolutions: int
    score_error: float
    box_error: float
    precision: Literal["int8", "float32"]

    @property
    def error(self) -> float:
        """The larger of the two errors."""
        return max(self.score_error, self.box_error)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.convolutions} convolutions in {self.precision}; alone in int8, scores "
            f"are off by {self.score_error:.4f} and boxes by {self.box_error:.4f}"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How an INT8 file was calibrated.

    Attributes:
        images: Number of calibration images.
        method: How the range of each map was chosen.
        groups: All groups of convolutions.
        score_error: Error of the scores of the whole file, as in :class:`LayerGroup`.
        box_error: Error of the boxes of the whole file.
        runtimes: The runtimes in which errors were measured. Each error is the largest of them.

    .. versionadded:: 0.3.0
    """

    images: int
    method: str
    groups: tuple[LayerGroup, ...]
    score_error: float
    box_error: float
    runtimes: tuple[str, ...]

    @property
    def float_groups(self) -> tuple[str, ...]:
        """Names of the groups that were left in floating point."""
        return tuple(group.name for group in self.groups if group.precision == "float32")

    def to_json(self) -> str:
        """Return the calibration as the metadata of a file stores it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: If the text is damaged.
        """
        try:
            values = json.loads(text)
            groups = tuple(LayerGroup(**group) for group in values.pop("groups"))
            runtimes = tuple(values.pop("runtimes"))
            found = cls(groups=groups, runtimes=runtimes, **values)
            errors = [found.score_error, found.box_error]
            for group in groups:
                errors += [group.score_error, group.box_error, group.convolutions]
            texts = [found.method, *runtimes, *(group.name for group in groups)]
            damaged = (
                not all(map(is_number, [found.images, *errors]))
                or not all(isinstance(text, str) for text in texts)
                or any(group.precision not in ("int8", "float32") for group in groups)
            )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"calibration is damaged ({error})") from error
        if damaged:
            raise ValueError(f"calibration is damaged ({shortened(text)})")
        return found

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        first = (
            f"calibrated on {images} ({self.method}), measured in {' and '.join(self.runtimes)}: scores "
            f"are off by {self.score_error:.4f} and boxes by {self.box_error:.4f}"
        )
        return "\n".join([first, *(f"  {group}" for group in self.groups)])
