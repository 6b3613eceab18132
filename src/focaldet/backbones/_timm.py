"""Backbones of timm, by name."""

from __future__ import annotations

import contextlib
import difflib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from focaldet._extras import import_extra
from focaldet.backbones._norms import freeze_norms, split_norms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TimmBackbone", "timm_key"]

_STRIDES = (2, 4, 8, 16, 32)  # of the five stages
_TRIAL_SIZE = (64, 96)  # not square and not a usual training size, but a multiple of 32


class TimmBackbone(nn.Module):
    """C3, C4 and C5 of one of timm's networks: its last maps of stride 8, 16 and 32.

    The network is tried on an image of 64x96 pixels when it is built. One that needs a fixed image
    size, or whose maps do not have the size that their strides say, raises an error. Maps with
    channels last (Swin) are permuted.

    Only BatchNorm has running statistics that can be frozen. In a network without it, ``norm`` has no
    effect: LayerNorm and GroupNorm train like any other layer, unless their stage is frozen.

    Args:
        name: timm's name of the network, such as ``"convnext_tiny"``. The tag of a name such as
            ``"convnext_tiny.fb_in22k"`` is accepted, but nothing is downloaded.
        norm: "frozen" for BatchNorm with fixed statistics and scales, "batch" for BatchNorm that
            trains.
        norm_eps: The constant added to variances by BatchNorm. None uses the network's own.
        in_channels: The number of channels of the images.
        levels: The levels of the maps to return, ascending numbers in [1, 5]. The map of level l is the
            last one of stride ``2**l``.

    Raises:
        ImportError: If timm is not installed (extra ``timm``).
        ValueError: If timm has no network of this name, or it does not make a backbone.

    .. versionadded:: 0.3.0
    """

    def __init__(
        self,
        name: str,
        *,
        norm: Literal["frozen", "batch"] = "frozen",
        norm_eps: float | None = None,
        in_channels: int = 3,
        levels: Sequence[int] = (3, 4, 5),
    ) -> None:
        super().__init__()
        self.name = name
        self.levels = tuple(levels)
        self.strides = tuple(2**level for level in self.levels)
        # A model may be built where a caller has disabled gradients, but the trial needs them.
        with torch.inference_mode(mode=False), torch.enable_grad():
            self.body = _create_with_levels(name, in_channels, self.levels)
            _set_norms(self.body, name, norm, norm_eps)
            self.channels = tuple(self.body.feature_info.channels())
            trial = _Trial(self.body, in_channels, name, self.strides)
            self._channels_last = _are_channels_last(trial.maps, self, name)
            self._stages = trial.stages()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``[B, C, H, W]`` images to C3, C4 and C5, or to the maps of ``levels``."""
        maps = self.body(images)
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else list(maps)

    @property
    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters of the five stages, first to last.

        A stage has the parameters that its map depends on (the last of stride 2, 4, 8, 16 or 32) and
        the maps before it do not. A stage without a map of its own is empty: the first of a ConvNeXt,
        whose maps begin at stride 4.
        """
        return [[self.body.get_parameter(name) for name in names] for names in self._stages]

    def split_norms(self) -> None:
        """Separate BatchNorm from activations, so that it can be folded into convolutions."""
        split_norms(self.body)


def timm_key(key: str, wanted: Mapping[str, object]) -> str:
    """Return the key of a feature extractor's tensor for that of the whole network's.

    timm's feature extractors keep a network's children as they are, join the names of two levels
    ("stages.0" is "stages_0"), or put the network into an attribute "model".

    Args:
        key: The key in the state dict of the whole network.
        wanted: The state dict of the feature extractor.
    """
    candidates = (key, key.replace(".", "_", 1), f"model.{key}")
    return next((candidate for candidate in candidates if candidate in wanted), key)


def _create_with_levels(name: str, in_channels: int, levels: Sequence[int]) -> Any:
    timm = import_extra("timm", purpose=f"backbone='timm/{name}'", install="focaldet[timm]")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        remedy = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise ValueError(
            f"timm {timm.__version__} has no network {name!r} (backbone='timm/{name}'){remedy}"
        )
    wanted = [2**level for level in levels]
    # Where the maps are those of the last strides up to 32, the network is built only once.
    with contextlib.suppress(ValueError):
        body = _create(name, in_channels, out_indices=tuple(level - 6 for level in levels))
        if list(body.feature_info.reduction()) == wanted:
            return body
    strides = list(_create(name, in_channels).feature_info.reduction())
    if not set(strides) >= set(wanted):
        *others, last = map(str, wanted)
        needed = f"{', '.join(others)} and {last}" if others else last
        raise ValueError(
            f"backbone='timm/{name}' has maps of stride {', '.join(map(str, strides))}, but a "
            f"RetinaNet needs {needed}."
        )
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in wanted]
    return _create(name, in_channels, out_indices=tuple(indices))


