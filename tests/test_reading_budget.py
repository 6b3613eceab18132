"""Small files that would take much time or memory, and tensors that cannot be weights."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy._core import multiarray

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import check_fit
from focaldet.pretrained._reading import read_checkpoint, read_tensors
from tests.helpers.checkpoint_files import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from focaldet import RetinaNetConfig

W = {"w": np.zeros(2, dtype=np.float32)}


@pytest.fixture(autouse=True)
def little_time() -> Iterator[None]:
    """Require that a test ends soon: each of these files could take minutes, or forever."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 20  # each takes a second or less


def doubled(wrap: Callable[[Any], Any], content: Any, levels: int = 40) -> Any:
    for _ in range(levels):
        content = wrap(content)
    return content


def pickled_top_down(levels: int = 40) -> bytes:
    """Return a pickle of lists that are filled after they were put into others: [[…], […]]."""
    data = b"\x80\x02" + b"".join(b"]q" + bytes([i]) + b"0" for i in range(levels))
    for i in reversed(range(1, levels)):
        data += b"h" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e0"
    return data + b"h" + bytes([levels - 1])


EXPENSIVE = {
    "shared dictionaries": pickle.dumps(doubled(lambda d: {"a": d, "b": d}, W), 2),
    "shared lists": pickle.dumps({"model": W, "x": doubled(lambda x: [x, x], 1)}, 2),
    "shared tuples": pickle.dumps({"model": W, "x": doubled(lambda x: (x, x), 1)}, 2),
    "lists filled later": pickled_top_down() + b".",
    "shared tuples as a key": b"\x80\x02}" + b"K\x01" + b"2\x86" * 40 + b"K\x01s.",
    "deep tuples as a key": b"\x80\x02}K\x01" + b"\x85" * 10**6 + b"K\x01s.",
    "deep lists": b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    "memo index": b"\x80\x02}r\x00\x00\x00\x40.",
    "memo index in text": b"}p1073741824\n.",
    "many copies": b"\x80\x02(" + b"K\x01K\x02\x86" * 10**4 + b"lq\x00(" + b"ccollections\nOrderedDict\nq\x010"
    + b"h\x01h\x00\x85R0" * 10**4 + b"l.",
    "one text many times": b"\x80\x02X" + struct.pack("<I", 10**5) + b"x" * 10**5 + b"q\x000c_codecs\nencode\n"
    b"q\x010(" + b"h\x01h\x00\x85R" * 10**5 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".zip"])
@pytest.mark.parametrize("name", EXPENSIVE)
def test_pickles_far_more_expensive_than_their_size_are_errors(
    name: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{suffix}"
    data = EXPENSIVE[name]
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/version", "3")
    else:
        path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"Cannot read '.*x\.(pkl|pth|zip)'|x.zip' was not"
    ) as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 600


def test_the_error_for_an_expensive_pickle_gives_the_reason(tmp_path: Path) -> None:
    for name, reason in (
        ("shared dictionaries", "its parts refer to each other too often"),
        ("lists filled later", "its parts refer to each other too often"),
        ("deep lists", "nested more than 100 levels deep"),
        ("memo index", "the memo entry 1073741824"),
    ):
        (tmp_path / "x.pkl").write_bytes(EXPENSIVE[name])
        with pytest.raises(CheckpointError, match=rf"x\.pkl.*{reason}"):
            read_tensors(tmp_path / "x.pkl")


def test_nested_objects_in_place_of_a_dtype_are_an_error(tmp_path: Path) -> None:
    data = pickled_top_down() + b"q\xff0cnumpy\ndtype\nh\xff\x85R."
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pkl.*a list in place of a text"):
        read_tensors(tmp_path / "x.pkl")


def test_shared_contents_of_honest_files_are_read_once(tmp_path: Path) -> None:
    arrays = {f"w{i}": W["w"] for i in range(1000)}
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "again": arrays}))
    file = read_checkpoint(path)
    assert len({tensor.data_ptr() for tensor in file.tensors.values()}) == 1
    weight = torch.ones(3)
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(300))}] * 20
    write_checkpoint(
        {"model": {"a": weight, "b": weight}, "groups": groups}, tmp_path / "y.pth", "torch"
    )
    assert read_tensors(tmp_path / "y.pth")["b"].tolist() == [1, 1, 1]


