"""Images from URLs, from a server on 127.0.0.1 that also misbehaves."""

from __future__ import annotations

import io
import socket
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from focaldet import _image_urls
from focaldet.errors import DownloadError, UnreadableImageError
from focaldet.images import iter_images, load_image
from tests.helpers.local_server import LocalServer, QuietHandler, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from focaldet import RetinaNet


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (80, 64), "red").save(stream, "PNG")
    return stream.getvalue()


class Handler(QuietHandler):
    """Answers with the function of the server for the path."""

    server: Server

    def answer(self) -> None:
        self.server.requested.append(self.path)
        self.server.answers.get(self.path, not_found)(self)

    def send(self, content: bytes, length: int | None, **headers: str) -> None:
        self.begin(200, length, **headers)
        self.wfile.write(content)


def not_found(handler: Handler) -> None:
    handler.send_error(404)


def redirect(target: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


class Server(LocalServer):
    def __init__(self) -> None:
        super().__init__(Handler)
        self.requested: list[str] = []
        self.url = self.root
        self.answers: dict[str, Callable[[Handler], None]] = {
            "/a.png": lambda handler: handler.send(png(), len(png())),
            "/endless.png": lambda handler: handler.send(png(), None),
            "/page.png": lambda handler: handler.send(b"<html>", 6),
            "/moved.png": redirect("/a.png"),
            "/file.png": redirect("file:///etc/hostname"),
            "/ftp.png": redirect("ftp://127.0.0.1/a.png"),
            "/loop.png": redirect("/loop.png"),
            "/cut.png": lambda handler: handler.send(png()[:-20], len(png())),
            "/gzip.png": lambda handler: handler.send(b"x", 1, Content_Encoding="gzip"),
            "/stalled.png": self.stall,
            "/slow-headers.png": self.send_headers_slowly,
        }

    def stall(self, handler: Handler) -> None:
        handler.send(png()[:50], None)
        self.released.wait(5)

    def send_headers_slowly(self, handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nA: ")
        while not self.released.wait(0.01):
            try:
                handler.wfile.write(b"a")
            except OSError:
                return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Server(), monkeypatch) as running:
        yield running


@pytest.mark.parametrize("path", ["/a.png", "/endless.png", "/moved.png"])
def test_an_allowed_url_gives_the_image(server: Server, path: str) -> None:
    assert load_image(server.url + path, allow_urls=True)[:, 0, 0].tolist() == [255, 0, 0]
    [loaded] = iter_images([server.url + path], allow_urls=True)
    assert loaded is not None
    assert loaded.name == server.url + path
    assert load_image(server.url.upper() + path, allow_urls=True).shape == (3, 64, 80)


def test_a_url_is_not_requested_unless_it_is_allowed(server: Server) -> None:
    with pytest.raises(ValueError, match=r"sources is the URL .*allow_urls=True"):
        next(iter_images(server.url + "/a.png"))
    assert server.requested == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "the server answered 404 Not Found"),
        ("/file.png", "302 .*'file:///etc/hostname' is not allowed"),
        ("/ftp.png", "redirects to 'ftp://127.0.0.1/a.png', which is not an http or https URL"),
        ("/loop.png", "the server answered 302 .*infinite loop"),
        ("/cut.png", r"connection ended after \d+ of \d+ bytes"),
        ("/gzip.png", "Content-Encoding gzip, which was not requested"),
        ("/a b.png", "URL can't contain control characters"),
    ],
)
def test_a_failed_download_names_the_url_and_the_reason(
    server: Server, path: str, reason: str
) -> None:
    with pytest.raises(DownloadError, match=rf"(?s)'{server.url}{path}' \(photo\): .*{reason}"):
        load_image(server.url + path, "photo", allow_urls=True)


def test_a_server_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
        with pytest.raises(DownloadError, match=rf"'{url}' \(image\): .*refused"):
            load_image(url, allow_urls=True)


def test_a_url_that_is_not_an_image_is_unreadable(server: Server) -> None:
    with pytest.raises(UnreadableImageError, match=rf"Cannot read '{server.url}/page\.png'"):
        load_image(server.url + "/page.png", allow_urls=True)


@pytest.mark.parametrize("path", ["/a.png", "/endless.png"])
def test_the_size_is_limited(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_image_urls, "_MAX_BYTES", len(png()))
    load_image(server.url + path, allow_urls=True)
    monkeypatch.setattr(_image_urls, "_MAX_BYTES", len(png()) - 1)
    with pytest.raises(DownloadError, match=r"it has more than .* MB"):
        load_image(server.url + path, allow_urls=True)


@pytest.mark.parametrize("path", ["/stalled.png", "/slow-headers.png"])
def test_the_time_is_limited_although_data_arrive(
    server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_image_urls, "_MAX_SECONDS", 0.1)
    with pytest.raises(DownloadError, match=r"it takes longer than 0\.1 s"):
        load_image(server.url + path, allow_urls=True)
    assert not server.released.is_set()


@pytest.mark.parametrize(
    "url", ["s3://bucket/a.jpg", "file:///a.jpg", "data:image/png;base64,AAAA"]
)
def test_other_schemes_raise_even_if_urls_are_allowed(url: str) -> None:
    with pytest.raises(ValueError, match=r"is the URL '.*', but only http:// and https:// URLs"):
        load_image(url, allow_urls=True)


def test_predict_downloads_allowed_urls_and_skips_failures(
    server: Server, tiny_model: RetinaNet
) -> None:
    good, bad = server.url + "/a.png", server.url + "/none.png"
    [expected] = tiny_model.predict(png())
    options: dict[str, Any] = {"allow_urls": True, "on_error": "skip"}
    with pytest.warns(UserWarning, match=r"Skipped an image: .*none\.png' \(sources\[1\]\)"):
        found = tiny_model.predict([good, bad], **options)
    assert found[0] is not None
    assert found[0].source == good
    assert found[0].boxes.equal(expected.boxes)
    assert found[1] is None
    with pytest.raises(DownloadError, match=r"none\.png' \(sources\)"):
        next(tiny_model.predict_iter(bad, allow_urls=True))
