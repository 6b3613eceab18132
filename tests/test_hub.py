"""Uploads and downloads with a server on 127.0.0.1 that answers like the Hugging Face Hub."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet import RetinaNetConfig

huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from huggingface_hub import constants  # noqa: E402
from safetensors.torch import save  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """A Hub with one repository, "me/owls", that has one commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.log.append(f"{self.command} {path}")
        files = self.server.files
        if path in (f"/api/models/me/owls/revision/{rev}" for rev in ("main", "v1")):
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            self.answer_json({"id": "me/owls", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/me/owls/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                    for name, content in files.items()
                ]
            )
        elif path.startswith("/me/owls/resolve/") and path.split("/", 5)[5] in files:
            content = files[path.split("/", 5)[5]]
            etag = f'"{oid(content)}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)
        elif path.startswith("/me/owls/"):
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.log.append(f"private={private}")
            self.answer_json({"url": f"{self.server.url}/me/owls", "name": wanted["name"]})
        elif self.path == "/api/validate-yaml":
            assert "library_name: focaldet" in json.loads(body)["content"]
            self.answer_json({"warnings": [], "errors": []})
        elif self.path == "/api/models/me/owls/preupload/main":
            paths = [one["path"] for one in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer_json({"files": files})
        elif self.path == "/api/models/me/owls/commit/main":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
                else:
                    self.server.log.append(entry["value"]["summary"])
            url = f"{self.server.url}/me/owls/commit/{COMMIT}"
            self.answer_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer(404)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield running
        huggingface_hub.close_session()
        running.shutdown()
        thread.join()


@pytest.fixture
def tiny_model(tiny_config: RetinaNetConfig) -> RetinaNet:
    return RetinaNet.from_config(tiny_config.replace(backbone="mobilenet_v2")).eval()  # 10 MB


def equal(a: RetinaNet, b: RetinaNet) -> bool:
    theirs = b.state_dict()
    return a.config == b.config and all(
        torch.equal(value, theirs[key]) for key, value in a.state_dict().items()
    )


def test_a_pushed_model_loads_unchanged(hub: FakeHub, tiny_model: RetinaNet) -> None:
    url = tiny_model.push_to_hub("me/owls", private=True, commit_message="First owls")
    assert url == f"{hub.url}/me/owls/commit/{COMMIT}"
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert {"private=True", "First owls"} <= set(hub.log)
    assert equal(RetinaNet.from_pretrained("me/owls"), tiny_model)


def test_the_card_says_how_to_load_the_model_and_an_existing_card_is_kept(
    hub: FakeHub, tiny_model: RetinaNet
) -> None:
    tiny_model.push_to_hub("me/owls")
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: focaldet\n")
    assert "| classes | 3: cat, dog, owl |" in card
    assert "shorter side 64 pixels, longer side at most 96" in card
    assert 'RetinaNet.from_pretrained("me/owls")' in card
    hub.files["README.md"] = b"my own words"
    tiny_model.push_to_hub("me/owls")
    assert hub.files["README.md"] == b"my own words"


def test_a_revision_can_be_requested(hub: FakeHub, tiny_model: RetinaNet) -> None:
    tiny_model.push_to_hub("me/owls")
    assert equal(RetinaNet.from_pretrained("me/owls@v1"), tiny_model)
    assert "GET /api/models/me/owls/revision/v1" in hub.log
    with pytest.raises(FileNotFoundError, match="me/owls@v2.*Hugging Face Hub either: .*"):
        RetinaNet.from_pretrained("me/owls@v2")


def test_only_the_two_files_are_downloaded(hub: FakeHub, tiny_model: RetinaNet) -> None:
    tiny_model.push_to_hub("me/owls")
    hub.files["optimizer.bin"] = hub.files["model.pth"] = b"0"
    hub.log.clear()
    RetinaNet.from_pretrained("me/owls")
    downloaded = {one.rpartition("/")[2] for one in hub.log if one.startswith("GET /me/")}
    assert downloaded == {"config.json", "model.safetensors"}


def test_offline_the_cached_files_are_used_without_any_request(
    hub: FakeHub, tiny_model: RetinaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.push_to_hub("me/owls")
    RetinaNet.from_pretrained("me/owls")
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(RetinaNet.from_pretrained("me/owls"), tiny_model)
    with pytest.raises(FileNotFoundError, match="'me/cats'.* Hugging Face Hub either: "):
        RetinaNet.from_pretrained("me/cats")
    assert not hub.log


def test_a_cache_built_by_hand_works_offline(
    tiny_model: RetinaNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--owls"
    tiny_model.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert equal(RetinaNet.from_pretrained("me/owls"), tiny_model)


def test_the_error_for_a_missing_or_unsuitable_repository_names_it(hub: FakeHub) -> None:
    message = "No such file, folder or published name: 'me/cats'.* Hugging Face Hub either: .*list"
    with pytest.raises(FileNotFoundError, match=message):
        RetinaNet.from_pretrained("me/cats")
    hub.files["config.json"] = b'{"model_type": "detr"}'
    hub.files["model.safetensors"] = save({"detr.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors' \(1 tensor: 'detr\.weight'\)"):
        RetinaNet.from_pretrained("me/owls")
    hub.files.clear()
    with pytest.raises(FileNotFoundError, match="'me/owls'.*no checkpoint at the top level"):
        RetinaNet.from_pretrained("me/owls")


def torch_file(contents: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def downloaded(hub: FakeHub) -> set[str]:
    return {one.split("/", 5)[5] for one in hub.log if one.startswith("GET /me/owls/resolve/")}


def test_a_repository_of_a_different_project_is_loaded_from_its_only_checkpoint(
    hub: FakeHub, tiny_model: RetinaNet
) -> None:
    state = {f"model.{key}": value for key, value in tiny_model.state_dict().items()}
    large = b"a: 1\n" * 300_000
    hub.files |= {
        "model_final.pth": torch_file({"model": state}),
        "config.json": tiny_model.config.to_json().encode(),
        "config.yaml": large,
        "notes.yaml": b"",
        "README.md": b"",
        "samples/x.jpg": b"",
        "weights/other.pth": b"",
    }
    hub.files["config.json"] = hub.files["config.json"].replace(b"format_version", b"their_version")
    model = RetinaNet.from_pretrained("me/owls", config=tiny_model.config)
    assert equal(model, tiny_model)
    assert downloaded(hub) == {"model_final.pth", "config.json"}


def test_a_repository_with_several_checkpoints_needs_a_file_name(
    hub: FakeHub, tiny_model: RetinaNet
) -> None:
    content = torch_file(tiny_model.state_dict())
    hub.files |= {"a.pth": content, "sub/b.pth": content, "c.pth": content, "sub/b.yaml": b"a: 1"}
    with pytest.raises(CheckpointError, match="2 checkpoints: 'a.pth', 'c.pth'.*file_name="):
        RetinaNet.from_pretrained("me/owls", config=tiny_model.config)
    with pytest.raises(FileNotFoundError, match=r"no file 'd.pth'.*a.pth, c.pth, sub/b.pth"):
        RetinaNet.from_pretrained("me/owls", config=tiny_model.config, file_name="d.pth")
    assert not downloaded(hub)
    model = RetinaNet.from_pretrained("me/owls", config=tiny_model.config, file_name="sub/b.pth")
    assert equal(model, tiny_model)
    assert downloaded(hub) == {"sub/b.pth", "sub/b.yaml"}


@pytest.mark.usefixtures("hub")
def test_a_repository_can_be_loaded_for_other_classes(
    tiny_model: RetinaNet, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model.push_to_hub("me/owls")
    with caplog.at_level(logging.WARNING, "focaldet"):
        model = RetinaNet.from_pretrained("me/owls", class_names=["barn owl", "snowy owl"])
    assert model.config.num_classes == 2
    assert "new (to be trained): head.class_logits" in caplog.text


def test_without_the_extra_the_error_says_what_to_install(
    tiny_model: RetinaNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("huggingface_hub", "safetensors"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            install = rf"requires {package}\. .*pip install 'focaldet\[hub\]'"
            with pytest.raises(
                ImportError, match=f"No such file or folder: 'runs/best'.*{install}"
            ):
                RetinaNet.from_pretrained("runs/best")
            with pytest.raises(ImportError, match=f"Uploading .*{install}"):
                tiny_model.push_to_hub("me/owls")
