"""A network made ready to run only: norms folded into convolutions, maps laid channels last."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from focaldet._checks import check_choice, must_be
from focaldet._torchvision import torchvision
from focaldet._winograd import is_winograd_faster, use_winograd
from focaldet.backbones import FrozenBatchNorm2d, TimmBackbone

if TYPE_CHECKING:
    from focaldet.retinanet import RetinaNet

__all__ = ["SAVE_THE_ORIGINAL", "optimized"]

SAVE_THE_ORIGINAL = must_be(
    "model",
    "one that can be trained, to be saved",
    "the copy that optimize_for_inference made",
    "Save the original, and optimise it again after loading.",
)

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def optimized(model: RetinaNet, dtype: torch.dtype | None, *, winograd: bool | None) -> RetinaNet:
    """Do what ``RetinaNet.optimize_for_inference`` says."""
    check_choice("dtype", dtype, _DTYPES)
    result: RetinaNet = copy.deepcopy(model).eval()
    _fold_norms(result.backbone)
    parts = (result.backbone, result.fpn, result.head)
    for part in parts:
        part.to(dtype=dtype).to(memory_format=torch.channels_last)
    weight = result.head.class_logits.weight
    if winograd is None:
        fits = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        winograd = fits and is_winograd_faster(torch.get_num_threads())
    if winograd:
        for part in parts:
            use_winograd(part)
    result.is_optimized = True
    return result.eval().requires_grad_(requires_grad=False)


def _fold_norms(backbone: nn.Module) -> None:
    """Replace each BatchNorm that follows a convolution by nothing, and the convolution by both.

    Which follows which is read from a trace of ``forward``, so it holds for modules of any make; a
    module whose way depends on its input can't be traced, and stays as it is.
    """
    if isinstance(backbone, TimmBackbone):
        backbone.split_norms()
    if not any(_is_norm(module) for module in backbone.modules()):
        return
    try:
        graph = _Tracer().trace(backbone)
    except Exception as error:  # noqa: BLE001  # no one can foresee what a foreign forward raises
        reason = str(error) or type(error).__name__
        warnings.warn(
            f"The norms of the backbone stay as they are: it can't be traced ({reason}).",
            UserWarning,
            stacklevel=4,
        )
        return
    instead: dict[nn.Module, nn.Module] = {}
    for conv, norm in _pairs(backbone, graph):
        instead |= {conv: _folded(conv, norm), norm: nn.Identity()}
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if module in instead:
            backbone.set_submodule(name, instead[module])


class _Tracer(fx.Tracer):
    """Looks into modules that hold a norm, and takes all others as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (module for module in m.modules() if module is not m)
        return super().is_leaf_module(m, module_qualified_name) or not any(map(_is_norm, inside))


def _pairs(backbone: nn.Module, graph: fx.Graph) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Return each convolution whose result goes to one norm only, with the norm."""
    calls: defaultdict[nn.Module, list[fx.Node]] = defaultdict(list)
    touched = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[backbone.get_submodule(str(node.target))].append(node)
        elif node.op == "get_attr":  # a weight that forward uses by hand
            owner = str(node.target).rpartition(".")[0]
            touched.add(backbone.get_submodule(owner))
    pairs = []
    for norm, (call, *others) in calls.items():
        if others or not _is_norm(norm) or len(call.all_input_nodes) != 1:
            continue
        [before] = call.all_input_nodes
        if before.op != "call_module" or len(before.users) != 1:
            continue
        conv = backbone.get_submodule(str(before.target))
        if type(conv) is not nn.Conv2d or len(calls[conv]) > 1 or {conv, norm} & touched:
            continue
        if not _is_extended(conv) and not _is_extended(norm):
            pairs.append((conv, norm))
    return pairs


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of fixed statistics, and no subclass that does more."""
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return module.running_mean is not None
    return type(module) in (FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d)


def _is_extended(module: nn.Module) -> bool:
    """Whether a call does more than its class says, as where a weight is normalised anew."""
    hooks = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001  # no public way
    return bool(hooks) or "forward" in vars(module)


def _folded(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """Return one convolution that does what ``norm(conv(x))`` does in evaluation mode.

    ``norm`` computes (y - mean) / sqrt(var + eps) * weight + bias. Products are made in float64, so
    that rounding happens once.
    """
    mean, var = _double(norm.running_mean), _double(norm.running_var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _double(norm.weight)
    bias = -mean * scale if norm.bias is None else _double(norm.bias) - mean * scale
    if conv.bias is not None:
        bias = bias + _double(conv.bias) * scale
    folded = copy.deepcopy(conv)
    weight = _double(conv.weight) * scale[:, None, None, None]
    folded.weight = nn.Parameter(weight.to(conv.weight))
    folded.bias = nn.Parameter(bias.to(conv.weight))
    return folded


def _double(value: Tensor) -> Tensor:
    return value.detach().double()
