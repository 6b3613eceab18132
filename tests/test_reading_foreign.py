"""Objects that training scripts save next to the weights: admitted without importing or running them."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import io
import sys
import threading
import types
import zipfile
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import read_tensors
from focaldet.pretrained._reading import read_checkpoint
from focaldet.pretrained._unpickling import Inert, admitted_names
from tests.helpers.checkpoint_files import Bomb, foreign, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

W = {"w": torch.ones(2)}

HARMLESS: dict[str, Callable[[], Any]] = {
    "arguments": lambda: argparse.Namespace(lr=0.1, nested=argparse.Namespace(data=Path("a"))),
    "simple namespace": lambda: types.SimpleNamespace(lr=0.1),
    "paths": lambda: [Path("a/b"), PureWindowsPath("c:/d")],
    "dates": lambda: [
        dt.datetime(2024, 1, 2, tzinfo=dt.UTC),
        dt.date(2024, 1, 2),
        dt.timedelta(hours=1),
    ],
    "default dictionary": lambda: collections.defaultdict(list, a=[1]),
    "queue": lambda: collections.deque([1, 2], maxlen=3),
    "counter": lambda: collections.Counter("abc"),
    "NumPy": lambda: {"best": np.float64(0.4), "curve": np.arange(3.0), "names": np.array(["a"])},
    "version": lambda: torch.torch_version.TorchVersion("2.9.0"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_training_scripts_save_is_passed_over(kind: str, old: bool, tmp_path: Path) -> None:
    contents = {"model": W, "args": HARMLESS[kind](), "epoch": 3}
    path = write_checkpoint(contents, tmp_path / "x.pth", "torch old" if old else "torch")
    file = read_checkpoint(path)
    assert file.tensors["w"].tolist() == [1, 1]
    assert file.extras["epoch"] == 3


LIBRARIES = {
    "mmengine": (object, ("mmengine.logging.history_buffer.HistoryBuffer",)),
    "message hub": (object, ("mmengine.logging.message_hub.MessageHub",)),
    "Lightning": (dict, ("pytorch_lightning.utilities.parsing.AttributeDict",)),
    "lightning": (dict, ("lightning.fabric.utilities.data.AttributeDict",)),
    "yacs": (dict, ("yacs.config.CfgNode",)),
    "omegaconf": (object, ("omegaconf.dictconfig.DictConfig", "omegaconf.base.Metadata")),
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_objects_of_libraries_are_passed_over_without_importing_them(
    kind: str, tmp_path: Path
) -> None:
    base, names = LIBRARIES[kind]
    before = {*sys.modules}
    with foreign(*names, base=base) as classes:
        objects: list[Any] = [made() for made in classes]
        for one in objects:
            one.values_of_it = np.arange(3)
            one.method = type(one).mean  # saved as a call of getattr
            if base is dict:
                one["lr"] = 0.1
        path = write_checkpoint({"state_dict": W, "log": objects}, tmp_path / "x.ckpt", "torch")
        data = path.read_bytes()
    assert not {name.partition(".")[0] for name in names} & ({*sys.modules} - before)
    assert names[0].rpartition(".")[2].encode() in data
    file = read_checkpoint(path)
    assert file.tensors["w"].tolist() == [1, 1]
    if base is dict:
        assert dict(file.extras["log"][0]) == {"lr": 0.1}
    else:
        assert type(file.extras["log"][0]) is Inert
    assert not {name.partition(".")[0] for name in names} & ({*sys.modules} - before)


def test_what_stands_for_them_does_nothing_and_keeps_nothing() -> None:
    for stand_in, name in admitted_names():
        made = stand_in()
        assert not made or type(made) is Inert, name
        assert not vars(made) if hasattr(made, "__dict__") else True
    with pytest.raises(AttributeError):
        Inert(1, a=2).a  # type: ignore[attr-defined]  # noqa: B018
    modules = {name.partition(".")[0] for _, name in admitted_names()}
    assert not modules & {
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "importlib",
        "functools",
        "operator",
    }


def archive_with(pickled: bytes, path: Path) -> Path:
    """Write a torch file with any pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        # the class of Namespace is asked for, and called
        b"c__builtin__\ngetattr\n(cargparse\nNamespace\nX\x09\x00\x00\x00__class__tR(X\x01\x00\x00\x00xtR.",
        # the function system of a module is asked for, and called
        b"c__builtin__\ngetattr\n(cos\npath\nX\x06\x00\x00\x00systemtR(X\x05\x00\x00\x00touchtR.",
        # a Namespace that is called, and one whose class gets a state
        b"cargparse\nNamespace\n)\x81(X\x01\x00\x00\x00xtR.",
        b"cargparse\nNamespace\n}X\x0c\x00\x00\x00__setstate__cargparse\nNamespace\nsb.",
        # dictionaries with a factory
        b"ccollections\ndefaultdict\n(cposix\nsystem\ntR.",
        # something else of an admitted module
        b"cargparse\nArgumentParser\n)R.",
        b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.",
        b"cpathlib\nPath.write_text\n(X\x01\x00\x00\x00xX\x01\x00\x00\x00ytR.",
    ],
)
def test_admitted_names_are_no_way_to_run_anything(pickled: bytes, tmp_path: Path) -> None:
    path = archive_with(b"\x80\x02" + pickled, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth") as caught:
        read_tensors(path)
    assert "trust" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("how", ["call", "eval", "open"])
def test_code_inside_admitted_objects_is_not_run(how: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace, how)
    for inside in (
        argparse.Namespace(callback=bomb),
        collections.deque([bomb]),
        collections.defaultdict(dict, {"a": {"b": bomb}}),
        {"deep": [argparse.Namespace(a={"b": (bomb,)})]},
    ):
        path = write_checkpoint({"model": W, "args": inside}, tmp_path / "x.pth", "torch")
        with pytest.raises(
            CheckpointError, match=r"x\.pth' was not opened: it asks for .* run code"
        ):
            read_tensors(path)
        assert not trace.exists()


def test_what_a_program_has_admitted_itself_stays_as_it_is(tmp_path: Path) -> None:
    path = write_checkpoint({"model": W, "args": argparse.Namespace(a=1)}, tmp_path / "x", "torch")
    before = {*torch.serialization.get_safe_globals()}
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert read_checkpoint(path).extras["args"] == argparse.Namespace(a=1)
        assert {*torch.serialization.get_safe_globals()} == before | {argparse.Namespace}
    assert type(read_checkpoint(path).extras["args"]) is Inert
    assert {*torch.serialization.get_safe_globals()} == before


def test_files_are_read_in_several_threads_at_once(tmp_path: Path) -> None:
    path = write_checkpoint({"model": W, "args": argparse.Namespace(a=1)}, tmp_path / "x", "torch")
    found: list[Any] = []

    def read() -> None:
        found.extend(read_tensors(path)["w"].tolist() for _ in range(20))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 1]] * 80


class Custom(torch.nn.Module):
    """A model that can only be unpickled with its class."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.inner = model


def test_the_advice_for_a_pickled_model_is_right(tiny_model: RetinaNet, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    model = Custom(tiny_model)
    torch.save(model, path)
    message = r"x\.pth' was not opened: it asks for \S*Custom, .* torch\.save\(model\.state_dict\(\), path\)"
    with pytest.raises(CheckpointError, match=message):
        RetinaNet.from_pretrained(path, config=tiny_model.config)
    torch.save(model.state_dict(), path)
    loaded = RetinaNet.from_pretrained(path, config=tiny_model.config)
    assert torch.equal(loaded.head.class_logits.weight, tiny_model.head.class_logits.weight)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_torchscript_archive_is_named_as_such(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"model/{name}", b"\x80\x02}.")
    if zipped:
        data = path.read_bytes()
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.pt", data)
    with pytest.raises(CheckpointError, match=r"x\.(pt|zip)'.* a TorchScript archive.*state_dict"):
        RetinaNet.from_pretrained(path)
