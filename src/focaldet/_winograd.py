"""3x3 convolutions with a quarter of the multiplications, for processors with fast matrix products.

Uses Winograd's minimal filtering F(4x4, 3x3): a tile of 6x6 pixels is transformed, multiplied and
transformed back to 4x4 results. This takes 36 matrix products ``[tiles, C] @ [C, C']`` instead of 144.

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

_CHUNK = 128  # tiles per step, so that intermediate results stay in the caches
_MIN_TILES = 16  # in a map; with fewer, the ordinary convolution is faster
_CHANNELS = range(128, 257)  # no gain with fewer; with more, the transformed weights are too large
_MIN_SPEEDUP = 1.1  # below this, the transformed weights are not worth their memory


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 1 and padding 1, for inference in float32.

    Results differ from those of the ordinary convolution by about 1e-5 of their standard deviation.
    Small maps use the ordinary convolution.
    """

    filters: Tensor  # [36, C, C']

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> WinogradConv2d:
        """Share the weights of an ordinary convolution and add their transform."""
        result = cls(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        result.weight, result.bias = conv.weight, conv.bias
        transform = torch.tensor(_FILTER, dtype=torch.float64, device=conv.weight.device)
        weight = conv.weight.detach().double()
        filters = torch.einsum("ia,ocab,jb->ijco", transform, weight, transform).flatten(0, 1)
        result.register_buffer("filters", filters.to(conv.weight), persistent=False)
        return result.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in nn.Conv2d
        """Map ``[B, C, H, W]`` to ``[B, C', H, W]`` in channels_last memory format."""
        batch, _, height, width = input.shape
        if batch * -(-height // 4) * -(-width // 4) < _MIN_TILES:
            return super().forward(input)
        result: Tensor = _convolve(input, self.filters, self.bias)
        return result


# A custom operator, because compilers generate slow code for its many views.
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
    scratch = image.new_empty(2, size)  # reused by every step
    for first in range(0, rows, step):
        part = slice(first, first + step)
        results[:, :, part] = _convolve_tiles(tiles[:, :, part], filters, bias, scratch)
    return result[:, :height, :width].permute(0, 3, 1, 2)


@_convolve.register_fake
def _(image: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return _empty(image, filters)[:, : image.shape[2], : image.shape[3]].permute(0, 3, 1, 2)


def _empty(image: Tensor, filters: Tensor) -> Tensor:
    """Allocate the results of all tiles, ``[B, 4 * rows, 4 * columns, C']``."""
    batch, _, height, width = image.shape
    return image.new_empty(batch, -(-height // 4) * 4, -(-width // 4) * 4, filters.shape[2])


def _convolve_tiles(tiles: Tensor, filters: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
    """Map tiles ``[6, 6, ..., C]`` to ``[4, 4, ..., C']``, a view of ``scratch``."""
    shape = tiles.shape[2:-1]
    count = shape.numel()
    channels, out_channels = filters.shape[1:]

    def view(half: int, points: int, channels: int) -> Tensor:
        return scratch[half, : points * count * channels].view(points, count, channels)

    to_input, to_output = _transforms(tiles.dtype, tiles.device)
    pixels = view(0, 36, channels)
    pixels.view(tiles.shape).copy_(tiles)
    points = view(1, 36, channels)
    torch.mm(to_input, pixels.flatten(1), out=points.flatten(1))
    products = torch.bmm(points, filters, out=view(0, 36, out_channels))
    values = view(1, 16, out_channels)
    torch.mm(to_output, products.flatten(1), out=values.flatten(1))
    if bias is not None:
        values += bias
    return values.view(4, 4, *shape, out_channels)


@functools.cache
def _transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices that transform 6x6 pixels to 36 points, and 36 products to 4x4 results."""
    with torch.inference_mode(mode=False):
        matrices = [
            torch.tensor(rows, dtype=torch.float64, device=device) for rows in (_INPUT, _OUTPUT)
        ]
        to_input, to_output = (torch.kron(matrix, matrix).to(dtype) for matrix in matrices)
    return to_input, to_output


def use_winograd(module: nn.Module) -> None:
    """Replace the convolutions of a network that are faster with Winograd's filtering."""
    for name, conv in list(module.named_modules(remove_duplicate=False)):
        if type(conv) is nn.Conv2d and _is_suitable(conv):
            module.set_submodule(name, WinogradConv2d.from_conv(conv))


def _is_suitable(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or conv.padding_mode != "zeros":
        return False
    return conv.in_channels in _CHANNELS and conv.out_channels >= _CHANNELS.start


@functools.cache
def is_winograd_faster(threads: int) -> bool:
    """Whether Winograd's filtering is faster on this machine.

    The first call measures one convolution of a head, which takes half a second.

    Args:
        threads: PyTorch's number of threads. The result is cached for each number.
    """
    del threads  # only a key of the cache
    plain = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    image = torch.rand(1, 256, 64, 64).to(memory_format=torch.channels_last)
    convs: list[Callable[[Tensor], Tensor]] = [plain, WinogradConv2d.from_conv(plain)]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(4):
            for conv, spent in zip(convs, seconds, strict=True):
                start = time.perf_counter()
                conv(image)
                spent.append(time.perf_counter() - start)
    slow, fast = (statistics.median(spent[1:]) for spent in seconds)
    return slow > _MIN_SPEEDUP * fast
