"""Detect objects in photos: print them, draw them, and write them to a JSON file.

    python examples/predict.py runs/r50 photo.jpg holidays/ --output found

Writes a picture per photo and detections.json to the --output folder. `focaldet predict` does the
same and more.
"""

from __future__ import annotations

import os

# Waiting threads sleep instead of spinning; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from pathlib import Path

import torch

from focaldet import Detections, RetinaNet
from focaldet.images import list_images


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model",
        help="folder of a training run, whose best model is used, or of a saved model; a checkpoint file; "
        "a published name; or a Hugging Face Hub repository")  # fmt: skip
    add("sources", type=Path, nargs="+", help="images, or folders of images")
    add("--score-threshold", type=float, default=0.5, metavar="SCORE",
        help="keep detections that score above this, between 0 and 1 (default: 0.5)")  # fmt: skip
    add("--batch-size", type=int, default=1, metavar="N",
        help="images per forward pass (default: 1)")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"PyTorch device of the model (default: {device})")
    add("--output", type=Path, default=Path("predictions"), metavar="FOLDER",
        help="folder to write to (default: predictions)")  # fmt: skip
    return parser.parse_args()


def show(found: Detections) -> None:
    """Print the objects in an image."""
    print(f"{found.source}: {len(found)} object{'' if len(found) == 1 else 's'}")
    for name, score, box in zip(
        found.label_names, found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        corners = "  ".join(f"{value:7.1f}" for value in box)
        print(f"  {score:.2f}  {corners}  {name}")


def main() -> None:
    """Detect, print, draw and write."""
    options = parse()
    try:
        paths = list_images(options.sources)
        model = RetinaNet.from_pretrained(options.model).to(options.device)
        results = model.predict(
            paths, batch_size=options.batch_size, score_threshold=options.score_threshold
        )
        options.output.mkdir(parents=True, exist_ok=True)
        for number, (path, found) in enumerate(zip(paths, results, strict=True)):
            show(found)
            twice = [p.stem for p in paths].count(path.stem) > 1  # as cat.jpg in two folders
            name = f"{path.stem}_{number}.png" if twice else f"{path.stem}.png"
            found.draw().save(options.output / name)
        text = json.dumps([found.to_dict() for found in results], indent=1)
        (options.output / "detections.json").write_text(text)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote the pictures and detections.json to {options.output}.")


if __name__ == "__main__":
    main()
