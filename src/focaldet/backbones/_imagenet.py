"""Where torchvision and timm publish the classifier weights of the backbones known by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from focaldet._extras import import_extra
from focaldet._torchvision import torchvision

if TYPE_CHECKING:
    from focaldet.backbones._table import BackboneSpec

__all__ = ["ImageNetWeights", "of_timm", "of_torchvision"]

_ENTRY = "IMAGENET1K_V1"  # the recipe of the detectors that the paper and torchvision compare
_HASH = re.compile(r"-([0-9a-f]{8,})\.pth")
_BYTES_PER_MB = 2**20 / 1e6  # torchvision gives sizes in MiB


@dataclass(frozen=True, kw_only=True)
class ImageNetWeights:
    """One published file with the weights of a classifier.

    Attributes:
        name: What messages call it.
        url: The URL of the file.
        file_name: The file's name in the cache.
        sha256_prefix: The first hexadecimal digits of its SHA-256, or None if it is not published.
        megabytes: Its size in 10^6 bytes, or None if it is not known.
        image_mean: The mean of each channel that the classifier subtracts from images in [0, 1].
        image_std: The standard deviation of each channel that it divides by.
    """

    name: str
    url: str
    file_name: str
    sha256_prefix: str | None
    megabytes: int | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def by_hand(self) -> bool:
        """False: a program can download the file."""
        return False


def of_torchvision(spec: BackboneSpec) -> ImageNetWeights:
    """Return torchvision's weights of a backbone, version ``IMAGENET1K_V1``.

    Raises:
        ValueError: If torchvision does not publish any.
    """
    if spec.weights is None:
        raise ValueError(
            f"backbone_weights='imagenet' is not possible for {spec.name!r}, because torchvision does "
            "not publish weights for it. Pass a file, or choose another backbone."
        )
    entry: Any = torchvision.models.get_weight(f"{spec.weights}.{_ENTRY}")
    file_name = entry.url.rpartition("/")[2]
    found = _HASH.search(file_name)
    transform = entry.transforms()
    return ImageNetWeights(
        name=f"torchvision's {spec.weights}.{_ENTRY}",
        url=entry.url,
        file_name=file_name,
        sha256_prefix=found[1] if found else None,
        megabytes=round(entry.meta["_file_size"] * _BYTES_PER_MB),
        image_mean=tuple(transform.mean),
        image_std=tuple(transform.std),
    )


def of_timm(name: str) -> ImageNetWeights:
    """Return timm's default weights of a network, or those of the tag in its name.

    Args:
        name: timm's name of the network, without the prefix "timm/".

    Raises:
        ImportError: If timm is not installed.
        ValueError: If timm has no network of this name, or no weights for it on the Hugging Face Hub.
    """
    backbone = f"timm/{name}"
    timm: Any = import_extra("timm", purpose=f"backbone={backbone!r}", install="focaldet[timm]")
    try:
        settings = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"backbone_weights='imagenet' is not possible for {backbone!r}: {error}."
        ) from error
    repository = settings.hf_hub_id
    if repository is None:
        raise ValueError(
            f"backbone_weights='imagenet' is not possible for {backbone!r}, because timm does not "
            "publish weights for it on the Hugging Face Hub. Pass a file, or choose another backbone."
        )
    file = settings.hf_hub_filename or "model.safetensors"
    return ImageNetWeights(
        name=f"timm's {repository}",
        url=f"https://huggingface.co/{repository}/resolve/main/{file}",
        file_name=f"{repository.replace('/', '--')}--{file}",
        sha256_prefix=None,
        megabytes=None,
        image_mean=tuple(settings.mean),
        image_std=tuple(settings.std),
    )
