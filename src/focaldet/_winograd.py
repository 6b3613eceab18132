"""3x3 convolutions with a quarter of the multiplications, for processors whose matrix products are fast.

Winograd's minimal filtering F(4x4, 3x3): a tile of 6x6 pixels gives 4x4 results by 36 products of
matrices ``[tiles, C] @ [C, C']`` instead of 144, between two small transforms.

References:
    Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, section 4. CVPR 2016.
    arXiv:1509.09308.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WinogradConv2d", "is_winograd_faster", "use_winograd"]

# The paper's B^T, G and A^T for the points 0, 1, -1, 2, -2 and infinity.
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)

_CHUNK = 128  # tiles at a time, so that what lies between the products stays in the caches
_FEWEST = 16  # tiles of a map, below which the plain convolution is faster
_CHANNELS = range(128, 257)  # fewer gain nothing; of more the transformed weights are large
_GAIN = 1.1  # of the measured speeds, for which four times the weights are worth their memory


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3x3 pixels, stride 1 and padding 1, for inference in float32.

    Results differ from the plain one's by some 1e-5 of their spread. Maps of few tiles take the
    plain way.
    """

    filters: Tensor  # [36, C, C']

    @classmethod
    def of(cls, conv: nn.Conv2d) -> WinogradConv2d:
        """Return one with a convolution's own weights, and their transform beside them."""
        result = cls(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        result.weight, result.bias = conv.weight, conv.bias
        transform = torch.tensor(_FILTER, dtype=torch.float64, device=conv.weight.device)
        weight = conv.weight.detach().double()
        filters = torch.einsum("ia,ocab,jb->ijco", transform, weight, transform).flatten(0, 1)
        result.register_buffer("filters", filters.to(conv.weight), persistent=False)
        return result.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Conv2d names it
        """Map ``[B, C, H, W]`` to ``[B, C', H, W]``, laid channels last."""
        batch, _, height, width = input.shape
        if batch * -(-height // 4) * -(-width // 4) < _FEWEST:
            return super().forward(input)
        result: Tensor = _convolve(input, self.filters, self.bias)
        return result


# An operator of its own, since compilers make slow code of its views.
@torch.library.custom_op("focaldet::winograd_conv2d", mutates_args=())
def _convolve(image: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    batch, channels, height, width = image.shape
    rows, columns = -(-height // 4), -(-width // 4)
    border = (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height)
    padded = F.pad(image.permute(0, 2, 3, 1), border)
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 1, 0, 2, 3)  # [6, 6, rows, ...]
    result = _empty(image, filters)
    results = result.view(batch, rows, 4, columns, 4, -1).permute(2, 4, 1, 0, 3, 5)
    step = min(rows, max(1, _CHUNK // (batch * columns)))
    size = 36 * step * batch * columns * max(channels, filters.shape[2])
    scratch = image.new_empty(2, size)  # is used chunk after chunk
    for first in range(0, rows, step):
        part = slice(first, first + step)
        results[:, :, part] = _convolve_tiles(tiles[:, :, part], filters, bias, scratch)
    return result[:, :height, :width].permute(0, 3, 1, 2)


@_convolve.register_fake
def _(image: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return _empty(image, filters)[:, : image.shape[2], : image.shape[3]].permute(0, 3, 1, 2)


def _empty(image: Tensor, filters: Tensor) -> Tensor:
    """Return room for whole tiles, ``[B, 4 * rows, 4 * columns, C']``."""
    batch, _, height, width = image.shape
    return image.new_empty(batch, -(-height // 4) * 4, -(-width // 4) * 4, filters.shape[2])


def _convolve_tiles(tiles: Tensor, filters: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """Map tiles ``[6, 6, ..., C]`` to ``[4, 4, ..., C']``, which lies in ``scratch``."""
    shape = tiles.shape[2:-1]
    count = shape.numel()
    channels, out_channels = filters.shape[1:]

    def take(half: int, points: int, channels: int) -> Tensor:
        return scratch[half, : points * count * channels].view(points, count, channels)

    to_input, to_output = _transforms(tiles.dtype, tiles.device)
    pixels = take(0, 36, channels)
    pixels.view(tiles.shape).copy_(tiles)
    points = take(1, 36, channels)
    torch.mm(to_input, pixels.flatten(1), out=points.flatten(1))
    products = torch.bmm(points, filters, out=take(0, 36, out_channels))
    values = take(1, 16, out_channels)
    torch.mm(to_output, products.flatten(1), out=values.flatten(1))
    if bias is not None:
        values += bias
    return values.view(4, 4, *shape, out_channels)


@functools.cache
def _transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what takes 6x6 pixels to 36 points, and 36 products to 4x4 results."""
    with torch.inference_mode(mode=False):
        matrices = [
            torch.tensor(rows, dtype=torch.float64, device=device) for rows in (_INPUT, _OUTPUT)
        ]
        to_input, to_output = (torch.kron(matrix, matrix).to(dtype) for matrix in matrices)
    return to_input, to_output


def use_winograd(module: nn.Module) -> None:
    """Replace the convolutions of a network that gain from it."""
    for name, conv in list(module.named_modules(remove_duplicate=False)):
        if type(conv) is nn.Conv2d and _gains(conv):
            module.set_submodule(name, WinogradConv2d.of(conv))


def _gains(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or conv.padding_mode != "zeros":
        return False
    return conv.in_channels in _CHANNELS and conv.out_channels >= _CHANNELS.start


@functools.cache
def is_winograd_faster(threads: int) -> bool:
    """Whether it is on this machine, measured with one convolution of a head; takes half a second.

    Args:
        threads: torch's, of which the answer may depend.
    """
    del threads
    plain = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    image = torch.rand(1, 256, 64, 64).to(memory_format=torch.channels_last)
    ways: list[Callable[[Tensor], Tensor]] = [plain, WinogradConv2d.of(plain)]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(4):
            for way, spent in zip(ways, seconds, strict=True):
                start = time.perf_counter()
                way(image)
                spent.append(time.perf_counter() - start)
    slow, fast = (statistics.median(spent[1:]) for spent in seconds)
    return slow > _GAIN * fast
