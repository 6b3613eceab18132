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


def test_the_citation_is_of_this_version() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == focaldet.__version__


def test_continuous_integration_covers_every_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"3\.(\d+)"', workflow.split("steps:")[0]) == minors
    assert project["requires-python"] == f">=3.{minors[0]}"


def test_read_the_docs_builds_with_a_configuration_and_extras_that_exist() -> None:
    text = (ROOT / ".readthedocs.yaml").read_text()
    configuration = re.search(r"^  configuration: (\S+)$", text, re.MULTILINE)
    extras = re.search(r"^      extra_requirements: \[(.*)\]$", text, re.MULTILINE)
    assert configuration is not None
    assert (ROOT / configuration[1]).is_file()
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(", ")) <= set(project["optional-dependencies"])