class RawArray:
    """An array that pickles with any state."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    "shape", [(10**4000,) * 200, (1,) * 65, (2**62, 8), (True,), (1.0,), ("1",)]
)
def test_shapes_of_other_than_a_few_lengths_are_errors(
    shape: tuple[Any, ...], tmp_path: Path
) -> None:
    array = RawArray(1, shape, np.dtype("f4"), False, b"1234")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": array}, 2))
    with pytest.raises(CheckpointError, match=r"Cannot read .*x\.pkl"):
        read_tensors(tmp_path / "x.pkl")


def test_a_zip_of_very_many_members_is_checked_in_linear_time(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for index in range(20_000):
            archive.writestr(zipfile.ZipInfo(f"{index}.txt"), b"")
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.zip.*0 \.pth or \.pt files"):
        read_tensors(tmp_path / "x.zip")
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("name", ["x.pth", "archive/data.pkl", "archive/data/0"])
def test_a_zip_that_unpacks_to_far_more_than_its_size_is_an_error(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(10**8))
        archive.writestr("archive/data.pkl" if name.endswith("0") else "notes", b"}.")
    with pytest.raises(
        CheckpointError, match=r"Cannot read .*x\.zip.*unpacks to 1000000\d\d bytes"
    ):
        read_tensors(path)


def test_a_zip_within_a_zip_is_checked_too(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}.")
        archive.writestr("a/data/0", bytes(10**8))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.pth", inner.getvalue())
    with pytest.raises(CheckpointError, match=r"x\.zip.*unpacks to"):
        read_tensors(tmp_path / "x.zip")


def test_a_view_that_repeats_a_number_without_end_is_an_error(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(1).expand(2**40), "v": torch.zeros(1)}
    for file_format in ("torch", "torch old", "torch release"):
        path = write_checkpoint(weights, tmp_path / "x.pth", file_format)
        with pytest.raises(
            CheckpointError, match=r"Cannot read .*its tensors have 4398046511108 bytes"
        ):
            read_tensors(path)


def test_a_pickle_that_asks_torch_for_empty_bytes_is_an_error(tmp_path: Path) -> None:
    pickled = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", "3")
    with pytest.raises(CheckpointError, match=r"x\.pth.*bytearray"):
        read_tensors(path)


def test_a_config_that_is_huge_or_deeply_nested_is_an_error(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"config\.json.*nested too deeply"):
        RetinaNet.from_pretrained(tmp_path)
    config.write_text(" " * 2**25)
    with pytest.raises(CheckpointError, match=r"config\.json.* 33554432 bytes"):
        RetinaNet.from_pretrained(tmp_path)


# What the tensors of a checkpoint may be.


def nested_tensor() -> Any:
    nested: Any = torch.nested  # untyped
    return nested.nested_tensor([torch.ones(2), torch.ones(3)])


KINDS: dict[str, Callable[[], Any]] = {
    "a meta tensor": lambda: torch.empty(2, device="meta"),
    "a sparse tensor": lambda: torch.ones(2, 2).to_sparse(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "a nested tensor": nested_tensor,
    "a complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that some of these kinds change
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_for_a_tensor_without_plain_values_names_file_and_tensor(
    kind: str, tmp_path: Path
) -> None:
    torch.save({"ok": torch.ones(1), "head.bias": KINDS[kind]()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"Cannot read .*x\.pth.*'head\.bias' is {kind}"):
        RetinaNet.from_pretrained(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_the_error_for_weights_of_another_dtype_names_file_and_tensor(
    dtype: torch.dtype, tiny_model: RetinaNet, tmp_path: Path
) -> None:
    save_with(tiny_model, tmp_path, lambda w: w.to(dtype))
    message = rf"{tmp_path.name}.*fpn\.p7\.weight has the dtype {dtype}.*floating-point"
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_error_for_nan_or_infinite_weights_names_file_and_tensor(
    value: float, dtype: torch.dtype, tiny_model: RetinaNet, tmp_path: Path
) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(dtype)
        weight.view(-1)[3] = value
        return weight

    save_with(tiny_model, tmp_path, spoil)
    message = rf"{tmp_path.name}.*fpn\.p7\.weight contains NaN or infinity \(1 of \d+.*diverged"
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(tmp_path)


def save_with(
    model: RetinaNet, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    tensors = model.state_dict()
    torch.save(
        tensors | {"fpn.p7.weight": change(tensors["fpn.p7.weight"].clone())}, folder / "model.pth"
    )


def test_weights_whose_sum_overflows_are_finite(tiny_config: RetinaNetConfig) -> None:
    wanted = RetinaNet.from_config(tiny_config).state_dict()
    largest = torch.full_like(wanted["fpn.p7.weight"], torch.finfo(torch.float32).max)
    check_fit(wanted, wanted | {"fpn.p7.weight": largest})
    check_fit(wanted, {k: v.half() if v.is_floating_point() else v for k, v in wanted.items()})


def test_all_spoilt_weights_are_counted() -> None:
    wanted = {f"w{i}": torch.ones(2) for i in range(5)}
    with pytest.raises(CheckpointError, match=r"w0 .*w1 .*w2 .*, and 2 more\. The training"):
        check_fit(wanted, {key: value * torch.nan for key, value in wanted.items()})


def test_nan_in_a_layer_that_starts_again_does_not_matter(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    tensors = tiny_model.state_dict()
    tensors["head.class_logits.bias"] = tensors["head.class_logits.bias"] * torch.nan
    torch.save(tensors, tmp_path / "model.pth")
    RetinaNet.from_pretrained(tmp_path, num_classes=7)
    with pytest.raises(CheckpointError, match=r"head\.class_logits\.bias contains NaN"):
        RetinaNet.from_pretrained(tmp_path)


def test_tensors_without_dimensions_are_an_error_of_their_family(tmp_path: Path) -> None:
    keys = ["backbone.body.conv1.weight", "head.classification_head.cls_logits.weight"]
    keys += ["head.regression_head.bbox_reg.weight", "head.classification_head.cls_logits.bias"]
    keys += [f"backbone.fpn.inner_blocks.{level}.0.weight" for level in range(3)]
    torch.save({key: torch.tensor(0.0) for key in keys}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"x\.pth': .*RetinaNet of torchvision.* not its shapes"
    ):
        RetinaNet.from_pretrained(tmp_path / "x.pth")
