"""The metadata of exported files: how to prepare images and how to read the outputs."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from focaldet._checks import check_choice, shortened
from focaldet._version import __version__
from focaldet.config import RetinaNetConfig
from focaldet.errors import CheckpointError
from focaldet.export._calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from focaldet.retinanet import RetinaNet

__all__ = ["ExportMetadata", "FilePrecision", "Kind", "Shape"]

_FORMAT = 1  # increased when older versions of focaldet cannot read new files
# Of files in INT8 and float16: older versions would run them, but not say what they are.
_REDUCED_FORMAT = 2
_PREFIX = "focaldet."
_MAX_INTEGER = 2**31  # larger strides or sides are damage

FilePrecision = Literal["float32", "float16", "int8"]
Kind = Literal["detections", "maps"]
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """The metadata of an exported file.

    Attributes:
        config: Configuration of the model.
        kind: "detections" with post-processing, "maps" without.
        strides: Strides of the backbone's maps, in pixels.
        fixed_shape: ``(batch, height, width)``, the only shape that the file accepts. None if it
            accepts any.
        opset: ONNX opset. None for a program of ``torch.export``.
        focaldet_version: Version of focaldet that wrote the file.
        precision: "float32", "float16" or "int8": what the network computes in.

            .. versionadded:: 0.3.0
        calibration: How an INT8 file was calibrated, with the layers that were left in floating
            point. None for other files.

            .. versionadded:: 0.3.0

    .. versionchanged:: 0.3.0
        Renamed from ``FileFacts``, which still works with a warning. There can be any number of
        strides.
    """

    config: RetinaNetConfig
    kind: Kind
    strides: tuple[int, ...]
    fixed_shape: Shape | None
    opset: int | None
    focaldet_version: str
    precision: FilePrecision = "float32"
    calibration: Calibration | None = None

    @classmethod
    def of_model(
        cls,
        model: RetinaNet,
        kind: Kind,
        fixed_shape: Shape | None,
        opset: int | None = None,
        precision: FilePrecision = "float32",
    ) -> ExportMetadata:
        """Return the metadata of a file exported from a model."""
        config = model.current_config()
        return cls(
            config=config,
            kind=kind,
            strides=model.anchor_generator.strides[: len(config.map_levels)],
            fixed_shape=fixed_shape,
            opset=opset,
            focaldet_version=__version__,
            precision=precision,
        )

    @property
    def num_channels(self) -> int:
        """Number of image channels."""
        return len(self.config.image_mean)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return ("images",) if self.kind == "maps" else ("images", "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        if self.kind == "maps":
            return tuple(
                f"{part}_p{level}"
                for part in ("logits", "box_deltas")
                for level in self.config.levels
            )
        return ("boxes", "scores", "labels", "count")

    def check_graph(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise unless the inputs and outputs of a graph are those that the file was exported with.

        Args:
            name: Name of the file, for messages.
            inputs: Inputs of the graph. An input that the graph does not use may be missing.
            outputs: Outputs of the graph.

        Raises:
            CheckpointError: If the file was changed after the export. This is a ``ValueError``.
        """
        if not set(inputs) <= set(self.inputs) or tuple(outputs) != self.outputs:
            raise CheckpointError(
                f"{name!r} was changed after it was exported: it has the inputs {_listed(inputs)} and "
                f"the outputs {_listed(outputs)}, but was exported with the inputs "
                f"{_listed(self.inputs)} and the outputs {_listed(self.outputs)}. Export the model "
                "again."
            )

    def to_strings(self) -> dict[str, str]:
        """Return the metadata as it is written to the file, under keys that begin with "focaldet."."""
        config = self.config
        values = {
            "format": str(_FORMAT if self.precision == "float32" else _REDUCED_FORMAT),
            "version": self.focaldet_version,
            "kind": self.kind,
            "config": config.to_json(),
            "strides": json.dumps(self.strides),
            "fixed_shape": json.dumps(self.fixed_shape),
            "opset": json.dumps(self.opset),
            "class_names": json.dumps(config.class_names),
            "thresholds": json.dumps(
                {
                    name: getattr(config, name)
                    for name in (
                        *("score_threshold", "nms_threshold"),
                        *("pre_nms_top_k", "max_detections"),
                    )
                }
            ),
            "preprocessing": _preprocessing(config),
            "inputs": json.dumps(self._describe_inputs()),
            "outputs": json.dumps(self._describe_outputs()),
            "made_with": f"torch {torch.__version__}, Python {platform.python_version()}",
        }
        if self.precision != "float32":
            values["precision"] = self.precision
        if self.calibration is not None:
            values["calibration"] = self.calibration.to_json()
        return {_PREFIX + key: value for key, value in values.items()}

    def _describe_inputs(self) -> dict[str, str]:
        colours = ", RGB" if self.num_channels == 3 else ""
        sizes = "int64 [B, 2], (height, width) of each image without its padding"
        described = {
            "images": f"float32 [B, {self.num_channels}, H, W]{colours}, preprocessed",
            "sizes": sizes,
        }
        return {name: described[name] for name in self.inputs}

    def _describe_outputs(self) -> dict[str, str]:
        if self.kind == "maps":
            return {
                name: "float32 [B, A * K, H, W], class k of anchor a in channel a * K + k"
                if name.startswith("logits")
                else "float32 [B, A * 4, H, W], delta j of anchor a in channel a * 4 + j"
                for name in self.outputs
            }
        return {
            "boxes": "float32 [B, D, 4], (x1, y1, x2, y2) in pixels of the batch",
            "scores": "float32 [B, D], best first, 0 in empty rows",
            "labels": "int64 [B, D], 0-based, -1 in empty rows",
            "count": "int64 [B], number of filled rows",
        }

    @classmethod
    def from_strings(cls, name: str, values: Mapping[str, str]) -> ExportMetadata:
        """Read the metadata of a file.

        Args:
            name: Name of the file, for messages.
            values: The metadata, as :meth:`to_strings` returns it.

        Raises:
            CheckpointError: If the file was not exported by focaldet, was exported by a version with a
                different format, or its metadata is damaged. This is a ``ValueError``.
        """
        found = values.get(_PREFIX + "format")
        if found is None:
            raise CheckpointError(
                f"{name!r} was not exported by focaldet: it has no metadata that tells how to prepare "
                "images. Export the model with export_onnx."
            )
        if found not in (str(_FORMAT), str(_REDUCED_FORMAT)):
            raise CheckpointError(
                f"{name!r} has format {shortened(found)}, but this version of focaldet reads formats "
                f"'{_FORMAT}' and '{_REDUCED_FORMAT}'. Export the model again, or use focaldet "
                f"{shortened(values.get(_PREFIX + 'version', '?'))}, which wrote the file."
            )
        try:
            return cls._read({key.removeprefix(_PREFIX): value for key, value in values.items()})
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"The metadata of {name!r} is damaged: {what.rstrip('.')}. Export the model again."
            ) from error

    @classmethod
    def _read(cls, values: Mapping[str, str]) -> ExportMetadata:
        kind = values["kind"]
        check_choice("kind", kind, ("detections", "maps"))
        config = _config(values["config"])
        strides = _json("strides", values["strides"])
        strides = tuple(_integers("strides", strides, count=len(config.map_levels)))
        shape = _json("fixed_shape", values["fixed_shape"])
        if shape is not None:
            batch, height, width = _integers("fixed_shape", shape, count=3)
            shape = (batch, height, width)
        opset = _json("opset", values["opset"])
        if opset is not None:
            [opset] = _integers("opset", [opset], count=1)
        precision: Any = values.get("precision", "float32")
        check_choice("precision", precision, ("float32", "float16", "int8"))
        calibration = values.get("calibration")
        return cls(
            config=config,
            kind="maps" if kind == "maps" else "detections",
            strides=strides,
            fixed_shape=shape,
            opset=opset,
            focaldet_version=values["version"],
            precision=precision,
            calibration=None if calibration is None else Calibration.from_json(calibration),
        )


