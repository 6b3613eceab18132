"""A server on 127.0.0.1 for tests of downloads, which can also misbehave."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

ServerType = TypeVar("ServerType", bound="LocalServer")


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Begins answers, and logs nothing. A subclass answers."""

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.send_error(404)

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class LocalServer(http.server.ThreadingHTTPServer):
    """A server on a free port."""

    daemon_threads = True

    def __init__(self, handler: type[QuietHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.released = threading.Event()  # ends a stalling answer
        self.root = f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving(server: ServerType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerType]:
    """Run a server in a thread, and no proxy in front of it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with server as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:  # a failing test must not leave the thread running
            running.released.set()
            running.shutdown()
            thread.join()
