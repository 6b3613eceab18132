"""Which files of a folder are data, how text is decoded, and how names are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from focaldet._checks import printable
from focaldet._files import decode_text, is_hidden, list_files
from tests.helpers.annotation_files import write_text

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN = ("._a.png", ".DS_Store", ".ipynb_checkpoints", "Thumbs.db", "__MACOSX", "desktop.ini")


@pytest.mark.parametrize("name", HIDDEN)
def test_files_that_tools_leave_behind_are_hidden(tmp_path: Path, name: str) -> None:
    assert is_hidden(name)
    write_text(tmp_path / "a.png", "")
    write_text(tmp_path / name / "b.png", "")
    write_text(tmp_path / "inside" / "__MACOSX" / "._a.png", "")
    assert list_files(tmp_path, (".png",), recursive=True) == [tmp_path / "a.png"]


def test_a_folder_inside_a_hidden_one_can_be_listed(tmp_path: Path) -> None:
    file = write_text(tmp_path / ".cache" / "images" / "A.PNG", "")
    assert list_files(file.parent, (".png",)) == [file]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_text(tmp_path / "elsewhere" / "b.png", "")
    write_text(tmp_path / "images" / "a.png", "")
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images", target_is_directory=True)
    found = list_files(tmp_path / "images", recursive=True)
    assert [path.name for path in found] == ["a.png", "b.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_decoded_as_its_byte_order_mark_says(encoding: str) -> None:
    assert decode_text("é\n".encode(encoding)) == "é\n"


def test_bytes_that_are_not_text_are_located() -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(ValueError, match="line 3 contains the byte 0xe9"):
            decode_text(mark + b"a\nb\nc\xe9\n")
    with pytest.raises(ValueError, match="not valid UTF-16"):
        decode_text(b"\xff\xfea")


def test_control_characters_and_broken_text_are_escaped() -> None:
    text = "a\x1b[2J\x9b\r\n\u202e\ud800é日本"
    assert printable(text) == r"a\x1b[2J\x9b\r\n\u202e\ud800é日本"
