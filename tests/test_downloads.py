"""Downloads from a server on 127.0.0.1 that fails in many ways, and the cache."""

from __future__ import annotations

import contextlib
import errno
import gc
import gzip
import hashlib
import itertools
import shutil
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from focaldet.errors import DownloadError
from focaldet.pretrained import _downloads
from focaldet.pretrained._downloads import cache_folder, download, fetch
from focaldet.pretrained._published import PUBLISHED
from tests.helpers.local_server import LocalServer, QuietHandler, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CONTENT = bytes(range(256)) * 16
SHA256 = hashlib.sha256(CONTENT).hexdigest()[:8]
QUICK: dict[str, Any] = {"wait": 0.0, "timeout": 5.0, "tries": 3}


class Handler(QuietHandler):
    """Answers each request with the next of the server's ``answers``, and repeats the last one."""

    server: Server

    def answer(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.encodings.append(self.headers.get("Accept-Encoding"))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)


class Server(LocalServer):
    """A server for one file, with a list of answers."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.answers: list[Callable[[Handler], None]] = [whole]
        self.ranges: list[str | None] = []
        self.encodings: list[str | None] = []

    @property
    def url(self) -> str:
        return f"{self.root}/weights.pth"


def whole(handler: Handler) -> None:
    """Send the file, or the requested range if the file has not changed."""
    wanted = handler.headers.get("Range")
    if wanted is None or handler.headers.get("If-Range") != '"1"':
        handler.begin(200, len(CONTENT), ETag='"1"')
        handler.wfile.write(CONTENT)
        return
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    last = len(CONTENT) - 1
    range_ = f"bytes {start}-{last}/{len(CONTENT)}"
    handler.begin(206, len(CONTENT) - start, Content_Range=range_, ETag='"1"')
    handler.wfile.write(CONTENT[start:])


def cut(at: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.begin(200, len(CONTENT), **headers)
        handler.wfile.write(CONTENT[:at])

    return answer


def stall(handler: Handler) -> None:
    handler.begin(200, len(CONTENT), ETag='"1"')
    handler.wfile.write(CONTENT[:700])
    handler.wfile.flush()
    handler.server.released.wait(5)


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.begin(code, 0)


def sending(content: bytes, length: int | None, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.begin(200, length, **headers)
        handler.wfile.write(content)

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Server(), monkeypatch) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def assert_fails(url: str, path: Path, reason: str, **options: Any) -> None:
    """Require an error with the reason, the URL and the path, and that no file is left."""
    with pytest.raises(DownloadError) as caught:
        download(url, path, **{"sha256_prefix": SHA256, "megabytes": 3, **QUICK, **options})
    message = str(caught.value)
    assert message.startswith("Could not download weights.pth: ")
    assert reason in message, message
    assert f"download {url} (about 3 MB) and save it as {str(path)!r}." in message
    assert not list(path.parent.iterdir())


def test_a_download_leaves_only_the_complete_file(server: Server, path: Path) -> None:
    assert download(server.url, path, sha256_prefix=SHA256, **QUICK) == path
    assert path.read_bytes() == CONTENT
    assert [one.name for one in path.parent.iterdir()] == ["weights.pth"]
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
    assert server.ranges == [None]


def test_an_interrupted_download_resumes_where_it_stopped(server: Server, path: Path) -> None:
    server.answers = [cut(1000, ETag='"1"'), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]


def test_a_file_that_changed_meanwhile_is_downloaded_from_the_start(
    server: Server, path: Path
) -> None:
    server.answers = [cut(1000, ETag='"0"'), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]  # If-Range did not hold


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}])
def test_without_a_strong_validator_a_download_starts_again(
    server: Server, path: Path, headers: dict[str, str]
) -> None:
    server.answers = [cut(1000, **headers), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Server, path: Path) -> None:
    server.answers = [cut(1000, ETag='"1"'), cut(2000, ETag='"1"'), sending(CONTENT, len(CONTENT))]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT


def wrong_part(handler: Handler) -> None:
    handler.begin(206, 10, Content_Range=f"bytes 5-14/{len(CONTENT)}")
    handler.wfile.write(CONTENT[5:15])


@pytest.mark.parametrize("answer", [wrong_part, status(416)])
def test_after_a_wrong_range_the_whole_file_is_requested(
    server: Server, path: Path, answer: Callable[[Handler], None]
) -> None:
    server.answers = [cut(1000, ETag='"1"'), answer, whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-", None]


def test_a_stalled_connection_is_retried(server: Server, path: Path) -> None:
    server.answers = [stall, whole]
    download(server.url, path, sha256_prefix=SHA256, **{**QUICK, "timeout": 0.2})
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=700-"]


def test_a_server_that_always_stalls_is_given_up(server: Server, path: Path) -> None:
    server.answers = [stall]
    assert_fails(server.url, path, "timed out", timeout=0.1, tries=2)
    assert len(server.ranges) == 2


def test_temporary_failures_are_retried_and_permanent_ones_are_not(
    server: Server, path: Path
) -> None:
    server.answers = [status(503), status(429), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    path.unlink()
    server.answers, server.ranges = [status(404)], []
    assert_fails(server.url, path, "the server answered 404 Not Found")
    assert len(server.ranges) == 1
    server.answers, server.ranges = [status(503)], []
    assert_fails(server.url, path, "the server answered 503 Service Unavailable")
    assert len(server.ranges) == 3


def test_attempts_that_make_progress_are_not_counted(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_downloads, "_PROGRESS", 500)
    server.answers = [*(cut(n, ETag='"1"') for n in (600, 1200, 1800, 2400, 3000)), whole]
    server.answers[1:5] = [continued(600 * i, 600 * (i + 1)) for i in range(1, 5)]
    download(server.url, path, sha256_prefix=SHA256, **{**QUICK, "tries": 2})
    assert path.read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=3000-"


def continued(
    start: int, end: int | None = None, content: bytes = CONTENT, **headers: str
) -> Callable[[Handler], None]:
    """Send the rest of the file, up to ``end``, whatever If-Range says."""

    def answer(handler: Handler) -> None:
        last, size = len(CONTENT) - 1, len(CONTENT)
        headers.setdefault("ETag", '"1"')
        handler.begin(206, size - start, Content_Range=f"bytes {start}-{last}/{size}", **headers)
        handler.wfile.write(content[start:end])

    return answer


def test_a_server_that_always_disconnects_is_given_up(server: Server, path: Path) -> None:
    server.answers = [cut(1000)]
    assert_fails(server.url, path, f"the connection ended after 1000 of {len(CONTENT)} bytes")
    assert len(server.ranges) == 3


def test_a_wrong_content_length_is_an_error(server: Server, path: Path) -> None:
    server.answers = [sending(CONTENT, len(CONTENT) + 10)]
    assert_fails(
        server.url, path, f"the connection ended after {len(CONTENT)} of {len(CONTENT) + 10} bytes"
    )
    server.answers = [sending(CONTENT, 1000)]
    assert_fails(
        server.url, path, f"its SHA-256 begins with {sha256(CONTENT[:1000])}, not {SHA256}"
    )
    assert_fails(server.url, path, "the file has 0.0 MB instead of about 3", sha256_prefix=None)
    server.answers = [cut_length("9" * 5000)]
    assert_fails(server.url, path, "SHA-256 begins with")


def cut_length(length: str) -> Callable[[Handler], None]:
    return lambda handler: handler.begin(200, None, Content_Length=length)


OTHER = bytes(reversed(CONTENT))
OLD_DATE, NEW_DATE = "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize(
    "etag", ['"2"', 'W/"1"', "1", ""], ids=["changed", "weak", "unquoted", "empty"]
)
def test_parts_of_two_files_are_never_joined(server: Server, path: Path, etag: str) -> None:
    server.answers = [
        cut(1000, ETag='"1"'),
        continued(1000, content=OTHER, ETag=etag),  # as if If-Range had been ignored
        sending(OTHER, len(OTHER), ETag='"2"'),
    ]
    download(server.url, path, **QUICK)
    assert path.read_bytes() == OTHER
    assert server.ranges == [None, "bytes=1000-", None]


def test_a_server_that_always_sends_parts_of_another_file_is_given_up(
    server: Server, path: Path
) -> None:
    server.answers = [cut(1000, ETag='"1"'), continued(1000, ETag='"2"')]
    assert_fails(server.url, path, "different range: 'bytes 1000-4095/4096'", tries=4)
    server.answers = [cut(1000, ETag='"1"'), continued(1000, ETag='"2"')]
    assert_fails(server.url, path, """its ETag was '"1"', now '"2"'""", tries=2)


class Dated(Handler):
    """Does not send the date by itself."""

    def send_response(self, code: int, message: str | None = None) -> None:
        self.send_response_only(code, message)


@pytest.mark.parametrize(
    ("headers", "part", "resumed"),
    [
        ({"Last-Modified": OLD_DATE, "Date": NEW_DATE}, {"Last-Modified": OLD_DATE}, True),
        ({"Last-Modified": OLD_DATE, "Date": NEW_DATE}, {"Last-Modified": NEW_DATE}, False),
        ({"Last-Modified": OLD_DATE, "Date": NEW_DATE}, {}, False),
    ],
    ids=["same date", "other date", "no date"],
)
def test_a_part_is_joined_under_the_same_strong_date(
    server: Server, path: Path, headers: dict[str, str], part: dict[str, str], resumed: bool
) -> None:
    server.RequestHandlerClass = Dated
    rest = continued(1000, None, CONTENT, ETag="", **part)
    server.answers = [cut(1000, **headers), rest, sending(CONTENT, len(CONTENT))]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"] + [None] * (not resumed)


@pytest.mark.parametrize(
    "headers",
    [
        {"Last-Modified": OLD_DATE, "Date": OLD_DATE},  # may have changed again in that second
        {"Last-Modified": NEW_DATE, "Date": OLD_DATE},
        {"Last-Modified": OLD_DATE},
        {"Last-Modified": "yesterday", "Date": NEW_DATE},
        {"Last-Modified": OLD_DATE, "Date": NEW_DATE[:-4]},  # no time zone: not comparable
        {"Last-Modified": OLD_DATE, "Date": NEW_DATE, "ETag": 'W/"1"'},  # a tag excludes the date
    ],
)
def test_a_weak_date_is_not_a_reason_to_resume(
    server: Server, path: Path, headers: dict[str, str]
) -> None:
    server.RequestHandlerClass = Dated
    server.answers = [cut(1000, **headers), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("megabytes", [0.0001, None])
@pytest.mark.parametrize("length", [None, len(CONTENT)])
def test_a_file_far_larger_than_expected_is_not_downloaded(
    server: Server,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    megabytes: float | None,
    length: int | None,
) -> None:
    monkeypatch.setattr(_downloads, "_MAX_SIZE", 400)
    server.answers = [sending(CONTENT, length)]
    message = r"at least 0\.0 MB, but at most 0\.0 MB are accepted"
    with pytest.raises(DownloadError, match=message):
        download(server.url, path, megabytes=megabytes, **QUICK)
    assert len(server.ranges) == 1
    assert not list(path.parent.iterdir())


def test_a_download_without_an_end_stops_at_the_limit(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_downloads, "_MAX_SIZE", 10**6)

    def endless(handler: Handler) -> None:
        handler.begin(200, None)
        with contextlib.suppress(ConnectionError):  # the client hangs up
            while not handler.server.released.is_set():
                handler.wfile.write(CONTENT)

    server.answers = [endless]
    with pytest.raises(DownloadError, match=r"at most 1\.0 MB are accepted"):
        download(server.url, path, **QUICK)


def test_an_encoded_file_is_an_error(server: Server, path: Path) -> None:
    packed = gzip.compress(CONTENT)
    server.answers = [sending(packed, len(packed), Content_Encoding="gzip")]
    assert_fails(server.url, path, "Content-Encoding 'gzip', which was not requested")
    assert len(server.ranges) == 1
    server.answers = [sending(CONTENT, len(CONTENT), Content_Encoding="Identity")]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert server.encodings == ["identity"] * 2


def ticking(seconds: float) -> Callable[[], float]:
    """Return a clock that is ``seconds`` later every time it is read."""
    times = itertools.count()
    return lambda: next(times) * seconds


def test_a_server_that_trickles_is_interrupted_and_given_up(server: Server, path: Path) -> None:
    def trickle(handler: Handler) -> None:
        handler.begin(200, len(CONTENT), ETag='"1"')
        for byte in CONTENT[:100]:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    server.answers = [trickle, whole]
    download(server.url, path, sha256_prefix=SHA256, clock=ticking(61), **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges[0] is None
    assert len(server.ranges) == 2
    path.unlink()
    server.answers = [trickle]
    assert_fails(server.url, path, "the server is too slow: it sent", clock=ticking(61), tries=2)


def test_a_slow_server_above_the_least_rate_is_not_interrupted(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_downloads, "_LEAST_PER_WINDOW", 100)
    monkeypatch.setattr(_downloads, "_CHUNK_SIZE", 512)
    server.answers = [whole, status(404)]
    download(server.url, path, sha256_prefix=SHA256, clock=ticking(61), **QUICK)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # urllib leaves the socket open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("url", ["http://[", "http://a b/", "http://\u00e9" + "x" * 70 + "/"])
def test_a_redirection_to_an_invalid_url_is_an_error(server: Server, path: Path, url: str) -> None:
    server.answers = [lambda handler: handler.begin(302, 0, Location=url)]
    assert_fails(server.url, path, "")
    gc.collect()


def test_messages_repeat_no_control_characters_of_a_server(server: Server, path: Path) -> None:
    server.answers = [lambda handler: handler.send_error(404, "gone\x1b[31m")]
    assert_fails(server.url, path, "the server answered 404 gone?[31m")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def test_without_a_content_length_the_hash_decides(server: Server, path: Path) -> None:
    server.answers = [sending(CONTENT, None)]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    path.unlink()
    server.answers = [sending(CONTENT[:-1], None)]
    assert_fails(server.url, path, "SHA-256 begins with")


def test_a_different_file_is_never_kept(server: Server, path: Path) -> None:
    server.answers = [sending(b"something else", 14)]
    assert_fails(server.url, path, f"SHA-256 begins with {sha256(b'something else')}, not {SHA256}")
    assert len(server.ranges) == 1
    server.answers = [sending(b"<html>Log in", 12, Content_Type="text/html; charset=utf-8")]
    assert_fails(
        server.url, path, "the server sent a web page, perhaps a network login", sha256_prefix=None
    )


def test_without_a_network_the_error_says_where_to_save_the_file(path: Path) -> None:
    with Server() as gone:
        url = gone.url  # nothing listens on this port any more
    assert_fails(url, path, "refused", wait=60)
    url = "http://weights.invalid/weights.pth"
    assert_fails(url, path, "", wait=60)


def test_a_full_disk_is_reported_before_and_during_writing(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = types.SimpleNamespace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert_fails(server.url, path, "the disk has 0 MB free, but 0 MB are needed")

    def no_space(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(transfer: Any, chunk: bytes) -> None:
        transfer.file = types.SimpleNamespace(write=no_space)
        original(transfer, chunk)

    original = _downloads._Transfer._write
    monkeypatch.setattr(_downloads._Transfer, "_write", write)
    server.ranges.clear()
    assert_fails(server.url, path, "writing failed: [Errno 28] No space left on device")
    assert len(server.ranges) == 1


def test_an_interrupted_download_leaves_nothing(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_downloads._Transfer, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(server.url, path, **QUICK)
    assert not list(path.parent.iterdir())


def test_two_downloads_of_one_file_do_not_interfere(server: Server, path: Path) -> None:
    both = threading.Barrier(2)

    def together(handler: Handler) -> None:
        handler.begin(200, len(CONTENT))
        handler.wfile.write(CONTENT[:2000])
        handler.wfile.flush()
        both.wait(5)
        handler.wfile.write(CONTENT[2000:])

    server.answers = [together]
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(download, server.url, path, sha256_prefix=SHA256, **QUICK) for _ in range(2)
        ]
        assert {one.result() for one in done} == {path}
    assert path.read_bytes() == CONTENT
    assert [one.name for one in path.parent.iterdir()] == ["weights.pth"]


def test_downloads_work_without_tqdm(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    server.answers = [cut(1000, ETag='"1"'), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT


def test_a_terminal_shows_a_progress_bar(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    server.answers = [cut(1000, ETag='"1"'), whole]
    download(server.url, path, sha256_prefix=SHA256, **QUICK)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("weights.pth: 100%")
    assert "4.10k/4.10k" in last


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOCALDET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_cache_is_focaldets_home_or_torchs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == home
    monkeypatch.delenv("FOCALDET_HOME")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hub" / "checkpoints"


def test_a_cached_file_needs_no_network_and_is_verified_every_time(
    server: Server, home: Path
) -> None:
    entry = replace(PUBLISHED[0], url=server.url, sha256_prefix=SHA256)
    path = home / entry.file_name
    assert fetch(entry) == path
    assert fetch(entry) == path
    assert len(server.ranges) == 1
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=rf"is not {entry.name}: .*not {SHA256}. Delete it"):
        fetch(entry)
    assert path.exists()  # only the user may delete it


def test_a_file_that_needs_a_browser_is_read_from_the_cache_or_requested(home: Path) -> None:
    [entry] = [one for one in PUBLISHED if one.by_hand]
    with pytest.raises(DownloadError) as caught:
        fetch(entry)
    assert str(caught.value) == (
        "'yhenon/coco_resnet_50_map_0_335' can only be downloaded with a browser. To use it without "
        "a network, download https://drive.google.com/open?id=1yLmjq3JtXi841yXWBxst0coAgR26MNBS "
        f"(about 152 MB) and save it as {str(home / 'coco_resnet_50_map_0_335_state_dict.pt')!r}."
    )
    home.mkdir()
    (home / entry.file_name).write_bytes(b"")
    assert fetch(entry) == home / entry.file_name
