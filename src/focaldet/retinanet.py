"""RetinaNet: the parts wired together."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from focaldet import pretrained
from focaldet._assembly import (
    Parts,
    build_named_backbone,
    build_parts,
    current_config,
    name_backbone,
    warn_of_frozen_random_norms,
)
from focaldet._detector import RetinaNetDetector
from focaldet._optimized import IS_OPTIMIZED_WARNING, OptimizedRetinaNet, optimized_copy
from focaldet._output import RetinaNetOutput
from focaldet._to_torchvision import build_torchvision
from focaldet.backbones import adapt_to_input
from focaldet.config import RetinaNetConfig
from focaldet.structures import check_targets

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from focaldet.anchors import AnchorGenerator
    from focaldet.heads import RetinaNetHead
    from focaldet.postprocess import PostProcess
    from focaldet.structures import ImageBatch, Target
    from focaldet.transforms import Preprocess

__all__ = ["OptimizedRetinaNet", "RetinaNet", "RetinaNetConfig", "RetinaNetOutput"]


class RetinaNet(RetinaNetDetector):
    """RetinaNet (Lin et al. 2017), which detects objects of many sizes in one forward pass.

    Use :meth:`from_config` or :meth:`from_pretrained` to build one. The constructor takes finished
    parts.

    Args:
        config: Describes the parts; :meth:`save_pretrained` writes it.
        backbone: Computes a list of maps, such as C3, C4 and C5; see :mod:`focaldet.backbones`.
        fpn: Computes the levels from them, such as P3 to P7; a :class:`focaldet.FPN`, or
            :class:`torch.nn.Identity` for a head that reads the maps themselves.
        head: Predicts class logits and box deltas for every level.
        anchor_generator: Lays out the head's A anchors per cell.
        criterion: Computes the losses from logits, box deltas, anchors and targets, as
            :class:`focaldet.criterion.RetinaNetCriterion` does.
        postprocess: Turns head outputs into detections.
        preprocess: Normalises, resizes and pads the images.

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
        fpn: nn.Module,
        head: RetinaNetHead,
        anchor_generator: AnchorGenerator,
        criterion: nn.Module,
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
        backbone_weights: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
        criterion: nn.Module | None = None,
    ) -> RetinaNet:
        """Build a RetinaNet.

        Args:
            config: Describes the model.
            backbone: Your own backbone; see :class:`focaldet.backbones.Backbone`. The model's config
                then has ``backbone="custom"``, whether or not the one passed does. It is an error if
                the one passed names a backbone other than the default, "resnet50", which cannot be
                distinguished from a field that was left out.
            backbone_weights: Weights of a classifier of torchvision or timm, for a backbone known by
                name: its state dict; the path of a file that
                :func:`focaldet.pretrained.read_tensors` reads; or "imagenet" to download the weights
                of :func:`focaldet.backbones.imagenet_weights` once, to the same cache as the models
                of :meth:`from_pretrained`. With weights, all stages except the last
                ``config.trainable_stages`` are frozen. Without, all stages train, and the model's
                config has ``trainable_stages=5``. With ``config.in_channels`` other than 3, the first
                convolution is adapted; see :func:`focaldet.backbones.adapt_input_channels`.
            criterion: Your own criterion: a module that takes logits, box deltas, anchors and targets
                like :class:`focaldet.criterion.RetinaNetCriterion`, and returns losses by name. The
                model's config then has ``criterion="custom"``. None builds the config's.

        Raises:
            ValueError: If an option is out of range, weights do not fit, or ``config.criterion`` is
                "custom" and no criterion is given.
            FileNotFoundError: If there is no file at ``backbone_weights``.
            focaldet.errors.DownloadError: If the "imagenet" weights could not be downloaded. The
                message says where to put the file by hand.
            focaldet.errors.CheckpointError: If the file of weights is damaged. It is also a
                ValueError.
            TypeError: If a custom backbone is missing, lacks ``channels`` or ``strides``, or was
                passed together with the name of another or with ``backbone_weights``.
            ValueError: If a custom backbone does not have one map per level of ``config.levels``
                up to 5.

        Warns:
            UserWarning: If BatchNorm is frozen and there are no weights, so that the backbone barely
                trains.

        .. versionchanged:: 0.3.0
            Added ``criterion``. ``backbone_weights`` can be a path or "imagenet".
        """
        if criterion is None and config.criterion == "custom":
            raise ValueError("config.criterion is 'custom', so criterion= is required.")
        if backbone is not None and backbone_weights is not None:
            raise TypeError(
                "backbone_weights are for a backbone known by name, but backbone= is your own module. "
                "Load the weights into it and leave out backbone_weights=."
            )
        if backbone is not None or backbone_weights is not None:
            return cls._build(config, backbone, backbone_weights, criterion=criterion)
        model = cls._build(config.replace(trainable_stages=5), None, criterion=criterion)
        warn_of_frozen_random_norms(model.backbone)
        return model

    @classmethod
    def _build(
        cls,
        config: RetinaNetConfig,
        backbone: nn.Module | None,
        backbone_weights: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
        *,
        criterion: nn.Module | None = None,
    ) -> RetinaNet:
        config = name_backbone(config, backbone)
        if criterion is not None:
            config = config.replace(criterion="custom")
        if backbone is None:
            backbone = build_named_backbone(config, backbone_weights)
        return cls(config, backbone=backbone, **build_parts(config, backbone, criterion))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        config: RetinaNetConfig | None = None,
        backbone: nn.Module | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        criterion: nn.Module | None = None,
        weights: str | None = None,
        drop_background: bool = False,
        file_name: str | None = None,
        **changes: Any,
    ) -> RetinaNet:
        """Build a RetinaNet and load its weights; it is in evaluation mode.

        A checkpoint can be wrapped in any dictionaries, and its keys can have any prefix. What a file
        of a different project does not say about the model is logged as a warning (logger
        ``focaldet``), and can be given as ``config`` or ``changes``.

        Args:
            source: A folder written by :meth:`save_pretrained`; the folder of a training run, whose
                best model is loaded, or else its last (the log says which); a published name, which is
                downloaded once (see :func:`focaldet.pretrained.list`); the checkpoint of a run, a
                checkpoint file of a different project, or a folder with one; or a repository on the
                Hugging Face Hub, ``"user/repo"`` or ``"user/repo@revision"``.
            config: Used instead of the checkpoint's config. The weights must fit it, except that RGB
                weights are adapted to its ``in_channels`` by
                :func:`focaldet.backbones.adapt_input_channels`.
            backbone: Your own backbone, whose weights are loaded too; see :meth:`from_config`.
            num_classes: Number of classes to fine-tune for. If the classes differ from the
                checkpoint's, the class output layer is newly initialised, and with different anchors
                in ``config`` the box output layer too; see
                :func:`focaldet.pretrained.for_other_classes`.
            class_names: Names of these classes, or of the checkpoint's if it does not have them.
            criterion: Your own criterion, as in :meth:`from_config`. Its parameters and buffers are
                loaded if the checkpoint was saved with a custom criterion. A model that was saved
                with one can predict without it, but not compute losses.
            weights: Which set of weights to load if a file has several, for example "ema". None loads
                the one that is not an average, and logs a warning that lists the others.
            drop_background: Whether the first class of the checkpoint is an unused background. It is
                dropped, so that labels count from the class that follows.
            file_name: Which file of a folder or repository to load.
            **changes: Fields of :class:`RetinaNetConfig` that replace those of the checkpoint, such as
                ``min_size=600``. They cannot be combined with ``config``.

        Raises:
            FileNotFoundError: If nothing is found at ``source`` or on the Hub.
            focaldet.errors.DownloadError: If a published file could not be downloaded.
            focaldet.errors.CheckpointError: If a file is damaged, would run code, is not a RetinaNet
                in a supported format, or does not fit the architecture. It is also a ValueError. No
                code in a file is ever run.
            ValueError: If arguments contradict each other.
            TypeError: If a change is not a field of the config, or is combined with ``config``.

        .. versionchanged:: 0.3.0
            Added ``criterion``, ``weights``, ``drop_background``, ``file_name`` and ``changes``.
            Folders of runs are accepted.
        """
        checkpoint = pretrained.load_checkpoint(
            source,
            config,
            num_classes=num_classes,
            class_names=class_names,
            weights=weights,
            drop_background=drop_background,
            file_name=file_name,
            **changes,
        )
        model = cls._build(checkpoint.config, backbone, criterion=criterion)
        if (checkpoint.config.criterion == "custom") != (criterion is not None):
            checkpoint = checkpoint._replace(renewed=(*checkpoint.renewed, "criterion"))
        tensors = adapt_to_input(checkpoint.tensors, model.state_dict())
        checkpoint = checkpoint._replace(tensors=tensors)
        pretrained.load_into(model, checkpoint)
        return model.eval()

    def current_config(self) -> RetinaNetConfig:
        """Return the config that describes the model as it is now.

        This is ``model.config``, with the settings of parts that were changed since, such as
        ``model.postprocess.score_threshold = 0.3`` or
        ``model.criterion.assigner = ATSSAssigner()``. If it cannot describe the criterion, its
        ``criterion`` is "custom".

        Raises:
            ValueError: If a part other than the criterion cannot be described, for example a head
                of your own. The message names what differs.

        .. versionadded:: 0.3.0
        """
        parts = Parts(
            preprocess=self.preprocess,
            fpn=self.fpn,
            head=self.head,
            anchor_generator=self.anchor_generator,
            criterion=self.criterion,
            postprocess=self.postprocess,
        )
        return current_config(self.config, parts, self.backbone)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` for :meth:`from_pretrained`.

        The config is that of :meth:`current_config`, so a loaded model has the same thresholds and
        losses. Without the package safetensors, ``model.pth`` is written. Files are written under a
        temporary name and renamed, so that a failure leaves the previous ones.

        Args:
            folder: Created if it does not exist.

        Raises:
            ValueError: If the config cannot describe the model.

        Warns:
            UserWarning: If the criterion is custom and must be passed to :meth:`from_pretrained`.
        """
        pretrained.save_checkpoint(self._checkpoint(), folder)

    def push_to_hub(
        self, repository: str, *, private: bool | None = None, commit_message: str = "Upload model"
    ) -> str:
        """Upload the files of :meth:`save_pretrained` to the Hugging Face Hub (extra ``hub``).

        Args:
            repository: "user/repo". It is created if it does not exist, with a model card if it has
                none.
            private: Whether a new repository is private. None uses the account's default.
            commit_message: Message of the commit.

        Returns:
            The URL of the upload.
        """
        return pretrained.push_checkpoint(
            self._checkpoint(), repository, private=private, commit_message=commit_message
        )

    def to_torchvision(self) -> nn.Module:
        """Return torchvision's RetinaNet with copies of the weights, which gives the same detections.

        The model is a :class:`focaldet.torchvision.RetinaNet`, a subclass of
        ``torchvision.models.detection.RetinaNet`` that is called like it, and its state dict has
        torchvision's key names. Labels are the same: ``0 .. num_classes - 1``, without a background class. It is in
        the same mode (training or evaluation) and on the same device, and frozen parameters are frozen.

        A state dict does not contain the sizes of anchors and images, the thresholds, or the eps of
        BatchNorm. To load it in another program, build the model there with those of this one.

        Raises:
            ValueError: If options that affect the detections have no counterpart in torchvision, such
                as ``anchor_mode="exact"``. The message names all of them. Also if the config cannot
                describe the model; see :meth:`current_config`.

        Logs a warning (logger ``focaldet``) if its losses are different.

        .. versionadded:: 0.3.0

        >>> config = RetinaNetConfig.torchvision_v1(2).replace(
        ...     backbone="resnet18", backbone_norm="batch", fpn_channels=32
        ... )
        >>> peer = RetinaNet.from_config(config).to_torchvision()
        >>> peer.state_dict()["head.classification_head.cls_logits.weight"].shape
        torch.Size([18, 32, 3, 3])
        """
        model = build_torchvision(self, self.current_config())
        # By name, because focaldet.torchvision is optional and imports this module.
        drop_in = importlib.import_module("focaldet.torchvision")
        converted: nn.Module = drop_in.RetinaNet.from_torchvision(model)
        return converted

    def _checkpoint(self) -> pretrained.Checkpoint:
        return pretrained.Checkpoint(self.current_config(), self.state_dict())

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
            images: RGB images ``[C, H, W]``, floating-point in [0, 1] or uint8; a tensor ``[B, C, H, W]`` of
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
        self,
        dtype: torch.dtype | None = None,
        *,
        winograd: bool | None = None,
        allow_tf32: bool = True,
        cuda_graphs: bool = False,
    ) -> OptimizedRetinaNet:
        """Return a faster copy that only predicts. This model is left unchanged.

        BatchNorm is folded into the convolutions (a custom backbone that cannot be traced keeps its
        norms, with a warning) and the network uses the channels_last memory format. In float32, boxes
        move by less than 0.05 pixels and scores by less than 1e-4, unless a GPU computes in TF32; see
        ``allow_tf32``. Box geometry is always computed in float32 or better.

        Args:
            dtype: torch.bfloat16 or torch.float16 is faster but less exact. None keeps the model's
                dtype.
            winograd: Whether to compute wide 3x3 convolutions by Winograd's F(4x4, 3x3), which also
                stores transformed weights, four times as large (176 MiB for a ResNet-50 and 80
                classes). None uses it in float32 on a CPU if a measurement of half a second finds it
                faster there.
            allow_tf32: Whether cuDNN may compute float32 convolutions of the copy in TF32, which is
                faster but rounds their inputs to 10 bits. True follows PyTorch's setting, which allows
                it by default. False switches it off while the network of a copy on a GPU runs. The setting
                belongs to the process, so convolutions of other threads are exact meanwhile, too.
                :meth:`forward_maps` alone always follows PyTorch's setting.

                .. versionadded:: 0.3.0
            cuda_graphs: Whether a copy on a CUDA device launches the network, and the steps before
                non-maximum suppression, as CUDA graphs. This saves the time that Python and PyTorch need
                to launch each operation, so it helps where that takes longer than the GPU computes:
                single or small images, and fast GPUs. For large batches it only takes memory. See below.

                .. versionadded:: 0.3.0

        With ``cuda_graphs=True``, the first batch of each shape runs normally. At the second one, graphs
        are captured, which takes as long as several batches. The graphs of four shapes are kept, each
        with memory for its images and twice for its maps; intermediate results share memory. A graph is
        replaced by that of a new shape only if it has not been used for about 500 batches, so images
        should be padded to few sizes. Outputs are copies that later calls do not change, several threads
        can use the copy, and weights and options may be changed at any time. Graphs are not used while
        gradients or autocast are enabled, or if the network has hooks, which a graph would not call. If
        a capture fails, for example because a custom backbone reads values or memory runs out, a
        warning is logged once (logger ``focaldet``) and batches of that shape run normally.

        Raises:
            ValueError: If the dtype is not supported.

        Warns:
            UserWarning: If the backbone cannot be traced, or a subclass overrides methods of this
                class that the copy does not have.
        """
        return optimized_copy(
            self, dtype, winograd=winograd, allow_tf32=allow_tf32, cuda_graphs=cuda_graphs
        )

    @property
    def is_optimized(self) -> bool:
        """False.

        .. deprecated:: 0.3.0
            Use ``isinstance(model, OptimizedRetinaNet)``.
        """
        warnings.warn(IS_OPTIMIZED_WARNING, DeprecationWarning, stacklevel=2)
        return False
