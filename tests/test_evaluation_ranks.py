"""evaluate_coco and analyse_errors on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet.evaluation import analyse_errors, evaluate_coco
from tests.helpers.evaluation import found, truth

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)

RANK = """
import json, sys
import torch
from torch import distributed
from focaldet import Detections
from focaldet.evaluation import analyse_errors, evaluate_coco

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
)

def detections(boxes, scores, labels):
    boxes, scores = torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(scores)
    return Detections(boxes, scores, torch.tensor(labels).long(), (100, 100))

outcomes = {}
for name, shares in json.load(open(f"{folder}/shares.json")).items():
    share, image_ids = shares[rank]
    if isinstance(share, dict):
        share = {int(image): detections(*found) for image, found in share.items()}
    try:
        result = evaluate_coco(f"{folder}/truth.json", share, image_ids=image_ids)
        outcomes[name] = [*result.stats, result.precision.sum(), result.num_images]
        errors = analyse_errors(f"{folder}/truth.json", share, image_ids=image_ids)
        outcomes[f"{name}: errors"] = [
            errors.to_dict(),
            errors.confusion_matrix(0.1).table(),
            [[one.image_id, one.summary] for one in errors.worst_images(score_threshold=0.1)],
        ]
    except ValueError as error:
        outcomes[name] = str(error)
print(json.dumps(outcomes))
distributed.destroy_process_group()
"""

TRUTH = truth((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]), (9, 7, [0, 0, 20, 20]))
FIRST: Any = ([[10, 10, 50, 50], [3, 3, 9, 9]], [0.9, 0.7], [0, 1])
SECOND: Any = ([[20, 20, 70, 70], [1, 0, 20, 21]], [0.8, 0.6], [1, 0])
ENTRIES = [found(*FIRST).to_coco(4, [7, 30]), found(*SECOND).to_coco(9, [7, 30])]

SHARES: dict[str, Any] = {  # what each rank passes as results and as image_ids
    "a share each": [[{4: FIRST}, None], [{9: SECOND}, None]],
    "padded": [[ENTRIES[0] + ENTRIES[1], None], [ENTRIES[0], None]],
    "nothing found there": [[{4: FIRST, 9: ([], [], [])}, None], [{9: SECOND}, None]],
    "some images": [[{4: FIRST}, [4]], [{}, []]],
    "an error": [[{4: FIRST}, None], [{77: SECOND}, None]],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The result or error of each case, on each of two ranks."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "truth.json").write_text(json.dumps(TRUTH))
    (folder / "shares.json").write_text(json.dumps(SHARES))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def expected(results: dict[int, Any], image_ids: list[int] | None = None) -> list[float]:
    detections = {image: found(*one) for image, one in results.items()}
    alone = evaluate_coco(TRUTH, detections, image_ids=image_ids)
    assert 0 < alone.ap <= 1
    return [*alone.stats, alone.precision.sum(), alone.num_images]


def test_all_ranks_get_the_result_of_one_rank_with_all_images(
    outcomes: list[dict[str, Any]],
) -> None:
    alone = expected({4: FIRST, 9: SECOND})
    assert [rank["a share each"] for rank in outcomes] == [alone, alone]


@pytest.mark.parametrize("case", ["a share each", "padded"])
def test_the_errors_are_those_of_one_rank_with_all_images(
    outcomes: list[dict[str, Any]], case: str
) -> None:
    errors = analyse_errors(TRUTH, {4: found(*FIRST), 9: found(*SECOND)})
    assert errors.kind("background").count == 1
    alone = [
        errors.to_dict(),
        errors.confusion_matrix(0.1).table(),
        [[one.image_id, one.summary] for one in errors.worst_images(score_threshold=0.1)],
    ]
    assert alone[2] == [[4, "1 hit, 0 misses, 1 false alarm"]]
    assert [rank[f"{case}: errors"] for rank in outcomes] == [alone, alone]


def test_an_image_that_two_ranks_have_counts_once(outcomes: list[dict[str, Any]]) -> None:
    alone = expected({4: FIRST, 9: SECOND})
    assert [rank["padded"] for rank in outcomes] == [alone, alone]
    alone = expected({4: FIRST, 9: ([], [], [])})  # the first rank's detections count
    assert [rank["nothing found there"] for rank in outcomes] == [alone, alone]


def test_the_images_to_evaluate_are_those_of_all_ranks(outcomes: list[dict[str, Any]]) -> None:
    alone = expected({4: FIRST}, image_ids=[4])
    assert [rank["some images"] for rank in outcomes] == [alone, alone]


def test_an_error_on_one_rank_is_raised_on_all(outcomes: list[dict[str, Any]]) -> None:
    first, second = (rank["an error"] for rank in outcomes)
    assert first == second
    assert "results: image id 77 is not in the annotations" in first
