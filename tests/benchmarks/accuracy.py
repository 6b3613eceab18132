"""Accuracy on any small dataset: the RetinaNet of torchvision, of focaldet, and focaldet's recipe.

All variants train on the same photos with the same pretrained backbone, frozen stages, width of the
pyramid, images per step, number of steps and seeds, in the same loop:

- torchvision: the class RetinaNet with its defaults, AdamW and the paper's step schedule;
- focaldet: RetinaNetConfig with its defaults, everything else the same;
- recipe: what `focaldet.training.recipe` chooses for the data, for the same number of epochs.

`--variants` adds others with one change each, to the recipe (such as recipe-half-anchors) or to
focaldet's defaults (focaldet-l1). The trainings of a seed run one after the other in this order, so that
the machine is the same for all. DATA is a folder with splits, or files:

    python -m tests.benchmarks.accuracy chess --splits train val --weights FEATURES.pth
    python -m tests.benchmarks.accuracy cells=coco/train.json,coco/val.json,photos --weights ...

Each finished training is one file in --output. Run the same command again after an interruption: it
skips what is finished, and continues an unfinished training after its last epoch. Several processes may
share an output folder; each takes what the others leave. `--table` prints what is finished, `--ablation`
the difference between each variant and the recipe, and `--compare NAME...` the tables of
docs/accuracy.md for these data. `--collect FILE.jsonl` writes what is finished to one file, from which
`--output FILE.jsonl` prints the tables. None of the four needs DATA. FEATURES.pth is a state dict of
torchvision's classifier or of its features.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torchvision

from focaldet import RetinaNetConfig
from focaldet.training import TrainingOptions, recipe
from tests.benchmarks.trainings import (
    Data,
    Job,
    Network,
    adopt,
    read_records,
    run_all,
    summary,
    write_records,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from focaldet.datasets import AnnotationTable

_SIZES = RetinaNetConfig(num_classes=1).anchor_sizes
_RATIOS = RetinaNetConfig(num_classes=1).aspect_ratios


def _anchors(factor: float) -> dict[str, Any]:
    return {"anchor_sizes": tuple(factor * size for size in _SIZES), "aspect_ratios": _RATIOS}


@dataclass(frozen=True)
class Variant:
    """A contestant: a library's defaults with changes of the model, or the recipe with any changes."""

    kind: Literal["torchvision", "focaldet", "recipe"] = "recipe"
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0  # of the recipe's learning rate


VARIANTS = {
    "torchvision": Variant("torchvision"),
    "focaldet": Variant("focaldet"),
    "recipe": Variant(),
    "focaldet-l1": Variant("focaldet", config={"box_loss": "l1"}),  # torchvision's box loss
    "recipe-default-anchors": Variant(config=_anchors(1)),
    "recipe-half-anchors": Variant(config=_anchors(0.5)),
    "recipe-double-anchors": Variant(config=_anchors(2)),
    "recipe-paper-init": Variant(config={"head_init": "paper"}),
    "recipe-atss": Variant(config={"assigner": "atss"}),
    # One square anchor per cell, 8 times as large as the stride, as in the paper on ATSS.
    "recipe-atss-single": Variant(
        config={
            "assigner": "atss",
            "octave_scales": (1.0,),
            "aspect_ratios": (1.0,),
            "anchor_sizes": (64, 128, 256, 512, 1024),
        }
    ),
    "recipe-smooth-l1": Variant(config={"box_loss": "smooth_l1", "box_loss_weight": 1.0}),
    "recipe-ciou": Variant(config={"box_loss": "ciou"}),
    "recipe-no-group-norm": Variant(config={"head_norm": None}),
    "recipe-step": Variant(options={"schedule": "step"}),
    "recipe-no-average": Variant(options={"ema_decay": None}),
    "recipe-jitter": Variant(transform={"min_scale": 0.6}),
    "recipe-mosaic": Variant(transform={"mosaic": 0.5}),
    "recipe-layer-rate": Variant(options={"backbone_lr_decay": 0.7}),
    "recipe-batch-2": Variant(options={"batch_size": 2}),
    "recipe-batch-8": Variant(options={"batch_size": 8}),
    "recipe-batch-8-double-rate": Variant(options={"batch_size": 8}, lr_factor=2.0),
    "recipe-quality": Variant(config={"classification_loss": "quality_focal"}),
}


