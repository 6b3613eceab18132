"""A faster copy of a RetinaNet that only predicts."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from focaldet._checks import check_choice
from focaldet._detector import RetinaNetDetector, weight_of_head
from focaldet._norm_folding import fold_head_norms, fold_norms
from focaldet._winograd import is_winograd_faster, use_winograd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from focaldet._output import RetinaNetOutput
    from focaldet.structures import ImageBatch

__all__ = ["IS_OPTIMIZED_WARNING", "OptimizedRetinaNet", "optimized_copy"]

IS_OPTIMIZED_WARNING = (
    "is_optimized is deprecated and will be removed in focaldet 1.0; "
    "use isinstance(model, focaldet.retinanet.OptimizedRetinaNet)."
)

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)
_PARTS = ("preprocess", "backbone", "fpn", "head", "anchor_generator", "postprocess")
_ONLY_ON_THE_ORIGINAL = ("criterion", "optimize_for_inference", "push_to_hub", "save_pretrained")


class OptimizedRetinaNet(RetinaNetDetector):
    """A faster copy of a :class:`~focaldet.RetinaNet` that only predicts.

    Created by :meth:`focaldet.RetinaNet.optimize_for_inference`, whose arguments and accuracy are
    described there. The copy has no criterion, takes no targets and cannot be saved as a checkpoint,
    because its weights no longer match the layers in its ``config``. Keep the original for that.
    Copying, pickling and ``.to()`` work as for any module.

    .. versionadded:: 0.3.0
    """

    def forward(
        self,
        images: Sequence[Tensor] | Tensor | ImageBatch,
        *,
        resize: bool = True,
        validate: bool = True,
    ) -> RetinaNetOutput:
        """Run the network on images of any size.

        Args:
            images: As for :meth:`focaldet.RetinaNet.forward`.
            resize: False keeps the images at their size.
            validate: Whether to check the values of the images, which synchronises a GPU.

        Returns:
            The output, without losses. :meth:`detections` converts it to detections.

        Raises:
            TypeError: If an image is not a tensor or has an unsupported dtype.
            ValueError: If an image has a wrong shape or wrong values. The message names the image.
        """
        return self._run_batch(self._to_batch(images, resize=resize, validate=validate))

    @property
    def is_optimized(self) -> bool:
        """True.

        .. deprecated:: 0.3.0
            Use ``isinstance(model, OptimizedRetinaNet)``.
        """
        warnings.warn(IS_OPTIMIZED_WARNING, DeprecationWarning, stacklevel=2)
        return True

    def __getattr__(self, name: str) -> Any:
        """Say where to find what only the original has."""
        if name in _ONLY_ON_THE_ORIGINAL:
            raise AttributeError(
                f"An optimised copy has no {name}, because it can only predict. "
                f"Use {name} of the original model."
            )
        return super().__getattr__(name)


def optimized_copy(
    model: RetinaNetDetector, dtype: torch.dtype | None, *, winograd: bool | None
) -> OptimizedRetinaNet:
    """Implement :meth:`focaldet.RetinaNet.optimize_for_inference`."""
    check_choice("dtype", dtype, _DTYPES)
    _warn_of_overrides(type(model))
    # One call, so that modules that several parts share stay shared.
    parts: dict[str, Any] = copy.deepcopy({name: getattr(model, name) for name in _PARTS})
    result = OptimizedRetinaNet(model.config, **parts).eval()
    fold_norms(result.backbone)
    fold_head_norms(result.head)
    network: tuple[nn.Module, ...] = (result.backbone, result.fpn, result.head)
    for part in network:
        part.to(dtype=dtype).to(memory_format=torch.channels_last)
    weight = weight_of_head(result)
    if winograd is None:
        supported = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        winograd = supported and is_winograd_faster(torch.get_num_threads())
    if winograd:
        for part in network:
            use_winograd(part)
    return result.eval().requires_grad_(requires_grad=False)


def _warn_of_overrides(kind: type[RetinaNetDetector]) -> None:
    names = ("forward_maps", "detections", "predict", "predict_iter")
    overridden = [n for n in names if getattr(kind, n) is not getattr(RetinaNetDetector, n)]
    if overridden:
        warnings.warn(
            f"{kind.__name__} overrides {' and '.join(overridden)}, which the optimised copy does "
            "not: it behaves as RetinaNet does.",
            UserWarning,
            stacklevel=4,  # the caller of optimize_for_inference
        )
