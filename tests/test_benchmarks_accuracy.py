"""The benchmark of accuracy: its trainings can be resumed, and both libraries train the same parts."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.testing import assert_close

from focaldet.errors import TrainingError
from tests.benchmarks import trainings
from tests.benchmarks.accuracy import (
    VARIANTS,
    ablation_lines,
    comparison_lines,
    job_of,
    main,
    table_lines,
)
from tests.benchmarks.trainings import (
    Data,
    Focaldet,
    Job,
    Network,
    Photos,
    Torchvision,
    adopt,
    read_records,
    run,
)
from tests.helpers.tiny_training import write_data

MIN_SIZE = 48
NAMES = [name for name in VARIANTS if name != "recipe-quality"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Return the training of the recipe on four images for two epochs of one step."""
    return jobs(tmp_path_factory.mktemp("data"), "recipe")["recipe"]


def jobs(folder: Path, *names: str, backbone: str = "mobilenet_v2") -> dict[str, Job]:
    annotations = str(write_data(folder / "photos", count=4))
    data = Data(name="shapes", train=annotations, test=annotations, folder=folder / "photos")
    weights = folder / "weights.pth"
    torch.manual_seed(0)
    body = getattr(torchvision.models, backbone)(weights=None)
    state = body.features.state_dict() if backbone == "mobilenet_v2" else body.state_dict()
    torch.save(state, weights)
    return {
        name: job_of(
            name,
            VARIANTS[name],
            data=data,
            table=data.read()[0],
            network=Network(backbone=backbone, weights=weights, fpn_channels=64),
            min_size=MIN_SIZE,
            epochs=2,
            seed=0,
            output=folder,
        )
        for name in names
    }


