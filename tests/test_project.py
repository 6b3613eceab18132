"""The project's own files: versions, changelog, metadata."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import focaldet

ROOT = Path(__file__).parents[1]


def test_the_newest_changelog_entry_is_the_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == focaldet.__version__


def test_runtime_dependencies_are_exactly_the_six() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[><=\[ ]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {
        *("numpy", "pillow", "pycocotools"),
        *("torch", "torchvision", "typing-extensions"),
    }


def test_every_extra_brings_safetensors_and_tqdm() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, requirements in extras.items():
        text = " ".join(requirements)
        assert "focaldet[" in text or ("safetensors" in text and "tqdm" in text), name


def test_files_stay_readable_in_length() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
