"""Fold BatchNorm layers into the convolutions before them."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

from torch import Tensor, fx, nn

from focaldet._padding import SameConv2d
from focaldet._torchvision import torchvision
from focaldet.backbones import FrozenBatchNorm2d, TimmBackbone
from focaldet.heads import RetinaNetHead

__all__ = ["fold_head_norms", "fold_norms"]

_CONVOLUTIONS = (nn.Conv2d, SameConv2d)  # and not other subclasses, which may do more


def fold_head_norms(head: nn.Module) -> None:
    """Fold the BatchNorm of a head's towers. Heads with a different ``forward`` are left unchanged."""
    if isinstance(head, RetinaNetHead) and type(head).forward is RetinaNetHead.forward:
        for tower in (head.class_tower, head.box_tower):
            fold_norms(tower, "A tower of the head")


def fold_norms(network: nn.Module, name: str = "The backbone") -> None:
    """Replace each convolution followed by a BatchNorm by one convolution, and the norm by identity.

    The order of layers is read from a trace of ``forward``, so this works for any module whose
    control flow does not depend on the input. A module that cannot be traced is left unchanged.

    Args:
        network: The module, which is changed in place.
        name: What the warning calls it.

    Warns:
        UserWarning: If the module cannot be traced.
    """
    if isinstance(network, TimmBackbone):
        network.split_norms()
    if not any(_is_norm(module) for module in network.modules()):
        return
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # noqa: BLE001  # a custom forward may raise anything
        reason = str(error) or type(error).__name__
        warnings.warn(
            f"{name} cannot be traced ({reason}), so its norms are not folded into the "
            "convolutions. The copy is slower than it could be, but correct.",
            UserWarning,
            stacklevel=4,  # the caller of optimize_for_inference
        )
        return
    replacements: dict[nn.Module, nn.Module] = {}
    for conv, norm in _pairs(network, graph):
        replacements |= {conv: _folded(conv, norm), norm: nn.Identity()}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if module in replacements:
            network.set_submodule(path, replacements[module])


class _Tracer(fx.Tracer):
    """Traces into modules that contain a norm, and treats all others as leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = (module for module in m.modules() if module is not m)
        return super().is_leaf_module(m, module_qualified_name) or not any(map(_is_norm, inside))


def _pairs(network: nn.Module, graph: fx.Graph) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Return each convolution whose output only goes to one norm, with that norm."""
    calls: defaultdict[nn.Module, list[fx.Node]] = defaultdict(list)
    used_directly = set()
    for node in graph.nodes:
        if node.op == "call_module":
            calls[network.get_submodule(str(node.target))].append(node)
        elif node.op == "get_attr":  # a parameter that forward uses directly
            owner = str(node.target).rpartition(".")[0]
            used_directly.add(network.get_submodule(owner))
    pairs = []
    for norm, (call, *others) in calls.items():
        if others or not _is_norm(norm) or len(call.all_input_nodes) != 1:
            continue
        [before] = call.all_input_nodes
        if before.op != "call_module" or len(before.users) != 1:
            continue
        conv = network.get_submodule(str(before.target))
        if not isinstance(conv, nn.Conv2d) or type(conv) not in _CONVOLUTIONS:
            continue
        if len(calls[conv]) > 1 or {conv, norm} & used_directly:
            continue
        if not _is_extended(conv) and not _is_extended(norm):
            pairs.append((conv, norm))
    return pairs


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with fixed statistics, and not a subclass that may do more."""
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return module.running_mean is not None
    return type(module) in (FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d)


def _is_extended(module: nn.Module) -> bool:
    """Whether hooks or a replaced ``forward`` extend the module, as ``weight_norm`` does."""
    hooks = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001  # no public access
    return bool(hooks) or "forward" in vars(module)


def _folded(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """Return a convolution equivalent to ``norm(conv(x))`` in evaluation mode.

    ``norm`` computes (y - mean) / sqrt(var + eps) * weight + bias. The new weights are computed in
    float64 and rounded once.
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
