"""Write the convolutions of an ONNX file in INT8, except for those that cost too much accuracy.

onnxruntime's static quantisation chooses the ranges and inserts the nodes: each convolution gets weights
in INT8 with a scale per output channel, and inputs and outputs in UINT8 with a scale per map, as pairs of
QuantizeLinear and DequantizeLinear. Both onnxruntime and OpenVINO run such files with integer kernels, so
that one file serves both and no other package is needed. They do not always compute the same, so errors are
measured in both, if both are installed. Everything else stays in float32: of all operators, only
convolutions take enough time to gain from it.

Which convolutions can be in INT8 depends on the model and on its weights, so it is measured. The
convolutions are put into groups, and each group is converted alone and its maps are compared with the
float model's. A group whose error alone exceeds the budget is divided into its layers, because often one
of them causes it. Then all groups are converted, and those with the largest errors are put back
one by one until the error of the whole network is within the budget.
"""

from __future__ import annotations

import contextlib
import graphlib
import importlib.util
import logging
import re
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from focaldet._extras import import_extra
from focaldet.errors import ExportError
from focaldet.export._calibration import Calibration, LayerGroup
from focaldet.export._candidates import MapError, map_error, mean_error
from focaldet.export._exporter_calls import raising_export_errors
from focaldet.export._sessions import open_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from focaldet.export._calibration_images import CalibrationImages
    from focaldet.export._sessions import RuntimeName
    from focaldet.retinanet import RetinaNet
    from focaldet.structures import ImageBatch

__all__ = ["quantize", "read_shapes_of_sums"]

_METHOD = "smallest and largest value of each map"
_MEASURED_IMAGES = 8
_PURPOSE = "precision='int8'"
# Activations that need no kernel of their own after a convolution in INT8: its range ends where they cut.
_REMOVABLE = ("Relu", "Clip")
_STEM = "stem"


def quantize(
    source: Path,
    *,
    model: RetinaNet,
    images: CalibrationImages,
    error_budget: float,
    folder: Path,
) -> tuple[Any, Calibration]:
    """Convert an ONNX file to INT8.

    Args:
        source: The float file.
        model: The model, on the CPU in evaluation mode.
        images: The calibration images.
        error_budget: Maximum error of the whole network's scores and boxes.
        folder: A folder for temporary files.

    Returns:
        The ``onnx.ModelProto`` in INT8, and what the calibration found.

    Raises:
        ExportError: If onnxruntime fails, or no convolution can be in INT8 within the budget.
    """
    onnx: Any = import_extra("onnx", purpose=_PURPOSE, install="focaldet[export]")
    whole = onnx.load(str(source))
    read_shapes_of_sums(whole)
    network, outputs = _network_of(onnx, whole)
    groups = _groups_of(network)
    onnx.save(network, str(folder / "network.onnx"))
    with raising_export_errors("Calibrating the INT8 file"), _no_new_handler():
        ranges = _ranges(folder, images)

    batches = list(images.batches(_MEASURED_IMAGES))
    runtimes = _runtimes()
    run_float = _runner(folder / "network.onnx", outputs, "onnxruntime")
    expected = [run_float(batch) for batch in batches]

    def nodes_of(names: Sequence[str]) -> list[str]:
        return [convolution.node for name in names for convolution in groups[name]]

    def measure(names: Sequence[str]) -> MapError:
        """Return the error of the network with some groups in INT8, the largest of all runtimes."""
        with raising_export_errors("Converting the network to INT8"), _no_new_handler():
            converted = _converted(network, ranges, nodes_of(names))
        trial = folder / "trial.onnx"
        onnx.save(converted, str(trial))
        errors = []
        for runtime in runtimes:
            run = _runner(trial, outputs, runtime)
            errors.append(
                mean_error(
                    [
                        map_error(model, maps, run(batch), size_of(batch))
                        for batch, maps in zip(batches, expected, strict=True)
                    ]
                )
            )
        scores, boxes = zip(*errors, strict=True)
        return MapError(max(scores), max(boxes))

    def size_of(batch: ImageBatch) -> tuple[int, int]:
        height, width = batch.tensor.shape[2:]
        return height, width

    found = []
    waiting = deque(groups)
    while waiting:
        name = waiting.popleft()
        alone = measure([name])
        layers = _by_layer(groups[name])
        if alone.worst > error_budget and len(layers) > 1:
            groups |= layers
            waiting.extendleft(reversed(layers))
            continue
        found.append(
            LayerGroup(
                name=name,
                convolutions=len(groups[name]),
                score_error=alone.scores,
                box_error=alone.boxes,
                precision="int8",
            )
        )
    chosen, error = _within_budget(found, measure, error_budget)
    with raising_export_errors("Converting the network to INT8"), _no_new_handler():
        converted = _converted(whole, ranges, nodes_of(chosen))
    _strip(converted)
    return converted, Calibration(
        images=len(images),
        method=_METHOD,
        groups=tuple(
            group if group.name in chosen else replace(group, precision="float32")
            for group in found
        ),
        score_error=error.scores,
        box_error=error.boxes,
        runtimes=runtimes,
    )


