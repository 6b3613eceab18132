# ruff: noqa: SLF001  # the operators that torch.compile's own code is made of begin with "_"
"""Convolutions packed for oneDNN: weights in its own layout, what follows a convolution done within it.

PyTorch lays a convolution's weights anew at every call, and runs over the result once more for an
addition and once more for an activation. ``torch.compile`` with "freezing" spares all three by the
operators used here; eager mode has no other way to them.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from focaldet._checks import must_be

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from focaldet.retinanet import RetinaNet

__all__ = ["PackedConv2d", "can_pack", "is_extended", "packed"]

_REMEDY = "Move the original, then optimise it."
_SIDE = 256  # of the image that shapes are read from


def is_extended(module: nn.Module) -> bool:
    """Whether a call does more than its class says, as where a weight is normalised anew."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


class Activation(NamedTuple):
    """As oneDNN's operators take it."""

    name: str
    numbers: tuple[float, ...] = ()


class Ending(NamedTuple):
    """What is done with a convolution's result: a map is added, perhaps in its place; an activation."""

    activation: Activation
    adds: bool
    in_place: bool


_NONE = Activation("none")
_RELU = Activation("relu")
_BY_CLASS: dict[type[nn.Module], Activation] = {
    nn.ReLU: _RELU,
    nn.ReLU6: Activation("hardtanh", (0.0, 6.0)),
    nn.Hardswish: Activation("hardswish"),
}
_BY_FUNCTION: dict[Callable[..., Any], Activation] = {
    F.relu: _RELU,
    torch.relu: _RELU,
    F.relu6: _BY_CLASS[nn.ReLU6],
    F.hardswish: _BY_CLASS[nn.Hardswish],
}


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this processor have the operators."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedConv2d(nn.Module):
    """A convolution, the sum of its result with another map, and an activation, in one operator.

    Args:
        conv: is packed in its own dtype; it is left as it is.
        ending: what is done with its result.
    """

    def __init__(self, conv: nn.Conv2d, ending: Ending) -> None:
        super().__init__()
        self.geometry: list[Any] = [
            list(conv.padding),
            list(conv.stride),
            list(conv.dilation),
            conv.groups,
        ]
        self.ending = ending
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
        self.weight = self._packed(conv.weight.detach())

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map ``[B, C, H, W]``; ``other``, of the result's shape, is added before the activation."""
        ops: Any = torch.ops.mkldnn
        name, numbers = self.ending.activation
        if other is None:
            result: Tensor = ops._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, name, list(numbers), ""
            )
            return result
        ending = ("add", 1.0, None if name == "none" else name, list(numbers), "")
        if self.ending.in_place:
            written: Tensor = ops._convolution_pointwise_.binary(
                other, x, self.weight, self.bias, *self.geometry, *ending
            )
            return written
        summed: Tensor = ops._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, *ending
        )
        return summed

    def _packed(self, weight: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002, FBT001, FBT002
        """Refuse another device or dtype, which ``weight`` can't take."""
        bias = fn(self.bias)
        if (bias.device, bias.dtype) != (self.bias.device, self.bias.dtype):
            condition = f"kept in {self.bias.dtype} on the CPU"
            got = f"moved to {bias.dtype} on {bias.device}"
            raise RuntimeError(must_be("a packed model", condition, got, _REMEDY))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Hold the weights as others do: those of oneDNN can be neither copied nor pickled."""
        return self.__dict__ | {"weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight = self._packed(self.weight)


def packed(model: RetinaNet) -> fx.GraphModule | None:
    """Return ``model.forward_maps`` with packed convolutions; None where it can't be traced.

    A backbone that can't be traced stays as it is, and the rest is packed.
    """
    for leaves in ((), (model.backbone,)):
        try:
            tracer = _Tracer(leaves)
            tracer.traced_func_name = "forward_maps"
            graph = fx.GraphModule(model, tracer.trace(model))
            break
        except Exception:  # noqa: BLE001, S112  # no one can foresee what a foreign forward raises
            continue
    else:
        return None
    example = torch.zeros(1, 3, _SIDE, _SIDE).to(next(model.parameters()))
    ShapeProp(graph).propagate(example)
    for node in list(graph.graph.nodes):
        if _is_conv(graph, node):
            _pack(graph, node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Tracer(fx.Tracer):
    """Looks into modules that hold others, but for ``leaves``."""

    def __init__(self, leaves: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = not list(m.children()) or any(m is leaf for leaf in self.leaves)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _is_conv(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it is a convolution that does no more than its class says, on a border of zeros."""
    if node.op != "call_module":
        return False
    module = graph.get_submodule(str(node.target))
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and not is_extended(module)
    )


def _pack(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Put a packed convolution in the place of a convolution, its sum and its activation."""
    chain = [conv]
    other = _added(conv)
    if other is not None:
        chain += conv.users
    activation = _activation(graph, chain[-1])
    if activation is not None:
        chain += chain[-1].users
    ending = Ending(activation or _NONE, other is not None, _is_free(graph, other, chain[-1]))
    name = f"{conv.target}_{ending.activation.name}_{ending.adds}_{ending.in_place}"
    name = name.replace(".", "_")
    if name not in graph._modules:  # a tower's is used on every level
        module: Any = graph.get_submodule(str(conv.target))
        graph.add_submodule(name, PackedConv2d(module, ending))
    inputs = conv.args if other is None else (*conv.args, other)
    with graph.graph.inserting_before(chain[-1]):
        result = graph.graph.call_module(name, inputs)
    result.meta = chain[-1].meta
    chain[-1].replace_all_uses_with(result)
    for node in reversed(chain):
        graph.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(conv: fx.Node) -> fx.Node | None:
    """Return what is added to a convolution's result and to nothing else, if it has its shape."""
    total = _only_user(conv)
    if total is None or total.op != "call_function" or total.kwargs:
        return None
    if total.target not in (operator.add, torch.add) or len(total.all_input_nodes) != 2:
        return None
    [other] = [node for node in total.all_input_nodes if node is not conv]
    ours, theirs = conv.meta["tensor_meta"], other.meta.get("tensor_meta")
    alike = theirs is not None and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return other if alike else None


def _activation(graph: fx.GraphModule, node: fx.Node) -> Activation | None:
    """Return the activation that is all that becomes of a node's result."""
    user = _only_user(node)
    if user is None or len(user.args) != 1:
        return None
    if user.op == "call_module":
        module = graph.get_submodule(str(user.target))
        return None if is_extended(module) else _BY_CLASS.get(type(module))
    return _BY_FUNCTION.get(user.target) if user.op == "call_function" else None  # type: ignore[arg-type]


def _is_free(graph: fx.GraphModule, node: fx.Node | None, last: fx.Node) -> bool:
    """Whether a map has memory of its own, and nothing looks at it after ``last``.

    It is a convolution's or a resized map, and only convolutions before ``last`` read it besides.
    """
    if node is None:
        return False

    def is_conv(node: fx.Node) -> bool:
        kinds = (nn.Conv2d, PackedConv2d)
        return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), kinds)

    readers = [user for user in node.users if last not in (user, *user.users)]
    fresh = is_conv(node) or node.target is F.interpolate
    return fresh and all(is_conv(user) and user < last for user in readers)
