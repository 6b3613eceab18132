"""A report of an evaluation: one HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._atomic import atomic_write_text
from focaldet._checks import printable
from focaldet.errors import UnreadableImageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.figure import Figure
    from PIL import Image

    from focaldet.evaluation._errors import ErrorAnalysis
    from focaldet.evaluation._result import CocoResult
    from focaldet.evaluation._worst import ImageErrors

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72em; margin: 2em auto;
  padding: 0 1em; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1em 0; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
.text { text-align: left; } .dense { font-size: 12px; } .dense th, .dense td { padding: .2em .4em; }
thead th { border-bottom: 2px solid #bbb; } img { max-width: 100%; height: auto; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20em, 100%), 1fr)); gap: 1em; }
figure { margin: 0; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
.key { display: inline-block; width: .9em; height: .9em; border: 1px solid #333; margin: 0 .3em 0 0;
  vertical-align: -1px; }
.wide { overflow-x: auto; }
@media (max-width: 40em) { .plot { overflow-x: auto; } .plot img { max-width: max(100%, 34em); } }
"""


def write_report(
    path: str | os.PathLike[str],
    result: CocoResult,
    errors: ErrorAnalysis,
    *,
    images: Mapping[int, str | os.PathLike[str]] | None = None,
    count: int = 12,
    score_threshold: float | None = None,
    title: str = "Evaluation",
) -> None:
    """Write a report of an evaluation as one HTML file (extra ``plot``).

    It has COCO's numbers, the precision-recall curves, the cost of each kind of error, a table of the
    classes with their best score thresholds, the confusion matrix and the worst images. Pictures are
    inside the file, and there are no scripts, so it opens without a network.

    Args:
        path: The file to write, such as ``report.html``.
        result: The numbers.
        errors: The errors, of the same annotations and results.
        images: Path of each image by its id. None leaves out the worst images.
        count: Maximum number of worst images to show.
        score_threshold: For the confusion matrix and the worst images, count detections that score
            above this. None uses the threshold of the highest F1 of each class.
        title: Title of the report.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        ImportError: If matplotlib is not installed.
        ValueError: If ``result`` and ``errors`` are of different evaluations.

    Warns:
        UserWarning: If some of the worst images are missing or cannot be read.

    .. versionadded:: 0.3.0
    """
    ids = tuple(one.id for one in result.classes)
    if (result.num_images, ids) != (errors.num_images, tuple(one.id for one in errors.classes)):
        raise ValueError(
            "result and errors are of different evaluations: they have "
            f"{result.num_images} and {errors.num_images} images, {len(ids)} and "
            f"{len(errors.classes)} classes. Compute both from the same annotations."
        )
    matrix = errors.confusion_matrix(score_threshold)
    threshold = (
        "above the score threshold of the highest F1 of their class"
        if score_threshold is None
        else f"that score above {score_threshold:g}"
    )
    parts = [
        f"<h1>{_text(title)}</h1>",
        (
            f"<p>{result.num_images:,} images, {errors.objects:,} objects, "
            f"{sum(one.detections for one in result.classes):,} detections. At most "
            f"{result.max_detections} detections per image and class count.</p>"
        ),
        _table(("", "value"), result.to_dict()["stats"].items()),
        "<h2>Precision and recall</h2>",
        _figure(result.plot_precision_recall(), "Precision-recall curves by IoU threshold"),
        "<h2>What errors cost</h2>",
        (
            f"<p>AP at IoU {errors.iou_threshold:g} is {_value(errors.ap)}. The gain is the rise of this AP "
            "if one kind of error alone is fixed. Gains overlap, because one error hides another; the "
            "shares sum to 1 - AP.</p>"
        ),
        _table(
            ("error", "count", "gain", "share"),
            (
                (one.name, one.count, one.gain, one.share)
                for one in (*errors.kinds, errors.false_positives, errors.false_negatives)
            ),
        ),
        _figure(errors.plot(), "Cost of each kind of error"),
        "<h2>Classes</h2>",
        (
            f"<p>Hits, gains and F1 are at IoU {errors.iou_threshold:g}. The threshold is the score above "
            "which F1 is the highest.</p>"
        ),
        _classes(result, errors),
        "<h2>Confusion matrix</h2>",
        (
            f"<p>Objects in rows, detections {threshold} in columns. The last column has missed objects, "
            "the last row false alarms.</p>"
        ),
        _figure(matrix.plot(), "Confusion matrix"),
    ]
    pairs = matrix.most_confused()
    if pairs:
        parts.append(_table(("object", "detected as", "count"), pairs))
    if images is not None:
        worst = errors.worst_images(count, score_threshold=score_threshold)
        parts += _worst(worst, images, threshold)
    body = "\n".join(parts)
    atomic_write_text(
        Path(path),
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n",
    )


