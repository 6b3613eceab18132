"""Detect objects in a video file or the pictures of a webcam, and draw them into a new video.

    python examples/predict_video.py runs/r50 street.mp4 --output found.mp4
    python examples/predict_video.py runs/r50 0                # the first webcam, until Ctrl-C

Prints the frame rate, and writes a video (without sound) if --output is given. Needs PyAV: install
focaldet[video]. A webcam is read with OpenCV if it is installed, and otherwise with PyAV on Linux.
"""

from __future__ import annotations

import os

# Waiting threads sleep instead of spinning; this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import itertools
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from focaldet import RetinaNet

if TYPE_CHECKING:
    from collections.abc import Iterator

    import PIL.Image

TIME_BASE = Fraction(1, 90_000)  # seconds per unit of a time stamp in the written video


class Frame(NamedTuple):
    """An upright ``[H, W, 3]`` RGB picture and its time in seconds."""

    pixels: np.ndarray
    seconds: float


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "model",
        help="folder of a training run or a saved model, a checkpoint file, or a published name",
    )
    add("source", help="video file, or the number of a webcam, counted from 0")
    add("--output", type=Path, metavar="FILE", help="video to write (default: none)")
    add("--frames", type=int, metavar="N", help="stop after this many frames (default: at the end)")
    add("--score-threshold", type=float, default=0.5, metavar="SCORE",
        help="draw detections that score above this, between 0 and 1 (default: 0.5)")  # fmt: skip
    add("--batch-size", type=int, default=1, metavar="N",
        help="frames per forward pass (default: 1)")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"PyTorch device of the model (default: {device})")
    return parser.parse_args()


def read_video(file: str, format: str | None = None) -> Iterator[Frame]:  # noqa: A002
    """Decode the frames of a video file or, with a format such as "v4l2", of a device."""
    import av

    with av.open(file, format=format) as container:
        if not container.streams.video:
            raise ValueError(f"{file!r} contains no video.")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(container.decode(stream)):
            pixels = frame.to_ndarray(format="rgb24")
            # Phones store how the frame must be turned; the angle is counterclockwise.
            pixels = np.rot90(pixels, frame.rotation // 90)
            yield Frame(pixels, number / rate if frame.time is None else frame.time)


def read_webcam(number: int) -> Iterator[Frame]:
    """Yield the pictures of a webcam as they are taken."""
    try:
        import cv2
    except ImportError:
        yield from read_video(f"/dev/video{number}", "v4l2")
        return
    camera = cv2.VideoCapture(number)
    begin = time.monotonic()
    try:
        while True:
            taken, picture = camera.read()
            if not taken:
                raise OSError(f"The webcam {number} gives no picture. Check that it is connected.")
            yield Frame(picture[..., ::-1], time.monotonic() - begin)  # OpenCV gives BGR
    finally:
        camera.release()


class VideoWriter:
    """Writes pictures to a video file, which begins with the first one."""

    def __init__(self, path: Path) -> None:
        import av

        self.container = av.open(str(path), "w")
        self.stream: Any = None
        self.last = -1

    def write(self, picture: PIL.Image.Image, seconds: float) -> None:
        """Add a picture that is shown from a time on."""
        import av

        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=30)
            self.stream.width, self.stream.height = (side // 2 * 2 for side in picture.size)
            self.stream.pix_fmt = "yuv420p"  # which most players read, but only for even sides
            self.stream.codec_context.time_base = TIME_BASE
        frame = av.VideoFrame.from_image(picture).reformat(self.stream.width, self.stream.height)
        self.last = max(self.last + 1, round(seconds / TIME_BASE))  # times must increase
        frame.pts, frame.time_base = self.last, TIME_BASE
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Finish the file."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()


def run(options: argparse.Namespace) -> None:
    """Detect, draw, write, and print the frame rate every two seconds."""
    model = RetinaNet.from_pretrained(options.model).to(options.device).optimize_for_inference()
    is_live = options.source.isdecimal()
    frames = read_webcam(int(options.source)) if is_live else read_video(options.source)
    # Frames are read ahead of their results, and tee keeps those whose result has yet to come.
    frames, shown = itertools.tee(itertools.islice(frames, options.frames))
    results = model.predict_iter(
        (frame.pixels for frame in frames),
        batch_size=options.batch_size,
        score_threshold=options.score_threshold,
        read_ahead=0 if is_live else None,  # a live picture is not delayed by those after it
    )
    count = objects = 0
    begin = printed = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(results))
        writer = None
        if options.output is not None:
            writer = stack.enter_context(contextlib.closing(VideoWriter(options.output)))
        with contextlib.suppress(KeyboardInterrupt):
            for found, frame in zip(results, shown, strict=True):
                if writer is not None:
                    writer.write(found.draw(frame.pixels), frame.seconds)
                count, objects = count + 1, objects + len(found)
                now = time.monotonic()
                if now - printed >= 2:
                    printed = now
                    print(f"{count} frames, {count / (now - begin):.1f} per second")
    rate = count / max(time.monotonic() - begin, 1e-9)
    print(f"Found {objects} objects in {count} frames, {rate:.1f} frames per second.")


def main() -> None:
    """Run, and report mistakes in one line."""
    options = parse()
    try:
        run(options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    if options.output is not None:
        print(f"Wrote {options.output}.")


if __name__ == "__main__":
    main()
