"""Downloads of single images, limited in size and time.

Only http and https URLs are opened, also after redirects. Nothing is written to a file.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from typing_extensions import override

from focaldet._checks import printable
from focaldet.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["download_image"]

_MAX_BYTES = 100_000_000
_MAX_SECONDS = 60.0  # for the whole download, with its redirects
_TIMEOUT = 10.0  # seconds without data
_CHUNK = 1 << 16
_HEADERS = {"User-Agent": "focaldet", "Accept": "image/*", "Accept-Encoding": "identity"}


def download_image(url: str, name: str) -> bytes:
    """Download an image file into memory.

    Args:
        url: An http or https URL.
        name: What error messages call the image.

    Raises:
        ValueError: If the URL has a different scheme.
        DownloadError: If the download fails, takes more than 60 s, or has more than 100 MB.
    """
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ValueError(
            f"{name} is the URL {url!r}, but only http:// and https:// URLs are downloaded. Save the "
            "image and pass the file's path."
        )
    with _time_limit() as (watch, has_expired):
        try:
            content = _read(_opener(watch), url)
            if has_expired():  # without a Content-Length, this looks like the end of the image
                raise TimeoutError
        # A malformed URL or redirect is a ValueError or an InvalidURL.
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = _reason(error)
            if has_expired():
                reason = f"it takes longer than {_MAX_SECONDS:g} s"
            raise DownloadError(f"Could not download {url!r} ({name}): {reason}.") from error
    return content


def _read(opener: urllib.request.OpenerDirector, url: str) -> bytes:
    request = urllib.request.Request(url, headers=_HEADERS)  # noqa: S310  # http or https
    with opener.open(request, timeout=_TIMEOUT) as response:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ConnectionError(
                f"the server sent it with Content-Encoding {encoding}, which was not requested"
            )
        length = response.headers.get("Content-Length", "")
        total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
        content = bytearray()
        if total is None or total <= _MAX_BYTES:
            while len(content) <= _MAX_BYTES and (chunk := response.read1(_CHUNK)):
                content += chunk
    received = len(content)
    if received > _MAX_BYTES or (total is not None and total > _MAX_BYTES):
        raise ConnectionError(f"it has more than {_MAX_BYTES / 1e6:g} MB")
    if total is not None and received != total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")
    return bytes(content)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return printable(f"the server answered {error.code} {error.reason}")
    inner = error.reason if isinstance(error, URLError) else error
    return printable(str(inner)).rstrip(".") or type(inner).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https only."""

    @override
    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not re.match(r"https?://", newurl, re.IGNORECASE):
            raise URLError(f"the server redirects to {newurl!r}, which is not an http or https URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(watch: Callable[[socket.socket], None]) -> urllib.request.OpenerDirector:
    """Return an opener for http and https, which reports each socket that it opens."""

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    class SecureConnection(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Connection, req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(SecureConnection, req)

    opener = urllib.request.OpenerDirector()  # build_opener would add file, ftp and data
    for handler in (
        urllib.request.ProxyHandler(),
        Http(),
        Https(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


@contextlib.contextmanager
def _time_limit() -> Iterator[tuple[Callable[[socket.socket], None], Callable[[], bool]]]:
    """Yield a function that has a socket shut down after a time, and one that tells if it was.

    The timeout of a socket begins again with every byte, so it does not limit the whole.
    """
    opened: list[socket.socket] = []
    expired = threading.Event()
    lock = threading.Lock()

    def watch(sock: socket.socket) -> None:
        with lock:
            opened.append(sock)
            if expired.is_set():
                _shut_down(sock)

    def expire() -> None:
        with lock:
            expired.set()
            for sock in opened:
                _shut_down(sock)

    timer = threading.Timer(_MAX_SECONDS, expire)
    timer.daemon = True
    timer.start()
    try:
        yield watch, expired.is_set
    finally:
        timer.cancel()


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        sock.shutdown(socket.SHUT_RDWR)