def _classes(result: CocoResult, errors: ErrorAnalysis) -> str:
    kinds = [one.name for one in errors.kinds]
    ar = f"AR {result.max_detections}"
    heads = ("class", "objects", "detections", "hits", "AP", "AP50", "AP75", ar)
    return _table(
        (*heads, *kinds, "F1", "threshold"),
        (
            (
                *(one.name, one.objects, one.detections, wrong.hits),
                *(one.ap, one.ap50, one.ap75, one.ar_max),
                *(wrong.gains[kind] for kind in kinds),
                *(wrong.f1, wrong.threshold),
            )
            for one, wrong in zip(result.classes, errors.classes, strict=True)
        ),
        style="wide dense",
    )


def _worst(
    worst: Sequence[ImageErrors], images: Mapping[int, str | os.PathLike[str]], threshold: str
) -> list[str]:
    if not worst:
        return ["<h2>Worst images</h2>", f"<p>Detections {threshold} have no errors.</p>"]
    figures, failures = [], []
    for one in worst:
        if one.image_id not in images:
            failures.append(f"image {one.image_id} has no path")
            continue
        source = images[one.image_id]
        try:
            picture = one.draw_file(source)
        except (FileNotFoundError, UnreadableImageError) as error:
            failures.append(str(error))
            continue
        name = _text(str(source).replace("\\", "/").rsplit("/", 1)[-1])
        figures.append(
            f'<figure><img src="{_data_uri(picture)}" alt="{name}">'
            f"<figcaption>{name}: {one.summary}</figcaption></figure>"
        )
    colors = "&emsp;".join(
        f'<span class="key" style="background: rgb{color}"></span>{name}'
        for name, color in worst[0].COLORS.items()
        if name != "below the threshold" or any(len(one.below) for one in worst)
    )
    parts = [
        "<h2>Worst images</h2>",
        f"<p>The images with the most misses and false alarms, for detections {threshold}.</p>",
        f"<p>{colors}</p>",
        f'<div class="images">{"".join(figures)}</div>',
    ]
    if failures:
        are = "1 image is" if len(failures) == 1 else f"{len(failures)} images are"
        message = f"{are} left out of the report because of errors. The first: {failures[0]}"
        warnings.warn(message, UserWarning, stacklevel=3)
        parts.append(f"<p>{_text(message)}</p>")
    return parts


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, style: str = "wide") -> str:
    """Return a table in which columns of words are aligned to the left, numbers to the right."""
    rows = list(rows)
    kinds = [' class="text"' if isinstance(one, str) else "" for one in (rows or [heads])[0]]
    head = "".join(f"<th{kind}>{_text(one)}</th>" for one, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_value(one)}</td>" for one, kind in zip(row, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="{style}"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>'
        "</table></div>"
    )


def _value(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else _text(str(value))


def _text(text: str) -> str:
    return html.escape(printable(text).encode("utf-8", "backslashreplace").decode())


def _figure(figure: Figure, text: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return f'<p class="plot"><img src="{_encoded("png", content)}" alt="{_text(text)}"></p>'


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=85)
    return _encoded("jpeg", content)


def _encoded(kind: str, content: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
