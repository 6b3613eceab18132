"""Reading pickles and torch files: supported contents, malicious files and invalid arrays."""

from __future__ import annotations

import collections
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy._core import multiarray

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained._reading import read_checkpoint, read_tensors
from focaldet.pretrained._unpickling import UnsafePickleError, unpickle_arrays
from tests.helpers.checkpoint_files import FILE_FORMATS, Bomb, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ARRAYS = {
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "big": np.arange(4, dtype=">f4"),
    "f8": np.linspace(0, 1, 5),
    "f2": np.ones(3, dtype=np.float16),
    "i8": np.array([[-1], [2**40]]),
    "u1": np.array([0, 255], dtype=np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "number": np.float32(1.5),
    "point": np.array(7, dtype=np.int64),
}


def assert_same_arrays(found: Any, arrays: Any = ARRAYS) -> None:
    """Require tensors with the names, dtypes, shapes and values of the arrays."""
    assert list(found) == list(arrays)
    for name, value in arrays.items():
        tensor = found[name]
        assert isinstance(tensor, torch.Tensor), name
        assert (
            tensor.dtype
            == torch.from_numpy(np.array(value).astype(value.dtype.newbyteorder("="))).dtype
        )
        assert tuple(tensor.shape) == np.shape(value), name
        assert np.array_equal(tensor.numpy(), value), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_of_every_protocol_give_tensors(protocol: int, tmp_path: Path) -> None:
    content = {"model": ARRAYS, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    file = read_checkpoint(path)
    assert_same_arrays(file.tensors)
    assert file.extras == {"__author__": "Detectron2 Model Zoo"}
    assert file.name == "model_final.pkl"


@pytest.mark.parametrize("old", [True, False])
def test_arrays_of_numpy_1_and_2_are_read(old: bool) -> None:
    data = pickle.dumps(ARRAYS, protocol=2)
    assert b"numpy._core.multiarray" in data
    if old:
        data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert_same_arrays(unpickle_arrays(data))


def test_a_pickle_of_python_2_is_read_as_latin1() -> None:
    # Python 2 wrote an array's bytes as a short string: opcode U, which becomes text here.
    raw = np.array([1.5, -2], dtype="<f4").tobytes()
    data = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(raw)])
        + raw
        + b"tbs."
    )
    assert unpickle_arrays(data)["w"].tolist() == [1.5, -2]


