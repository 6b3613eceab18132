"""The Python code in README and the documentation runs, page by page, as a user would run it.

Code that users copy, here and in the examples, imports public names only.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageDraw

from focaldet import RetinaNet
from focaldet.pretrained import list as list_published

if TYPE_CHECKING:
    from focaldet import RetinaNetConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if "_build" not in page.parts and "```python" in page.read_text(encoding="utf-8")
]
PUBLISHED = "torchvision/retinanet_resnet50_fpn_v2_coco"  # the model of README and the landing page
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


class Block(NamedTuple):
    line: int  # line number of its first line of code, counted from 1
    code: str


def name_of(page: Path) -> str:
    """Return the name of a page relative to docs/, such as ``ko/README.md``."""
    return page.relative_to(DOCS if DOCS in page.parents else ROOT).as_posix()


def blocks_of(text: str, *, marked: bool = False) -> list[Block]:
    """Find the blocks fenced as ```python; those marked as not run are included only on request."""
    found = []
    lines = text.splitlines()
    start = None
    for index, line in enumerate(lines):
        if start is None and line.strip() == "```python":
            start = index + 1
        elif start is not None and line.strip() == "```":
            if marked or start < 2 or not NOT_RUN.fullmatch(lines[start - 2].strip()):
                indent = len(lines[start - 1]) - len(lines[start - 1].lstrip())
                code = "\n".join(one[indent:] for one in lines[start:index])
                found.append(Block(start + 1, code))
            start = None
    assert start is None, f"line {start}: the block is not closed"
    return found


def run_page(name: str, text: str) -> None:
    """Run the blocks of a page in one namespace; a failure names the page and the line."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(text):
        padding = "\n" * (block.line - 1)  # so that Python reports the line numbers of the page
        try:
            exec(compile(padding + block.code, name, "exec"), namespace)  # noqa: S102
        except Exception as error:
            raise AssertionError(
                f"{name}:{_line_in(name, error) or block.line}: {type(error).__name__}: {error}"
            ) from error


def _line_in(name: str, error: BaseException) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def draw_photo(path: Path, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (90, 120, 150))
    ImageDraw.Draw(picture).ellipse((20, 15, 60, 70), fill=(200, 60, 40))
    picture.save(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: RetinaNetConfig) -> Path:
    """Change to a folder with what the pages use: a photo, a folder of photos and a saved model."""
    draw_photo(tmp_path / "photo.jpg", (120, 90))
    (tmp_path / "photos").mkdir()
    for index in range(3):
        draw_photo(tmp_path / "photos" / f"{index}.jpg", (80 + 10 * index, 90))
    torch.manual_seed(0)
    RetinaNet.from_config(tiny_config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # Nothing is downloaded: the saved model stands in for the published one.
    load = RetinaNet.from_pretrained
    assert PUBLISHED in {one.name for one in list_published()}
    monkeypatch.setattr(
        RetinaNet,
        "from_pretrained",
        lambda source, **options: load("model" if source == PUBLISHED else source, **options),
    )
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("desk")
def test_the_code_blocks_of_a_page_run(page: Path) -> None:
    run_page(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))


def test_a_failing_block_is_reported_with_page_and_line() -> None:
    text = "# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\n\nx += 1\n1 / (x - 2)\n```\n"
    with pytest.raises(AssertionError, match=r"^a\.md:12: ZeroDivisionError: division by zero$"):
        run_page("a.md", text)
    with pytest.raises(AssertionError, match=r"^a\.md:2: SyntaxError"):
        run_page("a.md", "```python\nx = = 1\n```\n")


def test_blocks_marked_as_not_run_and_other_languages_are_skipped() -> None:
    text = (
        "<!-- not run: no network -->\n```python\nfail\n```\n```bash\nfail\n```\n"
        "- in a list:\n\n  ```python\n  if True:\n      y = 2\n  ```\n"
    )
    assert blocks_of(text) == [Block(11, "if True:\n    y = 2")]
    with pytest.raises(AssertionError, match="the block is not closed"):
        blocks_of("```python\nx = 1\n")


def private_imports(code: str) -> list[str]:
    """Return what a piece of code imports from focaldet although it is not public.

    Public are modules without an underscore, and the names in their ``__all__``.
    """
    imported: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [(node.module or "", alias.name) for alias in node.names]
    private = []
    for module, name in imported:
        if module.partition(".")[0] != "focaldet":
            continue
        path = module if name is None else f"{module}.{name}"
        if any(part.startswith("_") for part in path.split(".")):
            private.append(path)
        elif name is not None:
            home = importlib.import_module(module)
            is_module = hasattr(home, "__path__") and importlib.util.find_spec(path) is not None
            if name not in home.__all__ and not is_module:
                private.append(path)
    return private


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_imports_public_names_only(path: Path) -> None:
    assert private_imports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_blocks_of_a_page_import_public_names_only(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8"), marked=True):
        is_session = block.code.startswith(">>>")
        code = doctest.script_from_examples(block.code) if is_session else block.code
        assert private_imports(code) == [], f"{name_of(page)}:{block.line}"


DEPRECATED = {"coco", "datasets.check_anchors", "datasets.check_report"}


def test_every_public_module_has_a_page_in_the_reference() -> None:
    package = ROOT / "src" / "focaldet"
    paths = [path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")]
    modules = {
        ".".join(parts).removesuffix(".__init__") for parts in paths if parts[-1] != "__main__"
    }
    public = {name for name in modules if not re.search(r"(^|\.)_", name)}
    pages = {page.stem for page in (DOCS / "api").glob("*.md")}
    assert pages - {"index"} == public - DEPRECATED - {"cli"}
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    for name in DEPRECATED | {"cli"}:
        assert f"`focaldet.{name}`" in index
    for name in pages - {"index"}:
        page = (DOCS / "api" / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# focaldet.{name}\n\n")
        assert "{doc}`/" in page.split("```{eval-rst}")[0], f"{name}: no link to a guide"
        assert f".. automodule:: focaldet.{name}\n" in page
        assert f"\n{name}\n" in index


def test_private_imports_are_found() -> None:
    code = """
import json
import focaldet.pretrained
import focaldet._checks
from focaldet import FocalLoss, pretrained
from focaldet.pretrained import read_tensors, push
from focaldet.pretrained._reading import read_checkpoint
"""
    assert private_imports(code) == [
        "focaldet._checks",
        "focaldet.pretrained.push",
        "focaldet.pretrained._reading.read_checkpoint",
    ]
