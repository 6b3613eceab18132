"""A RetinaNet as modules that can be exported: tensors in, tensors of fixed shapes out.

``torch.export``, ``torch.compile(fullgraph=True)`` and ONNX cannot represent shapes or branches that
depend on values. The number of rows is therefore the same in every step, whatever the image contains:
rejected rows keep their place with a score of 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._detector import weight_of_head
from focaldet._torchvision import torchvision

if TYPE_CHECKING:
    from focaldet.retinanet import OptimizedRetinaNet, RetinaNet

__all__ = ["ExportableDetector", "ExportableMaps"]

# Boxes that overlap no other box: one for all rejected rows, and an additional one. Both are always
# present, because torchvision tells torch.export that suppression keeps at least two boxes.
_NOWHERE = (-2.0, -2.0, -1.0, -1.0)
_ELSEWHERE = (-4.0, -4.0, -3.0, -3.0)


class ExportableMaps(nn.Module):
    """Only the network, as a function of one tensor that returns two for each level.

    Args:
        model: The model, whose modules are shared.

    >>> from focaldet import RetinaNet, RetinaNetConfig
    >>> config = RetinaNetConfig(
    ...     num_classes=2, backbone="resnet18", backbone_norm="batch", head_depth=0
    ... )
    >>> maps = ExportableMaps(RetinaNet.from_config(config).eval())(torch.zeros(1, 3, 32, 64))
    >>> [tuple(level.shape) for level in maps[:2] + maps[5:7]]
    [(1, 18, 4, 8), (1, 18, 2, 4), (1, 36, 4, 8), (1, 36, 2, 4)]
    """

    def __init__(self, model: RetinaNet | OptimizedRetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of all levels, then their box deltas.

        Args:
            images: ``[B, C, H, W]``, as the model's ``preprocess`` returns them.
        """
        logits, box_deltas = _float_maps(self.model, images)
        return (*logits, *box_deltas)


