"""Archives, safetensors files and others that are damaged, that lie, or that are no checkpoints."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.pretrained._reading import read_checkpoint, read_tensors
from tests.test_reading import written

if TYPE_CHECKING:
    from pathlib import Path


def test_a_released_zip_of_one_file_is_read_without_unpacking(tmp_path: Path) -> None:
    for route in ("torch release", "torch old release"):
        content = {"backbone": ["ResNet50FPN"], "state_dict": {"w": torch.ones(2)}}
        path = written(content, tmp_path / "rn50fpn.pth", route)
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
def test_zips_with_odd_paths_are_refused_and_write_nothing(
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
        with pytest.raises(ValueError, match=r"a readable checkpoint.*x\..*unsafe member"):
            read_tensors(folder / f"x{suffix}")
    with zipfile.ZipFile(folder / "torch.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("../../../evil", b"")
    with pytest.raises(ValueError, match="unsafe member '../../../evil'"):
        read_tensors(folder / "torch.pt")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["deep", "er", "x.zip", "x.pth", "x.pt", "torch.pt"]
    )


@pytest.mark.parametrize(("names", "count"), [([], 0), (["notes.txt"], 0), (["a.pth", "b.pth"], 2)])
def test_zips_without_one_file_of_weights_are_named(
    names: list[str], count: int, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with pytest.raises(ValueError, match=f"a zip archive with {count} files of weights"):
        read_tensors(tmp_path / "x.zip")


def test_a_torch_file_of_the_old_form_that_is_cut_anywhere_is_named(tmp_path: Path) -> None:
    path = written({"model": {"w": torch.ones(2, 3)}}, tmp_path / "x.pth", "torch old")
    data = path.read_bytes()
    for length in range(len(data) - 1):  # the last byte alone is not missed by torch
        path.write_bytes(data[:length])
        with pytest.raises(
            ValueError, match=r"`source` must be a (readable checkpoint|file of .*); got .*x\.pth"
        ):
            read_tensors(path)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = written({"w": torch.ones(1000)}, tmp_path / "x.pth", "torch old release")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a readable checkpoint.*x\.zip.*CRC"):
        read_tensors(path)


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(**entry: Any) -> bytes:
    return json.dumps(
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}
    ).encode()


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**63),
        header(b"{}", 10**9),
        header(b"not json"),
        header(described()),  # no data
        header(described(data_offsets=[0, 400]), data=b"1234"),
        header(described(data_offsets=[-4, 0]), data=b"1234"),
        header(described(data_offsets=[4, 0]), data=b"1234"),
        header(described(shape=[2**40]), data=b"1234"),
        header(described(shape=[2**62, 8]), data=b"1234"),
        header(described(dtype="X9"), data=b"1234"),
        header(described(dtype="F64"), data=b"1234"),
        header(b'{"w": 3}', data=b"1234"),
    ],
)
def test_safetensors_headers_that_lie_are_named(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a readable checkpoint; got .*x\.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html>Log in</html>", "a web page, it seems"),
        (b"\n <html>Not found</html>", "a web page, it seems"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.pkl", "x.safetensors", "x.zip", "x"])
def test_what_is_no_checkpoint_at_all_is_named(
    content: bytes, reason: str, name: str, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a readable checkpoint; got '.*{name}' \(({reason})"):
        RetinaNet.from_pretrained(path)


def test_a_folder_a_loop_and_a_pipe_of_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"save_pretrained; got '.*folder\.pth' without con"
    ):
        RetinaNet.from_pretrained(tmp_path / "folder.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(FileNotFoundError, match=r"got '.*loop\.pth', which does not exist"):
        RetinaNet.from_pretrained(tmp_path / "loop.pth")
    (tmp_path / "gone.pth").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match=r"got '.*gone\.pth', which does not exist"):
        RetinaNet.from_pretrained(str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"\xff\xfe{", "can't decode byte 0xff"),
        (b'{"format_version": 1, "num_classes": 2', "must be valid JSON"),
        (b'{"format_version": 1, "num_classes": "2"}', "must be an integer"),
        (b'{"format_version": 2, "num_classes": 2}', "must be 1; got 2. A newer focaldet wrote it"),
        (b'{"format_version": 1, "num_classes": 2, "colour": 3}', "known fields; got .'colour'."),
        (b"[]", "a RetinaNet's configuration, with 'num_classes'; got list"),
    ],
)
def test_a_config_that_does_not_hold_is_named_with_its_file(
    config: bytes, message: str, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "model.pth")
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=rf"config\.json': .*{message}"):
        RetinaNet.from_pretrained(tmp_path)
