"""The checks that the parity tests of all families share, given a family's reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close

from focaldet import RetinaNet
from focaldet.pretrained import load_checkpoint
from focaldet.retinanet import RetinaNetOutput
from tests.helpers.reference_models import assert_same, share_found, smooth_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from tests.helpers.reference_models import Prepared, Reference


def load_like(path: Path, reference: Reference) -> RetinaNet:
    """Load a file in float64, with the image size of the reference."""
    config = load_checkpoint(path).config
    config = config.replace(min_size=reference.min_size, max_size=reference.max_size)
    return RetinaNet.from_pretrained(path, config=config).double()


def check_image(
    model: RetinaNet, reference: Reference, image: np.ndarray[Any, Any], *, other_pixels: float
) -> int:
    """Compare a model with a reference, step by step and as a whole.

    Args:
        model: The model, in float64.
        reference: The reference of its family.
        image: The image, ``[H, W, 3]`` uint8.
        other_pixels: The share of resized values that may differ, by one level of 256.

    Returns:
        The number of detections.
    """
    original = (image.shape[0], image.shape[1])
    prepared = reference.prepare(image)
    with torch.no_grad():
        theirs = reference.network(prepared.tensor)
        batch = model.preprocess([torch.from_numpy(image).permute(2, 0, 1).double() / 255])
        assert batch.sizes == [prepared.size]
        assert batch.tensor.shape == prepared.tensor.shape
        difference = (batch.tensor - prepared.normalised).abs()
        assert float(difference.max()) < 1.01 / 255 / min(model.config.image_std)
        assert float((difference > 1e-3).double().mean()) <= other_pixels
        logits, deltas = model.forward_maps(prepared.normalised)
    for ours, level in zip(logits, theirs.logits, strict=True):  # whatever the order of the anchors
        assert_close(ours[0].sort(dim=0).values, level.sort(dim=0).values, rtol=0, atol=1e-5)
    found = reference.detect(theirs, prepared, original)
    output = RetinaNetOutput(
        logits, deltas, anchors_of(model, logits, prepared), [prepared.size], [original], None
    )
    [same_input] = model.detections(output)
    assert_same(same_input, found, boxes=2e-3, scores=1e-5)
    [predicted] = model.predict(image)  # prepares images in float32
    if prepared.size == original or other_pixels == 0:
        assert share_found(predicted, found, boxes=0.05, scores=1e-3) >= 0.99
    else:
        assert share_found(predicted, found, boxes=2.0, scores=0.05) >= reference.min_share
    return len(found.scores)


def anchors_of(model: RetinaNet, logits: Sequence[Tensor], prepared: Prepared) -> list[Tensor]:
    grids = [(level.shape[2], level.shape[3]) for level in logits]
    size = (prepared.tensor.shape[2], prepared.tensor.shape[3])
    anchors: list[Tensor] = model.anchor_generator(grids, size, dtype=torch.float64)
    return anchors


def check_synthetic_images(model: RetinaNet, reference: Reference, *, other_pixels: float) -> None:
    """Check an image that keeps its size, one that is enlarged and one that is shrunk."""
    side = reference.min_size
    same = smooth_image(side, side + 37)
    assert_close(torch.tensor(reference.prepare(same).size), torch.tensor(same.shape[:2]))
    assert check_image(model, reference, same, other_pixels=0) >= 50
    enlarged, shrunk = (
        smooth_image(side * 3 // 4 - 3, side + 13),
        smooth_image(side * 2, side * 5 - 10),
    )
    for image in (enlarged, shrunk):
        assert check_image(model, reference, image, other_pixels=other_pixels) >= 50


def check_photos(
    model: RetinaNet, reference: Reference, photos: Sequence[Path], *, other_pixels: float
) -> None:
    """Check photos of any size."""
    for path in photos:
        image = np.array(Image.open(path).convert("RGB"))
        assert check_image(model, reference, image, other_pixels=other_pixels) > 0, path.name