class ExportableDetector(nn.Module):
    """Network and post-processing, without shapes that depend on the content of the image.

    The detections are those of the model's :class:`~focaldet.postprocess.PostProcess`, with all its
    options, before they are scaled to the input images.

    Deviation:
        ``PostProcess`` suppresses each class on its own, or offsets the classes along a line. Here a
        single suppression handles the whole batch: the boxes of each class and image are moved to
        their own cell of a nearly square grid, which keeps offsets small enough for float32.

    Args:
        model: The model, whose modules are shared. Its maps are converted to float32.

    Raises:
        ValueError: If ``pre_nms_top_k`` is None or counts anchors, or ``pre_nms_top_k_per_class`` is
            given: the number of candidates would have no bound that is small enough. Also if ``clip_to``
            is "original" or ``scale_before_nms`` is True, because the sizes of the input images are no
            input.

    >>> from focaldet import RetinaNet, RetinaNetConfig
    >>> config = RetinaNetConfig(
    ...     num_classes=2, backbone="resnet18", backbone_norm="batch", head_depth=0
    ... )
    >>> detector = ExportableDetector(RetinaNet.from_config(config).eval())
    >>> boxes, scores, labels, count = detector(torch.zeros(1, 3, 64, 64), torch.tensor([[60, 50]]))
    >>> boxes.shape, scores.shape, labels[0, :3], count
    (torch.Size([1, 100, 4]), torch.Size([1, 100]), tensor([-1, -1, -1]), tensor([0]))
    """

    def __init__(self, model: RetinaNet | OptimizedRetinaNet) -> None:
        super().__init__()
        top_k = model.postprocess.pre_nms_top_k
        if top_k is None:
            raise ValueError(
                "A model with pre_nms_top_k=None cannot be exported with post-processing, because the "
                "number of candidates has no bound. Set pre_nms_top_k in the config to a number, or "
                "export the maps (postprocess=False)."
            )
        postprocess = model.postprocess
        if postprocess.clip_to == "original" or postprocess.scale_before_nms:
            option = (
                "scale_before_nms=True" if postprocess.scale_before_nms else "clip_to='original'"
            )
            raise ValueError(
                f"A model with {option} cannot be exported with post-processing, because it suppresses "
                "boxes in pixels of the input image, whose size the file does not get. Choose a "
                "different option, or export the maps (postprocess=False)."
            )
        if (
            postprocess.pre_nms_top_k_of != "pairs"
            or postprocess.pre_nms_top_k_per_class is not None
        ):
            raise ValueError(
                "A model with pre_nms_top_k_of='anchors' or a pre_nms_top_k_per_class cannot be "
                "exported with post-processing, because each anchor would be a candidate for every "
                "class. Set pre_nms_top_k_of='pairs' and pre_nms_top_k_per_class=None in the config, "
                "or export the maps (postprocess=False)."
            )
        self.model = model
        self.top_k = top_k
        device = weight_of_head(model).device
        for level in range(len(model.anchor_generator.strides)):
            cells = model.anchor_generator.cell_anchors(level).to(device)
            self.register_buffer(f"cell_anchors_{level}", cells, persistent=False)

    @property
    def num_detections(self) -> int:
        """Number of rows per image, filled or empty: D."""
        candidates = self.top_k * len(self.model.anchor_generator.strides)
        return min(self.model.postprocess.max_detections or candidates, candidates)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return detections, highest score first, in pixels of the batch.

        Args:
            images: ``[B, C, H, W]``, as the model's ``preprocess`` returns them: normalised, and padded
                to multiples of its ``size_divisor``.
            sizes: ``[B, 2]``, (height, width) of each image without its padding.

        Returns:
            ``boxes [B, D, 4]`` (xyxy), ``scores [B, D]``, ``labels [B, D]`` (int64; -1 in empty rows,
            whose other values are 0) and ``count [B]`` (int64), the number of filled rows.
        """
        logits, box_deltas = _float_maps(self.model, images)
        levels = [
            self._level_candidates(level, *maps, image_size=images.shape[-2:])
            for level, maps in enumerate(zip(logits, box_deltas, strict=True))
        ]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        limits = self._limits(sizes, logits[0]).to(boxes)
        clip_last = self.model.postprocess.clip_to == "image_after_nms"
        if not clip_last:
            boxes, scores = self._clip(boxes, scores, limits)
        scores = self._suppress(boxes, scores, labels)
        scores, best = scores.topk(self.num_detections)
        boxes, labels = _rows(boxes, best), labels.gather(1, best)
        if clip_last:
            boxes, scores = self._clip(boxes, scores, limits)
            scores, best = scores.topk(self.num_detections)  # moves dropped boxes to the end
            boxes, labels = _rows(boxes, best), labels.gather(1, best)
        filled = scores > 0
        boxes = torch.where(filled[..., None], boxes, 0.0)
        return boxes, scores, torch.where(filled, labels, -1), filled.sum(dim=1)

    def _level_candidates(
        self, level: int, logits_BCHW: Tensor, box_deltas_BCHW: Tensor, *, image_size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of a level's best candidates. Too low scores become 0."""
        _, channels, height, width = logits_BCHW.shape
        cells = height * width
        values, index = self._padded(level, logits_BCHW.flatten(1)).topk(self.top_k)
        index = index.clamp(max=channels * cells - 1)  # keeps padding, whose score is 0, in range
        channel = index // cells
        # Not "%", which torch's ONNX exporter does not support for dynamic sizes.
        cell = index - channel * cells
        num_classes = self.model.head.num_classes
        anchor = channel // num_classes
        delta = torch.arange(4, device=index.device)
        at = (anchor[..., None] * 4 + delta) * cells + cell[..., None]
        deltas = box_deltas_BCHW.flatten(1).gather(1, at.flatten(1)).view(at.shape)
        row = cell // width
        column = cell - row * width
        anchors = self._anchors(
            level, anchor, row, column, grid=(height, width), image_size=image_size
        )
        decode = self.model.postprocess.box_coder.decode
        boxes = decode(deltas.float().flatten(0, 1), anchors.flatten(0, 1)).view(at.shape)
        scores = values.float().sigmoid()
        threshold = self.model.postprocess.level_thresholds(
            len(self.model.anchor_generator.strides)
        )
        scores = torch.where(scores > threshold[level], scores, 0.0)
        return boxes, scores, channel % num_classes

    def _padded(self, level: int, logits: Tensor) -> Tensor:
        """Pad the rows of a level that may have fewer than ``top_k`` values.

        No batch is smaller than ``size_divisor`` pixels. If a level of that size has enough values, as
        the first ones do, its large map is not copied.
        """
        stride = self.model.anchor_generator.strides[level]
        tile = max(1, self.model.preprocess.size_divisor // stride)
        per_cell = self.model.head.num_classes * self.model.anchor_generator.num_anchors
        if per_cell * tile**2 >= self.top_k:
            return logits
        padding = logits.new_full((1, self.top_k), -math.inf).expand(logits.shape[0], -1)
        return torch.cat((logits, padding), dim=1)

    def _anchors(
        self,
        level: int,
        anchor: Tensor,
        row: Tensor,
        column: Tensor,
        *,
        grid: tuple[int, int],
        image_size: torch.Size,
    ) -> Tensor:
        """Return the selected anchors ``[B, k, 4]``, as ``AnchorGenerator`` computes them."""
        generator = self.model.anchor_generator
        stride_y = stride_x = generator.strides[level]
        if generator.mode == "torchvision":
            stride_y, stride_x = image_size[0] // grid[0], image_size[1] // grid[1]
        y = (row.float() + generator.offset) * stride_y
        x = (column.float() + generator.offset) * stride_x
        cell_anchors = self.get_buffer(f"cell_anchors_{level}")
        return torch.stack((x, y, x, y), dim=-1) + cell_anchors[anchor]

    def _limits(self, sizes: Tensor, logits_BCHW: Tensor) -> Tensor:
        """Return the ``(x, y, x, y)`` to which the boxes of each image are clipped, ``[B, 1, 4]``."""
        if self.model.postprocess.clip_to == "batch":
            stride = self.model.postprocess.first_stride
            height, width = (side * stride for side in logits_BCHW.shape[-2:])
            one = torch.ones_like(sizes[:, 0])
            sizes = torch.stack((one * height, one * width), dim=1)
        return sizes.flip(1).repeat(1, 2)[:, None]

    def _clip(self, boxes: Tensor, scores: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        postprocess = self.model.postprocess
        if postprocess.inclusive_corners and postprocess.clip_to is not None:
            last = boxes.new_tensor((0.0, 0.0, 1.0, 1.0))
            boxes = torch.minimum((boxes - last).clamp(min=0), limits - 1) + last
        elif postprocess.clip_to is not None:
            last_pixel = postprocess.clip_to == "last_pixel"
            boxes = torch.minimum(boxes.clamp(min=0), limits - 1 if last_pixel else limits)
        if postprocess.drop_empty:
            has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
            scores = torch.where(has_area, scores, 0.0)
        return boxes, scores

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scores, with 0 for boxes that a better one of the same image and class suppresses."""
        num_classes = self.model.head.num_classes
        if self.model.postprocess.class_agnostic_nms:
            labels, num_classes = torch.zeros_like(labels), 1
        alive = (scores > 0)[..., None]
        low = torch.where(alive, boxes, 0.0).min()
        extent = torch.where(alive, boxes, 0.0).max() - low + 1
        columns = math.ceil(math.sqrt(num_classes))
        rows = math.ceil(num_classes / columns)
        image = torch.arange(scores.shape[0], device=scores.device)[:, None]
        column, row = labels % columns, labels // columns + image * rows
        corner = torch.stack((column, row, column, row), dim=-1).to(boxes) * extent
        separated = torch.where(alive, boxes - low + corner, boxes.new_tensor(_NOWHERE))
        separated = torch.cat((separated.flatten(0, 1), boxes.new_tensor((_NOWHERE, _ELSEWHERE))))
        flat = nn.functional.pad(scores.flatten(), (0, 2))
        keep = torchvision.ops.nms(separated, flat, self.model.postprocess.nms_threshold)
        kept = torch.zeros_like(flat).index_fill(0, keep, 1.0)
        return scores * kept[:-2].view(scores.shape)


def _float_maps(
    model: RetinaNet | OptimizedRetinaNet, images: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the network in its own dtype on float32 images, and return float32 maps."""
    dtype = weight_of_head(model).dtype
    if dtype == images.dtype:
        return model.forward_maps(images)
    logits, box_deltas = model.forward_maps(images.to(dtype))
    return [level.float() for level in logits], [level.float() for level in box_deltas]


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
