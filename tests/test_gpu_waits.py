"""What a GPU would wait for in a training step, counted without a GPU, and the same results as a CPU's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close

from focaldet import AnchorGenerator, RetinaNet, matching
from focaldet import criterion as criterion_module
from focaldet.anchor_grid import AnchorGrid, grid_of
from focaldet.box_coder import BoxCoder, CornerBoxCoder
from focaldet.criterion import (
    FocalMapLoss,
    QualityFocalMapLoss,
    RetinaNetCriterion,
    SoftmaxFocalMapLoss,
)
from focaldet.matching import BACKGROUND, ATSSAssigner, Matcher
from focaldet.structures import check_targets, pad_targets
from focaldet.training import AverageWeights, DetectionDataModule, RetinaNetModule, TrainingOptions
from focaldet.transforms import Preprocess
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from focaldet.structures import Target

FEATURES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
CLASSES = 3
STEPS = {
    "some": [(1, 0, "cpu"), (2, 20, "cuda:0"), (16, 300, "cpu")],
    "all": [(batch, boxes, "cpu") for batch in (1, 2, 16) for boxes in (0, 20, 300)],
}


def tiny_model() -> RetinaNet:
    return RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).train()


def targets_of(
    counts: list[int], side: float = 60.0, *, dtype: Any = torch.float32
) -> list[Target]:
    targets: list[Target] = []
    for count in counts:
        corner = torch.rand(count, 2, dtype=dtype) * side * 0.7
        size = (0.1 + torch.rand(count, 2, dtype=dtype) * 0.9) * (side - corner)
        boxes = torch.cat((corner, corner + size), dim=1)
        targets.append({"boxes": boxes, "labels": torch.randint(CLASSES, (count,))})
    return targets


def head_outputs(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    logits = [torch.randn(batch, 9 * CLASSES, *size, dtype=dtype) for size in FEATURES]
    deltas = [torch.randn(batch, 36, *size, dtype=dtype) * 0.2 for size in FEATURES]
    return logits, deltas


def losses_and_gradients(module: RetinaNetCriterion, logits: Any, deltas: Any, *others: Any) -> Any:
    maps = [level.clone().requires_grad_() for level in (*logits, *deltas)]
    losses = module(maps[: len(logits)], maps[len(logits) :], *others)
    return losses, torch.autograd.grad(sum(losses.values()), maps)


def first_anchors(boxes: torch.Tensor, grid: AnchorGrid) -> torch.Tensor:
    """Assign the first anchors, one per box, which is no RetinaNet rule."""
    matched_idxs = torch.full((len(grid.anchors),), BACKGROUND)
    matched_idxs[: len(boxes)] = torch.arange(len(boxes))
    return matched_idxs


class FirstAnchors(Matcher):
    def __call__(self, boxes: torch.Tensor, anchors: Any) -> torch.Tensor:
        return first_anchors(boxes, anchors)


CRITERIA: dict[str, dict[str, Any]] = {
    **{
        box_loss: {"box_loss": box_loss} for box_loss in ("l1", "smooth_l1", "giou", "diou", "ciou")
    },
    **{normalizer: {"normalizer": normalizer} for normalizer in ("image", "ema")},
    "weight": {"box_loss_weight": 3.0, "box_loss": "giou"},
    "softmax": {"classification_loss": SoftmaxFocalMapLoss()},
    "options": {"classification_loss": FocalMapLoss(None, 1.5)},
    "quality": {"classification_loss": QualityFocalMapLoss()},
    "quality of corners": {
        "classification_loss": QualityFocalMapLoss(1.5),
        "box_coder": CornerBoxCoder((5, 5, 5, 5)),
        "normalizer": "image",
        "box_loss": "giou",
    },
    "no forced matches": {"assigner": Matcher(0.6, 0.3, force_match_floor=None)},
    "ATSS": {"assigner": ATSSAssigner()},
    "a function": {"assigner": first_anchors},
    "a subclass": {"assigner": FirstAnchors()},
    "corners": {"box_coder": CornerBoxCoder((5, 5, 5, 5))},
    "weights": {"box_coder": BoxCoder((10, 10, 5, 5)), "box_loss": "ciou"},
}


@pytest.mark.parametrize("counts", [[0, 3, 9], [0, 0], [2]], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_losses_without_waits_are_those_of_a_cpu(
    name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"assigner": Matcher(), "box_coder": BoxCoder(), **CRITERIA[name]}
    logits, deltas = head_outputs(len(counts))
    others = (AnchorGenerator()(FEATURES, dtype=torch.float64), targets_of(counts))
    expected = losses_and_gradients(RetinaNetCriterion(**options), logits, deltas, *others)
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: False)
    monkeypatch.setattr(matching, "runs_on_cpu", lambda _: False)
    module = RetinaNetCriterion(**options)
    monkeypatch.setattr(module, "_losses_of_positives", None)
    found = losses_and_gradients(module, logits, deltas, *others)
    assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert_close(found[1], expected[1], rtol=1e-7, atol=1e-12)
    if name == "ema":
        assert module.positives_average != 100
    # In float32, with boxes and anchors of float32:
    single = [[level.float() for level in maps] for maps in (logits, deltas)]
    others = (AnchorGenerator()(FEATURES), others[1])
    found = losses_and_gradients(RetinaNetCriterion(**options), *single, *others)
    monkeypatch.undo()
    expected = losses_and_gradients(RetinaNetCriterion(**options), *single, *others)
    assert_close(found[0], expected[0], rtol=1e-6, atol=1e-7)
    assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_padding_and_background_stay_without_gradient_for_anchors_without_area(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: False)
    anchors = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9]])]
    target: Target = {"boxes": torch.tensor([[0.0, 0, 9, 10]]), "labels": torch.tensor([0])}
    for box_loss in ("smooth_l1", "ciou"):
        module = RetinaNetCriterion(Matcher(), BoxCoder(), box_loss=box_loss)
        deltas = torch.full((1, 8, 1, 1), 0.1)
        deltas[0, 4:] = torch.inf
        deltas.requires_grad_()
        losses = module([torch.zeros(1, 2, 1, 1)], [deltas], anchors, [target])
        [gradient] = torch.autograd.grad(losses["box_regression"], deltas)
        assert gradient.isfinite().all()
        assert gradient[0, :4].any()
        assert not gradient[0, 4:].any()


@pytest.mark.parametrize("floor", [None, 0.0, 0.3])
@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.5, 0.0), (0.3, 0.3)])
def test_matches_of_a_batch_are_those_of_each_image(
    floor: float | None, thresholds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_IOUS_AT_ONCE", 3 * 4 * 774)  # blocks of three boxes
    matcher = Matcher(*thresholds, force_match_floor=floor)
    grid = AnchorGrid(AnchorGenerator()(FEATURES), FEATURES)
    for seed in range(5):
        torch.manual_seed(seed)
        targets = targets_of([0, 1, 7, 13])
        for target in targets:
            target["boxes"].div_(4).round_().mul_(4)  # equal IoUs are common
        padded = pad_targets(targets, grid.anchors)
        assert padded.boxes.shape == (4, 13, 4)
        assert padded.counts == padded.valid.sum(dim=1).tolist() == [0, 1, 7, 13]
        found = matcher.match_batch(padded.boxes, padded.valid, grid)
        expected = torch.stack([matcher(target["boxes"], grid) for target in targets])
        assert_close(found, expected, rtol=0, atol=0)
        assert int((found >= 0).sum()) > 5


@pytest.mark.parametrize("steps", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_step_has_no_waits_and_at_most_one_upload(steps: str) -> None:
    with fake_cuda() as counts:
        with torch.device("cuda:0"):
            model = tiny_model()
            images = [torch.rand(3, 64, 64)] * 16
        for batch, boxes, device in ((1, 1, "cpu"), *STEPS[steps]):
            target: Target = {
                "boxes": torch.zeros(boxes, 4, device=device),
                "labels": torch.zeros(boxes, dtype=torch.int64, device=device),
            }
            counts.clear()
            losses = model(images[:batch], [target] * batch, validate=False).losses
            if boxes == 1:
                assert counts.num_uploads > 1  # of constants, in the first step
                continue
            uploads = [kind for kind, _ in counts.uploads.elements()]
            assert counts.num_waits == 0, (batch, boxes, counts.report())
            assert uploads == (["pinned"] if device == "cpu" else []), (
                batch,
                boxes,
                counts.report(),
            )
            assert all(loss.device.type == "cuda" and loss.shape == () for loss in losses.values())


def test_a_whole_training_step_has_no_waits_and_one_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}
    with fake_cuda() as counts:
        with torch.device("cuda:0"):
            module = RetinaNetModule(tiny_model(), TrainingOptions())
        average = AverageWeights()
        with torch.device("cuda:0"):
            copy: Any = RetinaNetModule(tiny_model(), TrainingOptions())
        average._average_model = SimpleNamespace(module=copy, n_averaged=torch.tensor(1))  # type: ignore[assignment]
        module_of_data = object.__new__(DetectionDataModule)
        monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
        monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
        monkeypatch.setattr(module, "_lr", lambda: 0.5)
        for step in (1, 2, 3):
            counts.clear()
            batch = [torch.rand(3, 64, 64).pin_memory() for _ in range(2)], targets_of([3, 1])
            images, targets = DetectionDataModule.transfer_batch_to_device(
                module_of_data, batch, torch.device("cuda:0"), 0
            )
            assert {image.device.type for image in images} == {"cuda"}
            module.training_step((images, targets), 0)
            trainer: Any = SimpleNamespace(global_step=step)
            average.on_train_batch_end(trainer, module, None, None, 0)
        assert counts.num_waits == 0, counts.report()
        assert counts.num_blocking_uploads == 0, counts.report()
        assert counts.num_uploads == 3  # two images and the targets
        assert logged.pop("train/lr").device.type == "cpu"
        assert {value.device.type for value in logged.values()} == {"cuda"}


@pytest.mark.parametrize("assigner", [Matcher(), ATSSAssigner()], ids=repr)
@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("loss", [FocalMapLoss(), QualityFocalMapLoss()], ids=repr)
def test_the_criterion_reads_no_value(assigner: Any, box_loss: Any, loss: Any) -> None:
    with fake_cuda(strict=True):
        logits, deltas = head_outputs(2, torch.float32)
        logits, deltas = (
            [level.to("cuda:0", non_blocking=True) for level in maps] for maps in (logits, deltas)
        )
        sizes = [9 * height * width for height, width in FEATURES]
        anchors = [torch.zeros(size, 4, device="cuda:0") for size in sizes]
        coder = BoxCoder((1, 1, 1, 1))
        coder._constants._tensors[coder.weights, torch.float32, torch.device("cuda:0")] = (
            torch.ones(4, device="cuda:0")
        )  # as after the first step
        module = RetinaNetCriterion(assigner, coder, box_loss=box_loss, classification_loss=loss)
        losses = module(logits, deltas, anchors, targets_of([3, 0]))
    assert set(losses) == {"classification", "box_regression"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("loss", [FocalMapLoss(), QualityFocalMapLoss()], ids=repr)
def test_network_and_losses_are_compiled_in_one_graph(backend: str, loss: Any) -> None:
    model = tiny_model()
    model.criterion.classification_loss = loss
    images = torch.rand(2, 3, 64, 64)
    targets = targets_of([2, 5])
    for target in targets:
        target["labels"].clamp_(max=1)
    anchors = model(images, resize=False).anchors

    def losses(images: torch.Tensor, targets: list[Target]) -> torch.Tensor:
        logits, deltas = model.forward_maps(images)
        return torch.stack(list(model.criterion(logits, deltas, anchors, targets).values())).sum()

    compiled = torch.compile(losses, backend=backend, fullgraph=True)
    weights = list(model.parameters())
    expected = losses(images, targets)
    found = compiled(images, targets)
    assert_close(found, expected, rtol=1e-5, atol=0)
    assert_close(
        torch.autograd.grad(found, weights),
        torch.autograd.grad(expected, weights),
        rtol=1e-4,
        atol=1e-5,
    )


def test_checks_of_values_wait_once() -> None:
    with fake_cuda() as counts:
        with torch.device("cuda:0"):
            images = [torch.rand(3, 64, 64) for _ in range(5)]
            targets = targets_of([3, 0, 1, 2, 4])
        preprocess = Preprocess(min_size=64, max_size=64)
        preprocess(images, validate=True)
        assert counts.num_waits == 1, counts.report()
        counts.clear()
        check_targets(targets, [(64, 64)] * 5, CLASSES)
        assert [kind for kind, _ in counts.waits] == ["_local_scalar_dense"]


def test_the_flag_of_targets_on_a_device_is_that_of_the_checks_on_a_cpu() -> None:
    from focaldet.structures import _any_fault

    box, nan = [0.0, 0.0, 5.0, 7.0], float("nan")
    good: list[list[list[float]]] = [[box, [1.0, 2.0, 3.0, 4.0]], []]
    bad: list[list[list[float]]] = [
        [box, [nan, 0, 1, 1]],
        [[3.0, 0, 3, 1]],
        [[0, 0, 5.5, 1]],
        [[-1.0, 0, 5, 1]],
        [[0, 0, 1, 8]],
    ]
    for boxes in good + bad:
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        target: Target = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": labels}
        assert bool(_any_fault(target, (7, 5), 1)) == (boxes in bad)
    for label in (-1, 1):
        target = {"boxes": torch.tensor([box]), "labels": torch.tensor([label])}
        assert bool(_any_fault(target, (7, 5), 1))


def test_constants_are_uploaded_once() -> None:
    with fake_cuda() as counts:
        preprocess = Preprocess(min_size=64, max_size=64)
        images = [torch.rand(3, 64, 64, device="cuda:0") for _ in range(4)]
        preprocess(images, validate=False)
        assert counts.num_uploads == 2  # mean and std
        preprocess(images, validate=False)
        assert counts.num_uploads == 2
        preprocess.mean = (0.5, 0.5, 0.5)
        preprocess(images, validate=False)
        assert counts.num_uploads == 3
    assert not preprocess.state_dict()


def test_a_grid_is_built_once_for_the_anchors_of_a_generator() -> None:
    generator = AnchorGenerator()
    grid = grid_of(generator(FEATURES), FEATURES)
    assert grid_of(generator(FEATURES), FEATURES) is grid
    other = [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
    assert grid_of(generator(other), other) is not grid
    changed = generator(FEATURES)
    assert grid_of([*changed[:-1], changed[-1].clone()], FEATURES) is not grid
    changed[1].add_(1)
    moved = grid_of(changed, FEATURES)
    assert moved is not grid
    assert_close(moved.anchors, torch.cat(changed))


def test_a_grid_that_was_built_in_inference_mode_can_be_trained_with() -> None:
    generator = AnchorGenerator()
    with torch.inference_mode():
        inferred = grid_of(generator(FEATURES), FEATURES)
        assert inferred.strides.shape == (5, 2)
    grid = grid_of(generator(FEATURES), FEATURES)
    assert grid is inferred
    assert not grid.anchors.is_inference()
    assert not grid.strides.is_inference()


def test_the_memory_of_the_matcher_does_not_grow_with_the_boxes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "_IOUS_AT_ONCE", 8 * 16 * 774)  # blocks of eight boxes
    peaks = []
    for boxes in (8, 16, 32):
        with fake_cuda(strict=True) as counts, torch.device("cuda:0"):
            levels = [torch.zeros(9 * height * width, 4) for height, width in FEATURES]
            grid = AnchorGrid(levels, FEATURES)
            padded = torch.zeros(16, boxes, 4), torch.ones(16, boxes, dtype=torch.bool)
            before = counts.live
            counts.clear()
            Matcher().match_batch(*padded, grid)
        peaks.append(counts.peak - before)
    assert peaks[2] == peaks[1] < 1.5 * peaks[0], peaks
