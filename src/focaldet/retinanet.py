"""RetinaNet: the parts wired together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from focaldet import pretrained
from focaldet._assembly import (
    build_named_backbone,
    build_parts,
    name_backbone,
    warn_of_frozen_random_norms,
)
from focaldet._inference import SAVE_THE_ORIGINAL, optimized
from focaldet._output import RetinaNetOutput
from focaldet._prediction import predict_images
from focaldet.backbones import adapt_to_input
from focaldet.config import RetinaNetConfig
from focaldet.structures import ImageBatch, check_targets

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from focaldet.anchors import AnchorGenerator
    from focaldet.criterion import RetinaNetCriterion
    from focaldet.detections import Detections
    from focaldet.fpn import FPN
    from focaldet.heads import RetinaNetHead
    from focaldet.images import ImageSource
    from focaldet.postprocess import PostProcess
    from focaldet.structures import Target
    from focaldet.transforms import Preprocess

__all__ = ["RetinaNet", "RetinaNetConfig", "RetinaNetOutput"]


class RetinaNet(nn.Module):
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

    is_optimized = False  # the copy of optimize_for_inference

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
        super().__init__()
        self.config = config
        self.preprocess = preprocess
        self.backbone = backbone
        self.fpn = fpn
        self.head = head
        self.anchor_generator = anchor_generator
        self.criterion = criterion
        self.postprocess = postprocess

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
            config: Describes the model.
            backbone: A module of your own; see :class:`focaldet.backbones.Backbone`. The model's
                config then says ``backbone="custom"``, whether or not the one passed does. It is an
                error if that names a backbone other than the default, "resnet50", which cannot be
                told from a field that was left out.
            backbone_weights: A classifier's state dict, of torchvision or timm, for a backbone known
                by name. All but the last ``config.trainable_stages`` stages are then frozen. Without
                weights everything trains, and ``trainable_stages`` of the model's config is 5. With
                ``config.in_channels`` other than 3, the first convolution is adapted; see
                :func:`focaldet.backbones.adapt_input_channels`.

        Raises:
            ValueError: If an option is out of range, or the weights do not fit.
            TypeError: If a custom backbone is missing, lacks ``channels`` or ``strides``, or was
                passed together with the name of another or with ``backbone_weights``.

        Warns:
            UserWarning: If the backbone starts at random with frozen BatchNorm, and so barely trains.
        """
        if backbone is not None and backbone_weights is not None:
            raise TypeError(
                "backbone_weights are for a backbone known by name, but backbone= is a module of "
                "your own; load the weights into it and leave out backbone_weights=."
            )
        if backbone is not None or backbone_weights is not None:
            return cls._build(config, backbone, backbone_weights)
        model = cls._build(config.replace(trainable_stages=5), None)
        warn_of_frozen_random_norms(model.backbone)
        return model

    @classmethod
    def _build(
        cls,
        config: RetinaNetConfig,
        backbone: nn.Module | None,
        backbone_weights: Mapping[str, Tensor] | None = None,
    ) -> RetinaNet:
        config = name_backbone(config, backbone)
        if backbone is None:
            backbone = build_named_backbone(config, backbone_weights)
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
            config: instead of the one that the checkpoint brings or suggests; the weights must fit,
                except that RGB weights are adapted to its ``in_channels`` by
                :func:`focaldet.backbones.adapt_input_channels`.
            backbone: A module of your own, whose weights are loaded too; see :meth:`from_config`.
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
        tensors = adapt_to_input(checkpoint.tensors, model.state_dict())
        checkpoint = checkpoint._replace(tensors=tensors)
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
        if self.is_optimized:
            raise ValueError(SAVE_THE_ORIGINAL)
        return pretrained.Checkpoint(self.config, self.state_dict())

    def forward(
        self,
        images: Sequence[Tensor] | Tensor | ImageBatch,
        targets: Sequence[Target] | None = None,
        *,
        resize: bool = True,
        validate: bool = True,
    ) -> RetinaNetOutput:
        """Run the network on images of any sizes.

        Args:
            images: ``[3, H, W]`` each, RGB, floating-point in 0-1; or ``[B, 3, H, W]``;
                or the batch that ``preprocess`` made of them.
            targets: one an image, boxes in pixels of the image as given; gives losses too.
            resize: False takes the images at the size they have, as transforms for training made them.
            validate: check values of images and targets, which waits for a GPU to finish.

        Raises:
            TypeError, ValueError: images or targets that don't hold; the message names the image.
        """
        batch = images
        if not isinstance(batch, ImageBatch):
            batch = self.preprocess(batch, resize=resize, validate=validate)
        if targets is not None and validate:
            check_targets(targets, batch.original_sizes, self.config.num_classes)
        weight = self.head.class_logits.weight
        logits, box_deltas = self.forward_maps(batch.tensor.to(weight))
        anchors = self.anchor_generator(
            [(level.shape[2], level.shape[3]) for level in logits],
            (batch.tensor.shape[2], batch.tensor.shape[3]),
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )
        losses = None
        if targets is not None:
            losses = self.criterion(logits, box_deltas, anchors, batch.scale_targets(targets))
        return RetinaNetOutput(
            logits, box_deltas, anchors, batch.sizes, batch.original_sizes, losses
        )

    def forward_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Run the network alone: no data-dependent step, fit for ``torch.compile`` and ``export``.

        Args:
            images: ``[B, 3, H, W]``, as the model's ``preprocess`` makes them.

        Returns:
            ``logits`` and ``box_deltas``, as in :class:`RetinaNetOutput`.
        """
        logits, box_deltas = self.head(self.fpn(self.backbone(images)))
        return logits, box_deltas

    def detections(
        self, output: RetinaNetOutput, *, score_threshold: float | None = None
    ) -> list[Detections]:
        """Return the objects found by a forward pass, in pixels of the images as given.

        Args:
            output: of this model.
            score_threshold: scores must be greater; None takes the config's.
        """
        found: list[Detections] = self.postprocess(
            output.logits,
            output.box_deltas,
            output.anchors,
            output.sizes,
            output.original_sizes,
            score_threshold=score_threshold,
            class_names=self.config.class_names,
        )
        return found

    def optimize_for_inference(
        self, dtype: torch.dtype | None = None, *, winograd: bool | None = None
    ) -> RetinaNet:
        """Return a faster copy that only predicts; this model stays as it is.

        BatchNorm is folded into the convolutions (a custom backbone that can't be traced keeps its
        norms, with a warning) and maps lie channels last. In float32 boxes move by less than 0.05
        pixels and scores by less than 1e-4. Geometry is always in float32 at least.

        Args:
            dtype: torch.bfloat16 or torch.float16 is faster and less exact; None keeps the model's.
            winograd: whether wide 3x3 convolutions are done by Winograd's F(4x4, 3x3), with four
                times their weights beside them (176 MiB for a ResNet-50 and 80 classes). None does so
                for float32 on a CPU if a measurement of half a second finds it faster there.

        Raises:
            ValueError: another dtype; and later, an attempt to save the copy.
        """
        return optimized(self, dtype, winograd=winograd)

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = ...,
        score_threshold: float | None = ...,
        on_error: Literal["raise"] = ...,
        progress: bool | None = ...,
    ) -> list[Detections]: ...

    @overload
    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = ...,
        score_threshold: float | None = ...,
        on_error: Literal["skip"],
        progress: bool | None = ...,
    ) -> list[Detections | None]: ...

    def predict(
        self,
        sources: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> list[Detections] | list[Detections | None]:
        """Find the objects in images, in evaluation mode whatever the model's mode.

        Args:
            sources: a path, a PIL image, an ``[H, W, 3]`` uint8 array, a ``[3, H, W]`` tensor (uint8,
                or floating-point in 0-1); a list or generator of such; or a folder, whose images are
                taken by name. See :func:`focaldet.images.load_image`.
            batch_size: images that go through the network together, if their padded sizes are equal;
                up to four times as many wait for their like. Others are read ahead meanwhile.
            score_threshold: scores must be greater; None takes the config's.
            on_error: "raise", or "skip" to warn of files that can't be read and give None for them.
            progress: show a progress bar, if tqdm is installed; None does on a terminal, for ten
                images and more.

        Returns:
            One :class:`~focaldet.Detections` an image, in order, on the CPU, in pixels of the image
            as given, with ``source`` set for files. A single image gives a list of one.

        Raises:
            FileNotFoundError, ValueError, TypeError: a source that can't be read; the message names it.
        """
        return predict_images(
            self,
            sources,
            batch_size=batch_size,
            score_threshold=score_threshold,
            on_error=on_error,
            progress=progress,
        )
