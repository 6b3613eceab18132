"""Run ONNX files in onnxruntime or OpenVINO, behind one small interface."""

from __future__ import annotations

import functools
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from focaldet._checks import check_choice, check_integer, check_range, existing_file
from focaldet._extras import import_extra
from focaldet.errors import CheckpointError
from focaldet.export._exporter_calls import raising_export_errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["RunPrecision", "RuntimeName", "Session", "open_session", "shared_core"]

RuntimeName = Literal["onnxruntime", "openvino"]
RunPrecision = Literal["float32", "bfloat16", "float16"]

_LOG = logging.getLogger("focaldet")

_RUNNING = "Running the ONNX file"
_PURPOSE = "OnnxDetector"
_EXTRA = "focaldet[export]"
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CAPABILITIES = {"bfloat16": "BF16", "float16": "FP16"}


class Session(Protocol):
    """A loaded ONNX file, which several threads may run at the same time.

    Attributes:
        runtime: Name and version of the runtime.
        metadata: The file's metadata.
        inputs: Names of the graph's inputs.
        outputs: Names of the graph's outputs.
    """

    runtime: str
    metadata: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name. Inputs that the graph does not use are ignored.

        Raises:
            ExportError: If the runtime fails.
        """


def open_session(
    path: Path,
    runtime: RuntimeName,
    providers: Sequence[str] | None,
    threads: int | None,
    precision: RunPrecision = "float32",
) -> Session:
    """Load an ONNX file.

    Args:
        path: The ONNX file.
        runtime: "onnxruntime" or "openvino".
        providers: Execution providers of onnxruntime. None uses the CPU.
        threads: Number of threads. None lets the runtime choose.
        precision: What OpenVINO computes the file's float32 layers in.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If the runtime is not installed.
        CheckpointError: If the file is damaged or not an ONNX file. This is a ``ValueError``.
        ValueError: If an option is invalid.
    """
    check_choice("runtime", runtime, ("onnxruntime", "openvino"))
    check_choice("precision", precision, tuple(_HINTS))
    if precision != "float32" and runtime != "openvino":
        raise ValueError(
            f"precision={precision!r} requires runtime='openvino'; onnxruntime computes a file in the "
            "precision that it was exported in."
        )
    if threads is not None:
        check_integer("threads", threads)
        check_range("threads", threads, 1)
    existing_file("path", path)
    if runtime == "onnxruntime":
        return _OnnxRuntime(path, providers, threads)
    if providers is not None:
        raise ValueError(
            f"providers={list(providers)} requires runtime='onnxruntime'; OpenVINO has no providers."
        )
    return _OpenVino(path, threads, precision)


class _OnnxRuntime:
    def __init__(self, path: Path, providers: Sequence[str] | None, threads: int | None) -> None:
        onnxruntime: Any = import_extra("onnxruntime", purpose=_PURPOSE, install=_EXTRA)
        providers = ["CPUExecutionProvider"] if providers is None else list(providers)
        available = onnxruntime.get_available_providers()
        for provider in providers:
            check_choice("providers", provider, available)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
            self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
            self.inputs = tuple(value.name for value in self._session.get_inputs())
            self.outputs = tuple(value.name for value in self._session.get_outputs())
        except Exception as error:  # text that is not UTF-8 too
            raise _unreadable(path, error) from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}"

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        with raising_export_errors(_RUNNING):
            outputs = self._session.run(list(self.outputs), arrays)
        return {
            name: torch.from_numpy(array) for name, array in zip(self.outputs, outputs, strict=True)
        }


class _OpenVino:
    def __init__(self, path: Path, threads: int | None, precision: RunPrecision) -> None:
        openvino: Any = import_extra(
            "openvino", purpose="OnnxDetector with OpenVINO", install="openvino"
        )
        core = shared_core(openvino)
        if not _has_kernels(core, precision):
            _LOG.warning(
                "OpenVINO has no %s kernels for this processor, so %s runs in float32, at the speed of "
                "float32.",
                precision,
                path,
            )
            precision = "float32"
        # By default, OpenVINO uses bfloat16 if the processor supports it.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = core.read_model(path.read_bytes())
            self._model = core.compile_model(graph, "CPU", options)
        except Exception as error:
            raise _unreadable(path, error) from error
        self._idle_requests: deque[Any] = deque()  # as many as threads ever ran at the same time
        self.runtime = f"openvino {openvino.__version__.split('-')[0]}"
        self.metadata = _metadata_of(path)
        self.inputs = tuple(value.get_any_name() for value in self._model.inputs)
        self.outputs = tuple(value.get_any_name() for value in self._model.outputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        with raising_export_errors(_RUNNING):
            request = self._take_request()
            results = request.infer(arrays, share_inputs=True, share_outputs=True)
            # The next run of this request overwrites the arrays.
            outputs = {name: torch.from_numpy(results[name].copy()) for name in self.outputs}
        self._idle_requests.append(request)
        return outputs

    def _take_request(self) -> Any:
        """Return a request that no other thread uses. It has the inputs and outputs of one run."""
        try:
            return self._idle_requests.pop()
        except IndexError:
            return self._model.create_infer_request()


@functools.cache
def shared_core(openvino: Any) -> Any:
    """Return the one core of the module ``openvino``, which lives as long as the process.

    A core replaces the memory on which signal handlers run, and frees its own when it is deleted. If
    two are deleted in the order of their creation, or one in another thread, the handlers are left
    with freed memory, and the next signal, such as that of Ctrl-C, ends the process without a word
    (OpenVINO 2026.4, Linux).
    """
    return openvino.Core()


def _has_kernels(core: Any, precision: RunPrecision) -> bool:
    """Return whether OpenVINO can compute in a precision on this processor."""
    name = _CAPABILITIES.get(precision)
    return name is None or name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _metadata_of(path: Path) -> dict[str, str]:
    onnx: Any = import_extra("onnx", purpose="OnnxDetector with OpenVINO", install=_EXTRA)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise _unreadable(path, error) from error
    return {entry.key: entry.value for entry in model.metadata_props}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"Cannot read {str(path)!r}: it is damaged or not an ONNX file ({reason}). Export the model "
        "again."
    )