def test_a_killed_training_continues_as_if_nothing_had_happened(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = Photos.read(job.data.read()[0], job.config)
    whole, times, _ = trainings.train(job, photos, tmp_path / "whole.ckpt")
    dead = types.SimpleNamespace(is_alive=lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "parent_process", lambda: dead)
        with pytest.raises(TrainingError, match="the script has been killed"):
            trainings.train(job, photos, tmp_path / "last.ckpt")
    resumed, resumed_times, _ = trainings.train(job, photos, tmp_path / "last.ckpt")
    assert len(times) == len(resumed_times) == 2
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_finished_training_is_not_run_again_unless_its_settings_change(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dataclasses.replace(job.options, epochs=1)
    first = dataclasses.replace(
        job, options=options, output=tmp_path, threads=torch.get_num_threads()
    )
    record = run(first)
    [line] = first.result_file.read_text().splitlines()
    assert json.loads(line) == record
    assert record is not None
    assert (len(record["stats"]), record["epochs"], record["threads"]) == (12, 1, first.threads)
    assert not list((tmp_path / "unfinished").iterdir())

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(trainings, "train", fail)
    assert run(first) == record
    other = dataclasses.replace(first, config=first.config.replace(box_loss="ciou"))
    with pytest.raises(AssertionError):
        run(other)
    assert "its result has other settings; training again" in capsys.readouterr().out


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_both_libraries_train_the_same_stages_of_the_same_backbone(
    tmp_path: Path, backbone: str
) -> None:
    both = jobs(tmp_path, "torchvision", "focaldet", backbone=backbone)
    theirs = Torchvision(
        both["torchvision"].config, both["torchvision"].network
    ).model.backbone.body
    ours = Focaldet(both["focaldet"].config, both["focaldet"].network).model.backbone.eval()
    trained = [
        sum(p.numel() for p in body.parameters() if p.requires_grad) for body in (theirs, ours)
    ]
    assert trained[0] == trained[1] > 0
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for level, wanted in zip(ours(image), theirs(image).values(), strict=True):
            assert_close(level, wanted)


def test_the_contestants_differ_in_nothing_but_what_the_recipe_chooses(tmp_path: Path) -> None:
    all_jobs = jobs(tmp_path, *NAMES)
    plain, best = all_jobs["focaldet"], all_jobs["recipe"]
    assert all_jobs["torchvision"].settings() == {**plain.settings(), "library": "torchvision"}
    for name, each in all_jobs.items():
        batch_size = {"recipe-batch-2": 2, "recipe-batch-8": 8, "recipe-batch-8-double-rate": 8}
        assert (each.options.epochs, each.options.batch_size) == (2, batch_size.get(name, 4))
    for name in ("backbone", "fpn_channels", "trainable_stages", "min_size", "max_size"):
        assert getattr(plain.config, name) == getattr(best.config, name)
    halved = all_jobs["recipe-half-anchors"].config
    assert list(halved.anchor_sizes) == [16, 32, 64, 128, 256]
    assert (
        halved.replace(
            anchor_sizes=best.config.anchor_sizes, aspect_ratios=best.config.aspect_ratios
        )
        == best.config
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("focaldet-l1", {"config": {"box_loss"}}),
        ("recipe-atss", {"config": {"assigner"}}),
        ("recipe-ciou", {"config": {"box_loss"}}),
        ("recipe-smooth-l1", {"config": {"box_loss", "box_loss_weight"}}),
        ("recipe-no-group-norm", {"config": {"head_norm"}}),
        ("recipe-step", {"options": {"schedule"}}),
        ("recipe-no-average", {"options": {"ema_decay"}}),
        ("recipe-layer-rate", {"options": {"backbone_lr_decay"}}),
        ("recipe-jitter", {"transform": {"min_scale"}}),
        ("recipe-mosaic", {"transform": {"mosaic"}}),
        ("recipe-batch-8", {"options": {"batch_size"}}),
        ("recipe-batch-8-double-rate", {"options": {"batch_size", "lr"}}),
    ],
)
def test_a_variant_has_one_change(tmp_path: Path, name: str, changes: dict[str, set[str]]) -> None:
    base = name.partition("-")[0]
    both = jobs(tmp_path, base, name)
    best, other = both[base].settings(), both[name].settings()
    found = {
        part: {
            key
            for key in best[part].keys() | other[part].keys()
            if best[part].get(key) != other[part].get(key)
        }
        for part in ("config", "options", "transform")
    }
    assert {part: keys for part, keys in found.items() if keys} == changes


def test_a_single_anchor_is_8_strides_wide(tmp_path: Path) -> None:
    config = jobs(tmp_path, "recipe-atss-single")["recipe-atss-single"].config
    assert (config.octave_scales, config.aspect_ratios) == ((1.0,), (1.0,))
    assert [
        size / 2**level for size, level in zip(config.anchor_sizes, config.levels, strict=True)
    ] == [8] * 5


def test_the_settings_of_finished_trainings_stay_valid(job: Job) -> None:
    settings = job.settings()
    assert set(settings) == {"library", "network", "config", "options", "transform"}
    assert set(settings["options"]) == {
        *("epochs", "batch_size", "optimizer", "lr", "weight_decay", "decay_norm_and_bias"),
        *("schedule", "warmup_steps", "clip_norm", "ema_decay", "seed"),
    }
    assert job.has_settings(settings)
    del settings["config"]["assigner"]  # as if the field were new
    assert job.has_settings(settings)
    settings["config"]["head_depth"] = 3
    assert not job.has_settings(settings)


def test_mosaics_and_the_rates_of_stages_reach_the_loop(job: Job, tmp_path: Path) -> None:
    photos = Photos.read(job.data.read()[0], job.config)
    once = dataclasses.replace(job.options, epochs=1)
    plain = dataclasses.replace(job, options=once)
    states = {}
    for name, changed in {
        "plain": plain,
        "mosaic": dataclasses.replace(plain, transform={**job.transform, "mosaic": 1.0}),
        "rate": dataclasses.replace(
            plain, options=dataclasses.replace(once, backbone_lr_decay=1e-6, ema_decay=None)
        ),
    }.items():
        trained, _, _ = trainings.train(changed, photos, tmp_path / f"{name}.ckpt")
        states[name] = trained.state_dict()
    torch.manual_seed(job.options.seed)
    start = Focaldet(job.config, job.network).state_dict()
    weight = "model.backbone.features.17.conv.0.0.weight"
    assert not torch.equal(states["plain"][weight], states["mosaic"][weight])
    assert_close(states["rate"][weight], start[weight], rtol=0, atol=1e-6)
    assert float((states["plain"][weight] - start[weight]).abs().max()) > 1e-5


def record_of(variant: str, seed: int, ap: float, data: str = "cells") -> dict[str, Any]:
    settings = {"network": {"backbone": "resnet18"}, "config": {"min_size": 240}}
    return {
        "data": data,
        "epochs": 12,
        "variant": variant,
        "seed": seed,
        "stats": [ap, ap + 0.2, ap + 0.1],
        "step_seconds": 0.5,
        "train_seconds": 100.0,
        "peak_mib": 1000.0 + seed,
        "settings": {**settings, "options": {"seed": seed}},
    }


def test_the_ablation_is_sorted_by_the_difference_to_the_recipe_of_the_same_seeds() -> None:
    records = [
        record_of("recipe-step", 0, 0.45),
        record_of("recipe-step", 1, 0.51),
        record_of("recipe", 0, 0.5),
        record_of("recipe", 1, 0.55),
        record_of("recipe-mosaic", 1, 0.57),
        record_of("recipe-ciou", 2, 0.9),
        record_of("recipe", 0, 0.2, data="chess"),
    ]
    head = "| cells | 12 | resnet18, 240 px |"
    assert ablation_lines(records)[2:] == [
        f"{head} recipe-mosaic | 1 | 57.0 | +2.0 |",
        f"{head} recipe | 2 | 52.5 | +0.0 (+0.0 to +0.0) |",
        f"{head} recipe-step | 2 | 48.0 | -4.5 (-5.0 to -4.0) |",
        "| chess | 12 | resnet18, 240 px | recipe | 1 | 20.0 | +0.0 |",
        "No recipe with the same seeds for cells, 12 epochs, resnet18, 240 px: recipe-ciou.",
    ]


def test_results_are_collected_in_one_file_without_paths(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "results", tmp_path / "results.jsonl"
    folder.mkdir()
    for seed in (0, 1):
        record = {**record_of("recipe", seed, 0.5), "settings": job.settings()}
        (folder / f"recipe_{seed}.json").write_text(json.dumps(record))
    main(["--output", str(folder), "--collect", str(file)])
    assert f"Wrote 2 results to {file}." in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 2
    assert str(job.output) not in file.read_text()
    assert "/" not in file.read_text()
    assert read_records(file) == read_records(folder)
    printed = []
    for source in (folder, file):
        main(["--output", str(source), "--table"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "| recipe | 2 | 50.0 (50.0 to 50.0) |" in printed[0]
    main(["--output", str(file), "--ablation"])
    assert "| recipe | 2 | 50.0 | +0.0 (+0.0 to +0.0) |" in capsys.readouterr().out


def test_the_comparison_has_the_means_of_seeds_and_data() -> None:
    records = [
        record_of("torchvision", 0, 0.25),
        record_of("torchvision", 1, 0.35),
        record_of("recipe", 0, 0.5),
        record_of("recipe", 1, 0.45),
        record_of("recipe", 2, 0.55),
        record_of("recipe-mosaic", 0, 0.9),
        *(record_of(name, 0, 0.1, data="chess") for name in ("torchvision", "focaldet", "recipe")),
        record_of("recipe", 0, 0.9, data="tiles"),
    ]
    assert comparison_lines(records, ["chess", "cells"])[2:] == [
        "| 12 | chess | 10.0 | 10.0 | 10.0 | +0.0 |",
        "| 12 | cells | 30.0 (25.0 to 35.0) | - | 50.0 (45.0 to 55.0) | +17.5 (+10.0 to +25.0) |",
        "| 12 | mean | 20.0 | - | 30.0 | +8.8 |",
    ]
    with pytest.raises(ValueError, match="no results for spots"):
        comparison_lines(records, ["chess", "spots"])
    records[0]["settings"]["config"]["min_size"] = 320
    with pytest.raises(ValueError, match="different networks: resnet18, 240 px; resnet18, 320 px"):
        comparison_lines(records, ["cells"])


def test_the_tables_of_the_docs_are_those_of_the_records() -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = (docs / "accuracy.md").read_text(encoding="utf-8")
    records = read_records(docs / "figures" / "accuracy.jsonl")
    commands = re.findall(r"--output docs/figures/accuracy\.jsonl \\\n +--compare (.+)", page)
    assert len(commands) == 2
    for names in commands:
        assert "\n".join(comparison_lines(records, names.split())) in page


def test_results_of_another_machine_are_adopted_if_their_settings_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = jobs(tmp_path, "recipe", "focaldet")
    records = [
        {**record_of(name, 0, 0.5, data="shapes"), "settings": job.settings()}
        for name, job in made.items()
    ]
    records[1]["settings"]["options"]["lr"] = 1.0
    assert adopt(list(made.values()), records) == 1
    assert made["focaldet"].result() is None
    monkeypatch.setattr(trainings, "_run", lambda *_: pytest.fail("it was trained again"))
    assert run(made["recipe"]) == records[0]
    assert adopt(list(made.values()), records) == 0


def test_the_table_has_a_row_for_all_seeds_of_a_variant() -> None:
    records = [
        record_of("recipe", 0, 0.5),
        record_of("recipe", 1, 0.6),
        record_of("torchvision", 0, 0.25),
        record_of("torchvision", 1, 0.25),
    ]
    assert table_lines(records)[2:] == [
        "| cells | 12 | torchvision | 2 | 25.0 (25.0 to 25.0) | 45.0 | 35.0 | 0.50 | 100 | 1001 MiB |",
        "| cells | 12 | recipe | 2 | 55.0 (50.0 to 60.0) | 75.0 | 65.0 | 0.50 | 100 | 1001 MiB |",
    ]
    records[0]["settings"]["options"]["lr"] = 1.0
    assert table_lines(records)[-1].startswith("The recipe of cells, 12 epochs")


def test_data_is_a_folder_or_two_files() -> None:
    assert Data.parse("a=x/t.json,x/v.json") == Data(name="a", train="x/t.json", test="x/v.json")
    folder = Data.parse("pieces=sets/chess", ("train", "test"))
    assert folder == Data(name="pieces", train="train", test="test", folder=Path("sets/chess"))
    with pytest.raises(ValueError, match=r"give it a name: NAME=t\.json,v\.json"):
        Data.parse("t.json,v.json")


def test_classes_can_be_merged_into_one(job: Job) -> None:
    merged = dataclasses.replace(job.data, one_class=True)
    for apart, one in zip(job.data.read(), merged.read(), strict=True):
        assert len(apart.class_names) > 1
        assert one.class_names == ("object",)
        assert set(one.labels.tolist()) == {0}
        assert (one.boxes == apart.boxes).all()
