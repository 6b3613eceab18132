"""Speed, memory and waits on a GPU, compared with torchvision, in one run of about ten minutes.

Each section prints a table. A section that takes too long leaves out its last rows, and a row that does
not fit the memory says so. The exit status is 1 if a row failed. Times are medians; functions that are
compared in a row take turns, and the ratio is relative to the first one. Three sections need no GPU:
loss-memory, loss-instructions and, with ``--device cpu``, synchronisations.

    python -m tests.benchmarks.gpu                                # everything, on a GPU
    python -m tests.benchmarks.gpu --device cpu --small           # a check that it runs
    python -m tests.benchmarks.gpu --only loss-instructions
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
import torchvision

from tests.benchmarks import gpu_detector, gpu_losses
from tests.benchmarks.gpu_timing import Section, Setting, run_section

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTIONS = {
    "losses": Section(
        "Focal loss and gradient of the maps of 2 images, 80 classes", 60, gpu_losses.losses
    ),
    "loss-memory": Section(
        "Memory of the focal loss beyond the maps of 2 images, MiB (fake tensors)",
        20,
        gpu_losses.loss_memory,
    ),
    "loss-instructions": Section(
        "Instructions per logit on sm_90, 80 classes, gamma 2", 30, gpu_losses.loss_instructions
    ),
    "synchronisations": Section(
        "How often the host waits for the GPU", 30, gpu_detector.synchronisations
    ),
    "memory": Section("Peak memory with one side on the device", 40, gpu_detector.memory),
    "photos": Section(
        "From JPEG files of 480x640 pixels to detections, batch size given", 80, gpu_detector.photos
    ),
    "detection": Section(
        "Detection from images on the device to boxes", 120, gpu_detector.detection
    ),
    "training": Section("Training step", 80, gpu_detector.training),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="where to measure (default: cuda)")
    parser.add_argument("--small", action="store_true", help="only check that everything runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections (default: all)")
    arguments = parser.parse_args(argv)
    setting = Setting(torch.device(arguments.device), arguments.small)
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    good = True
    for section in arguments.only or SECTIONS:
        print()
        good &= run_section(SECTIONS[section], setting)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
