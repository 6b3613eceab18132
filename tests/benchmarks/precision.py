"""The effect of ``optimize_for_inference`` on the average precision of a trained model.

Evaluates a saved model unchanged, and optimised in float32 and bfloat16, on annotations in COCO format.

    python -m tests.benchmarks.precision MODEL ANNOTATIONS IMAGES [--threads 2]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from focaldet import RetinaNet
from focaldet.evaluation import evaluate_coco


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = RetinaNet.from_pretrained(options.model)
    photos = json.loads(options.annotations.read_text(encoding="utf-8"))["images"]
    paths = [options.images / Path(photo["file_name"]).name for photo in photos]
    print(f"torch {torch.__version__}, {len(photos)} photos")
    for name, variant in (
        ("unchanged", model),
        ("optimised, float32", model.optimize_for_inference()),
        ("optimised, bfloat16", model.optimize_for_inference(torch.bfloat16)),
    ):
        found = variant.predict(paths)
        by_id = {photo["id"]: f for photo, f in zip(photos, found, strict=True)}
        print(f"{name:20s} {evaluate_coco(options.annotations, by_id)}", flush=True)


if __name__ == "__main__":
    main()