def _json(field: str, text: str) -> Any:
    """Read the JSON value of a field.

    Raises:
        ValueError: If it is not valid JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{field} is not valid JSON ({reason})") from error


def _integers(field: str, values: object, count: int) -> list[int]:
    """Return the positive integers of a field, or raise ``ValueError``."""
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(value) is int and 1 <= value <= _MAX_INTEGER for value in values)
    ):
        what = "a positive integer" if count == 1 else f"{count} positive integers"
        found = values[0] if isinstance(values, list) and count == len(values) == 1 else values
        raise ValueError(f"{field} must be {what}, got {shortened(found)}")
    return values


def _config(text: str) -> RetinaNetConfig:
    try:
        return RetinaNetConfig.from_json(text)
    except RecursionError as error:
        raise ValueError("config is not valid JSON (it is nested too deeply)") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _resized_sides(config: RetinaNetConfig) -> dict[str, object]:
    """Describe the size that images are resized to."""
    if not config.keep_ratio:
        return {"both_sides": config.min_size}
    return {
        "short_side": config.min_size,
        "long_side_at_most": config.max_size,
        "sizes_rounded": config.size_rounding,
    }


def _preprocessing(config: RetinaNetConfig) -> str:
    """Describe in JSON how to turn an image into a row of ``images``."""
    return json.dumps(
        {
            "color_order": "RGB, values from 0 to 1"
            if len(config.image_mean) == 3
            else "values from 0 to 1",
            "resize": {
                **_resized_sides(config),
                "sampled_by": config.resize_by,
                "filter": "bilinear, half-pixel centres"
                + (", as cv2.resize" if config.round_pixels and not config.antialias else ""),
                "antialias": config.antialias,
                "of_256_levels": config.round_pixels,
                "order": "resize, then normalise"
                if config.round_pixels
                else "normalise, then resize",
            },
            "mean": config.image_mean,
            "std": config.image_std,
            "padded_right_and_below_with": 0,
            "size_divisor": config.size_divisor,
            "always_pad": config.always_pad,
        }
    )
