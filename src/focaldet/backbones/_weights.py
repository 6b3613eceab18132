"""Load a classifier's weights into a backbone, and adapt them to other numbers of channels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = [
    "adapt_input_channels",
    "adapt_to_input",
    "load_weights",
    "replace_first_convolution",
]

_logger = logging.getLogger(__name__)


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the first convolution of a network trained on RGB images to another number of channels.

    With four or more channels, the first three are taken to be red, green and blue and keep their
    filters; each further one gets the mean of the three. With one or two, each gets the mean. The
    result is multiplied by ``3 / in_channels``, so that an image whose channels are all equal gives
    exactly the activations of the grey RGB image, and the norms that follow still fit.

    Convention:
        A filter of (1, 2, 6) for red, green and blue has the mean 3. It becomes (9) for one channel
        and (0.75, 1.5, 4.5, 2.25) for four. Both add up to 9, as the original does.

    Args:
        weight: ``[O, 3, kH, kW]``, the weight of the convolution.
        in_channels: The number of channels of the images.

    Returns:
        ``[O, in_channels, kH, kW]``; ``weight`` itself if ``in_channels`` is 3.

    .. versionadded:: 0.3.0

    >>> weight = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> adapt_input_channels(weight, 4).flatten().tolist()
    [0.75, 1.5, 4.5, 2.25]
    """
    if in_channels == 3:
        return weight
    mean = weight.mean(dim=1, keepdim=True)
    if in_channels > 3:
        adapted = torch.cat([weight, mean.expand(-1, in_channels - 3, -1, -1)], dim=1)
    else:
        adapted = mean.expand(-1, in_channels, -1, -1)
    return adapted * (3 / in_channels)


def adapt_to_input(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adapt those RGB convolutions of a state dict that differ from a model's in their channels.

    Args:
        tensors: The state dict to adapt.
        wanted: The model's own state dict, whose shapes decide.

    Returns:
        The state dict, with the adapted tensors.
    """
    adapted = dict(tensors)
    for key, tensor in tensors.items():
        shape = wanted[key].shape if key in wanted else tensor.shape
        same_filters = (*tensor.shape[:1], *tensor.shape[2:]) == (*shape[:1], *shape[2:])
        if tensor.ndim == 4 and tensor.shape[1] == 3 != shape[1] and same_filters:
            adapted[key] = adapt_input_channels(tensor, shape[1])
            _logger.info("Adapted %s from RGB to %d input channels.", key, shape[1])
    return adapted


def replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Replace a network's first convolution by one for another number of channels, at random."""
    name, old = next(
        (name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    )
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # a pair, although typed as any tuple
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    # As torchvision initialises the convolutions of these networks.
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule(name, new)


def load_weights(
    argument: str,
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    description: str,
    rename: Callable[[str, Mapping[str, Tensor]], str],
) -> None:
    """Load a classifier's state dict into a network, without the entries of the classifier.

    Args:
        argument: What the message calls the weights.
        network: The network to load them into.
        weights: The state dict. RGB weights are adapted to the network's number of channels.
        description: What the weights should be of, for the message: "a torchvision resnet50".
        rename: Returns the network's key for a key of ``weights``, given the network's state dict.

    Raises:
        ValueError: If keys are missing or shapes differ.
    """
    wanted = network.state_dict()
    renamed = {rename(key, wanted): value for key, value in weights.items()}
    kept = adapt_to_input({key: renamed[key] for key in renamed if key in wanted}, wanted)
    # Old state dicts lack the counters, which only matter for a BatchNorm without momentum.
    missing = sorted(
        key for key in wanted.keys() - kept.keys() if not key.endswith("num_batches_tracked")
    )
    misshapen = sorted(
        f"{key} {list(value.shape)} instead of {list(wanted[key].shape)}"
        for key, value in kept.items()
        if value.shape != wanted[key].shape
    )
    faults = [
        f"{len(keys)} {noun}{'s' if len(keys) != 1 else ''} {'are' if len(keys) != 1 else 'is'} "
        f"{fault} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for keys, noun, fault in (
            (missing, "key", "missing"),
            (misshapen, "tensor", "of a different shape"),
        )
        if keys
    ]
    if faults:
        raise ValueError(f"{argument} do not fit {description}: {'; '.join(faults)}.")
    network.load_state_dict(kept, strict=False)
