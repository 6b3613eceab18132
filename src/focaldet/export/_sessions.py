"""The runtimes that run an ONNX file, behind one small interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from focaldet._checks import check_choice, check_range, must_be
from focaldet.export._errors import explaining, needed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["RuntimeName", "Session", "open_session"]

RuntimeName = Literal["onnxruntime", "openvino"]

_RUNNING = "Running the ONNX file"
_DAMAGED = "It may be damaged or not whole: export the model again."


class Session(Protocol):
    """An ONNX file, loaded.

    Attributes:
        runtime: its name and version.
        metadata: text by key, as the file has it.
        inputs: names of what the graph takes.
        outputs: names of what it gives.
    """

    runtime: str
    metadata: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name; inputs that the graph doesn't use are left out.

        Raises:
            ExportError: the runtime could not run it.
        """


def open_session(
    path: Path, runtime: RuntimeName, providers: Sequence[str] | None, threads: int | None
) -> Session:
    """Load an ONNX file.

    Args:
        path: of the file.
        runtime: "onnxruntime" or "openvino".
        providers: of onnxruntime, or None for the CPU.
        threads: for one run; None lets the runtime choose.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the runtime is not installed.
        ValueError: an option out of its range, or a file that is damaged or no ONNX file.
    """
    check_choice("runtime", runtime, ("onnxruntime", "openvino"))
    if threads is not None:
        check_range("threads", threads, 1)
    if not path.is_file():
        raise FileNotFoundError(must_be("path", "an existing file", repr(str(path))))
    if runtime == "onnxruntime":
        return _OnnxRuntime(path, providers, threads)
    if providers is not None:
        raise ValueError(must_be("providers", "None with runtime='openvino'", providers))
    return _OpenVino(path, threads)


class _OnnxRuntime:
    def __init__(self, path: Path, providers: Sequence[str] | None, threads: int | None) -> None:
        onnxruntime: Any = needed("onnxruntime")
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
        except Exception as error:
            raise _unreadable(path, error) from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.inputs = tuple(one.name for one in self._session.get_inputs())
        self.outputs = tuple(one.name for one in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        with explaining(_RUNNING):
            outputs = self._session.run(list(self.outputs), arrays)
        return {
            name: torch.from_numpy(array) for name, array in zip(self.outputs, outputs, strict=True)
        }


class _OpenVino:
    def __init__(self, path: Path, threads: int | None) -> None:
        openvino: Any = needed("openvino")
        # OpenVINO may choose bfloat16 by itself where the processor has it.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            graph = openvino.Core().read_model(path.read_bytes())
            self._model = openvino.compile_model(graph, "CPU", options)
        except Exception as error:
            raise _unreadable(path, error) from error
        self.runtime = f"openvino {openvino.__version__.split('-')[0]}"
        self.metadata = _metadata_of(path)
        self.inputs = tuple(one.get_any_name() for one in self._model.inputs)
        self.outputs = tuple(one.get_any_name() for one in self._model.outputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with explaining(_RUNNING):
            results = self._model({name: inputs[name].numpy() for name in self.inputs})
        # Copied: OpenVINO writes the next results over these.
        return {name: torch.from_numpy(results[name].copy()) for name in self.outputs}


def _metadata_of(path: Path) -> dict[str, str]:
    onnx: Any = needed("onnx")
    model = onnx.load(str(path), load_external_data=False)
    return {entry.key: entry.value for entry in model.metadata_props}


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(must_be("path", "an ONNX file", f"{str(path)!r} ({reason})", _DAMAGED))
