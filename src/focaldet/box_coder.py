"""Box coders, which convert boxes to deltas relative to anchors, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_range
from focaldet._uploads import Constants
from focaldet.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["BoxCoder", "CornerBoxCoder"]


class BoxCoder:
    """Encode boxes relative to anchors as ``(dx, dy, dw, dh)``, and decode them.

    With centres (x, y) and sizes (w, h), where a denotes the anchor::

        dx = wx (x - xa) / wa    dy = wy (y - ya) / ha
        dw = ww log(w / wa)      dh = wh log(h / ha)

    Args:
        weights: ``(wx, wy, ww, wh)``, each above 0.
        max_log_scale: Upper limit of ``dw / ww`` and ``dh / wh`` in decoding, above 0, so that an
            extreme prediction cannot overflow ``exp``. The usual log(1000 / 16) allows boxes up to
            62.5 times as wide as their anchor; ``inf`` allows any size.
        min_log_scale: Lower limit of the same, at most 0. MMDetection uses ``-log(1000 / 16)``.

    Convention: an anchor (0, 0, 10, 10) and a box (5, 0, 15, 10) give (0.5, 0, 0, 0).

    Raises:
        ValueError: If there are not four weights, or an option is out of range.

    References:
        Girshick et al., Rich feature hierarchies, appendix C. CVPR 2014. arXiv:1311.2524.

    >>> coder = BoxCoder()
    >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> deltas = coder.encode(torch.tensor([[5.0, 0.0, 15.0, 10.0]]), anchors)
    >>> deltas
    tensor([[0.5000, 0.0000, 0.0000, 0.0000]])
    >>> coder.decode(deltas, anchors)
    tensor([[ 5.,  0., 15., 10.]])
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        *,
        max_log_scale: float = math.log(1000 / 16),
        min_log_scale: float = -math.inf,
    ) -> None:
        self.weights = _checked_weights(weights, "dx, dy, dw and dh")
        check_range("max_log_scale", max_log_scale, 0, low_open=True)
        check_range("min_log_scale", min_log_scale, -math.inf, 0)
        self.max_log_scale = max_log_scale
        self.min_log_scale = min_log_scale
        self._constants = Constants()

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Encode boxes as deltas relative to anchors.

        Args:
            boxes: ``[N, 4]``, xyxy, with positive width and height.
            anchors: ``[N, 4]``, xyxy, with positive width and height.

        Returns:
            ``[N, 4]``: dx, dy, dw and dh.
        """
        box, anchor = xyxy_to_cxcywh(boxes), xyxy_to_cxcywh(anchors)
        shift = (box[:, :2] - anchor[:, :2]) / anchor[:, 2:]
        log_scale = (box[:, 2:] / anchor[:, 2:]).log()
        return torch.cat((shift, log_scale), dim=1) * self._constants(self.weights, boxes)

    def decode(self, box_deltas: Tensor, anchors: Tensor) -> Tensor:
        """Decode deltas relative to anchors to boxes.

        Args:
            box_deltas: ``[N, 4]``: dx, dy, dw and dh.
            anchors: ``[N, 4]``, xyxy.

        Returns:
            ``[N, 4]``, xyxy, not clipped to any image.
        """
        deltas = box_deltas / self._constants(self.weights, box_deltas)
        anchor = xyxy_to_cxcywh(anchors)
        centre = deltas[:, :2] * anchor[:, 2:] + anchor[:, :2]
        log_scale = deltas[:, 2:].clamp(self.min_log_scale, self.max_log_scale)
        size = log_scale.exp() * anchor[:, 2:]
        return cxcywh_to_xyxy(torch.cat((centre, size), dim=1))

    def __repr__(self) -> str:
        low = "" if self.min_log_scale == -math.inf else f", min_log_scale={self.min_log_scale:.4f}"
        return f"BoxCoder(weights={self.weights}, max_log_scale={self.max_log_scale:.4f}{low})"


class CornerBoxCoder:
    """Encode each corner of a box relative to the same corner of its anchor, and decode them.

    With corners (x1, y1) and (x2, y2), and an anchor a of width wa and height ha::

        dx1 = w1 (x1 - x1a) / wa    dy1 = w2 (y1 - y1a) / ha
        dx2 = w3 (x2 - x2a) / wa    dy2 = w4 (y2 - y2a) / ha

    keras-retinanet uses this with a weight of 5, because it divides deltas by a standard deviation of
    0.2. There is nothing to clamp, since no delta is an exponent.

    Args:
        weights: ``(w1, w2, w3, w4)``, each above 0.

    Convention: with weights of 1, an anchor (0, 0, 10, 10) and a box (5, 0, 15, 20) give
    (0.5, 0, 0.5, 1).

    Deviation: deltas can swap the corners of a box. :meth:`decode` puts them in order, so that every
    box is valid. keras-retinanet returns such a box inside out, but TensorFlow's suppression treats it
    as the same area.

    Raises:
        ValueError: If there are not four weights, or one is not above 0.

    .. versionadded:: 0.3.0

    >>> coder = CornerBoxCoder()
    >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> deltas = coder.encode(torch.tensor([[5.0, 0.0, 15.0, 20.0]]), anchors)
    >>> deltas
    tensor([[0.5000, 0.0000, 0.5000, 1.0000]])
    >>> coder.decode(deltas, anchors)
    tensor([[ 5.,  0., 15., 20.]])
    """

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        self.weights = _checked_weights(weights, "dx1, dy1, dx2 and dy2")
        self._constants = Constants()

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Encode boxes as deltas relative to anchors.

        Args:
            boxes: ``[N, 4]``, xyxy.
            anchors: ``[N, 4]``, xyxy, with positive width and height.

        Returns:
            ``[N, 4]``: dx1, dy1, dx2 and dy2.
        """
        deltas = (boxes - anchors) / _sides(anchors)
        return deltas * self._constants(self.weights, boxes)

    def decode(self, box_deltas: Tensor, anchors: Tensor) -> Tensor:
        """Decode deltas relative to anchors to boxes.

        Args:
            box_deltas: ``[N, 4]``: dx1, dy1, dx2 and dy2.
            anchors: ``[N, 4]``, xyxy.

        Returns:
            ``[N, 4]``, xyxy with x1 <= x2 and y1 <= y2, not clipped to any image.
        """
        deltas = box_deltas / self._constants(self.weights, box_deltas)
        corners = anchors + deltas * _sides(anchors)
        first, last = corners[:, :2], corners[:, 2:]
        return torch.cat((torch.minimum(first, last), torch.maximum(first, last)), dim=1)

    def __repr__(self) -> str:
        return f"CornerBoxCoder(weights={self.weights})"


def _sides(anchors: Tensor) -> Tensor:
    """Return width, height, width and height of each anchor, ``[N, 4]``."""
    return (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)


def _checked_weights(weights: Sequence[float], deltas: str) -> tuple[float, ...]:
    if len(weights) != 4:
        raise ValueError(f"weights must be four numbers, for {deltas}, got {tuple(weights)}.")
    for i, weight in enumerate(weights):
        check_range(f"weights[{i}]", weight, 0, low_open=True)
    return tuple(weights)
