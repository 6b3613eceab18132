"""``metrics.csv``: all numbers that a run logs, kept when the run is interrupted and resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from focaldet._atomic import atomic_write
from focaldet._checks import shortened
from focaldet.errors import TrainingError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["MetricsFile", "read_metrics"]

_FLUSH_EVERY = 50  # rows
_COUNTS = ("epoch", "step")


class MetricsFile(Logger):
    """Write everything that is logged to one CSV file, one row per call, and extend it on resuming.

    Lightning's ``CSVLogger`` deletes the file of the run that is resumed.

    Args:
        path: Path of the CSV file. It is rewritten atomically every 50 rows and after each epoch.
        resume_step: Step from which the run is resumed: rows from this step on are dropped. None
            starts a new file.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: list[dict[str, Any]] = []
        self._unwritten = 0
        if resume_step is not None and self.path.is_file():
            self._rows = [row for row in read_metrics(self.path) if row["step"] < resume_step]

    @property
    def name(self) -> str:
        """An empty string, because each folder holds one run."""
        return ""

    @property
    def version(self) -> str:
        """An empty string, because each folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self._rows.append({**metrics, "step": step})
        self._unwritten += 1
        if self._unwritten >= _FLUSH_EVERY:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the hyperparameters are in ``run.json``."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file if there are new rows."""
        if not self._unwritten:
            return
        columns = {key for row in self._rows for key in row}.difference(_COUNTS)
        with (
            atomic_write(self.path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, [*_COUNTS, *sorted(columns)])
            writer.writeheader()
            writer.writerows(self._rows)
        self._unwritten = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file."""
        del status
        self.save()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.csv``, leaving out empty cells.

    Raises:
        TrainingError: If the file is damaged.
    """
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError("the number of cells is wrong")  # noqa: TRY301
                rows.append({key: _number(key, value) for key, value in row.items() if value})
                if rows[-1].get("step", -1) < 0:
                    raise ValueError(f"step is {row.get('step')!r}")  # noqa: TRY301
        except (ValueError, csv.Error) as error:
            raise TrainingError(
                f"Cannot read {str(path)!r}: it is damaged near line {reader.line_num + 1} "
                f"({shortened(str(error))}). Correct the file, or move it away to continue without the "
                "rows before."
            ) from error
    return rows


def _number(column: str, text: str) -> float:
    return int(text) if column in _COUNTS else float(text)