def test_ordered_dictionaries_and_plain_values_are_read() -> None:
    content = collections.OrderedDict(model=collections.OrderedDict(a=ARRAYS["f4"]), epoch=3)
    found = unpickle_arrays(pickle.dumps(content))
    assert found["epoch"] == 3
    assert found["model"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("where", ["model", "state_dict", "other entry", "key"])
@pytest.mark.parametrize("how", ["call", "eval", "open"])
@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_nothing_in_a_file_is_run(tmp_path: Path, file_format: str, how: str, where: str) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace, how)
    weights: dict[str, Any] = {"weight": torch.zeros(2)}
    if file_format == "pickle":  # where a tensor would be refused before the bomb is reached
        weights = {"weight": np.zeros(2, dtype=np.float32)}
    contents: Any = {
        "model": {"model": {**weights, "bomb": bomb}},
        "state_dict": {"state_dict": {"deep": {"deeper": [bomb]}, **weights}},
        "other entry": {"model": weights, "optimizer": bomb},
        "key": {"model": weights, bomb: 1},
    }[where]
    path = write_checkpoint(contents, tmp_path / "bomb.pth", file_format)
    with pytest.raises(CheckpointError, match=r"bomb\.(pth|zip|pkl)"):
        RetinaNet.from_pretrained(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("builtins.eval", b"cbuiltins\neval\n(V1+1\ntR."),
        ("posix.system", b"cposix\nsystem\n(Vtrue\ntR."),
        ("os.system", b"\x80\x04\x8c\x02os\x8c\x06system\x93."),
        ("numpy.load", b"cnumpy\nload\n(Vx\ntR."),
        ("numpy.core.multiarray.fromfile", b"cnumpy.core.multiarray\nfromfile\n."),
        ("numpy.ndarray.tofile", b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."),
        ("torch._utils._rebuild_tensor_v2", b"ctorch._utils\n_rebuild_tensor_v2\n."),
        ("functools.partial", b"(ifunctools\npartial\n."),
        ("copyreg._reconstructor", b"ccopyreg\n_reconstructor\n."),
        ("_codecs.encode to 'rot13'", b"c_codecs\nencode\n(Vx\nVrot13\ntR."),
    ],
)
def test_the_error_for_an_unsafe_pickle_names_what_it_asks_for(
    tmp_path: Path, name: str, pickled: bytes
) -> None:
    with pytest.raises(UnsafePickleError, match=name):
        unpickle_arrays(pickled)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled)
    message = rf"x\.pkl' was not opened: it asks for {name}, .* NumPy arrays.*state_dict\(\)"
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(Vtouch %\ntR.",
        b"(Vtouch %\nios\nsystem\n.",
        b"(cos\nsystem\nVtouch %\no.",
        b"\x80\x02cos\nsystem\nVtouch %\n\x85\x81.",
        b"\x80\x04cos\nsystem\nVtouch %\n\x85}\x92.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93Vtouch %\n\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n)R}V__setstate__\ncos\nsystem\nsbVtouch %\nb.",
        b"\x80\x02\x82\x01.",
        b"Pos.system\n.",
    ],
    ids=["REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "BUILD", "EXT", "PERSID"],
)
def test_no_pickle_instruction_runs_and_no_message_advises_to_trust_the_file(
    pickled: bytes, wrapped: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    pickled = pickled.replace(b"%", str(trace).encode())
    for suffix in (".pkl", ".PKL", ".pth", ".pt", ".pth.tar"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(pickled)
        if wrapped:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/data.pkl", pickled)
                archive.writestr("x/version", "3")
        with pytest.raises(CheckpointError, match=r"x\.(pkl|PKL|pth|pt)") as caught:
            RetinaNet.from_pretrained(path)
        assert "weights_only" not in str(caught.value)
        assert "trust" not in str(caught.value)
        assert not trace.exists()


def test_the_error_for_an_unsafe_torch_file_names_what_it_asks_for(tmp_path: Path) -> None:
    contents = {"model": {"w": torch.ones(1)}, "epoch": Bomb(tmp_path, "eval")}
    path = write_checkpoint(contents, tmp_path / "x", "torch")
    message = r"x' was not opened: it asks for \S*eval, .* run code.* Save the state dict"
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_a_pickle_cannot_affect_how_the_next_one_is_read() -> None:
    # The pickle sets an attribute of the stand-in for arrays, and of the one for its constructor.
    spoil = b"(N}V__setstate__\nNstb"
    for target in (b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"):
        with pytest.raises((pickle.UnpicklingError, UnsafePickleError)):
            unpickle_arrays(b"\x80\x02" + target + spoil + b"0" + b"X")
    assert_same_arrays(unpickle_arrays(pickle.dumps(ARRAYS)))


class Raw:
    """An array that pickles with any state."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return multiarray._reconstruct, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Raw(1, (2**40,), np.dtype("f4"), False, b"1234"), "shape .1099511627776,. .* in 4 bytes"),
        (Raw(1, (-1, -1), np.dtype("f4"), False, b"1234"), "shape .-1, -1. .* in 4 bytes"),
        (Raw(1, (1,), np.dtype("O"), False, [1]), "dtype 'O8'"),
        (Raw(1, (1,), np.dtype("f4"), False, 10**13), "dtype 'f4'"),
        (Raw(1, (1,), "f4", False, b"1234"), "not numeric"),
        (Raw(1, None, np.dtype("f4"), False, b"1234"), "not numeric"),
        (Raw(1, (1,)), "not numeric"),
        (np.array(["text"]), "dtype 'U4'"),
        (np.array([1 + 2j]), "dtype 'c16'"),
        (np.zeros(2, dtype=[("a", "f4")]), "dtype 'V4'"),
    ],
)
def test_the_error_for_an_invalid_array_describes_it(
    array: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": array}}))
    with pytest.raises(CheckpointError, match=rf"Cannot read .*x\.pkl.*{message}"):
        read_tensors(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"text",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # bytes that are longer than any memory
        b"\x80\x02}q\x00(q\x01h\x09.",
        b"}" * 10**5 + b".",
        b"(" * 10**5 + b"t" * 10**5 + b".",
        pickle.dumps({"model": ARRAYS})[:-40],
    ],
)
def test_the_error_for_a_damaged_pickle_names_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pkl"):
        read_tensors(path)


def test_a_pickle_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": {}}
    content["a"]["b"] = content
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"Cannot read .*x\.pkl"):
        read_tensors(path)
