"""Published files, fetched once: resumed after a cut, checked, and named only when they are whole."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import socket
import ssl
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from focaldet._atomic import atomic_write
from focaldet.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from focaldet.pretrained._published import PublishedWeights

__all__ = ["DownloadError", "cache_folder", "download", "fetch"]

_CHUNK = 1 << 18
_WORTHWHILE = 1 << 20  # a try that brought this much was not in vain
_HOPELESS = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP answers that may be another one soon
_RANGE_REFUSED = 416

_logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """Trying again would not help."""


def cache_folder() -> Path:
    """Return where published files are kept.

    It is ``$FOCALDET_HOME``, or else the folder ``checkpoints`` of torch's hub directory, where
    torchvision and others keep theirs: what they have fetched is found.
    """
    home = os.environ.get("FOCALDET_HOME")
    return Path(home).expanduser() if home else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(weights: PublishedWeights) -> Path:
    """Return a published file's path in the cache, after downloading it if it is not there.

    A file in the cache needs no network. Where a hash is published the file is held against it each
    time, so that one put there by hand is checked too.

    Args:
        weights: an entry of the table.

    Raises:
        DownloadError: no network, no such file, a full disk, or a file that is not the published one.
    """
    path = cache_folder() / weights.file_name
    if path.is_file():
        try:
            _check(path, weights.sha256_prefix, None)
        except _RefusedError as error:
            remedy = "Delete it, and it is downloaded anew."
            raise DownloadError(
                f"{str(path)!r} is not {weights.name}: {error}. {remedy}"
            ) from error
        return path
    if weights.by_hand:
        raise DownloadError(
            f"{weights.name!r} can only be fetched with a browser. "
            f"{_by_hand(weights.url, path, weights.megabytes)}"
        )
    return download(
        weights.url, path, sha256_prefix=weights.sha256_prefix, megabytes=weights.megabytes
    )


def download(
    url: str,
    path: Path,
    *,
    sha256_prefix: str | None = None,
    megabytes: float | None = None,
    timeout: float = 30.0,
    tries: int = 5,
    wait: float = 1.0,
) -> Path:
    """Download a file; it gets its name when it is whole and has been checked.

    After a cut it goes on where it was if the server can do so, and else from the start. The part
    that is there so far has a name of its own, so that two processes do each other no harm, and is
    removed when the download fails. Proxies are taken from the environment.

    Args:
        url: of the file, http or https.
        path: to be; its folder is made.
        sha256_prefix: the first hexadecimal digits of the file's SHA-256. Without, a length that the
            server states must be kept, and the file have half of ``megabytes`` at least.
        megabytes: the size to be expected, in 10^6 bytes, for messages.
        timeout: seconds without a byte after which the connection counts as cut.
        tries: attempts in a row that brought nothing new, after which it gives up.
        wait: seconds before the second try, doubled before each further one.

    Raises:
        DownloadError: with the reason, the URL, and where to put the file by hand.
    """
    _logger.info("downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            with part.open("wb") as file:
                _Transfer(url, file, path, timeout).run(tries, wait)
            _check(part, sha256_prefix, megabytes)
    except (_RefusedError, OSError, HTTPException) as error:
        raise DownloadError(
            f"{path.name} could not be downloaded: {_reason(error)}. {_by_hand(url, path, megabytes)}"
        ) from error
    return path


def _by_hand(url: str, path: Path, megabytes: float | None) -> str:
    size = "size not known" if megabytes is None else f"about {megabytes:g} MB"
    return f"Fetch {url} ({size}) and put it at {str(path)!r}; no network is needed then."


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    inner = error.reason if isinstance(error, URLError) else error
    return str(inner) or type(inner).__name__


def _check(path: Path, sha256_prefix: str | None, megabytes: float | None) -> None:
    """Raise unless a file has the hash or, where none is known, about the size that is wanted."""
    if sha256_prefix is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[: len(sha256_prefix)]
        if found != sha256_prefix:
            raise _RefusedError(f"the file's SHA-256 begins with {found}, not {sha256_prefix}")
    elif megabytes is not None and path.stat().st_size < megabytes * 1e6 / 2:
        size = path.stat().st_size / 1e6
        raise _RefusedError(f"the file has {size:.1f} MB, not about {megabytes:g}")


class _Transfer:
    """One file on its way: how much has come, and how to go on after a cut."""

    def __init__(self, url: str, file: BinaryIO, target: Path, timeout: float) -> None:
        self.url, self.file, self.target, self.timeout = url, file, target, timeout
        self.received = 0
        self.total: int | None = None
        self.validator: str | None = (
            None  # by which the server knows that the file is still the same
        )
        self.bar = _progress_bar(target.name)

    def run(self, tries: int, wait: float) -> None:
        failures, furthest = 0, 0
        try:
            while True:
                try:
                    self._try_once()
                except (OSError, HTTPException) as error:
                    if isinstance(error, HTTPError):
                        self._consider_answer(error)
                    if self.received >= furthest + _WORTHWHILE:
                        failures, furthest = 0, self.received
                    failures += 1
                    if failures >= tries or (not self.received and _is_hopeless(error)):
                        raise
                    _logger.info("%s: %s; trying again", self.url, _reason(error))
                else:
                    return
                time.sleep(wait * 2 ** (failures - 1))
        finally:
            self.bar.close()

    def _try_once(self) -> None:
        request = Request(self.url, headers={"User-Agent": "focaldet"})  # noqa: S310
        if self.received and self.validator:
            request.add_header("Range", f"bytes={self.received}-")
            request.add_header("If-Range", self.validator)
        with urlopen(request, timeout=self.timeout) as response:  # noqa: S310
            self._begin(response.status, response.headers)
            while chunk := response.read1(self._wanted):  # unlike read, loses nothing at a cut
                self._write(chunk)
        if self.total is not None and self.received != self.total:
            raise ConnectionError(f"cut after {self.received} of {self.total} bytes")

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        if headers.get("Content-Type", "").startswith("text/html"):
            raise _RefusedError("a web page came, perhaps the network's login")
        if status != 206:
            self._restart()
            length = headers.get("Content-Length", "")
            self.total = int(length) if length.isdecimal() else None
            etag = headers.get("ETag", "")
            self.validator = etag if etag.startswith('"') else headers.get("Last-Modified")
        elif headers.get("Content-Range") != f"bytes {self.received}-{self._last}/{self.total}":
            self._restart()
            raise ConnectionError(f"another part came: {headers.get('Content-Range')}")
        self.bar.total = self.total
        missing = (self.total or 0) - self.received
        free = shutil.disk_usage(self.target.parent).free
        if missing > free:
            raise _RefusedError(f"{missing / 1e6:.0f} MB are missing and {free / 1e6:.0f} MB free")

    @property
    def _wanted(self) -> int:
        return _CHUNK if self.total is None else min(_CHUNK, self.total - self.received)

    @property
    def _last(self) -> int | None:
        return None if self.total is None else self.total - 1

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received, self.validator = 0, None
        self.bar.reset()

    def _write(self, chunk: bytes) -> None:
        try:
            self.file.write(chunk)
        except OSError as error:  # a full disk: not the network's fault
            raise _RefusedError(f"writing failed: {error}") from error
        self.received += len(chunk)
        self.bar.update(len(chunk))

    def _consider_answer(self, error: HTTPError) -> None:
        error.close()
        if error.code == _RANGE_REFUSED and self.received:
            self._restart()
        elif error.code not in _PASSING:
            raise _RefusedError(_reason(error)) from error


def _is_hopeless(error: Exception) -> bool:
    return isinstance(error, URLError) and isinstance(error.reason, _HOPELESS)


class _NoBar:
    """A progress bar that shows nothing."""

    total: int | None = None

    def update(self, count: int) -> None: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


def _progress_bar(name: str) -> Any:
    if importlib.util.find_spec("tqdm") is None:
        return _NoBar()
    from tqdm.auto import tqdm

    # disable=None: only where a person is watching
    return tqdm(desc=name, unit="B", unit_scale=True, disable=None)
