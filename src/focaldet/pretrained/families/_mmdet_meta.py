"""What the ``meta`` entry of an MMDetection file says about its model.

Versions 1 and 2 of MMDetection save their configuration as ``meta["config"]`` and the names of the
classes as ``meta["CLASSES"]``, version 3 as ``meta["cfg"]`` and ``meta["dataset_meta"]["classes"]``.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from focaldet._checks import shortened
from focaldet.errors import CheckpointError
from focaldet.pretrained.families._mmdet_text import UNREADABLE, evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from focaldet.pretrained._checkpoint import CheckpointFile

__all__ = ["Meta", "Pixels"]

_logger = logging.getLogger(__name__)

_STYLE = re.compile(r"style\s*=\s*['\"](caffe|pytorch)['\"]")
_OF_VERSION_2 = re.compile(r"_coco(_20\d{6}|-[0-9a-f]{8})")  # in the names of the model zoo's files
_OF_VERSION_1 = re.compile(r"_201[89]\d{4}-")
_PATHS_OF_TEST_PIPELINE = (
    "test_dataloader.dataset.pipeline",
    "data.test.pipeline",
    "test_pipeline",
)
_HARMLESS_STEPS = frozenset(
    {
        *("LoadImageFromFile", "LoadAnnotations", "MultiScaleFlipAug", "RandomFlip", "Collect"),
        *("Resize", "Normalize", "Pad", "ImageToTensor", "ToTensor", "DefaultFormatBundle"),
        *("PackDetInputs", "LoadImageFromNDArray", "LoadImageFromWebcam", "WrapFieldsToLists"),
    }
)
_MISSING = object()


class Pixels(NamedTuple):
    """How pixels in [0, 255] are normalised: the values of red, green and blue, and their order."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_rgb: bool