def job_of(
    name: str,
    variant: Variant,
    *,
    data: Data,
    table: AnnotationTable,
    network: Network,
    min_size: int,
    epochs: int,
    seed: int,
    output: Path,
    vertical_flip: bool = False,
    threads: int = 1,
) -> Job:
    """Return the training of a variant. ``table`` is the training data."""
    shared: dict[str, Any] = {
        "backbone": network.backbone,
        "fpn_channels": network.fpn_channels,
        "trainable_stages": network.trainable_stages,
    }
    flip = {"vertical_flip": 0.5} if vertical_flip else {}
    chosen = recipe(
        "small_data",
        table,
        device="cpu",
        min_size=min_size,
        epochs=epochs,
        config_changes={**shared, **variant.config},
        option_changes={"seed": seed, **variant.options},
        transform_options={**flip, **variant.transform},
    )
    config, options, transform = chosen.config, chosen.options, chosen.transform_options
    if variant.lr_factor != 1:
        assert options.lr is not None
        options = dataclasses.replace(options, lr=variant.lr_factor * options.lr)
    if variant.kind != "recipe":
        config = RetinaNetConfig(
            num_classes=config.num_classes,
            class_names=config.class_names,
            min_size=config.min_size,
            max_size=config.max_size,
            **shared,
            **variant.config,
        )
        # The paper's SGD barely trains a narrow pyramid in so few steps, in either library.
        options = TrainingOptions(
            epochs=epochs,
            batch_size=options.batch_size,
            optimizer="adamw",
            lr=1e-3,
            clip_norm=10.0,
            seed=seed,
        )
        transform = {"min_scale": 1.0}
    return Job(
        data=data,
        network=network,
        variant=name,
        library="torchvision" if variant.kind == "torchvision" else "focaldet",
        config=config,
        options=options,
        transform=transform,
        output=output,
        threads=threads,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not (options.table or options.ablation or options.compare or options.collect):
        if not options.data:
            raise SystemExit("DATA is required (or --table, --ablation, --compare or --collect).")
        _run(options)
    records = read_records(options.output)
    if options.collect:
        write_records(options.collect, records)
        print(f"Wrote {len(records)} results to {options.collect}.")
    if options.compare:
        lines = comparison_lines(records, options.compare)
    else:
        lines = ablation_lines(records) if options.ablation else table_lines(records)
    print(*lines, sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", nargs="*", metavar="DATA", help="FOLDER, or NAME=TRAIN.json,TEST.json[,PHOTOS]")
    add("--splits", nargs=2, default=["train", "val"], metavar=("TRAIN", "TEST"),
        help="splits of folders (default: train val)")  # fmt: skip
    add("--one-class", action="store_true",
        help="find the objects of all classes without telling the classes apart; names of data end in "
        "-one-class")  # fmt: skip
    add("--weights", type=Path, help="file of the backbone's weights")
    add("--backbone", default="mobilenet_v2", help="mobilenet_v2 (default) or a ResNet")
    add("--fpn-channels", type=int, default=64, help="width of the pyramid (default: 64)")
    add("--min-size", type=int, default=240, help="short side of the images (default: 240)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3], metavar="NAME",
        help=f"any of {', '.join(VARIANTS)} (default: the first three)")  # fmt: skip
    add("--epochs", type=int, nargs="+", default=[12, 30], help="default: 12 30")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--vertical-flip", action="store_true", help="mirror top to bottom too, in the recipe")
    add("--threads", type=int, default=1, help="threads of a training (default: 1)")
    add("--processes", type=int, default=1, help="trainings at once (default: 1)")
    add("--output", type=Path, default=Path("accuracy-results"),
        help="folder of the results (default: accuracy-results), or a file that --collect has written, "
        "for the tables")  # fmt: skip
    add("--finished", type=Path, metavar="FILE.jsonl",
        help="file that --collect has written elsewhere: trainings whose results it holds are not repeated")  # fmt: skip
    add("--table", action="store_true", help="only print the table of what is finished")
    add("--ablation", action="store_true",
        help="only print the difference between each variant and the recipe, best first")  # fmt: skip
    add("--compare", nargs="+", metavar="NAME",
        help="only print the AP of the first three variants for the data of these names, and their mean")  # fmt: skip
    add("--collect", type=Path, metavar="FILE.jsonl",
        help="write all finished results to one file, as JSON lines without paths")  # fmt: skip
    return parser


def _run(options: argparse.Namespace) -> None:
    network = Network(
        backbone=options.backbone, weights=options.weights, fpn_channels=options.fpn_channels
    )
    network.state()  # an error now rather than after the first photos
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {options.threads} thread(s) "
        f"per training, {options.processes} in parallel, load {os.getloadavg()[0]:.1f}; "
        f"{options.backbone} at {options.min_size} pixels, {options.fpn_channels} FPN channels"
    )
    jobs = []
    for text in options.data:
        data = Data.parse(text, options.splits)
        if options.one_class:
            data = dataclasses.replace(data, name=f"{data.name}-one-class", one_class=True)
        table, _ = data.read()
        for epochs, seed, name in itertools.product(
            options.epochs, options.seeds, options.variants
        ):
            job = job_of(
                name,
                VARIANTS[name],
                data=data,
                table=table,
                network=network,
                min_size=options.min_size,
                epochs=epochs,
                seed=seed,
                output=options.output,
                vertical_flip=options.vertical_flip,
                threads=options.threads,
            )
            jobs.append(job)
    if options.finished:
        count = adopt(jobs, read_records(options.finished))
        print(f"{count} results of {options.finished} are used.")
    for job, record in zip(jobs, run_all(jobs, options.processes), strict=True):
        if record is not None:
            print(f"{job.name}  {summary(record)}", flush=True)


def ablation_lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of the variants of the recipe, for each dataset the best first.

    The difference is a mean over the seeds that both the variant and the recipe have.
    """
    columns = (
        *("data", "epochs", "network", "variant", "seeds", "AP"),
        *("difference to the recipe: mean (lowest to highest)",),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    notes = []
    for (data, epochs, size), variants in sorted(_aps(records).items()):
        best = variants.get("recipe", {})
        rows = []
        for name, found in variants.items():
            seeds = sorted(found.keys() & best.keys())
            if not seeds:
                continue
            differences = _differences(found, best)
            ap = statistics.mean(found[seed] for seed in seeds)
            rows.append(
                (
                    statistics.mean(differences),
                    f"{name} | {len(seeds)} | {ap:.1f} | {_spread(differences, '+')}",
                )
            )
        rows.sort(key=lambda row: -row[0])
        lines += [f"| {data} | {epochs} | {size} | {cells} |" for _, cells in rows]
        if left_out := sorted(name for name, found in variants.items() if not found.keys() & best):
            notes.append(
                f"No recipe with the same seeds for {data}, {epochs} epochs, {size}: "
                f"{', '.join(left_out)}."
            )
    return lines + notes


def comparison_lines(records: Iterable[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return a Markdown table of torchvision, focaldet and the recipe: a row for each of the data.

    The difference is that between the recipe and torchvision with the same seeds. The last row for a
    number of epochs is the mean over the data.

    Raises:
        ValueError: If there are no results for one of the names, or those of different networks.
    """
    variants = list(VARIANTS)[:3]
    aps = {setup: found for setup, found in _aps(records).items() if setup[0] in names}
    if missing := set(names) - {data for data, _, _ in aps}:
        raise ValueError(f"There are no results for {', '.join(sorted(missing))}.")
    sizes = {size for _, _, size in aps}
    if len(sizes) > 1:
        raise ValueError(f"The results are of different networks: {'; '.join(sorted(sizes))}.")
    size = sizes.pop()
    lines = [
        f"| epochs | data | {' | '.join(variants)} | recipe compared with torchvision |",
        "|---" * (len(variants) + 3) + "|",
    ]
    signs: list[Literal["", "+"]] = ["", "", "", "+"]
    for epochs in sorted({epochs for _, epochs, _ in aps}):
        rows = []
        for data in names:
            found = aps.get((data, epochs, size), {})
            theirs, defaults, ours = (found.get(variant, {}) for variant in variants)
            aps_of_each = [list(by_seed.values()) for by_seed in (theirs, defaults, ours)]
            rows.append([*aps_of_each, _differences(ours, theirs)])
        means = [
            [statistics.mean(map(statistics.mean, column))] if all(column) else []
            for column in zip(*rows, strict=True)
        ]
        for name, row in zip([*names, "mean"], [*rows, means], strict=True):
            cells = [_spread(cell, sign) for cell, sign in zip(row, signs, strict=True)]
            lines.append(f"| {epochs} | {name} | {' | '.join(cells)} |")
    return lines


def _aps(
    records: Iterable[dict[str, Any]],
) -> dict[tuple[str, int, str], dict[str, dict[int, float]]]:
    """Return the AP in percent by setup, variant and seed."""
    found: dict[tuple[str, int, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for record in records:
        found[_setup(record)][record["variant"]][record["seed"]] = 100 * record["stats"][0]
    return found


def _differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _spread(values: Sequence[float], sign: Literal["", "+"] = "") -> str:
    """Return the mean, followed by the lowest and highest of several values."""
    if not values:
        return "-"
    low, mean, high = (f"{f(values):{sign}.1f}" for f in (min, statistics.mean, max))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def _setup(record: dict[str, Any]) -> tuple[str, int, str]:
    """Return what variants that can be compared have in common."""
    network, config = (record["settings"][name] for name in ("network", "config"))
    size = f"{network['backbone']}, {config['min_size']} px"
    return record["data"], record["epochs"], size


def table_lines(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of all results, a row for all seeds of a variant."""
    groups: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        groups[_setup(record)][record["variant"]].append(record)
    columns = (
        *("data", "epochs", "variant", "seeds", "AP: mean (lowest to highest)", "AP50", "AP75"),
        *("CPU seconds per step", "per run", "peak memory"),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    notes = []
    order = list(VARIANTS)
    for (data, epochs, size), variants in sorted(groups.items()):
        names = sorted(
            variants, key=lambda name: (order.index(name) if name in order else len(order), name)
        )
        for name in names:
            found = variants[name]
            lines.append(f"| {data} | {epochs} | {name} | {len(found)} | {_cells(found)} |")
            if len({_without_seed(record) for record in found}) > 1:
                notes.append(
                    f"The {name} of {data}, {epochs} epochs, {size}: not all seeds have the same settings."
                )
    return lines + notes


def _cells(records: Sequence[dict[str, Any]]) -> str:
    each = [[100 * value for value in record["stats"][:3]] for record in records]
    _, ap50, ap75 = (statistics.mean(column) for column in zip(*each, strict=True))
    step, run = (
        statistics.median(record[name] for record in records)
        for name in ("step_seconds", "train_seconds")
    )
    peak = max(record["peak_mib"] for record in records)
    return (
        f"{_spread([values[0] for values in each])} | {ap50:.1f} | {ap75:.1f} | {step:.2f} | {run:.0f} | "
        f"{peak:.0f} MiB"
    )


def _without_seed(record: dict[str, Any]) -> str:
    settings = record["settings"]
    options = {name: value for name, value in settings["options"].items() if name != "seed"}
    return repr({**settings, "options": options})


if __name__ == "__main__":
    main()
