r"""Detect objects in photos: print them, draw them, and write them to files.

The --output folder receives a picture per photo and detections.json, which
has the boxes, scores and labels of every photo, or, with --results, another
file. With --format, the detections are also written as annotations, to correct
them in a labelling tool or to train on them.

Detections are written as they come, in parts. If the command is stopped, the
same command with --resume continues with the next part. With torchrun, several
processes share the photos; on several machines, --output is a shared folder.

Examples:
  focaldet predict runs/a photo.jpg holidays/ --output found
  focaldet predict torchvision/retinanet_resnet50_fpn_v2_coco photo.jpg
  focaldet predict runs/a photos --score-threshold 0.3 --format coco
  focaldet predict runs/a https://example.com/photo.jpg --allow-urls
  torchrun --nproc-per-node 2 -m focaldet predict runs/a photos \
    --results jsonl --no-pictures --resume
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from focaldet.cli._arguments import (
    add_batch_size,
    add_device,
    add_model,
    add_output,
    add_suppression,
    load_model,
    positive,
    score,
)
from focaldet.cli._ranks import rank_and_world_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from focaldet import Detections, RetinaNet
    from focaldet.results import ResultsSummary

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "detect objects in photos"

_ANNOTATIONS = {
    "coco": "annotations.json",
    "yolo": "yolo",
    "voc": "voc",
    "csv": "annotations.csv",
    "labelme": "labelme",
}
"""The formats of --format, each with the file or folder that is written into the output folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    add_model(parser)
    parser.add_argument(
        "sources",
        type=_source,
        nargs="+",
        metavar="SOURCE",
        help="photo, folder of photos, or, with --allow-urls, http or https URL of a photo",
    )
    group = parser.add_argument_group("detection")
    group.add_argument(
        "--score-threshold",
        type=score,
        default=0.5,
        metavar="SCORE",
        help="keep detections that score above this, between 0 and 1 (default: 0.5)",
    )
    add_batch_size(group)
    add_device(group)
    group.add_argument(
        "--tile",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="cut larger photos into overlapping windows of this size in pixels, for small objects in "
        "large photos (default: no windows)",
    )
    group.add_argument(
        "--overlap",
        type=float,
        default=0.25,
        metavar="PART",
        help="overlap of the windows, as a fraction of their size (default: 0.25)",
    )
    group.add_argument(
        "--augment",
        action="store_true",
        help="predict three views of each photo, which takes three times as long",
    )
    group.add_argument(
        "--class",
        dest="class_names",
        action="append",
        metavar="NAME",
        help="keep only objects of this class; can be repeated (default: all)",
    )
    group.add_argument(
        "--max-detections",
        type=positive,
        metavar="N",
        help="maximum number of objects per photo (default: that of the model)",
    )
    add_suppression(group)
    group.add_argument(
        "--allow-urls",
        action="store_true",
        help="download photos given as URLs, each at most 100 MB and for at most 60 s; a picture needs "
        "a second download",
    )
    group.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="what to do about a photo that is missing or damaged: stop, or skip it with a warning "
        "(default: raise)",
    )
    group = parser.add_argument_group("output")
    add_output(group, "predictions")
    group.add_argument(
        "--format",
        choices=list(_ANNOTATIONS),
        help="also write the detections, without scores, as annotations in this format",
    )
    group.add_argument("--no-pictures", action="store_true", help="do not draw the photos")
    group.add_argument(
        "--results",
        choices=["json", "jsonl", "coco", "parquet"],
        default="json",
        help="format of the detections: detections.json; detections.jsonl, with a line per photo; "
        "results.json and images.json in COCO format; or detections.parquet, which requires pyarrow "
        "(default: json)",
    )
    group.add_argument("--quiet", action="store_true", help="do not print the objects")
    group = parser.add_argument_group("long runs")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the unfinished run in the output folder; start a new one if there is none",
    )
    group.add_argument(
        "--part-size",
        type=positive,
        metavar="N",
        help="photos per part; a run that is resumed repeats at most one part (default: up to 100)",
    )


def run(options: argparse.Namespace) -> int:
    """Detect, print, draw and write."""
    from focaldet.results import predict_to_folder

    rank, world_size = rank_and_world_size()
    paths = _list(options)
    model = load_model(options)
    folder: Path = options.output
    summary = predict_to_folder(
        lambda part: _predict(model, part, options),
        paths,
        folder,
        format=options.results,
        settings=_settings(model, options),
        class_names=model.config.class_names,
        rank=rank,
        world_size=world_size,
        resume=options.resume,
        part_size=options.part_size,
        on_result=_on_result(paths, options),
        before_cleanup=lambda found: _write_annotations(found, options),
    )
    if summary is None:  # rank 0 reports the outcome
        return 0
    skipped = f", skipped {summary.num_skipped:,}" if summary.num_skipped else ""
    sys.stdout.write(
        f"Found {summary.num_detections:,} objects in {_counted(summary.num_images)}{skipped}. "
        f"Wrote {', '.join(_written(summary, options))} to {folder}.\n"
    )
    return 0