class Meta:
    """The ``meta`` entry of a file, whose settings are looked up by the paths of a configuration.

    Every method returns None for what the file does not say.

    Args:
        file: The file.
    """

    def __init__(self, file: CheckpointFile) -> None:
        meta = file.extras.get("meta")
        self._meta: dict[Any, Any] = meta if isinstance(meta, dict) else {}
        self._name = file.name
        self._tensors = file.tensors
        texts = (self._meta.get(key) for key in ("cfg", "config"))
        self._text = next((text for text in texts if isinstance(text, str) and text), "")
        self._settings: dict[str, Any] = {}
        self._unreadable = ""
        try:
            self._settings = evaluate(self._text)
        except ValueError as error:
            self._unreadable = str(error)

    def warn_if_unreadable(self) -> None:
        """Log a warning if the configuration cannot be read."""
        if self._unreadable:
            _logger.warning(
                "The configuration in %r cannot be read, because %s. The model is assumed to be like "
                "MMDetection's published ones.",
                self._name or "the file",
                self._unreadable,
            )

    def get(self, path: str, *alternatives: str) -> Any:
        """Return the setting at one of several paths, such as "model.neck.type", or None.

        Raises:
            CheckpointError: If the value is an expression that cannot be evaluated.
        """
        for one in (path, *alternatives):
            value: Any = self._settings
            for key in one.split("."):
                value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
            if value is not _MISSING:
                return self._readable(one, value)
        return None

    def _readable(self, path: str, value: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(part is UNREADABLE for part in parts):
            raise self.error(
                path,
                "an expression that is not a literal",
                "Replace it by its value in the file's meta, or pass config=.",
            )
        return value

    @staticmethod
    def error(path: str, value: object, remedy: str) -> CheckpointError:
        """Build the error for a setting that cannot be represented."""
        shown = value if isinstance(value, str) and " " in value else shortened(value)
        return CheckpointError(
            f"The configuration in this MMDetection file says that {path} is {shown}. {remedy}"
        )

    def number(self, path: str, *alternatives: str) -> float | None:
        """Return a number.

        Raises:
            CheckpointError: If the value is not a number.
        """
        value = self.get(path, *alternatives)
        if value is None or _is_number(value):
            return value  # type: ignore[no-any-return]
        raise self.error(path, value, "It should be a number.")

    def numbers(
        self, path: str, *alternatives: str, count: int | None = None
    ) -> tuple[float, ...] | None:
        """Return a tuple of numbers.

        Args:
            path: The path of the setting.
            alternatives: Other paths that older versions use.
            count: The number of numbers. None allows any.

        Raises:
            CheckpointError: If the value is not made of so many numbers.
        """
        return _numbers(path, self.get(path, *alternatives), count)

    @property
    def is_version_1(self) -> bool:
        """Whether the model is of MMDetection 1, whose boxes include their last pixels.

        The form of the configuration decides, then the file's name if it is one of the model zoo of
        version 2, the version of MMDetection, the names of the tensors, and the file's name.
        """
        head = self.get("model.bbox_head")
        if isinstance(head, dict):
            generator = head.get("anchor_generator")
            if isinstance(generator, dict):
                return str(generator.get("type")).endswith("LegacyAnchorGenerator")
            if "octave_base_scale" in head or "anchor_strides" in head:
                return True
        if _OF_VERSION_2.search(self._name):
            return False
        version = self._meta.get("mmdet_version")
        if isinstance(version, str) and version[:1].isdigit():
            return version.partition(".")[0] in ("0", "1")
        if "bbox_head.cls_convs.0.weight" in self._tensors:
            return True  # until version 0.6
        return _OF_VERSION_1.search(self._name) is not None and "_coco" not in self._name

    @property
    def style(self) -> str | None:
        """The style of the ResNet, "caffe" or "pytorch"."""
        style = self.get("model.backbone.style")
        if style is None:
            found = _STYLE.search(self._text)
            style = found[1] if found else None
        if style not in (None, "caffe", "pytorch"):
            raise self.error("model.backbone.style", style, "It should be 'caffe' or 'pytorch'.")
        return style if style is None else str(style)

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """Return the names of the classes.

        Raises:
            CheckpointError: If they are not one string for each of ``num_classes`` classes.
        """
        of_dataset = self._meta.get("dataset_meta")
        names = None
        for entries in (self._meta, of_dataset):
            if isinstance(entries, dict):
                names = names or entries.get("classes") or entries.get("CLASSES")
        if names is None:
            return None
        if isinstance(names, str):
            names = (names,)
        if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
            raise CheckpointError(
                f"The class names in this MMDetection file should be a list of strings, but are "
                f"{shortened(names)}. Pass class_names=."
            )
        if len(names) != num_classes:
            raise CheckpointError(
                f"This MMDetection file names {len(names)} classes, but its head has {num_classes}. "
                "Pass config= with the class_names of the head."
            )
        return tuple(names)

    @property
    def delta_scales(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What box deltas are multiplied by, and what is then added, for dx, dy, dw and dh."""
        coder, old = "model.bbox_head.bbox_coder.target_", "model.bbox_head.target_"
        stds = self.numbers(coder + "stds", old + "stds", count=4)
        means = self.numbers(coder + "means", old + "means", count=4)
        if stds is None and not self._settings and "free_anchor" in self._name:
            stds = (0.1, 0.1, 0.2, 0.2)  # of the published models
        return stds or (1.0,) * 4, means or (0.0,) * 4

    @property
    def pixels(self) -> Pixels | None:
        """How pixels are normalised."""
        preprocessor = self.get("model.data_preprocessor")
        if isinstance(preprocessor, dict):  # version 3, which leaves pixels as they are by default
            where, values = "model.data_preprocessor", preprocessor
            to_rgb = bool(values.get("bgr_to_rgb") or values.get("rgb_to_bgr"))
        else:
            where = "Normalize in the test pipeline"
            values = self._step("Normalize") or self.get("img_norm_cfg", "data.test.img_norm_cfg")
            if not isinstance(values, dict):
                return None
            to_rgb = bool(values.get("to_rgb", True))
        mean = _numbers(f"mean of {where}", values.get("mean"), 3) or (0.0,) * 3
        std = _numbers(f"std of {where}", values.get("std"), 3) or (1.0,) * 3
        if min(std) <= 0:
            raise self.error(f"std of {where}", std, "It should be above 0.")
        order = 1 if to_rgb else -1
        return Pixels(mean[::order], std[::order], to_rgb)

    @property
    def input_sizes(self) -> dict[str, Any] | None:
        """The fields of the sizes to which images are resized in testing.

        Raises:
            CheckpointError: If they are resized in a way that cannot be represented.
        """
        for kind, _ in self._steps():
            if kind not in _HARMLESS_STEPS:
                raise self.error("a step of the test pipeline", kind, "Pass config= to ignore it.")
        settings = (self._step("MultiScaleFlipAug") or {}) | (self._step("Resize") or {})
        where = "of Resize in the test pipeline"
        for name, only in (("interpolation", "bilinear"), ("backend", "cv2")):
            if settings.get(name) not in (None, only):
                remedy = f"Only {only!r} can be loaded."
                raise self.error(f"{name} {where}", settings[name], remedy)
        is_version_3 = "scale" in settings
        scale = settings.get("scale", settings.get("img_scale", self.get("data.test.img_scale")))
        if scale is None:
            return None
        if isinstance(scale, list | tuple) and len(scale) == 1:
            scale = scale[0]
        if (
            not isinstance(scale, list | tuple)
            or len(scale) != 2
            or not all(type(side) is int and side > 0 for side in scale)
        ):
            remedy = "It should be one pair of a short and a long side."
            raise self.error(f"the scale {where}", scale, remedy)
        sizes: dict[str, Any] = {"min_size": min(scale), "max_size": max(scale)}
        keep_ratio = settings.get("keep_ratio", not is_version_3)
        if keep_ratio is True:
            return sizes
        if keep_ratio is not False or min(scale) != max(scale):
            remedy = "It should be True, or False with a square scale."
            raise self.error(f"keep_ratio {where}", keep_ratio, remedy)
        return {**sizes, "keep_ratio": False}

    @property
    def size_divisor(self) -> int | None:
        """What the sides of batches are multiples of."""
        pad = self._step("Pad")
        preprocessor = self.get("model.data_preprocessor")
        for name in ("size", "pad_to_square"):
            if pad and pad.get(name):
                where = f"{name} of Pad in the test pipeline"
                raise self.error(where, pad[name], "Only size_divisor can be loaded.")
        if pad:
            divisor = pad.get("size_divisor", 1)
        elif isinstance(preprocessor, dict):
            divisor = preprocessor.get("pad_size_divisor", 1)
        elif self._step("Normalize"):  # a complete pipeline without padding
            divisor = 1
        else:
            divisor = self.get("data.test.size_divisor")
        if divisor is not None and (type(divisor) is not int or divisor < 1):
            raise self.error("the divisor of padding", divisor, "It should be a positive integer.")
        return divisor

    def _step(self, kind: str) -> dict[str, Any] | None:
        return next((step for one, step in self._steps() if one == kind), None)

    def _steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the type and settings of each step of the test pipeline."""
        pipeline = self.get(*_PATHS_OF_TEST_PIPELINE)
        queue = list(pipeline) if isinstance(pipeline, list | tuple) else []
        for step in queue[:100]:
            if isinstance(step, dict):
                inner = step.get("transforms")
                queue += inner if isinstance(inner, list | tuple) and len(queue) < 100 else []
        for step in queue[:100]:
            if isinstance(step, dict):
                yield str(step.get("type")).rpartition(".")[2], step


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(where: str, value: Any, count: int | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or not all(map(_is_number, value))
        or (count is not None and len(value) != count)
    ):
        expected = "numbers" if count is None else f"{count} numbers"
        raise Meta.error(where, value, f"It should be a list of {expected}.")
    return tuple(float(one) for one in value)