def _runtimes() -> tuple[RuntimeName, ...]:
    """Return the runtimes to measure in: onnxruntime, and OpenVINO if it is installed."""
    if importlib.util.find_spec("openvino") is None:
        return ("onnxruntime",)
    return ("onnxruntime", "openvino")


def _within_budget(
    groups: list[LayerGroup], measure: Callable[[Sequence[str]], MapError], budget: float
) -> tuple[list[str], MapError]:
    """Return the names of the groups that can be in INT8 together, and the error that this causes."""
    kept = sorted(groups, key=lambda group: group.error)
    while kept:
        names = [group.name for group in kept]
        error = measure(names)
        if error.worst <= budget:
            return names, error
        del kept[-1]
    raise ExportError(
        f"No group of convolutions can be in INT8 with an error of scores and boxes within {budget}: "
        f"{'; '.join(map(str, groups))}. Pass calibration images that are like those the model was "
        "trained on, raise error_budget, or export the model in another precision."
    )


def _network_of(onnx: Any, whole: Any) -> tuple[Any, list[str]]:
    """Return the part of a file that computes the maps, and the names of the maps.

    The maps are the logits of all levels, then their box deltas.
    """
    outputs = [
        node.output[0]
        for part in ("class_logits", "box_deltas")
        for node in whole.graph.node
        if node.op_type == "Conv" and f"head.{part}." in node.input[1]
    ]
    network = onnx.ModelProto()
    network.CopyFrom(whole)
    graph = network.graph
    needed, kept = set(outputs), []
    for node in reversed(whole.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:], graph.output[:]
    graph.node.extend(reversed(kept))
    graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4)
        for name in outputs
    )
    for values in (graph.input, graph.initializer):
        unused = [value for value in values if value.name not in needed]
        for value in unused:
            values.remove(value)
    others = [value for value in graph.value_info if value.name in outputs]
    for value in others:
        graph.value_info.remove(value)
    return network, outputs


def read_shapes_of_sums(model: Any) -> None:
    """Let nodes that read the shape of a summand read that of the sum instead, which is the same.

    If the output of a convolution in INT8 is added to another map and its shape is read, OpenVINO 2026.4
    adds the bias of the first channel to all channels. In a MobileNetV2, the sizes to which the pyramid
    is upsampled are read there.
    """
    nodes = list(model.graph.node)
    shapes = {value.name: value.type.tensor_type.shape for value in model.graph.value_info}
    sums = {
        name: node.output[0]
        for node in nodes
        for name in node.input
        if node.op_type == "Add" and name in shapes and shapes[name] == shapes.get(node.output[0])
    }
    changes = [
        (node, sums[node.input[0]])
        for node in nodes
        if node.op_type == "Shape"
        and node.input[0] in sums
        # The sum must not depend on the shape.
        and sums[node.input[0]] not in _descendants(nodes, node.output[0])
    ]
    for node, total in changes:
        node.input[0] = total
    sources = {name: index for index, node in enumerate(nodes) for name in node.output}
    order = graphlib.TopologicalSorter(
        {
            index: [sources[name] for name in node.input if name in sources]
            for index, node in enumerate(nodes)
        }
    ).static_order()
    del model.graph.node[:]
    model.graph.node.extend(nodes[index] for index in order)


def _descendants(nodes: Sequence[Any], name: str) -> set[str]:
    """Return the names of all values that are computed from a value, with its own."""
    found = {name}
    for node in nodes:
        if found.intersection(node.input):
            found.update(node.output)
    return found


class _Convolution(NamedTuple):
    """The names of a convolution's node, and of its layer in the model."""

    node: str
    layer: str


