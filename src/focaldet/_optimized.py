"""A faster copy of a RetinaNet that only predicts."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from focaldet._checks import check_choice
from focaldet._cuda_graphs import GraphCache
from focaldet._detector import RetinaNetDetector, weight_of_head
from focaldet._norm_folding import fold_head_norms, fold_norms
from focaldet._tf32 import without_tf32
from focaldet._winograd import is_winograd_faster, use_winograd

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from typing import Self

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

    _allow_tf32 = True
    _graphs: GraphCache | None = None

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

    def _run_network(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        if self._graphs is None:
            return self._exact_maps(images)
        # Users may replace the method, for example by a compiled one.
        key = ("the network", vars(self).get("forward_maps"))
        maps: Any = self._graphs(self._flat_maps, [images], key=key, find_state=self._find_state)
        return list(maps[: len(maps) // 2]), list(maps[len(maps) // 2 :])

    def _flat_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, box_deltas = self._exact_maps(images)
        return (*logits, *box_deltas)

    def _exact_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Call :meth:`forward_maps`, without TF32 unless it is allowed."""
        if self._allow_tf32 or images.device.type != "cuda" or images.dtype != torch.float32:
            return self.forward_maps(images)
        with without_tf32():
            return self.forward_maps(images)

    def _find_state(self) -> Hashable:
        """Return what a graph of the network depends on, or None if hooks would not be called."""
        return _state_of(self.backbone, self.fpn, self.head)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        if self._graphs is not None:
            self._graphs.clear()  # they keep memory of the device that the model leaves
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

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


def _state_of(*modules: nn.Module) -> Hashable:
    """Return the addresses of all weights and the modes of all modules, or None if one has a hook.

    This runs before each use of a graph, so it avoids ``modules()`` and the like, which are slow.
    """
    has_any_global_hook: Any = nn.modules.module._has_any_global_hook  # noqa: SLF001
    if has_any_global_hook():
        return None
    state: list[Hashable] = []
    waiting: list[nn.Module | None] = list(modules)
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        parts = vars(module)
        if parts["_forward_hooks"] or parts["_forward_pre_hooks"]:
            return None
        state.append(parts["training"])
        for name in ("_parameters", "_buffers"):
            if parts[name]:
                state += [each.data_ptr() for each in parts[name].values() if each is not None]
        if parts["_modules"]:
            waiting += parts["_modules"].values()
    return tuple(state)


def optimized_copy(
    model: RetinaNetDetector,
    dtype: torch.dtype | None,
    *,
    winograd: bool | None,
    allow_tf32: bool,
    cuda_graphs: bool,
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
    result.eval().requires_grad_(requires_grad=False)
    result._allow_tf32 = allow_tf32  # noqa: SLF001
    if cuda_graphs:
        result._graphs = result.postprocess._graphs = GraphCache()  # noqa: SLF001
    return result


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
