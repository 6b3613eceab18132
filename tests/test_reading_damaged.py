"""Reading archives, safetensors files and others that are damaged, inconsistent or no checkpoints."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained._reading import read_checkpoint, read_tensors
from tests.helpers.checkpoint_files import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_a_released_zip_of_one_file_is_read_without_unpacking(tmp_path: Path) -> None:
    for file_format in ("torch release", "torch old release"):
        contents = {"backbone": ["ResNet50FPN"], "state_dict": {"w": torch.ones(2)}}
        path = write_checkpoint(contents, tmp_path / "rn50fpn.pth", file_format)
        file = read_checkpoint(path)
        assert file.tensors["w"].tolist() == [1, 1]
        assert file.extras == {"backbone": ["ResNet50FPN"]}
        assert [entry.name for entry in tmp_path.iterdir()] == ["rn50fpn.zip"]


@pytest.mark.parametrize(
    "names",
    [
        ["../w.pth"],
        ["/w.pth"],
        ["a/../../w.pth"],
        ["..\\w.pth"],
        ["C:w.pth"],
        ["w.pth", "../notes.txt"],
        ["w.pth", "w.pth"],
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_with_unsafe_paths_are_errors_and_nothing_is_written(
    names: list[str], tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    for suffix in (".zip", ".pth", ".pt"):
        with zipfile.ZipFile(folder / f"x{suffix}", "w") as archive:
            for name in names:
                archive.writestr(zipfile.ZipInfo(name), buffer.getvalue())
        with pytest.raises(CheckpointError, match=r"Cannot read .*x\..*unsafe member"):
            read_tensors(folder / f"x{suffix}")
    with zipfile.ZipFile(folder / "torch.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("../../../evil", b"")
    with pytest.raises(CheckpointError, match="unsafe member '../../../evil'"):
        read_tensors(folder / "torch.pt")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["deep", "er", "x.zip", "x.pth", "x.pt", "torch.pt"]
    )


@pytest.mark.parametrize(("names", "count"), [([], 0), (["notes.txt"], 0), (["a.pth", "b.pth"], 2)])
def test_the_error_for_a_zip_without_exactly_one_weight_file_gives_their_number(
    names: list[str], count: int, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=rf"x\.zip.* archive with {count} .*\.pth"):
        read_tensors(tmp_path / "x.zip")


def test_the_error_for_a_truncated_torch_file_of_the_old_format_names_it(tmp_path: Path) -> None:
    path = write_checkpoint({"model": {"w": torch.ones(2, 3)}}, tmp_path / "x.pth", "torch old")
    data = path.read_bytes()
    for length in range(len(data) - 1):  # torch does not notice if only the last byte is missing
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.pth'"):
            read_tensors(path)


def test_the_error_for_a_damaged_member_of_a_zip_names_the_archive(tmp_path: Path) -> None:
    path = write_checkpoint({"w": torch.ones(1000)}, tmp_path / "x.pth", "torch old release")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"Cannot read .*x\.zip.*damaged.*CRC"):
        read_tensors(path)


def safetensors_file(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """Return the bytes of a safetensors file with any header, header length and data."""
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_with(**entry: Any) -> bytes:
    """Return the header of one tensor with some values replaced."""
    return json.dumps(
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file(b"{}", 2**63),
        safetensors_file(b"{}", 10**9),
        safetensors_file(b"not json"),
        safetensors_file(header_with()),  # no data
        safetensors_file(header_with(data_offsets=[0, 400]), data=b"1234"),
        safetensors_file(header_with(data_offsets=[-4, 0]), data=b"1234"),
        safetensors_file(header_with(data_offsets=[4, 0]), data=b"1234"),
        safetensors_file(header_with(shape=[2**40]), data=b"1234"),
        safetensors_file(header_with(shape=[2**62, 8]), data=b"1234"),
        safetensors_file(header_with(dtype="X9"), data=b"1234"),
        safetensors_file(header_with(dtype="F64"), data=b"1234"),
        safetensors_file(b'{"w": 3}', data=b"1234"),
    ],
)
def test_the_error_for_an_inconsistent_safetensors_file_names_it(
    content: bytes, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"Cannot read .*x\.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html>Log in</html>", "it is a web page"),
        (b"\n <html>Not found</html>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "it is a Git LFS pointer.* git lfs pull",
        ),
        (b"", "it is empty"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.pkl", "x.safetensors", "x.zip", "x"])
def test_the_error_for_other_kinds_of_files_says_what_they_are(
    content: bytes, reason: str, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"Cannot read '.*{name}': {reason}"):
        RetinaNet.from_pretrained(path)


def test_the_error_for_a_folder_or_a_broken_link_names_it(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No config\.json in '.*folder\.pth'"):
        RetinaNet.from_pretrained(tmp_path / "folder.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(FileNotFoundError, match=r"No such file or folder: '.*loop\.pth'"):
        RetinaNet.from_pretrained(tmp_path / "loop.pth")
    (tmp_path / "gone.pth").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match=r"No such file, folder.*: '.*gone\.pth'"):
        RetinaNet.from_pretrained(str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"\xff\xfe{", "0xff"),
        (b'{"format_version": 1, "num_classes": 2', "JSON"),
        (b'{"format_version": 1, "num_classes": "2"}', "num_classes.* an integer.* '2'"),
        (b'{"format_version": 2, "num_classes": 2}', r"\b2\b.*Upgrade focaldet"),
        (b'{"format_version": 1, "num_classes": 2, "colour": 3}', "'colour'"),
        (b"[]", r"JSON object.*\[\]"),
    ],
)
def test_the_error_for_an_invalid_config_names_its_file(
    config: bytes, message: str, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pth")
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match=rf"Cannot read .*config\.json'.*{message}"):
        RetinaNet.from_pretrained(tmp_path)
