"""The feature pyramid network, which computes P3 to P7 from the maps of a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import nn

from focaldet._checks import check_choice, check_integer, check_maps, check_range
from focaldet._padding import SameConv2d, widened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["FPN"]


class FPN(nn.Module):
    """RetinaNet's feature pyramid network.

    P5 to P3 are computed from the top down: a lateral 1x1 convolution of C5, C4 or C3 is added to
    the level above, upsampled by nearest neighbour, and the sum goes through a 3x3 convolution. P6
    is a 3x3 convolution with stride 2 of C5 (or P5), and P7 is another of P6.

    The last map is called C5 here, whatever its stride and however many there are. Fewer or more maps
    give fewer or more levels: with four, P2 to P7.

    Args:
        in_channels: Channels of the maps, from the finest to C5, at least one: (of C3, of C4, of C5) in
            the paper.
        out_channels: Channels of every level.
        num_extra: Number of levels above P5: 2 for P6 and P7.

            .. versionadded:: 0.3.0

        p6_from: "c5", as in the paper, or "p5", as in torchvision's first RetinaNet.
        p7_relu: Whether P6 goes through a ReLU before P7 is computed, as in the paper, and P7 before P8
            and so on. MMDetection has none.
        strided_padding: How P6 and P7 pad maps with an even side: "symmetric", as in PyTorch, or
            "same", with one row or column less before, as in TensorFlow.

            .. versionadded:: 0.3.0

    Deviation: convolutions are initialised from a uniform Kaiming (a = 1) distribution with zero
    biases, as in torchvision and Detectron2. Maps can have any size, because the level above is
    resized to the size of the lateral map instead of doubled.

    Raises:
        TypeError: If ``num_extra`` is not an integer.
        ValueError: If ``in_channels`` is empty, ``num_extra`` is negative, or ``p6_from`` or
            ``strided_padding`` is unknown.

    .. versionchanged:: 0.3.0
        Takes any number of maps.

    References:
        Lin et al., Feature Pyramid Networks, section 3. CVPR 2017. arXiv:1612.03144.
        Lin et al., Focal Loss for Dense Object Detection, footnote 2 (P6, P7). arXiv:1708.02002.

    >>> import torch
    >>> c3, c4, c5 = torch.ones(1, 8, 10, 7), torch.ones(1, 16, 5, 4), torch.ones(1, 32, 3, 2)
    >>> [tuple(p.shape[1:]) for p in FPN((8, 16, 32), out_channels=4)([c3, c4, c5])]
    [(4, 10, 7), (4, 5, 4), (4, 3, 2), (4, 2, 1), (4, 1, 1)]
    """

    p6: nn.Conv2d
    p7: nn.Conv2d

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        num_extra: int = 2,
        p6_from: Literal["c5", "p5"] = "c5",
        p7_relu: bool = True,
        strided_padding: Literal["symmetric", "same"] = "symmetric",
    ) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError("in_channels is empty; pass the number of channels of each map.")
        check_integer("num_extra", num_extra)
        check_range("num_extra", num_extra, 0)
        check_choice("p6_from", p6_from, ("c5", "p5"))
        check_choice("strided_padding", strided_padding, ("symmetric", "same"))
        self.num_extra = num_extra
        self.p6_from = p6_from
        self.p7_relu = p7_relu
        self.strided_padding = strided_padding
        self.out_channels = out_channels
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        strided = nn.Conv2d if strided_padding == "symmetric" else SameConv2d
        channels = in_channels[-1] if p6_from == "c5" else out_channels
        for name in self._extra_names():
            self.add_module(name, strided(channels, out_channels, 3, stride=2, padding=1))
            channels = out_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the levels, P3 to P7 of C3, C4 and C5.

        Args:
            features: One map ``[B, C, H, W]`` for each of ``in_channels``, each with twice the stride of
                the one before.

        Returns:
            As many maps ``[B, out_channels, H, W]`` and ``num_extra`` more, each with twice the stride
            of the one before.

        Raises:
            TypeError: If ``features`` is a tensor.
            ValueError: If there is not one feature for each of ``in_channels``.
        """
        check_maps("features", features)
        if len(features) != len(self.lateral):
            raise ValueError(
                f"features must be {len(self.lateral)} maps, one for each of in_channels, got "
                f"{len(features)}."
            )
        c5 = features[-1]
        merged = [self.lateral[-1](c5)]
        for lateral, c in zip(self.lateral[-2::-1], features[-2::-1], strict=True):
            above = F.interpolate(merged[0], size=c.shape[-2:], mode="nearest")
            merged.insert(0, lateral(c) + above)
        levels = [output(m) for output, m in zip(self.output, merged, strict=True)]
        below = c5 if self.p6_from == "c5" else levels[-1]
        for name in self._extra_names():
            levels.append(self.get_submodule(name)(self._widened(below)))
            below = F.relu(levels[-1]) if self.p7_relu else levels[-1]
        return levels

    def _extra_names(self) -> list[str]:
        return [f"p{6 + i}" for i in range(self.num_extra)]

    def _widened(self, x: Tensor) -> Tensor:
        return widened(x) if self.training and self.strided_padding == "symmetric" else x
