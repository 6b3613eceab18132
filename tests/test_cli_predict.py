"""The command predict on many photos: formats of results, ranks, and runs that are continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from focaldet import RetinaNet
from focaldet.cli import main
from tests.helpers.local_server import LocalServer, QuietHandler, serving

if TYPE_CHECKING:
    from focaldet import RetinaNetConfig


@pytest.fixture
def photos(tmp_path: Path, tiny_config: RetinaNetConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of seven photos, next to a saved model."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(7):
        pixels = torch.randint(256, (40, 50 + index, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    RetinaNet.from_config(tiny_config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    return folder


def predict(*arguments: str) -> list[str]:
    options = ["--device", "cpu", "--score-threshold", "0.01", "--no-pictures", "--quiet"]
    return ["predict", "model", "photos", *options, *arguments]


def lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.usefixtures("photos")
def test_the_formats_of_results_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(predict("--output", "json", "--part-size", "3")) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1  # --quiet
    assert main(predict("--output", "jsonl", "--results", "jsonl")) == 0
    assert "Wrote detections.jsonl to jsonl." in capsys.readouterr().out
    assert main(predict("--output", "coco", "--results", "coco")) == 0
    assert "Wrote results.json, images.json to coco." in capsys.readouterr().out
    found = json.loads(Path("json/detections.json").read_text())
    assert [one["source"] for one in found] == [f"photos/{index}.png" for index in range(7)]
    assert sum(len(one["scores"]) for one in found) > 7
    assert lines("jsonl/detections.jsonl") == found
    entries = json.loads(Path("coco/results.json").read_text())
    assert [entry["score"] for entry in entries] == [s for one in found for s in one["scores"]]
    images = json.loads(Path("coco/images.json").read_text())
    assert [image["file_name"] for image in images["images"]] == [one["source"] for one in found]
    assert [category["name"] for category in images["categories"]] == ["cat", "dog", "owl"]


@pytest.mark.usefixtures("photos")
def test_windows_classes_and_limits_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tile", "40", "48", "--overlap", "0.1", "--class", "owl", "--max-detections", "4")
    assert main(predict("--output", "out", "--augment", *options)) == 0
    found = json.loads(Path("out/detections.json").read_text())
    expected = RetinaNet.from_pretrained("model").predict(
        "photos",
        score_threshold=0.01,
        tile=(40, 48),
        overlap=0.1,
        augment=True,
        classes=["owl"],
        max_detections=4,
    )
    assert [one["scores"] for one in found] == [one.to_dict()["scores"] for one in expected]
    assert {len(one["scores"]) for one in found} == {4}
    assert {label for one in found for label in one["labels"]} == {2}
    assert main(predict("--output", "out2", "--class", "fox")) == 2
    assert "classes contains 'fox', which is not in class_names" in capsys.readouterr().err


class PhotoHandler(QuietHandler):
    """Answers every request with the first photo."""

    def answer(self) -> None:
        content = Path("photos/0.png").read_bytes()
        self.begin(200, len(content))
        self.wfile.write(content)


@pytest.mark.usefixtures("photos")
def test_urls_are_downloaded_if_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--score-threshold", "0.01"]
    command = ["predict", *options, "model", "photos/0.png"]
    with serving(LocalServer(PhotoHandler), monkeypatch) as server:
        url = f"{server.root}//a/0.jpg?size=2"
        assert main([*command, url]) == 2
        assert f"{url!r} is a URL. Add --allow-urls to download it" in capsys.readouterr().err
        assert main([*command, url, "--allow-urls", "--format", "coco"]) == 2
        assert "--format writes annotations of files, but 'http://" in capsys.readouterr().err
        assert not Path("predictions").exists()
        assert main([*command, url, f"{server.root}/", "--allow-urls"]) == 0
    found = json.loads(Path("predictions/detections.json").read_text())
    assert [one["source"] for one in found] == ["photos/0.png", url, f"{server.root}/"]
    assert found[0]["scores"]
    assert found[0]["scores"] == found[1]["scores"] == found[2]["scores"]
    pictures = [
        Path("predictions", name).read_bytes() for name in ("0_0.png", "0_1.png", "photo.png")
    ]
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("--class", "owl"), "classes"),
        (("--tile", "32", "32"), "tile"),
        (("--suppression", "linear"), "its suppression is 'hard' instead of 'linear'"),
    ],
)
def test_a_run_is_not_continued_with_other_options(
    photos: Path, change: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "5.png").write_text("no photo")
    assert main(predict("--part-size", "2", "--output", "out")) == 2
    capsys.readouterr()
    assert main(predict("--part-size", "2", "--output", "out", "--resume", *change)) == 2
    assert name in capsys.readouterr().err


def test_a_run_that_failed_continues(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = RetinaNet.from_pretrained("model")
    expected = [one.to_dict() for one in model.predict("photos", score_threshold=0.01)]
    whole = (photos / "5.png").read_bytes()
    (photos / "5.png").write_text("no photo")
    options = ("--part-size", "2", "--results", "jsonl", "--output", "out")
    assert main(predict(*options)) == 2
    error = capsys.readouterr().err
    assert "warning: 2 of 4 parts are done and kept in 'out/parts'. Continue with" in error
    assert not Path("out/detections.jsonl").exists()
    (photos / "5.png").write_bytes(whole)
    weights = Path("model/model.safetensors").read_bytes()
    torch.nn.init.zeros_(model.head.class_logits.weight)
    model.save_pretrained("model")
    assert main([*predict(*options, "--resume"), "--score-threshold", "0.02"]) == 2
    error = capsys.readouterr().err
    assert "its model weights is " in error
    assert "its score_threshold is 0.01 instead of 0.02" in error
    Path("model/model.safetensors").write_bytes(weights)
    assert main(predict(*options, "--resume")) == 0
    assert "2 of 4 parts were done before" in capsys.readouterr().err
    assert lines("out/detections.jsonl") == expected
    assert [path.name for path in Path("out").iterdir()] == ["detections.jsonl"]


@pytest.mark.parametrize(
    ("rank", "world_size"), [("2", "2"), ("0", None), ("one", "2"), ("-1", "1")]
)
@pytest.mark.usefixtures("photos")
def test_ranks_that_cannot_be_are_an_error(
    rank: str,
    world_size: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert main(predict()) == 2
    expected = f"0 <= RANK < WORLD_SIZE, got {rank!r} and {world_size!r}. Start the processes with"
    assert expected in capsys.readouterr().err


def start(rank: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command as one of two processes."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "focaldet", *predict(*arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_two_processes_write_what_one_process_writes() -> None:
    assert main(predict("--results", "jsonl", "--output", "one")) == 0
    ranks = [start(rank, "--results", "jsonl", "--output", "two") for rank in range(2)]
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "in 7 photos" in printed[0][0]
    assert printed[1][0] == ""
    expected = Path("one/detections.jsonl").read_bytes()
    assert Path("two/detections.jsonl").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_two_processes_continue_after_sigkill(photos: Path) -> None:
    for index in range(7, 200):
        (photos / f"{index:03d}.png").write_bytes((photos / f"{index % 7}.png").read_bytes())
    assert main(predict("--results", "jsonl", "--output", "one")) == 0
    options = ("--results", "jsonl", "--output", "two", "--part-size", "2")
    ranks = [start(rank, *options) for rank in range(2)]
    parts = Path("two/parts")
    while len(list(parts.glob("part-*.jsonl"))) < 8:
        assert all(rank.poll() is None for rank in ranks)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate(timeout=60)
    assert all(rank.returncode == -signal.SIGKILL for rank in ranks)
    assert not Path("two/detections.jsonl").exists()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.jsonl")}
    assert 8 <= len(done) < 100
    ranks = [start(rank, *options, "--resume") for rank in range(2)]
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert all("parts were done before" in errors for _, errors in printed)
    expected = Path("one/detections.jsonl").read_bytes()
    assert Path("two/detections.jsonl").read_bytes() == expected
    assert len(expected.splitlines()) == 200
    assert [path.name for path in parts.iterdir()] == ["manifest.json"]
