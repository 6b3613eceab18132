"""A RetinaNet as modules that can be exported: tensors in, tensors of fixed shapes out.

``torch.export``, ``torch.compile(fullgraph=True)`` and ONNX cannot represent shapes or branches that
depend on values. The number of rows is therefore the same in every step, whatever the image contains:
rejected rows keep their place with a score of 0.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from focaldet._detector import weight_of_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet._fixed_shape import Places
    from focaldet.retinanet import OptimizedRetinaNet, RetinaNet

__all__ = ["ExportableDetector", "ExportableMaps"]


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
    options, before they are scaled to the input images; see
    :meth:`PostProcess.fixed_shape <focaldet.postprocess.PostProcess.fixed_shape>`.

    Args:
        model: The model, whose modules are shared. Its maps are converted to float32.

    Raises:
        ValueError: If ``pre_nms_top_k`` is None or counts anchors, or ``pre_nms_top_k_per_class`` is
            given: the number of candidates would have no bound that is small enough. Also if ``clip_to``
            is "original" or ``scale_before_nms`` is True, because the
            network is not given the sizes of the input images, and if ``suppression`` is not "hard", because ONNX has no operator for it.

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
        if postprocess.suppression != "hard":
            raise ValueError(
                f"A model with suppression={postprocess.suppression!r} cannot be exported with "
                "post-processing, because ONNX only has hard suppression. Set suppression='hard' in the "
                "config, or export the maps (postprocess=False), with which OnnxDetector lowers the "
                "scores in PyTorch."
            )
        self.model = model
        self.top_k = top_k
        device = weight_of_head(model).device
        generator = model.anchor_generator
        levels = range(len(generator.strides))
        cells = torch.stack([generator.cell_anchors(level) for level in levels]).to(device)
        self.register_buffer("cell_anchors", cells, persistent=False)
        strides = torch.tensor(generator.strides, device=device)[:, None]
        self.register_buffer("strides", strides, persistent=False)

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
        found = self.model.postprocess.fixed_shape(
            logits,
            box_deltas,
            partial(self._anchors_at, logits, images.shape[-2:]),
            sizes,
            min_cells=[self._min_cells(stride) for stride in self.model.anchor_generator.strides],
        )
        boxes, scores, labels, counts = found
        missing = self.num_detections - scores.shape[1]
        if missing > 0:  # a fixed shape with few cells
            boxes = nn.functional.pad(boxes, (0, 0, 0, missing))
            scores = nn.functional.pad(scores, (0, missing))
            labels = nn.functional.pad(labels, (0, missing), value=-1)
        return boxes, scores, labels, counts

    def _min_cells(self, stride: int) -> int:
        """Return the number of cells of a level in the smallest batch, of one tile."""
        return max(1, self.model.preprocess.size_divisor // stride) ** 2

    def _anchors_at(
        self, logits: Sequence[Tensor], image_size: torch.Size, places: Places
    ) -> Tensor:
        """Return the anchors of the candidates, as ``AnchorGenerator`` computes them."""
        generator = self.model.anchor_generator
        centres = torch.stack((places.column, places.row), dim=-1) + generator.offset
        strides = self.get_buffer("strides")
        if generator.mode == "torchvision":
            strides = torch.stack(
                [_inferred_strides(image_size, level, like=places.level) for level in logits]
            )
        centres = centres * strides[places.level]
        cells = self.get_buffer("cell_anchors").flatten(0, 1)
        cells = cells[places.level * generator.num_anchors + places.anchor]
        return centres.repeat(1, 1, 2) + cells


def _inferred_strides(image_size: torch.Size, level: Tensor, *, like: Tensor) -> Tensor:
    """Return the horizontal and vertical stride of a level, ``[2]``, which may be dynamic."""
    height, width = level.shape[2:]
    strides = image_size[1] // width, image_size[0] // height
    return torch.stack([like.new_full((), stride) for stride in strides])


def _float_maps(
    model: RetinaNet | OptimizedRetinaNet, images: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run the network in its own dtype on float32 images, and return float32 maps."""
    dtype = weight_of_head(model).dtype
    if dtype == images.dtype:
        return model.forward_maps(images)
    logits, box_deltas = model.forward_maps(images.to(dtype))
    return [level.float() for level in logits], [level.float() for level in box_deltas]
