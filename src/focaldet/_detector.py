"""What a RetinaNet and its optimised copy have in common: everything except training and saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from focaldet._output import RetinaNetOutput
from focaldet._prediction import Predictor
from focaldet._streams import CudaTransfers, Transfers
from focaldet.structures import ImageBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.anchors import AnchorGenerator
    from focaldet.config import RetinaNetConfig
    from focaldet.detections import Detections
    from focaldet.heads import RetinaNetHead
    from focaldet.postprocess import PostProcess
    from focaldet.transforms import Preprocess

__all__ = ["RetinaNetDetector", "weight_of_head"]


def weight_of_head(model: RetinaNetDetector) -> Tensor:
    """Return a weight of the head, which has the dtype and device of the maps."""
    return next(model.head.parameters())


class RetinaNetDetector(Predictor, nn.Module):
    """The parts of a RetinaNet that detect objects.

    Subclasses define ``forward``.

    Args:
        config: Describes the parts.
        backbone: Computes a list of maps; see :mod:`focaldet.backbones`.
        fpn: Computes the levels from them.
        head: Predicts class logits and box deltas on every level.
        anchor_generator: Generates the A anchors per cell.
        postprocess: Turns the head's output into detections.
        preprocess: Resizes, normalises and pads the images.
    """

    def __init__(
        self,
        config: RetinaNetConfig,
        *,
        backbone: nn.Module,
        fpn: nn.Module,
        head: RetinaNetHead,
        anchor_generator: AnchorGenerator,
        postprocess: PostProcess,
        preprocess: Preprocess,
    ) -> None:
        super().__init__()
        self.config = config
        self.preprocess = preprocess
        self.backbone = backbone
        self.fpn = fpn
        self.head = head
        self.anchor_generator = anchor_generator
        self.postprocess = postprocess

    def forward_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run only the network. No step depends on the data, so it can be compiled and exported.

        Args:
            images: ``[B, C, H, W]``, as the model's ``preprocess`` returns them.

        Returns:
            ``logits`` and ``box_deltas``, as in :class:`RetinaNetOutput`.
        """
        logits, box_deltas = self.head(self.fpn(self.backbone(images)))
        return logits, box_deltas

    def detections(
        self,
        output: RetinaNetOutput,
        *,
        score_threshold: float | None = None,
        labels: Sequence[int] | None = None,
        max_detections: int | None = None,
        device: torch.device | str | None = None,
    ) -> list[Detections]:
        """Convert the output of a forward pass to detections.

        Args:
            output: The output of this model.
            score_threshold: Keep detections that score above this. None uses the config's.
            labels: Labels to keep; the other classes are ignored. None keeps all.

                .. versionadded:: 0.3.0
            max_detections: Number of detections to keep per image. None uses the config's.

                .. versionadded:: 0.3.0
            device: Device of the detections. None uses that of the model. For a model on a GPU, "cpu"
                costs no additional wait, unlike :meth:`focaldet.Detections.to`.

                .. versionadded:: 0.3.0

        Returns:
            One :class:`~focaldet.Detections` per image, with boxes in pixels of the input image.
        """
        found: list[Detections] = self.postprocess(
            output.logits,
            output.box_deltas,
            output.anchors,
            output.sizes,
            output.original_sizes,
            score_threshold=score_threshold,
            class_names=self.config.class_names,
            labels=labels,
            max_detections=max_detections,
            device=device,
        )
        return found

    def _to_batch(
        self, images: Sequence[Tensor] | Tensor | ImageBatch, *, resize: bool, validate: bool
    ) -> ImageBatch:
        """Preprocess images, unless they are a batch already."""
        if isinstance(images, ImageBatch):
            return images
        batch: ImageBatch = self.preprocess(images, resize=resize, validate=validate)
        return batch

    def _run_batch(self, batch: ImageBatch) -> RetinaNetOutput:
        """Run the network on a batch and add the anchors. The output has no losses."""
        weight = weight_of_head(self)
        logits, box_deltas = self._run_network(batch.tensor.to(weight))
        anchors = self.anchor_generator(
            [(level.shape[2], level.shape[3]) for level in logits],
            (batch.tensor.shape[2], batch.tensor.shape[3]),
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )
        return RetinaNetOutput(logits, box_deltas, anchors, batch.sizes, batch.original_sizes, None)

    def _run_network(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Call :meth:`forward_maps`, in the way that suits the model."""
        return self.forward_maps(images)

    def _choose_model(
        self,
        batch_size: int | None,
        score_threshold: float | None,
        max_detections: int | None,
    ) -> tuple[RetinaNetDetector, int]:
        del score_threshold, max_detections  # all valid values are supported
        return self, 1 if batch_size is None else batch_size

    def _detection_options(self) -> dict[str, Any]:
        # A subclass may define `detections` without this option.
        own = type(self).detections is RetinaNetDetector.detections
        return {"device": "cpu"} if own and weight_of_head(self).device.type != "cpu" else {}

    def _transfers(self) -> Transfers:
        device = weight_of_head(self).device
        if device.type != "cuda":
            return Transfers()
        return CudaTransfers(device, overlaps=self._returns_new_maps())

    def _returns_new_maps(self) -> bool:
        """Return whether the next forward pass leaves the output of the last one as it is.

        CUDA graphs, which ``torch.compile`` may use, write to the same memory each time. Other methods
        than those of this class may keep anything from one to the other.
        """
        own = all(
            getattr(getattr(self, name), "__func__", None) is getattr(RetinaNetDetector, name)
            for name in ("forward_maps", "_run_batch", "detections")
        )
        return own and not any(map(_is_compiled, self.modules()))


def _is_compiled(module: nn.Module) -> bool:
    compiled = module._compiled_call_impl is not None  # noqa: SLF001  # no public access
    return compiled or "_orig_mod" in dict(module.named_children())
