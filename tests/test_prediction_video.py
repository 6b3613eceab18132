"""examples/predict_video.py, with a video of a few frames and a webcam that is simulated."""

from __future__ import annotations

import os
import runpy
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from focaldet import RetinaNet

av: Any = pytest.importorskip("av")

SCRIPT = Path(__file__).parents[1] / "examples" / "predict_video.py"
TIMES = [0, 40, 80, 200, 240]  # milliseconds; a frame is shown longer than the others


@pytest.fixture
def call(
    tmp_path: Path,
    tiny_model: RetinaNet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Return a function that runs the script with a model and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    tiny_model.save_pretrained(tmp_path / "model")

    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "model", *map(str, args)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def write_video(path: Path) -> Path:
    """Write five frames, the first red and the others noise."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, milliseconds in enumerate(TIMES):
            pixels = np.random.default_rng(number).integers(0, 255, (64, 80, 3), dtype=np.uint8)
            if number == 0:
                pixels[:] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> list[tuple[Any, float]]:
    with av.open(str(path)) as container:
        return [
            (frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)
        ]


def test_every_frame_is_drawn_at_its_time(tmp_path: Path, call: Callable[..., str]) -> None:
    source = write_video(tmp_path / "in.mp4")
    printed = call(source, "--output", "out.mp4", "--batch-size", 2, "--score-threshold", 1)
    assert "Found 0 objects in 5 frames" in printed
    written = read_video(tmp_path / "out.mp4")
    assert [round(1000 * seconds) for _, seconds in written] == TIMES
    red = written[0][0].mean(axis=(0, 1))
    assert red[0] > 200
    assert red[1:].max() < 60
    drawn = call(source, "--output", "drawn.mp4", "--score-threshold", 0, "--frames", 1)
    assert "in 1 frames" in drawn
    [(pixels, _)] = read_video(tmp_path / "drawn.mp4")
    assert abs(pixels.astype(int) - written[0][0]).mean() > 5  # there are boxes


def test_a_webcam_is_read_picture_by_picture(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Camera:
        def __init__(self, number: int) -> None:
            events.append(number)

        def read(self) -> tuple[bool, Any]:
            events.append("read")
            return True, np.full((64, 80, 3), 7, dtype=np.uint8)

        def release(self) -> None:
            events.append("released")

    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(VideoCapture=Camera))
    assert "in 3 frames" in call(2, "--frames", 3)
    assert events == [2, "read", "read", "read", "released"]
    monkeypatch.setattr(Camera, "read", lambda _: (False, None))
    with pytest.raises(SystemExit, match="error: The webcam 2 gives no picture"):
        call(2)


def test_without_opencv_a_webcam_is_read_with_pyav(
    tmp_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = write_video(tmp_path / "in.mp4")
    opened: list[Any] = []
    open_file = av.open

    def open_device(file: str, **options: Any) -> Any:
        opened.append((file, options))
        if file == "/dev/video7":
            return open_file(str(recorded), "r")
        raise av.error.FileNotFoundError(2, "No such file or directory", file)

    monkeypatch.setitem(sys.modules, "cv2", None)  # importing it raises ImportError
    monkeypatch.setattr(av, "open", open_device)
    assert "in 2 frames" in call(7, "--frames", 2)
    assert opened == [("/dev/video7", {"format": "v4l2"})]
    with pytest.raises(SystemExit, match=r"error: .*/dev/video8"):
        call(8)


def test_a_wrong_file_is_reported_in_one_line(tmp_path: Path, call: Callable[..., str]) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(SystemExit, match=r"error: .*text\.mp4"):
        call("text.mp4")
    with pytest.raises(SystemExit, match=r"error: .*gone\.mp4"):
        call("gone.mp4")
