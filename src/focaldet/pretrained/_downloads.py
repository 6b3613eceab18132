"""Download published files: resume after an interruption, verify, and cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from focaldet._atomic import atomic_write
from focaldet._checks import shortened
from focaldet.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DownloadError", "PublishedFile", "cache_folder", "download", "fetch"]

_CHUNK_SIZE = 1 << 18
_PROGRESS = 1 << 20  # bytes; an attempt that received this many does not count as a failure
_NO_CONNECTION = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)
_MAX_GROWTH = 4  # times the expected size, which may be that of the parameters alone
_MAX_SIZE = 4_000_000_000  # bytes, if the size is not known
_WINDOW = 60.0  # seconds over which the rate is measured
_LEAST_PER_WINDOW = 1 << 16  # bytes; about 1 kB/s
_DATE_MARGIN = 60.0  # seconds, for clocks that differ
_TEMPORARY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_RANGE_NOT_SATISFIABLE = 416

_logger = logging.getLogger(__name__)


class PublishedFile(Protocol):
    """What a download needs to know about a file, such as an entry of the published table.

    .. versionadded:: 0.3.0
    """

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def url(self) -> str:
        """The URL of the file."""

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""

    @property
    def sha256_prefix(self) -> str | None:
        """The first hexadecimal digits of its SHA-256, or None if it is not published."""

    @property
    def megabytes(self) -> int | None:
        """Its size in 10^6 bytes, or None if it is not known."""

    @property
    def by_hand(self) -> bool:
        """Whether the file can only be downloaded with a browser."""


class _PermanentError(Exception):
    """A failure that another attempt would not change."""


def cache_folder() -> Path:
    """Return the folder in which published files are cached.

    This is ``$FOCALDET_HOME``, if set, or the folder ``checkpoints`` in torch's hub directory. That
    folder is shared with torchvision and others, so files that they have downloaded are found.
    """
    home = os.environ.get("FOCALDET_HOME")
    return Path(home).expanduser() if home else Path(torch.hub.get_dir()) / "checkpoints"


def fetch(weights: PublishedFile) -> Path:
    """Return the path of a published file in the cache, downloading it first if necessary.

    A cached file needs no network. If a hash is published, the file is compared with it every time,
    so a file that was put there by hand is checked, too.

    Args:
        weights: The file: an entry of the published table, or the weights of a backbone.

    Raises:
        DownloadError: If there is no network, no such file, a full disk, or a file that is not the
            published one.
    """
    path = cache_folder() / weights.file_name
    if path.is_file():
        try:
            _check(path, weights.sha256_prefix, None)
        except _PermanentError as error:
            raise DownloadError(
                f"{str(path)!r} is not {weights.name}: {error}. Delete it to download it again."
            ) from error
        return path
    if weights.by_hand:
        raise DownloadError(
            f"{weights.name!r} can only be downloaded with a browser. "
            f"{_manual_download(weights.url, path, weights.megabytes)}"
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
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """Download a file, verify it, and only then give it its name.

    An interrupted download resumes where it stopped if the server supports that and confirms, by the
    same strong validator, that the file has not changed. Otherwise it starts again. A server that sends
    less than 64 KiB in a minute counts as interrupted. The partial file has a random name, so several
    processes can download the same file, and is removed if the download fails. Proxies are taken from
    the environment.

    Args:
        url: The file's URL, http or https.
        path: The path to write. Its folder is created if it does not exist.
        sha256_prefix: The first hexadecimal digits of the file's SHA-256. Without it, the file must
            have the length that the server reports, if any, and at least half of ``megabytes``.
        megabytes: The expected size in 10^6 bytes. None if it is not known. A file of more than four
            times this size, or of more than 4 GB if it is None, is not downloaded.
        timeout: Seconds without data after which the connection counts as interrupted.
        tries: Number of consecutive attempts without progress after which to give up.
        wait: Seconds before the second attempt, doubled before each further one.
        clock: The clock that the rate is measured with.

    Returns:
        The path.

    Raises:
        DownloadError: If the download fails. The message says why, and how to put the file in place
            by hand.
    """
    _logger.info("Downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            with part.open("wb") as file:
                max_size = _MAX_SIZE if megabytes is None else int(_MAX_GROWTH * megabytes * 1e6)
                transfer = _Transfer(url, file, path, timeout, max_size=max_size, clock=clock)
                transfer.run(tries, wait)
            _check(part, sha256_prefix, megabytes)
    except (_PermanentError, OSError, HTTPException) as error:
        raise DownloadError(
            f"Could not download {path.name}: {_reason(error)}. "
            f"{_manual_download(url, path, megabytes)}"
        ) from error
    return path


def _manual_download(url: str, path: Path, megabytes: float | None) -> str:
    size = "unknown size" if megabytes is None else f"about {megabytes:g} MB"
    return f"To use it without a network, download {url} ({size}) and save it as {str(path)!r}."


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return _printable(f"the server answered {error.code} {error.reason}")
    inner = error.reason if isinstance(error, URLError) else error
    return _printable(str(inner)) or type(inner).__name__


def _printable(text: str) -> str:
    """Return a text that may repeat what a server sent, without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)[:300]


