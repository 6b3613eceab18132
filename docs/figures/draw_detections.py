"""Draw the picture of the landing page and of README: detections in photos, side by side.

    python docs/figures/draw_detections.py MODEL PHOTO...

The photos are those of BCCD (https://github.com/Shenggan/BCCD_Dataset, MIT licence).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from focaldet import RetinaNet

WIDTH, GAP = 480, 6


def main() -> None:
    """Write detections_bccd.jpg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("photos", nargs="+")
    options = parser.parse_args()
    found = RetinaNet.from_pretrained(options.model).predict(options.photos, score_threshold=0.5)
    drawn = [one.draw() for one in found]
    drawn = [one.resize((WIDTH, round(WIDTH * one.height / one.width))) for one in drawn]
    height = max(one.height for one in drawn)
    row = Image.new("RGB", (len(drawn) * (WIDTH + GAP) - GAP, height), (128, 128, 128))
    for index, one in enumerate(drawn):
        row.paste(one, (index * (WIDTH + GAP), 0))
    row.save(Path(__file__).parent / "detections_bccd.jpg", quality=82)


if __name__ == "__main__":
    main()
