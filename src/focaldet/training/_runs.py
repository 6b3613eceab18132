"""Read the folders of runs, and compare the runs in a table."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet._checks import existing_folder, is_number, printable, shortened
from focaldet.errors import TrainingError
from focaldet.training._metrics_file import read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Run", "RunTable", "list_runs", "read_run"]

_RUN_FILE = "run.json"
_AP = "val/AP"
_LONGEST_CELL = 40  # characters
_STATUSES = ("running", "finished", "stopped", "failed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of one run say about it.

    Attributes:
        folder: Folder of the run.
        status: "running", "finished", "stopped" (by a signal), "failed"; "unknown" for a run of
            focaldet 0.2.0 without its last model; or "damaged" if ``run.json`` cannot be read. A run
            whose process was killed still says "running".
        best_ap: Highest validation AP, in [0, 1], or None if there is none.
        best_epoch: Its epoch, counted from 1.
        epochs: Number of completed epochs, or None if it is not known.
        options: The options of the run, as :class:`~focaldet.training.TrainingOptions` has them.
        config: The model, as :class:`~focaldet.RetinaNetConfig` has it.
        data: What is known about the data: "train" and perhaps "val", a dictionary each.
        recipe: How the run was set up, or None if the run does not say.
        problem: What is wrong with the files or what made the run fail; "" if nothing.

    .. versionadded:: 0.3.0
    """

    folder: Path
    status: str
    best_ap: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """Runs and what differs between them. It prints as a table.

    Attributes:
        folder: The folder that was searched.
        runs: The runs, ordered by folder.
        differences: Names of the options, fields of the config and parts of the data that are not the
            same in all runs, each with one value per run, which is None if the run does not say.

    .. versionadded:: 0.3.0
    """

    folder: Path
    runs: tuple[Run, ...]
    differences: dict[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def name_of(self, run: Run) -> str:
        """Return the folder of a run relative to the folder that was searched."""
        name = os.path.relpath(run.folder, self.folder)
        return run.folder.name if name == os.curdir else name

    def to_dict(self) -> dict[str, Any]:
        """Return the table as values for JSON: one dictionary per run, with what differs.

        ``{"folder": ..., "runs": [{"name", "status", "best_ap", "best_epoch", "epochs", "recipe",
        "differences", "problem"}, ...]}``
        """
        rows = [
            {
                "name": self.name_of(run),
                "status": run.status,
                "best_ap": run.best_ap,
                "best_epoch": run.best_epoch,
                "epochs": run.epochs,
                "recipe": _recipe_name(run),
                "differences": {name: values[i] for name, values in self.differences.items()},
                "problem": run.problem,
            }
            for i, run in enumerate(self.runs)
        ]
        return {"folder": str(self.folder), "runs": rows}

    def __str__(self) -> str:
        if not self.runs:
            return f"There are no runs in {str(self.folder)!r}."
        header = ["run", "status", "best AP", "epochs", *self.differences]
        rows = [
            [
                self.name_of(run),
                run.status,
                _best(run),
                _progress(run),
                *(_cell(values[i]) for values in self.differences.values()),
            ]
            for i, run in enumerate(self.runs)
        ]
        lines = _aligned([header, *([printable(cell) for cell in row] for row in rows)])
        problems = [
            f"{printable(self.name_of(run))}: {printable(run.problem)}"
            for run in self.runs
            if run.problem
        ]
        return "\n".join([*lines, *([""] if problems else []), *problems])


def list_runs(folder: str | os.PathLike[str]) -> RunTable:
    """Find the runs in a folder and in the folders below it, and compare them.

    Only small files are read: ``run.json``, ``config.json``, and ``metrics.csv`` for runs of focaldet
    0.2.0, which do not say their best AP. A file that is damaged does not raise an error but is
    reported in the row of its run.

    Args:
        folder: Folder to search. Folders of runs are not searched further.

    Returns:
        The runs in the order of their folders. ``print`` shows them as a table.

    Raises:
        FileNotFoundError: If there is no such folder.

    .. versionadded:: 0.3.0
    """
    folder = existing_folder("folder", folder)
    runs = tuple(_read_or_report(path) for path in _run_folders(folder))
    return RunTable(folder=folder, runs=runs, differences=_differences(runs))


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the files that describe one run.

    Args:
        folder: Folder of the run.

    Raises:
        FileNotFoundError: If there is no such folder, or it is not the folder of a run.
        TrainingError: If a file is damaged.

    .. versionadded:: 0.3.0
    """
    folder = existing_folder("folder", folder)
    if not (folder / _RUN_FILE).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is not the folder of a run: it has no {_RUN_FILE}. Pass the folder that "
            "was the output of a training."
        )
    content = _read_json(folder / _RUN_FILE)
    config = _dictionary(content, "config") or _config_of(folder)
    result = _dictionary(content, "result")
    status = content.get("status")
    if status not in _STATUSES:
        status = "finished" if (folder / "last" / "config.json").is_file() else "unknown"
    best_ap, best_epoch, epochs, problem = _result(folder, result)
    error = content.get("error")
    return Run(
        folder=folder,
        status=status,
        best_ap=best_ap,
        best_epoch=best_epoch,
        epochs=epochs,
        options=_dictionary(content, "options"),
        config=config,
        data=_dictionary(content, "data"),
        recipe=_dictionary(content, "recipe") or None,
        problem=error if isinstance(error, str) else problem,
    )


def _run_folders(folder: Path) -> list[Path]:
    found = []
    for place, names, files in os.walk(folder):
        if _RUN_FILE in files:
            found.append(Path(place))
            names.clear()
    return sorted(found)


def _read_or_report(folder: Path) -> Run:
    try:
        return read_run(folder)
    except (TrainingError, OSError) as error:
        return Run(folder=folder, status="damaged", problem=str(error))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TrainingError(
            f"Cannot read {str(path)!r}: it is damaged ({type(error).__name__}: "
            f"{shortened(str(error))})."
        ) from error
    if not isinstance(content, dict):
        raise TrainingError(
            f"Cannot read {str(path)!r}: it must hold a JSON object, but holds {shortened(content)}."
        )
    return content


def _dictionary(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of ``run.json``, or an empty dictionary if an old run lacks it."""
    value = content.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TrainingError(
            f"{_RUN_FILE} is damaged: {name!r} must be an object, but is {shortened(value)}."
        )
    return value


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _result(
    folder: Path, result: dict[str, Any]
) -> tuple[float | None, int | None, int | None, str]:
    """Return the best AP, its epoch, the number of epochs, and what is wrong with ``metrics.csv``.

    Runs of focaldet 0.2.0, runs in progress and killed runs have no result in ``run.json``.
    """
    if result:
        best_ap, best_epoch = _number(result.get("best_ap")), _number(result.get("best_epoch"))
        epochs = _number(result.get("epochs"))
        return best_ap, _whole(best_epoch), _whole(epochs), ""
    path = folder / "metrics.csv"
    if not path.is_file():
        return None, None, None, ""
    try:
        rows = read_metrics(path)
    except (TrainingError, OSError) as error:
        return None, None, None, str(error)
    aps = [(row[_AP], row["epoch"]) for row in rows if _AP in row and "epoch" in row]
    aps = [(ap, epoch) for ap, epoch in aps if math.isfinite(ap)]
    if not aps:
        return None, None, None, ""
    best_ap, best = max(aps, key=lambda pair: pair[0])
    return best_ap, int(best) + 1, int(max(epoch for _, epoch in aps)) + 1, ""


def _number(value: object) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else None  # type: ignore[arg-type]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _differences(runs: tuple[Run, ...]) -> dict[str, tuple[Any, ...]]:
    """Return what is not the same in all runs that say it, without what every run has of its own."""
    described = [_described(run) for run in runs]
    found = {}
    for name in dict.fromkeys(name for one in described for name in one):
        values = [one.get(name) for one in described]
        present = {json.dumps(one[name]) for one in described if name in one}
        if len(present) > 1:
            found[name] = tuple(values)
    return found


def _described(run: Run) -> dict[str, Any]:
    """Return the names and values of a run that are compared."""
    recipe = {} if run.recipe is None else {"recipe": _recipe_name(run)}
    data = {
        f"{part} data": value["source"]
        for part, value in run.data.items()
        if isinstance(value, dict) and "source" in value
    }
    options = {f"{name}": value for name, value in run.options.items()}
    config = {name: value for name, value in run.config.items() if name != "format_version"}
    return {**recipe, **data, **options, **config}


def _recipe_name(run: Run) -> str | None:
    name = None if run.recipe is None else run.recipe.get("name")
    return name if isinstance(name, str) else None


def _best(run: Run) -> str:
    if run.best_ap is None:
        return "-"
    epoch = "" if run.best_epoch is None else f" (epoch {run.best_epoch})"
    return f"{100 * run.best_ap:.1f}{epoch}"


def _progress(run: Run) -> str:
    planned = run.options.get("epochs", "?")
    return f"{'?' if run.epochs is None else run.epochs}/{planned}"


def _cell(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_CELL else f"…{text[1 - _LONGEST_CELL :]}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