def _check(path: Path, sha256_prefix: str | None, megabytes: float | None) -> None:
    """Raise unless a file has the expected hash or, if that is not known, about the expected size."""
    if sha256_prefix is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[: len(sha256_prefix)]
        if found != sha256_prefix:
            raise _PermanentError(f"its SHA-256 begins with {found}, not {sha256_prefix}")
    elif megabytes is not None and path.stat().st_size < megabytes * 1e6 / 2:
        size = path.stat().st_size / 1e6
        raise _PermanentError(f"the file has {size:.1f} MB instead of about {megabytes:g}")


class _Transfer:
    """The state of one download: what has been received, and how to resume it."""

    def __init__(
        self,
        url: str,
        file: BinaryIO,
        target: Path,
        timeout: float,
        *,
        max_size: int,
        clock: Callable[[], float],
    ) -> None:
        self.url, self.file, self.target, self.timeout = url, file, target, timeout
        self.max_size, self.clock = max_size, clock
        self.received = 0
        self.total: int | None = None
        self.validator: tuple[str, str] | None = None  # the header that identifies the version
        self.bar = _progress_bar(target.name)

    def run(self, tries: int, wait: float) -> None:
        failures, furthest = 0, 0
        try:
            while True:
                try:
                    self._try_once()
                except (OSError, HTTPException) as error:
                    if isinstance(error, HTTPError):
                        self._handle_status(error)
                    if self.received >= furthest + _PROGRESS:
                        failures, furthest = 0, self.received
                    failures += 1
                    if failures >= tries or (not self.received and _has_no_connection(error)):
                        raise
                    _logger.info(
                        "Download of %s interrupted (%s); retrying", self.url, _reason(error)
                    )
                else:
                    return
                time.sleep(wait * 2 ** (failures - 1))
        finally:
            self.bar.close()

    def _try_once(self) -> None:
        headers = {"User-Agent": "focaldet", "Accept-Encoding": "identity"}
        if self.received and self.validator:
            headers |= {"Range": f"bytes={self.received}-", "If-Range": self.validator[1]}
        with self._open(Request(self.url, headers=headers)) as response:  # noqa: S310
            self._begin(response.status, response.headers)
            begin, received = self.clock(), self.received
            while chunk := response.read1(self._max_chunk):  # read would lose a partial chunk
                self._write(chunk)
                now = self.clock()
                if now - begin >= _WINDOW and self.received != self.total:
                    self._check_rate(now - begin, self.received - received)
                    begin, received = now, self.received
        if self.total is not None and self.received != self.total:
            raise ConnectionError(
                f"the connection ended after {self.received} of {self.total} bytes"
            )

    def _open(self, request: Request) -> Any:
        try:
            return urlopen(request, timeout=self.timeout)  # noqa: S310
        except ValueError as error:
            raise _PermanentError(f"the server redirects to an invalid URL ({error})") from error

    @staticmethod
    def _check_rate(seconds: float, received: int) -> None:
        if received < _LEAST_PER_WINDOW * seconds / _WINDOW:
            raise ConnectionError(
                f"the server is too slow: it sent {received} bytes in {seconds:.0f} s"
            )

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        if headers.get("Content-Type", "").startswith("text/html"):
            raise _PermanentError("the server sent a web page, perhaps a network login")
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise _PermanentError(
                f"the server sent the file with Content-Encoding {shortened(encoding)}, which was not "
                "requested"
            )
        if status == 206:
            self._check_part(headers)
        else:
            self._restart()
            length = headers.get("Content-Length", "")
            self.total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
            # Without a length, the range of a continuation could not be checked.
            self.validator = None if self.total is None else _strong_validator(headers)
        if self.total is not None and self.total > self.max_size:
            raise _PermanentError(self._too_large(self.total))
        self.bar.total = self.total
        remaining = (self.total or 0) - self.received
        free = shutil.disk_usage(self.target.parent).free
        if remaining > free:
            raise _PermanentError(
                f"the disk has {free / 1e6:.0f} MB free, but {remaining / 1e6:.0f} MB are needed"
            )

    def _check_part(self, headers: Mapping[str, str]) -> None:
        """Raise, and forget what was received, unless a partial response continues the same file."""
        name, value = self.validator or ("ETag", "")
        found = headers.get(name)
        content_range = headers.get("Content-Range")
        if content_range != f"bytes {self.received}-{self._last}/{self.total}":
            self._restart()
            raise ConnectionError(f"the server sent a different range: {shortened(content_range)}")
        if found != value:  # a server may ignore If-Range
            self._restart()
            raise ConnectionError(
                f"the file may have changed: its {name} was {shortened(value)}, now {shortened(found)}"
            )

    def _too_large(self, size: int) -> str:
        return (
            f"the file has at least {size / 1e6:.1f} MB, but at most {self.max_size / 1e6:.1f} MB are "
            "accepted"
        )

    @property
    def _max_chunk(self) -> int:
        return _CHUNK_SIZE if self.total is None else min(_CHUNK_SIZE, self.total - self.received)

    @property
    def _last(self) -> int | None:
        return None if self.total is None else self.total - 1

    def _restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received, self.validator = 0, None
        self.bar.reset()

    def _write(self, chunk: bytes) -> None:
        if self.received + len(chunk) > self.max_size:
            raise _PermanentError(self._too_large(self.received + len(chunk)))
        try:
            self.file.write(chunk)
        except OSError as error:  # such as a full disk
            raise _PermanentError(f"writing failed: {error}") from error
        self.received += len(chunk)
        self.bar.update(len(chunk))

    def _handle_status(self, error: HTTPError) -> None:
        error.close()
        if error.code == _RANGE_NOT_SATISFIABLE and self.received:
            self._restart()
        elif error.code not in _TEMPORARY_STATUSES:
            raise _PermanentError(_reason(error)) from error


def _strong_validator(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the header that a later response must repeat to be of the same file, or None.

    A date is used only without an entity tag, and only if the response is so much younger that the file
    can't have changed again within that second.

    References:
        Fielding et al., HTTP Semantics, RFC 9110, sections 8.8.2.2 and 13.1.5.
    """
    etag = headers.get("ETag")
    if etag is not None:
        return ("ETag", etag) if etag.startswith('"') else None
    modified = headers.get("Last-Modified", "")
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
    except (TypeError, ValueError, OverflowError):
        return None
    return ("Last-Modified", modified) if age.total_seconds() >= _DATE_MARGIN else None


def _has_no_connection(error: Exception) -> bool:
    return isinstance(error, URLError) and isinstance(error.reason, _NO_CONNECTION)


class _NoBar:
    """Stands in for the progress bar if tqdm is not installed."""

    total: int | None = None

    def update(self, count: int) -> None: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


def _progress_bar(name: str) -> Any:
    if importlib.util.find_spec("tqdm") is None:
        return _NoBar()
    from tqdm.auto import tqdm

    # disable=None shows the bar only on a terminal.
    return tqdm(desc=name, unit="B", unit_scale=True, disable=None)