def _groups_of(network: Any) -> dict[str, list[_Convolution]]:
    """Return the convolutions by group, in the order of the network.

    The first convolution is a group, and so are each stage of the backbone, the pyramid, the two towers
    of the head and its two outputs. Depthwise convolutions have groups of their own, because their
    channels differ most.
    """
    groups: dict[str, list[_Convolution]] = {}
    for node in network.graph.node:
        if node.op_type != "Conv":
            continue
        name = _group_of(node.input[1]) if groups else _STEM
        depthwise = any(a.name == "group" and a.i > 1 for a in node.attribute)
        convolution = _Convolution(node.name, _layer_of(node.input[1]))
        groups.setdefault(f"{name} (depthwise)" if depthwise else name, []).append(convolution)
    return groups


def _by_layer(convolutions: Sequence[_Convolution]) -> dict[str, list[_Convolution]]:
    """Return the convolutions of each layer. A layer of the head has one for each level."""
    layers: dict[str, list[_Convolution]] = {}
    for convolution in convolutions:
        layers.setdefault(convolution.layer, []).append(convolution)
    return layers


def _layer_of(weight: str) -> str:
    return weight.removeprefix("model.").removesuffix(".weight")


def _group_of(weight: str) -> str:
    """Return the group of a convolution by the name of its weight.

    >>> _group_of("model.backbone.layer1.0.conv1.weight")
    'backbone.layer1'
    >>> _group_of("model.backbone.features.3.conv.0.0.weight")
    'backbone.features.3'
    >>> _group_of("model.fpn.lateral.2.weight")
    'fpn'
    """
    part, *names = _layer_of(weight).split(".")
    if part == "fpn" or not names:
        return part
    numbered = part == "backbone" and re.fullmatch(r"[a-z_]+", names[0]) and names[1:2]
    if numbered and names[1].isdecimal() and names[0] in {"features", "blocks", "stages"}:
        return f"{part}.{names[0]}.{names[1]}"
    return f"{part}.{names[0]}"


def _ranges(folder: Path, images: CalibrationImages) -> Any:
    """Return the ranges of all maps, as onnxruntime's quantisation expects them."""
    quantization: Any = import_extra(
        "onnxruntime.quantization", purpose=_PURPOSE, install="focaldet[export]"
    )
    calibrator = quantization.create_calibrator(
        str(folder / "network.onnx"),
        ["Conv", *_REMOVABLE],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    for batch in images.batches():
        calibrator.collect_data(_Reader(batch.tensor))
    return calibrator.compute_data()


class _Reader:
    """Gives onnxruntime's calibration one batch."""

    def __init__(self, images: Tensor) -> None:
        self._batches = [{"images": images.float().contiguous().numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        return self._batches.pop() if self._batches else None


def _converted(model: Any, ranges: Any, convolutions: Sequence[str]) -> Any:
    """Return a copy of a model whose named convolutions are in INT8."""
    quantization: Any = import_extra(
        "onnxruntime.quantization", purpose=_PURPOSE, install="focaldet[export]"
    )
    copied = type(model)()
    copied.CopyFrom(model)
    wanted = set(convolutions)
    outputs = {
        node.output[0]
        for node in copied.graph.node
        if node.op_type == "Conv" and node.name in wanted
    }
    activations = [
        node.name
        for node in copied.graph.node
        if node.op_type in _REMOVABLE and node.input[0] in outputs
    ]
    quantizer = quantization.QDQQuantizer(
        copied,
        per_channel=True,
        # Processors without VNNI add products of two 8-bit numbers in 16 bits, which would overflow.
        reduce_range=True,
        weight_qType=quantization.QuantType.QInt8,
        activation_qType=quantization.QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[*convolutions, *activations],
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", *_REMOVABLE],
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    quantizer.quantize_model()
    return quantizer.model.model


def _strip(model: Any) -> None:
    """Remove what describes each node's origin in Python, which is larger than small INT8 weights."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del model.graph.value_info[:]


def _runner(
    path: Path, outputs: Sequence[str], runtime: RuntimeName
) -> Callable[[ImageBatch], list[Tensor]]:
    """Return a function that runs a file of maps on a batch."""
    session = open_session(path, runtime, None, torch.get_num_threads())

    def run(batch: ImageBatch) -> list[Tensor]:
        found: Mapping[str, Tensor] = session.run({"images": batch.tensor.float().contiguous()})
        return [found[name] for name in outputs]

    return run


@contextlib.contextmanager
def _no_new_handler() -> Iterator[None]:
    """Stop ``logging.info`` of onnxruntime from adding a handler to a root logger that has none."""
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
