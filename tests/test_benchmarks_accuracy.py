"""The benchmark of accuracy: its trainings can be resumed, and both libraries train the same parts."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.testing import assert_close

from focaldet.errors import TrainingError
from tests.benchmarks import trainings
from tests.benchmarks.accuracy import VARIANTS, job_of, table_lines
from tests.benchmarks.trainings import Data, Focaldet, Job, Network, Photos, Torchvision, run
from tests.helpers.tiny_training import write_data

MIN_SIZE = 48


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
    all_jobs = jobs(tmp_path, *VARIANTS)
    plain, best = all_jobs["focaldet"], all_jobs["recipe"]
    assert all_jobs["torchvision"].settings() == {**plain.settings(), "library": "torchvision"}
    assert {(j.options.epochs, j.options.batch_size) for j in all_jobs.values()} == {(2, 4)}
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


def test_the_table_has_a_row_for_all_seeds_of_a_variant() -> None:
    settings = {"network": {"backbone": "resnet18"}, "config": {"min_size": 240}}
    records: list[dict[str, Any]] = [
        {
            "data": "cells",
            "epochs": 12,
            "variant": variant,
            "stats": [ap, ap + 0.2, ap + 0.1],
            "step_seconds": 0.5,
            "train_seconds": 100.0,
            "peak_mib": 1000.0 + seed,
            "settings": {**settings, "options": {"seed": seed}},
        }
        for seed, variant, ap in [
            (0, "recipe", 0.5),
            (1, "recipe", 0.6),
            (0, "torchvision", 0.25),
            (1, "torchvision", 0.25),
        ]
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