def _source(text: str) -> Path | str:
    """Read a path, or a URL, of which a path would drop a slash."""
    return text if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) else Path(text)


def _list(options: argparse.Namespace) -> list[Path | str]:
    """Return the photos and URLs, with each folder replaced by its photos."""
    from focaldet.images import list_images

    found: list[Path | str] = []
    for source in options.sources:
        if not isinstance(source, str):
            found += list_images([source])
            continue
        if not options.allow_urls:
            raise ValueError(
                f"{source!r} is a URL. Add --allow-urls to download it, or save the photo and pass the "
                "file."
            )
        if options.format is not None:
            raise ValueError(
                f"--format writes annotations of files, but {source!r} is a URL. Save the photo and "
                "pass the file, or leave out --format."
            )
        found.append(source)
    return found


def _predict(
    model: RetinaNet, paths: Sequence[Path | str], options: argparse.Namespace
) -> list[Detections] | list[Detections | None]:
    """Detect the objects in the photos of a part."""
    return model.predict(
        paths,
        batch_size=options.batch_size,
        on_error=options.on_error,
        allow_urls=options.allow_urls,
        **_detection_options(options),
        progress=False,  # a bar per part would not say how far the command is
    )


def _settings(model: RetinaNet, options: argparse.Namespace) -> dict[str, object]:
    """Return what the detections depend on, other than the photos."""
    from focaldet.results import model_fingerprint

    return {
        "model weights": model_fingerprint(model),
        "suppression": model.config.suppression,
        **_detection_options(options),
    }


def _detection_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :meth:`focaldet.RetinaNet.predict` on which the detections depend."""
    return {
        "score_threshold": options.score_threshold,
        "tile": options.tile,
        "overlap": options.overlap,
        "augment": options.augment,
        "classes": options.class_names,
        "max_detections": options.max_detections,
    }


def _on_result(
    paths: Sequence[Path | str], options: argparse.Namespace
) -> Callable[[int, Detections | None], None]:
    """Return a function that prints and draws what was found in a photo."""
    picture_name = _picture_names(paths)

    def on_result(index: int, found: Detections | None) -> None:
        if found is None:
            return
        if not options.quiet:
            _print(found)
        if not options.no_pictures:
            _draw(found, paths[index], options.output / picture_name(index))

    return on_result


def _print(found: Detections) -> None:
    from focaldet._checks import printable

    count = "1 object" if len(found) == 1 else f"{len(found)} objects"
    lines = [f"{printable(found.source or '')}: {count}\n"]
    for name, value, box in zip(
        found.label_names, found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        corners = "  ".join(f"{corner:7.1f}" for corner in box)
        lines.append(f"  {value:.2f}  {corners}  {printable(name)}\n")
    sys.stdout.write("".join(lines))


def _draw(found: Detections, source: Path | str, path: Path) -> None:
    from focaldet._atomic import atomic_write
    from focaldet.images import load_image

    image = load_image(source, allow_urls=True) if isinstance(source, str) else None
    with atomic_write(path) as temporary:
        found.draw(image).save(temporary, format="PNG")


def _write_annotations(found: Iterator[Detections | None], options: argparse.Namespace) -> None:
    """Write the annotations of --format, if it is given. All detections must fit in memory."""
    if options.format is None:
        return
    from focaldet.datasets import AnnotationTable, write_annotations

    table = AnnotationTable.from_detections(one for one in found if one is not None)
    target = options.output / _ANNOTATIONS[options.format]
    write_annotations(table, target, options.format, overwrite=True)


def _written(summary: ResultsSummary, options: argparse.Namespace) -> list[str]:
    """Return what was written, for the last line."""
    written = [file.name for file in summary.files]
    if options.format is not None:
        written.append(_ANNOTATIONS[options.format])
    if not options.no_pictures:
        count = summary.num_images
        written.append("1 picture" if count == 1 else f"{count:,} pictures")
    return written


def _picture_names(paths: Sequence[Path | str]) -> Callable[[int], str]:
    """Return a function from the index of a photo to the name of its picture.

    Photos of the same name, in different folders, are told apart by their index.
    """
    counts = Counter(_stem(path).lower() for path in paths)

    def name(index: int) -> str:
        stem = _stem(paths[index])
        return f"{stem}.png" if counts[stem.lower()] == 1 else f"{stem}_{index}.png"

    return name


def _stem(path: Path | str) -> str:
    """Return the name of a file without its extension. Of a URL, the host is not part of it."""
    if isinstance(path, str):
        path = Path(PurePosixPath(urlsplit(path).path).name)
    return path.stem or "photo"


def _counted(number: int) -> str:
    return "1 photo" if number == 1 else f"{number:,} photos"
