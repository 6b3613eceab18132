"""Load a checkpoint's tensors into a model, after checking that they fit."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from focaldet.errors import CheckpointError
from focaldet.pretrained._tensor_values import unsupported_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from focaldet.pretrained._checkpoint import Checkpoint

__all__ = ["LoadingReport", "check_fit", "load_into"]

_logger = logging.getLogger(__name__)


class LoadingReport(NamedTuple):
    """What happened to the tensors of a checkpoint when it was loaded, by key.

    Attributes:
        kept: Keys that were loaded into the model.
        dropped: Keys of the checkpoint that were not loaded.
        new: Keys that the model initialised itself, so they must be trained.

    >>> print(LoadingReport(("fpn.p7.bias",), (), ("head.class_logits.bias",)))
    1 tensor kept; dropped: none; new (to be trained): head.class_logits
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.kept)} tensor{'s' * (len(self.kept) != 1)} kept; "
            f"dropped: {_layers(self.dropped)}; new (to be trained): {_layers(self.new)}"
        )


def _layers(keys: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(key.rpartition(".")[0] for key in keys)) or "none"


def load_into(model: nn.Module, checkpoint: Checkpoint) -> LoadingReport:
    """Load a checkpoint's tensors into the model that its config describes.

    Args:
        model: The model. It keeps its own values in the layers of ``checkpoint.renewed``.
        checkpoint: The checkpoint. All its other tensors must fit the model.

    Returns:
        The report. If a layer is new, it is also logged as a warning (logger ``focaldet``).

    Raises:
        CheckpointError: If other tensors are missing, unexpected or of a different shape, or hold no
            usable values. See :func:`check_fit`.
    """
    prefixes = tuple(f"{layer}." for layer in checkpoint.renewed)
    own = model.state_dict()
    new = {key: value for key, value in own.items() if key.startswith(prefixes)}
    kept = {k: v for k, v in checkpoint.tensors.items() if not k.startswith(prefixes)}
    try:
        check_fit(own, kept | new)
    except CheckpointError as error:
        if not checkpoint.source:
            raise
        raise CheckpointError(f"Cannot load {checkpoint.source!r}. {error}") from error
    model.load_state_dict(kept | new)
    dropped = tuple(key for key in checkpoint.tensors if key not in kept)
    report = LoadingReport(tuple(kept), dropped, tuple(new))
    if new:
        _logger.warning("Loaded the checkpoint: %s", report)
    return report


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless a state dict has exactly the keys and shapes that a model expects, and finite values.

    Weights can be of any of the dtypes float16, bfloat16, float32 and float64. If both state dicts are
    on the meta device, there are no values to check.

    Args:
        wanted: The model's own state dict.
        tensors: The state dict to load.

    Raises:
        CheckpointError: If keys are missing, unexpected or of a different shape. The message names
            up to three of each and the likely cause. Also if weights are not floating-point, contain
            NaN or infinity, or are meta, sparse, quantised, nested or complex tensors.

    .. versionchanged:: 0.3.0
        Dtypes and values are checked, too.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(
        f"{key}: {list(tensors[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted.keys() & tensors.keys()
        if tensors[key].shape != wanted[key].shape
    )
    problems = [
        f"{len(keys)} key{'s' * (len(keys) != 1)} {one if len(keys) == 1 else many} "
        f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for one, many, keys in (
            ("is missing", "are missing", missing),
            ("is unexpected", "are unexpected", unexpected),
            ("has a different shape", "have different shapes", misshapen),
        )
        if keys
    ]
    if problems:
        cause = _likely_cause([*missing, *unexpected], misshapen)
        raise CheckpointError(f"The weights do not fit the model: {'; '.join(problems)}. {cause}")
    unusable = unsupported_values(wanted, tensors)
    if unusable:
        more = f", and {len(unusable) - 3} more" if len(unusable) > 3 else ""
        remedy = (
            "The training probably diverged; use an earlier checkpoint."
            if "NaN" in unusable[0]
            else "Save the weights as dense floating-point tensors."
        )
        raise CheckpointError(
            f"The weights are unusable: {'; '.join(unusable[:3])}{more}. {remedy}"
        )


def _likely_cause(missing_or_unexpected: list[str], misshapen: list[str]) -> str:
    """Name the option that explains which keys are missing, unexpected or of a different shape."""
    for options, parts, keys, others in (
        ("backbone_norm", ("num_batches_tracked",), missing_or_unexpected, misshapen),
        ("head_norm or head_depth", ("tower",), missing_or_unexpected, misshapen),
        ("normalizer", ("criterion.",), missing_or_unexpected, misshapen),
        ("num_classes", ("head.class_logits",), misshapen, missing_or_unexpected),
        ("p6_from", ("fpn.p6",), misshapen, missing_or_unexpected),
        (
            "octave_scales or aspect_ratios",
            ("class_logits", "box_deltas"),
            misshapen,
            missing_or_unexpected,
        ),
    ):
        if keys and not others and all(any(part in key for part in parts) for key in keys):
            remedy = ""
            if options == "num_classes":
                remedy = " To start a new class layer, pass num_classes= to from_pretrained."
            return f"Likely cause: the weights were trained with a different {options}.{remedy}"
    if any(key.startswith("backbone.") for key in [*missing_or_unexpected, *misshapen]):
        return "Likely cause: the weights were trained with a different backbone."
    return "Likely cause: the weights belong to a different model."
