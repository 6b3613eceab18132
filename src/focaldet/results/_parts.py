"""Predict in parts: several processes share the images, and a killed run continues.

The processes share nothing but a folder. Images are divided into parts of equal size, and part ``p``
belongs to rank ``p % world_size``. A part file is renamed to its final name when it is complete, so a
part that exists is a part that is done. Rank 0 waits until all of them exist, and joins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet._atomic import atomic_write, atomic_write_text, is_leftover
from focaldet._checks import check_integer, check_names, check_range, shortened
from focaldet.errors import FocaldetError
from focaldet.results._formats import (
    FORMATS,
    CocoIds,
    ResultsSummary,
    check_format,
    from_record,
    to_record,
    write_records,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

    from focaldet.detections import Detections
    from focaldet.results._formats import Record, ResultsFormat

__all__ = ["predict_to_folder"]

_logger = logging.getLogger(__name__)

_LARGEST_PART = 100  # images; what a killed process has to predict again
_PARTS_PER_RANK = 8  # at least, if there are enough images, so that ranks finish at similar times
_REPORT_INTERVAL = 60.0  # seconds between two lines about the progress
_LONGEST_PAUSE = 2.0  # seconds between two looks at the folder


def predict_to_folder(
    predict: Callable[[Sequence[Any]], Iterable[Detections | None]],
    paths: Sequence[Path | str],
    folder: str | os.PathLike[str],
    *,
    format: ResultsFormat = "jsonl",  # noqa: A002  # the usual name
    settings: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    image_ids: Sequence[int] | None = None,
    category_ids: Sequence[int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    resume: bool = False,
    part_size: int | None = None,
    timeout: float = 3600.0,
    on_result: Callable[[int, Detections | None], object] | None = None,
    before_cleanup: Callable[[Iterator[Detections | None]], object] | None = None,
) -> ResultsSummary | None:
    """Run a detector on image files and write its detections to a folder as they come.

    Start it in several processes, on one machine or on several that share the folder, with the same
    arguments except ``rank``. No process group is needed. The folder ``parts`` inside ``folder`` has a
    file per part and ``manifest.json``, which says what the run consists of. When all part files are
    there, rank 0 joins them in the order of ``paths`` and removes them.

    The images of a part are predicted in one call. The result therefore depends neither on the number
    of processes nor on interruptions, as long as ``part_size`` stays the same. With a different one, a
    batch may contain different images, which can change the last digits of the detections.

    Args:
        predict: Returns or yields the detections of each image, or None for an image that is skipped.
        paths: The image files, or URLs if ``predict`` downloads them.
        folder: The folder to write to. It is created if necessary.
        format: "json", "jsonl", "coco" or "parquet"; see :func:`write_results`. ``FORMATS`` has the
            names of the files.
        settings: Everything that the detections depend on, such as the score threshold and the
            :func:`model_fingerprint`, as values for ``json.dump``. A run only continues with the same
            settings.
        class_names: The name of every label, or None.
        image_ids: The id of each image in a COCO results file. None numbers them from 1.
        category_ids: The category id of each label in a COCO results file. None uses the labels.
        rank: The number of this process, from 0.
        world_size: The number of processes.
        resume: Whether to continue an unfinished run in the folder. If there is none, a new run
            starts. The number of processes may differ from before.
        part_size: Images per part. None uses up to 100, or the size with which the run was started.
        timeout: Seconds that a process waits for others without seeing a new part.
        on_result: Called with the index of an image and its detections, in the process that has
            predicted it. Images of parts that were complete before are left out.
        before_cleanup: Called on rank 0 with the detections of all images, in order and read one by
            one, after the results have been written and before the parts are removed.

    Returns:
        What was written, on rank 0. None on other ranks, which return when their own parts are done.

    Raises:
        FileExistsError: If the folder holds an unfinished run and ``resume`` is False, or, with several
            processes, a finished one.
        TimeoutError: If other processes do not make progress.
        FocaldetError: If another process has failed, or a part file is damaged.
        ValueError: If the unfinished run has other images or settings, an argument is out of range,
            ``predict`` returns a wrong number of results, or no image could be read.

    .. versionadded:: 0.3.0
    """
    paths = list(paths)
    _check_arguments(paths, rank, world_size, part_size, timeout)
    check_format("format", format)
    _check_length("image_ids", image_ids, len(paths))
    names = None if class_names is None else check_names("class_names", class_names)
    run = _Run(Path(folder), paths, settings, rank=rank, world_size=world_size, timeout=timeout)
    finished = run.start(part_size, resume=resume)
    if finished is None:
        run.predict(predict, on_result)
        if rank:
            return None
        run.wait_for_parts()
    elif rank:
        return None
    else:
        return _finished_summary(run, finished, format)
    ids = CocoIds(image_ids=image_ids, category_ids=category_ids, class_names=names)
    summary = write_records(run.records(), run.folder / FORMATS[format], format, ids)
    if before_cleanup is not None:
        before_cleanup(
            None if record is None else from_record(record, names) for record in run.records()
        )
    run.finish(summary, format)
    return summary


def _check_arguments(
    paths: Sized, rank: int, world_size: int, part_size: int | None, timeout: float
) -> None:
    if not len(paths):
        raise ValueError("paths is empty; pass at least one image file.")
    for name, value, low in (("world_size", world_size, 1), ("rank", rank, 0)):
        check_integer(name, value)
        check_range(name, value, low)
    if rank >= world_size:
        raise ValueError(
            f"rank is {rank}, but world_size is {world_size}, so ranks are 0 to {world_size - 1}."
        )
    if part_size is not None:
        check_integer("part_size", part_size)
        check_range("part_size", part_size, 1)
    check_range("timeout", timeout, 0, low_open=True)


def _check_length(name: str, values: Sized | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise ValueError(f"{name} has {len(values):,} entries, but there are {count:,} paths.")


def _finished_summary(run: _Run, finished: dict[str, Any], name: ResultsFormat) -> ResultsSummary:
    """Return the summary of a run that had finished before."""
    if finished["format"] != name:
        raise FileExistsError(
            f"The run in {str(run.folder)!r} has finished and was written as "
            f"{finished['format']!r}. Its parts are gone, so that it cannot be written as {name!r}; "
            f"remove {str(run.parts)!r} to predict again."
        )
    _logger.info("The run in %r has finished before; nothing is left to do.", str(run.folder))
    files = tuple(run.folder / file for file in finished["files"])
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"The run in {str(run.folder)!r} has finished, but {missing[0]!r} is gone. Remove "
            f"{str(run.parts)!r} to predict again."
        )
    counts = {key: finished[key] for key in ("num_images", "num_skipped", "num_detections")}
    return ResultsSummary(**counts, files=files)


class _Run:
    """The parts of a run as this process sees them."""

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path | str],
        settings: Mapping[str, Any],
        *,
        rank: int,
        world_size: int,
        timeout: float,
    ) -> None:
        self.folder, self.parts = folder, folder / "parts"
        self._paths, self._rank, self._world_size = paths, rank, world_size
        self._timeout = timeout
        self._part_size = 0  # known after start
        self._is_new_folder = False
        self._manifest = self.parts / "manifest.json"
        digest = hashlib.sha256(
            "\n".join(os.fspath(path) for path in paths).encode("utf-8", "surrogateescape")
        )
        self._content: dict[str, Any] = {
            "num_images": len(paths),
            "images_sha256": digest.hexdigest(),
            "settings": json.loads(json.dumps(dict(settings))),
        }

    # Starting

    def start(self, part_size: int | None, *, resume: bool) -> dict[str, Any] | None:
        """Start or continue a run, and return its outcome if it has finished before."""
        if self._rank == 0:
            started = self._start_first(part_size, resume=resume)
        else:
            started = self._wait_for_manifest()
            self._check_same(started)
            self._failure_of(self._rank).unlink(missing_ok=True)
        self._part_size = started["part_size"]
        if part_size not in (None, self._part_size):
            raise ValueError(
                f"part_size is {part_size}, but the run in {str(self.folder)!r} was started with "
                f"{self._part_size}. Leave part_size out to continue it."
            )
        outcome: dict[str, Any] | None = started.get("finished")
        return outcome

    def _start_first(self, part_size: int | None, *, resume: bool) -> dict[str, Any]:
        started = self._read_manifest()
        if started is not None and self._may_continue(started, resume=resume):
            self._check_same(started)
            for failure in self.parts.glob("rank-*.failed"):
                failure.unlink(missing_ok=True)
            return started
        if resume:
            _logger.info("No unfinished run in %r; starting a new run.", str(self.folder))
        self._is_new_folder = not self.folder.exists()
        self.parts.mkdir(parents=True, exist_ok=True)
        for part in self.parts.glob("part-*.jsonl"):  # of a run whose manifest somebody has removed
            part.unlink()
        started = {**self._content, "part_size": part_size or self._default_part_size()}
        atomic_write_text(self._manifest, json.dumps(started, indent=1))
        return started

    def _may_continue(self, started: dict[str, Any], *, resume: bool) -> bool:
        """Return whether to continue the run of a manifest instead of starting a new one."""
        if resume:
            return True
        if "finished" not in started:
            raise FileExistsError(
                f"{str(self.folder)!r} holds an unfinished run. Continue it with resume=True (--resume)"
                f", or remove {str(self.parts)!r} to start again."
            )
        if self._world_size > 1:  # other ranks could take the old manifest for that of this run
            raise FileExistsError(
                f"{str(self.folder)!r} holds the results of a finished run. Choose another folder, or "
                f"remove {str(self.parts)!r} before all processes start."
            )
        return False

    def _default_part_size(self) -> int:
        share = math.ceil(len(self._paths) / (self._world_size * _PARTS_PER_RANK))
        return _LARGEST_PART if self._world_size == 1 else min(_LARGEST_PART, share)

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            text = self._manifest.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
            return {**content, "part_size": int(content["part_size"])}
        except (ValueError, TypeError, KeyError) as error:
            raise FocaldetError(
                f"Cannot read {str(self._manifest)!r}: it is damaged or from a different program. "
                f"Remove {str(self.parts)!r} to start again."
            ) from error

    def _wait_for_manifest(self) -> dict[str, Any]:
        for _ in self._pauses(lambda: 0, "rank 0 to start the run"):
            started = self._read_manifest()
            if started is not None:
                return started
        raise AssertionError  # _pauses ends with an error only

    def _check_same(self, started: Mapping[str, Any]) -> None:
        """Raise unless the run was started with the same images and settings."""
        before, now = started.get("num_images"), len(self._paths)
        changes = []
        if before != now:
            changes.append(f"it has {before:,} images instead of {now:,}")
        elif started.get("images_sha256") != self._content["images_sha256"]:
            changes.append("it has other image files, or the same in a different order")
        old, new = started.get("settings", {}), self._content["settings"]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                was, now_is = shortened(old.get(name)), shortened(new.get(name))
                changes.append(f"its {name} is {was} instead of {now_is}")
        if changes:
            raise ValueError(
                f"The run in {str(self.folder)!r} was started differently: {'; '.join(changes)}. Use the "
                f"same images and settings to continue it, or choose another folder."
            )

    # Predicting

    def predict(
        self,
        predict: Callable[[Sequence[Any]], Iterable[Detections | None]],
        on_result: Callable[[int, Detections | None], object] | None,
    ) -> None:
        """Write the missing parts of this rank."""
        mine = range(self._rank, self._num_parts, self._world_size)
        missing = [part for part in mine if not self._part(part).exists()]
        if len(missing) < len(mine):
            done = len(mine) - len(missing)
            _logger.info("Continuing: %d of %d parts were done before.", done, len(mine))
        try:
            self._predict_parts(missing, predict, on_result)
        except BaseException as error:
            self._report_failure(error)
            raise

    def _predict_parts(
        self,
        missing: Sequence[int],
        predict: Callable[[Sequence[Any]], Iterable[Detections | None]],
        on_result: Callable[[int, Detections | None], object] | None,
    ) -> None:
        began = reported = time.monotonic()
        for done, part in enumerate(missing):
            if done and time.monotonic() - reported >= _REPORT_INTERVAL:
                reported = time.monotonic()
                rest = (len(missing) - done) * (reported - began) / done
                _logger.info(
                    "Predicted %d of %d parts of %d images; about %d min are left.",
                    *(done, len(missing), self._part_size, math.ceil(rest / 60)),
                )
            self._write_part(part, predict, on_result)

    def _write_part(
        self,
        part: int,
        predict: Callable[[Sequence[Any]], Iterable[Detections | None]],
        on_result: Callable[[int, Detections | None], object] | None,
    ) -> None:
        first = part * self._part_size
        paths = self._paths[first : first + self._part_size]
        count = 0
        with (
            atomic_write(self._part(part)) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for count, found in enumerate(predict(paths), start=1):
                file.write(json.dumps(to_record(found)) + "\n")
                if on_result is not None:
                    on_result(first + count - 1, found)
            if count != len(paths):
                raise ValueError(
                    f"predict returned {count} results for {len(paths)} images; it must return one "
                    "per image."
                )

    def _report_failure(self, error: BaseException) -> None:
        """Leave a message to rank 0; a run in one process that has done nothing leaves no files."""
        if self._rank:
            reason = " ".join(str(error).split()) or type(error).__name__
            with contextlib.suppress(OSError):
                atomic_write_text(self._failure_of(self._rank), reason)
        elif self._world_size == 1 and not self._count_parts():
            self._remove_parts()
            if self._is_new_folder:
                with contextlib.suppress(OSError):  # somebody has put other files there
                    self.folder.rmdir()
        else:
            _logger.warning(
                "%d of %d parts are done and kept in %r. Continue with resume=True (--resume).",
                *(self._count_parts(), self._num_parts, str(self.parts)),
            )

    # Joining

    def wait_for_parts(self) -> None:
        """Wait until the other ranks have written their parts.

        Raises:
            FocaldetError: If one of them has failed.
            TimeoutError: If no new part appears for too long.
        """
        for _ in self._pauses(self._count_parts, "the parts of other ranks"):
            if self._count_parts() == self._num_parts:
                return
            for failure in sorted(self.parts.glob("rank-*.failed")):
                rank = failure.stem.partition("-")[2]
                raise FocaldetError(
                    f"Rank {rank} has failed: {failure.read_text(encoding='utf-8').strip()} Start all "
                    "processes again with resume=True (--resume)."
                )

    def records(self) -> Iterator[Record]:
        """Read the parts, in order and one image at a time."""
        for part in range(self._num_parts):
            path = self._part(part)
            first = part * self._part_size
            expected = len(self._paths[first : first + self._part_size])
            count = 0
            with path.open(encoding="utf-8") as file:
                for count, line in enumerate(file, start=1):
                    try:
                        record: Record = json.loads(line)
                    except ValueError as error:
                        raise self._damaged(path, f"line {count} is not JSON") from error
                    yield record
            if count != expected:
                raise self._damaged(path, f"it has {count} lines instead of {expected}")

    @staticmethod
    def _damaged(path: Path, reason: str) -> FocaldetError:
        return FocaldetError(
            f"{str(path)!r} is damaged: {reason}. Remove the file and continue with resume=True "
            "(--resume)."
        )

    def finish(self, summary: ResultsSummary, name: ResultsFormat) -> None:
        """Remove the parts; with several processes, a manifest stays for those that come late."""
        outcome = {
            "format": name,
            "num_images": summary.num_images,
            "num_skipped": summary.num_skipped,
            "num_detections": summary.num_detections,
            "files": [file.name for file in summary.files],
        }
        started = {**self._content, "part_size": self._part_size, "finished": outcome}
        atomic_write_text(self._manifest, json.dumps(started, indent=1))
        if self._world_size == 1:
            self._remove_parts()
            return
        for path in self.parts.iterdir():
            if path != self._manifest:
                path.unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        """Remove the folder of the parts, and the manifest last."""
        for path in [*self.parts.glob("part-*.jsonl"), *self.parts.iterdir()]:
            if path.name.startswith(("part-", "rank-")) or is_leftover(path):
                path.unlink(missing_ok=True)
        self._manifest.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody has put other files there
            self.parts.rmdir()

    # The folder

    @property
    def _num_parts(self) -> int:
        return math.ceil(len(self._paths) / self._part_size)

    def _part(self, part: int) -> Path:
        return self.parts / f"part-{part:06d}.jsonl"

    def _failure_of(self, rank: int) -> Path:
        return self.parts / f"rank-{rank}.failed"

    def _count_parts(self) -> int:
        return sum(1 for _ in self.parts.glob("part-*.jsonl"))

    def _pauses(self, progress: Callable[[], int], what: str) -> Iterator[None]:
        """Yield again and again, with a pause in between, until there is no progress for too long."""
        pause, seen, since, reported = 0.05, progress(), time.monotonic(), time.monotonic()
        while True:
            yield
            now, current = time.monotonic(), progress()
            if current != seen:
                seen, since = current, now
            if now - since > self._timeout:
                raise TimeoutError(
                    f"Waited {self._timeout:g} s for {what} in {str(self.parts)!r}. Check the other "
                    "processes, then start all of them again with resume=True (--resume)."
                )
            if now - reported >= _REPORT_INTERVAL:
                reported = now
                _logger.info("Waiting for %s in %r.", what, str(self.parts))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