def _create(name: str, in_channels: int, **options: Any) -> Any:
    timm = import_extra("timm", purpose=f"backbone='timm/{name}'", install="focaldet[timm]")
    options |= {"pretrained": False, "features_only": True, "in_chans": in_channels}
    try:
        try:
            # Swin accepts images of any size only if asked to; other networks don't know the option.
            return timm.create_model(name, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(name, **options)
    except Exception as error:
        raise ValueError(
            f"backbone='timm/{name}' cannot be built as a feature extractor: {_reason(error)}"
        ) from error


def _set_norms(body: nn.Module, name: str, norm: str, norm_eps: float | None) -> None:
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    if norm_eps is not None:
        if not norms:
            raise ValueError(
                f"backbone_norm_eps is {norm_eps}, but backbone='timm/{name}' has no BatchNorm; "
                "leave it None."
            )
        for module in norms:
            module.eps = norm_eps
    if norm == "frozen":
        freeze_norms(body)


class _Trial:
    """A forward pass over a black image, with the maps of all five strides where timm names them."""

    def __init__(self, body: Any, in_channels: int, name: str, strides: Sequence[int]) -> None:
        self._body = body
        self._by_stride: dict[int, Tensor] = {}
        handles = [
            module.register_forward_hook(self._keep(stride))
            for stride in _STRIDES
            if stride not in strides and (module := _module_of_stride(body, stride)) is not None
        ]
        body.eval()
        try:
            self.maps: Sequence[Tensor] = body(torch.zeros(1, in_channels, *_TRIAL_SIZE))
        except Exception as error:
            height, width = _TRIAL_SIZE
            raise ValueError(
                f"backbone='timm/{name}' does not accept images of any size; one of "
                f"{height}x{width} pixels failed: {_reason(error)}"
            ) from error
        finally:
            body.train()
            for handle in handles:
                handle.remove()
        self._by_stride |= dict(zip(strides, self.maps, strict=True))

    def _keep(self, stride: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                self._by_stride[stride] = output

        return hook

    def stages(self) -> list[list[str]]:
        """Return the names of the parameters of each stage; those without effect are in the first."""
        parameters = dict(self._body.named_parameters())
        stages: list[list[str]] = []
        seen: set[str] = set()
        for feature in map(self._by_stride.get, _STRIDES):
            reached = set() if feature is None else _parameters_behind(feature, parameters)
            stages.append([name for name in parameters if name in reached - seen])
            seen |= reached
        stages[0] += [name for name in parameters if name not in seen]
        return stages


def _parameters_behind(feature: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    if not feature.requires_grad:
        return set()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        feature.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    }


def _module_of_stride(body: Any, stride: int) -> nn.Module | None:
    """Return the module whose output is the last map of a stride, if timm names one that is there."""
    names = [entry["module"] for entry in body.feature_info.info if entry["reduction"] == stride]
    if not names or not names[-1]:
        return None
    modules = dict(body.named_modules())
    return modules.get(timm_key(names[-1], modules))


def _are_channels_last(maps: Sequence[Tensor], backbone: TimmBackbone, name: str) -> bool:
    channels = backbone.channels
    sizes = [(_TRIAL_SIZE[0] // stride, _TRIAL_SIZE[1] // stride) for stride in backbone.strides]
    shapes = [tuple(feature.shape) for feature in maps]
    if shapes == [(1, count, *size) for count, size in zip(channels, sizes, strict=True)]:
        return False
    if shapes == [(1, *size, count) for count, size in zip(channels, sizes, strict=True)]:
        return True
    height, width = _TRIAL_SIZE
    raise ValueError(
        f"backbone='timm/{name}' gives maps of shape {', '.join(str(list(s)) for s in shapes)} for an "
        f"image of {height}x{width} pixels, not of its height and width divided by "
        f"{', '.join(map(str, backbone.strides))}."
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
