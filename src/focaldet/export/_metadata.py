"""What an exported file says of itself: enough to prepare images and to read what comes out."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

import focaldet
from focaldet._checks import must_be
from focaldet.config import RetinaNetConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from focaldet.retinanet import RetinaNet

__all__ = ["FileFacts", "Kind", "Shape"]

_FORMAT = 1  # raised when an older focaldet could not read what a newer one writes
_PREFIX = "focaldet."
_LEVELS = ("p3", "p4", "p5", "p6", "p7")
_SIZES = "(height, width) of each image without its padding"

Kind = Literal["detections", "maps"]
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """The metadata of an exported file.

    Attributes:
        config: of the model.
        kind: "detections" with post-processing, "maps" without.
        strides: of the backbone's C3, C4 and C5, in pixels.
        fixed_shape: ``(batch, height, width)`` that the file takes; None if it takes any.
        opset: of ONNX; None in a file of ``torch.export``.
        focaldet_version: that wrote the file.
    """

    config: RetinaNetConfig
    kind: Kind
    strides: tuple[int, int, int]
    fixed_shape: Shape | None
    opset: int | None
    focaldet_version: str

    @classmethod
    def of_model(
        cls, model: RetinaNet, kind: Kind, fixed_shape: Shape | None, opset: int | None = None
    ) -> FileFacts:
        """Say what a file made of a model is."""
        c3, c4, c5 = model.anchor_generator.strides[:3]
        return cls(
            config=model.config,
            kind=kind,
            strides=(c3, c4, c5),
            fixed_shape=fixed_shape,
            opset=opset,
            focaldet_version=focaldet.__version__,
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return ("images",) if self.kind == "maps" else ("images", "sizes")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        if self.kind == "maps":
            return tuple(
                f"{part}_{level}" for part in ("logits", "box_deltas") for level in _LEVELS
            )
        return ("boxes", "scores", "labels", "count")

    def check_graph(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise unless a file takes and gives what it was written with.

        Args:
            name: of the file, for messages.
            inputs: that its graph takes; what a graph doesn't use it may lack.
            outputs: that it gives.

        Raises:
            ValueError: it was changed since.
        """
        if not set(inputs) <= set(self.inputs) or tuple(outputs) != self.outputs:
            condition = (
                f"a file that takes {_listed(self.inputs)} and gives {_listed(self.outputs)}"
            )
            got = f"{name!r}, which takes {_listed(inputs)} and gives {_listed(outputs)}"
            raise ValueError(must_be("path", condition, got, "Export the model again."))

    def to_strings(self) -> dict[str, str]:
        """Return what is written into the file: text by keys that begin with "focaldet."."""
        config = self.config
        values = {
            "format": str(_FORMAT),
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
        return {_PREFIX + key: value for key, value in values.items()}

    def _describe_inputs(self) -> dict[str, str]:
        described = {"images": "float32 [B, 3, H, W], RGB, preprocessed"}
        return (
            described if self.kind == "maps" else {**described, "sizes": f"int64 [B, 2], {_SIZES}"}
        )

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
            "count": "int64 [B], rows filled",
        }

    @classmethod
    def from_strings(cls, name: str, values: Mapping[str, str]) -> FileFacts:
        """Read the metadata of a file.

        Args:
            name: of the file, for messages.
            values: its metadata.

        Raises:
            ValueError: it was not exported by focaldet, by a later one, or is damaged.
        """
        found = values.get(_PREFIX + "format")
        if found is None:
            remedy = "Without what export_onnx writes into a file, its inputs can't be prepared."
            raise ValueError(must_be("path", "a file exported by focaldet", repr(name), remedy))
        if found != str(_FORMAT):
            remedy = "Another focaldet wrote it: take that, or export the model again."
            got = f"{name!r} of format {found}"
            raise ValueError(must_be("path", f"a file of format {_FORMAT}", got, remedy))
        try:
            return cls._read({key.removeprefix(_PREFIX): value for key, value in values.items()})
        except (KeyError, TypeError, ValueError) as error:
            got = f"{name!r}, whose metadata is damaged ({type(error).__name__}: {error})"
            raise ValueError(must_be("path", "a file exported by focaldet", got)) from error

    @classmethod
    def _read(cls, values: Mapping[str, str]) -> FileFacts:
        kind = values["kind"]
        if kind not in ("detections", "maps"):
            raise ValueError(must_be("kind", "'detections' or 'maps'", repr(kind)))
        c3, c4, c5 = (int(stride) for stride in json.loads(values["strides"]))
        shape = json.loads(values["fixed_shape"])
        if shape is not None:
            batch, height, width = (int(side) for side in shape)
            shape = (batch, height, width)
        opset = json.loads(values["opset"])
        return cls(
            config=RetinaNetConfig.from_json(values["config"]),
            kind="maps" if kind == "maps" else "detections",
            strides=(c3, c4, c5),
            fixed_shape=shape,
            opset=None if opset is None else int(opset),
            focaldet_version=values["version"],
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _preprocessing(config: RetinaNetConfig) -> str:
    """Say in JSON how an image becomes a row of ``images``."""
    return json.dumps(
        {
            "color_order": "RGB, values from 0 to 1",
            "resize": {
                "short_side": config.min_size,
                "long_side_at_most": config.max_size,
                "sizes_rounded": config.size_rounding,
                "filter": "bilinear, half-pixel centres",
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
