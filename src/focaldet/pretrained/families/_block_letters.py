"""Blocks of a ResNet that are named by letters: a, b, c, or a, b1, b2 and so on.

Caffe's ResNets named them so, and keras-resnet and PaddleDetection do. Long stages have numbers, because
they have more blocks than there are letters.
"""

from __future__ import annotations

import re

__all__ = ["BLOCK", "block_index"]

BLOCK = "[a-z][0-9]*"
"""Pattern of a block's name."""

_NAME = re.compile(r"(?:(?P<letter>[a-z])|b(?P<number>[1-9][0-9]{0,2}))")


def block_index(name: str) -> int | None:
    """Return the index of a block in its stage, or None if it is not the name of a block.

    >>> block_index("a"), block_index("c"), block_index("b12"), block_index("c1")
    (0, 2, 12, None)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return ord(found["letter"]) - ord("a") if found["letter"] else int(found["number"])
