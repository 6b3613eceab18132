"""RetinaNet: the parts wired together."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from focaldet import pretrained
from focaldet._assembly import build_parts, choose_backbone, starting_at_random
from focaldet._detector import RetinaNetDetector
from focaldet._optimized import IS_OPTIMIZED_WARNING, OptimizedRetinaNet, optimized_copy
from focaldet._output import RetinaNetOutput
from focaldet.config import RetinaNetConfig
from focaldet.structures import check_targets

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from focaldet.anchors import AnchorGenerator
    from focaldet.criterion import RetinaNetCriterion
    from focaldet.fpn import FPN
    from focaldet.heads import RetinaNetHead
    from focaldet.postprocess import PostProcess
    from focaldet.structures import ImageBatch, Target
    from focaldet.transforms import Preprocess

__all__ = ["OptimizedRetinaNet", "RetinaNet", "RetinaNetConfig", "RetinaNetOutput"]


class RetinaNet(RetinaNetDetector):
    """RetinaNet (Lin et al. 2017): one forward pass from images to boxes of many sizes.

    Made by :meth:`from_config` or :meth:`from_pretrained`; the constructor takes finished parts.

    Args:
        config: describes the parts; what :meth:`save_pretrained` writes.
        backbone: gives C3, C4, C5; see :mod:`focaldet.backbones`.
        fpn: makes P3..P7 of them.
        head: gives class logits and box deltas of every level.
        anchor_generator: of the head's A anchors per cell.
        criterion: gives the losses.
        postprocess: gives the detections.
        preprocess: resizes, normalises and pads the images.

    References:
        Lin et al., Focal Loss for Dense Object Detection. ICCV 2017. arXiv:1708.02002.

    >>> import torch
    >>> config = RetinaNetConfig(
    ...     num_classes=2,
    ...     backbone="resnet18",
    ...     backbone_norm="batch",
    ...     fpn_channels=32,
    ...     min_size=64,
    ...     max_size=64,
    ... )
    >>> model = RetinaNet.from_config(config)
    >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    >>> output = model([torch.rand(3, 64, 64)], [target])
    >>> sum(output.losses.values()).backward()
    >>> model.detections(output)[0].image_size
    (64, 64)
    """

    def __init__(
        self,
        config: RetinaNetConfig,
        *,
        backbone: nn.Module,
        fpn: FPN,
        head: RetinaNetHead,
        anchor_generator: AnchorGenerator,
        criterion: RetinaNetCriterion,
        postprocess: PostProcess,
        preprocess: Preprocess,
    ) -> None:
        super().__init__(
            config,
            backbone=backbone,
            fpn=fpn,
            head=head,
            anchor_generator=anchor_generator,
            postprocess=postprocess,
            preprocess=preprocess,
        )
        self.criterion = criterion

    @classmethod
    def from_config(
        cls,
        config: RetinaNetConfig,
        *,
        backbone: nn.Module | None = None,
        backbone_weights: Mapping[str, Tensor] | None = None,
    ) -> RetinaNet:
        """Build a RetinaNet.

        Args:
            config: describes it.
            backbone: a module of your own, if ``config.backbone`` is "custom"; see
                :class:`focaldet.backbones.Backbone`.
            backbone_weights: a torchvision classifier's state dict for a backbone known by name.
                With them all but ``config.trainable_stages`` stages are frozen. Without, all train,
                and ``trainable_stages`` of the model's config is 5.

        Raises:
            ValueError: an option out of its range, or weights that don't fit.
            TypeError: a custom backbone that is missing, or lacks ``channels`` or ``strides``.

        Warns:
            UserWarning: frozen BatchNorm without weights, which does not train.
        """
        if backbone_weights is None and config.backbone != "custom":
            config = starting_at_random(config)
        return cls._build(config, backbone, backbone_weights)

    @classmethod
    def _build(
        cls,
        config: RetinaNetConfig,
        backbone: nn.Module | None,
        backbone_weights: Mapping[str, Tensor] | None = None,
    ) -> RetinaNet:
        backbone = choose_backbone(config, backbone, backbone_weights)
        return cls(config, backbone=backbone, **build_parts(config, backbone))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: RetinaNetConfig | None = None,
        backbone: nn.Module | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> RetinaNet:
        """Build a RetinaNet and load its weights; it is in evaluation mode.

        Args:
            source: a directory that :meth:`save_pretrained` wrote; a published name, which is
                downloaded once (:func:`focaldet.pretrained.list`); a published project's file; or a
                repository on the Hugging Face Hub, "user/repo" or "user/repo@revision".
            config: instead of the one that the checkpoint brings or suggests; the weights must fit.
            backbone: a module of your own, loaded too, if ``config.backbone`` is "custom".
            num_classes: for other classes the last class layer starts anew, and for a ``config`` of
                other anchors the box layer too: :func:`focaldet.pretrained.for_other_classes`.
            class_names: their names.

        Raises:
            FileNotFoundError: nothing is there, or on the Hub.
            focaldet.pretrained.DownloadError: a published file could not be fetched.
            ValueError: a damaged file, one that would run code, one of no known family, or weights
                that don't fit the architecture. No code in a file is ever run.
        """
        checkpoint = pretrained.load_checkpoint(
            source, config, num_classes=num_classes, class_names=class_names
        )
        model = cls._build(checkpoint.config, backbone)
        pretrained.load_into(model, checkpoint)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` for :meth:`from_pretrained`.

        Without the package safetensors, ``model.pth`` is written. Files are written aside and
        renamed, so that a failure leaves what was there before.

        Args:
            folder: made if it does not exist.
        """
        pretrained.save_checkpoint(self._checkpoint(), folder)

    def push_to_hub(
        self, repository: str, *, private: bool | None = None, commit_message: str = "Upload model"
    ) -> str:
        """Upload to the Hugging Face Hub what :meth:`save_pretrained` writes (extra ``hub``).

        Args:
            repository: "user/repo"; made if it does not exist, with a model card if it has none.
            private: of one that is made; None takes the account's default.
            commit_message: of the upload, whose URL is returned.
        """
        return pretrained.push_checkpoint(
            self._checkpoint(), repository, private=private, commit_message=commit_message
        )

    def _checkpoint(self) -> pretrained.Checkpoint:
        return pretrained.Checkpoint(self.config, self.state_dict())

    def forward(
        self,
        images: Sequence[Tensor] | Tensor | ImageBatch,
        targets: Sequence[Target] | None = None,
        *,
        resize: bool = True,
        validate: bool = True,
    ) -> RetinaNetOutput:
        """Run the network on images of any size.

        Args:
            images: RGB images ``[C, H, W]``, floating-point in [0, 1]; a tensor ``[B, C, H, W]`` of
                them; or the batch that ``preprocess`` returned for them.
            targets: One target per image, with boxes in pixels of the input image. With targets, the
                output includes the losses.
            resize: False keeps the images at their size, for training transforms that resize.
            validate: Whether to check the values of images and targets, which synchronises a GPU.

        Returns:
            The output of the head, with anchors, image sizes and losses, in training and evaluation
            mode alike. :meth:`detections` converts it to detections.

        Raises:
            TypeError: If an image or target has an unsupported type or dtype.
            ValueError: If an image or target has a wrong shape or wrong values. The message names
                the image.
        """
        batch = self._to_batch(images, resize=resize, validate=validate)
        if targets is not None and validate:
            check_targets(targets, batch.original_sizes, self.config.num_classes)
        output = self._run_batch(batch)
        if targets is None:
            return output
        scaled = batch.scale_targets(targets)
        losses = self.criterion(output.logits, output.box_deltas, output.anchors, scaled)
        return output._replace(losses=losses)

    def optimize_for_inference(
        self, dtype: torch.dtype | None = None, *, winograd: bool | None = None
    ) -> OptimizedRetinaNet:
        """Return a faster copy that only predicts. This model is left unchanged.

        BatchNorm is folded into the convolutions (a custom backbone that cannot be traced keeps its
        norms, with a warning) and the network uses the channels_last memory format. In float32, boxes
        move by less than 0.05 pixels and scores by less than 1e-4. Box geometry is always computed in
        float32 or better.

        Args:
            dtype: torch.bfloat16 or torch.float16 is faster but less exact. None keeps the model's
                dtype.
            winograd: Whether to compute wide 3x3 convolutions by Winograd's F(4x4, 3x3), which stores
                transformed weights four times as large in addition (176 MiB for a ResNet-50 and 80
                classes). None uses it in float32 on a CPU if a measurement of half a second finds it
                faster there.

        Raises:
            ValueError: If the dtype is not supported.

        Warns:
            UserWarning: If the backbone cannot be traced, or a subclass overrides methods of this
                class that the copy does not have.
        """
        return optimized_copy(self, dtype, winograd=winograd)

    @property
    def is_optimized(self) -> bool:
        """False.

        .. deprecated:: 0.3.0
            Use ``isinstance(model, OptimizedRetinaNet)``.
        """
        warnings.warn(IS_OPTIMIZED_WARNING, DeprecationWarning, stacklevel=2)
        return False
