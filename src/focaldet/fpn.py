"""The feature pyramid network, which computes P3 to P7 from C3 to C5 of a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import nn

from focaldet._checks import check_choice
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

    Args:
        in_channels: Channels of C3, C4 and C5.
        out_channels: Channels of every level.
        p6_from: "c5", as in the paper, or "p5", as in torchvision's first RetinaNet.
        p7_relu: Whether P6 goes through a ReLU before P7 is computed, as in the paper. MMDetection
            has none.
        strided_padding: How P6 and P7 pad maps with an even side: "symmetric", as in PyTorch, or
            "same", with one row or column less before, as in TensorFlow.

            .. versionadded:: 0.3.0

    Deviation: convolutions are initialised from a uniform Kaiming (a = 1) distribution with zero
    biases, as in torchvision and Detectron2. Maps can have any size, because the level above is
    resized to the size of the lateral map instead of doubled.

    Raises:
        ValueError: If there are not three ``in_channels``, or ``p6_from`` or
            ``strided_padding`` is unknown.

    References:
        Lin et al., Feature Pyramid Networks, section 3. CVPR 2017. arXiv:1612.03144.
        Lin et al., Focal Loss for Dense Object Detection, footnote 2 (P6, P7). arXiv:1708.02002.

    >>> import torch
    >>> c3, c4, c5 = torch.ones(1, 8, 10, 7), torch.ones(1, 16, 5, 4), torch.ones(1, 32, 3, 2)
    >>> [tuple(p.shape[1:]) for p in FPN((8, 16, 32), out_channels=4)([c3, c4, c5])]
    [(4, 10, 7), (4, 5, 4), (4, 3, 2), (4, 2, 1), (4, 1, 1)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        p6_from: Literal["c5", "p5"] = "c5",
        p7_relu: bool = True,
        strided_padding: Literal["symmetric", "same"] = "symmetric",
    ) -> None:
        super().__init__()
        if len(in_channels) != 3:
            raise ValueError(
                f"in_channels must be three numbers, for C3, C4 and C5, got {tuple(in_channels)}."
            )
        check_choice("p6_from", p6_from, ("c5", "p5"))
        check_choice("strided_padding", strided_padding, ("symmetric", "same"))
        self.p6_from = p6_from
        self.p7_relu = p7_relu
        self.strided_padding = strided_padding
        self.out_channels = out_channels
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        p6_channels = in_channels[-1] if p6_from == "c5" else out_channels
        strided = nn.Conv2d if strided_padding == "symmetric" else SameConv2d
        self.p6 = strided(p6_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = strided(out_channels, out_channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return P3 to P7.

        Args:
            features: C3, C4 and C5, each ``[B, C, H, W]``, with strides s, 2s and 4s.

        Returns:
            Five maps ``[B, out_channels, H, W]``, with strides s, 2s, 4s, 8s and 16s.

        Raises:
            ValueError: If there are not three features.
        """
        if len(features) != 3:
            raise ValueError(
                f"features must be three maps, C3, C4 and C5, got {len(features)} maps."
            )
        c3, c4, c5 = features
        m5 = self.lateral[2](c5)
        m4 = self.lateral[1](c4) + F.interpolate(m5, size=c4.shape[-2:], mode="nearest")
        m3 = self.lateral[0](c3) + F.interpolate(m4, size=c3.shape[-2:], mode="nearest")
        p3, p4, p5 = self.output[0](m3), self.output[1](m4), self.output[2](m5)
        p6 = self.p6(self._widened(c5 if self.p6_from == "c5" else p5))
        p7 = self.p7(self._widened(F.relu(p6) if self.p7_relu else p6))
        return [p3, p4, p5, p6, p7]

    def _widened(self, x: Tensor) -> Tensor:
        return widened(x) if self.training and self.strided_padding == "symmetric" else x
