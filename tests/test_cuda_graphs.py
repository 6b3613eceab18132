"""CUDA graphs give the results of the functions that they were captured from, or are not used.

The graphs are imitated on the CPU; see :mod:`tests.helpers.recorded_graphs`.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from focaldet import Detections, RetinaNet, _cuda_graphs
from focaldet._cuda_graphs import CudaCapture, GraphCache
from focaldet.box_coder import BoxCoder
from focaldet.postprocess import PostProcess
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.recorded_graphs import CpuCapture, recorded_graphs
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from focaldet.retinanet import OptimizedRetinaNet
    from focaldet.structures import ImageBatch
    from tests.helpers.recorded_graphs import Log

SIZES = [(60, 90), (64, 80)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    with recorded_graphs(monkeypatch) as log, torch.no_grad():
        yield log


class Doubling:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor | None, ...]:
        self.calls += 1
        return x * 2, None, (x + 1).relu_()


def run(cache: GraphCache, function: Any, x: Tensor, key: Any = "f", **options: Any) -> Tensor:
    doubled, none, other = cache(function, [x], key=(key,), **options)
    assert doubled is not None
    assert other is not None
    assert none is None
    assert_close(doubled, x * 2, rtol=0, atol=0)
    assert_close(other, (x + 1).relu(), rtol=0, atol=0)
    return doubled


def test_a_graph_is_captured_at_the_second_call_and_then_replayed_without_python(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    run(cache, function, torch.rand(3))
    assert not log.graphs
    run(cache, function, torch.rand(3))
    assert function.calls == 1 + _cuda_graphs._WARM_UP_CALLS + 1
    for _ in range(3):
        run(cache, function, torch.randn(3))
    assert function.calls == 1 + _cuda_graphs._WARM_UP_CALLS + 1
    run(cache, function, torch.rand(4))  # another shape
    run(cache, function, torch.rand(3, dtype=torch.float64))
    assert len(log.graphs) == 1


def test_results_are_not_changed_by_later_calls(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    inputs = [torch.randn(3) for _ in range(4)]
    results = [run(cache, function, x) for x in inputs]
    assert len(log.graphs) == 1
    for x, result in zip(inputs, results, strict=True):
        assert_close(result, x * 2, rtol=0, atol=0)
    results[-1].zero_()
    run(cache, function, inputs[0])


def test_calls_wait_for_each_other_on_the_device(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    for _ in range(2):
        run(cache, function, torch.rand(3))
    first = ["side waits for main", "main waits for side"]
    each = ["main waits for the last call", "main finished a call"]
    assert log.events == first + each
    for _ in range(2):
        run(cache, function, torch.rand(2))
    assert log.events == (first + each) * 2
    assert log.pools[0] is log.pools[1]
    cache.clear()
    assert log.events[-2:] == ["the host waits"] * 2


def test_inference_mode_can_be_mixed_with_no_grad(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    for mode in (True, True, False, True):
        with torch.inference_mode(mode):
            assert run(cache, function, torch.rand(3)).is_inference() is mode
    assert len(log.graphs) == 1


def test_unused_graphs_make_room_but_used_ones_do_not(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda_graphs, "_MAX_GRAPHS", 2)
    monkeypatch.setattr(_cuda_graphs, "_STALE_CALLS", 10)
    cache, function = GraphCache(CpuCapture), Doubling()

    def calls(*lengths: int) -> int:
        """Return how many captures these calls cause."""
        before = len(log.graphs)
        for length in lengths:
            run(cache, function, torch.rand(length))
        return len(log.graphs) - before

    assert calls(1, 1, 2, 2) == 2
    assert calls(*[3, 1, 2] * 10) == 0
    assert calls(*[2, 3] * 4) == 0
    assert "the host waits" not in log.events
    assert calls(2, 3) == 1  # instead of 1, which was last used more than 10 calls ago
    assert log.events.count("the host waits") == 1
    assert calls(2, 3, 2, 3) == 0
    assert calls(1, 1) == 0


def test_few_shapes_are_remembered(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_graphs, "_MAX_ENTRIES", 5)
    cache, function = GraphCache(CpuCapture), Doubling()
    for length in (1, *range(20)):
        run(cache, function, torch.rand(length))
    assert len(cache._entries) == 5
    run(cache, function, torch.rand(2))
    assert len(log.graphs) == 1


def waiting(x: Tensor) -> tuple[Tensor | None, ...]:
    return x * 2, None, (x + 1).relu() if bool(x.isfinite().all()) else x


def test_a_failed_capture_is_logged_once_and_tried_again(
    log: Log, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_cuda_graphs, "_RETRY_CALLS", 5)
    cache = GraphCache(CpuCapture)
    for _ in range(7):
        run(cache, waiting, torch.rand(3, 2), key="the network")
    assert len(log.graphs) == 1
    [message] = caplog.messages
    assert message == (
        "No CUDA graph of the network for an input of shape [3, 2]: CUDA error: _local_scalar_dense is "
        "not permitted when stream is capturing. It runs without one, and the capture is tried again "
        "after 5 calls."
    )
    assert torch.cuda.current_stream().name == "main"  # type: ignore[attr-defined]
    assert log.events[-2:] == ["the pool is closed", "the pool is released"]
    run(cache, waiting, torch.rand(3, 2), key="the network")
    assert len(log.graphs) == 2
    assert len(caplog.messages) == 1
    for _ in range(2):
        run(cache, Doubling(), torch.rand(3, 2))
    assert len(log.graphs) == 3
    assert log.pools[2] is not log.pools[0]  # whose state is undefined


def test_errors_of_the_function_are_raised(log: Log) -> None:
    cache = GraphCache(CpuCapture)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="size of tensor"):
            cache(lambda x: (x + torch.zeros(7),), [torch.rand(3)], key=("f",))
    assert not log.graphs


def test_a_new_state_drops_all_graphs_and_no_state_runs_the_function(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    state: list[int | None] = [1]

    def call(length: int = 3) -> None:
        run(cache, function, torch.rand(length), find_state=lambda: state[0])

    for _ in range(2):
        call()
    state[0] = None
    calls = function.calls
    call()
    assert function.calls == calls + 1
    state[0] = 2
    call()
    assert (len(log.graphs), log.events[-1]) == (1, "the host waits")
    call()
    assert len(log.graphs) == 2


@pytest.mark.usefixtures("log")
def test_settings_that_choose_operations_have_their_own_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    for _ in range(2):
        run(cache, function, torch.rand(3))
    calls = function.calls
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run(cache, function, torch.rand(3))
    assert function.calls == calls + 1
    monkeypatch.undo()


def test_copies_and_pickles_of_a_cache_are_empty() -> None:
    cache = GraphCache()
    cache._calls = 3
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):  # noqa: S301
        assert isinstance(other, GraphCache)
        assert (other._calls, other._kind) == (0, CudaCapture)


def test_threads_get_their_own_results(log: Log) -> None:
    cache, function = GraphCache(CpuCapture), Doubling()
    start = threading.Barrier(4)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        try:
            with torch.no_grad():
                for _ in range(50):
                    run(cache, function, torch.randn(8, generator=generator))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(log.graphs) == 1


def test_graphs_are_not_used_on_a_cpu_or_where_gradients_are_recorded() -> None:
    function = Doubling()
    cache = GraphCache()
    with torch.no_grad():
        for _ in range(3):
            run(cache, function, torch.rand(3))
    assert (function.calls, cache._calls) == (3, 0)
    with fake_cuda():
        x = torch.rand(3, device="cuda:0")
        with torch.no_grad():
            assert not CudaCapture.applies([x])  # a subclass of Tensor


# The model


def built(**options: Any) -> OptimizedRetinaNet:
    """Return a model that uses graphs."""
    torch.manual_seed(0)
    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone()).eval()
    optimised = model.optimize_for_inference(cuda_graphs=True, **options)
    optimised._graphs = optimised.postprocess._graphs = GraphCache(CpuCapture)
    return optimised


@pytest.fixture
def on_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostProcess, "_prefers_fixed_shape", lambda *_: True)


def batch_of(seed: int, model: Any) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in SIZES]
    batch: ImageBatch = model.preprocess(images)
    # As if the images had been larger, by a different factor each time.
    factor = 1 + seed / 10
    originals = [(int(height * factor), int(width * factor)) for height, width in batch.sizes]
    return batch._replace(original_sizes=originals)


def detect(model: Any, seed: int, **options: Any) -> list[Detections]:
    found: list[Detections] = model.detections(model(batch_of(seed, model)), **options)
    return found


def assert_as_without_graphs(model: OptimizedRetinaNet, seed: int, **options: Any) -> None:
    plain = copy.deepcopy(model)
    plain._graphs = plain.postprocess._graphs = None
    for ours, theirs in zip(
        detect(model, seed, **options), detect(plain, seed, **options), strict=True
    ):
        assert len(theirs) > 3
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert_close(ours.scores, theirs.scores, rtol=0, atol=0)
        assert_close(ours.boxes, theirs.boxes, rtol=0, atol=0)
        assert ours.image_size == theirs.image_size


@pytest.mark.usefixtures("on_accelerator")
def test_detections_are_those_without_graphs_whatever_the_sizes_and_options(log: Log) -> None:
    model = built()
    for seed in range(3):
        assert_as_without_graphs(model, seed)
    assert len(log.graphs) == 2  # the network, and the steps before suppression
    scores = detect(model, 3)[0].scores.tolist()
    options: Any
    for seed, options in enumerate(
        (
            {"score_threshold": scores[10]},
            {"max_detections": 7},
            {"score_threshold": scores[14]},
        ),
        start=3,
    ):
        assert_as_without_graphs(model, seed, **options)
    assert len(log.graphs) == 2
    for labels in ([0], [1], [1]):
        assert_as_without_graphs(model, 6, labels=labels)
    assert len(log.graphs) == 3  # another number of classes


@pytest.mark.usefixtures("on_accelerator")
@pytest.mark.parametrize(
    "change",
    [
        {"clip_to": "image_after_nms", "drop_empty": True},
        {"clip_to": "original", "inclusive_corners": True},
        {"clip_to": "batch", "class_agnostic_nms": True},
        {"scale_before_nms": True, "pre_nms_top_k": 11},
        {"clip_to": None, "resize_limits": (64, 96)},
    ],
    ids=str,
)
def test_options_of_the_post_processing_can_change_at_any_time(log: Log, change: Any) -> None:
    model = built()
    for seed in range(2):
        assert_as_without_graphs(model, seed)
    for name, value in change.items():
        setattr(model.postprocess, name, value)
    for seed in range(2, 4):
        assert_as_without_graphs(model, seed)
    assert len(log.graphs) == 3


@pytest.mark.usefixtures("on_accelerator")
def test_a_different_box_coder_is_used(log: Log) -> None:
    model = built()
    for seed in range(2):
        assert_as_without_graphs(model, seed)
    model.postprocess.box_coder.weights = (2.0, 2.0, 1.0, 1.0)
    assert_as_without_graphs(model, 2)

    class Own:
        decode = model.postprocess.box_coder.decode

    model.postprocess.box_coder = Own()  # type: ignore[assignment]
    for seed in range(3, 6):
        assert_as_without_graphs(model, seed)
    assert len(log.graphs) == 2


@pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")  # in torchvision
def test_the_captured_steps_neither_wait_nor_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    process = PostProcess(BoxCoder(), last_level_threshold=0.0, drop_empty=True)
    monkeypatch.setattr(Detections, "_check_each_value", lambda _: None)  # fake values are wrong
    sizes = [(8, 12), (4, 6)]
    seen = []
    with fake_cuda() as counts, torch.no_grad():

        def run(function: Any, inputs: Any) -> Any:
            function(*inputs)  # copies constants
            counts.clear()
            result = function(*inputs)
            seen.append(counts.num_waits + counts.num_uploads)
            return result

        monkeypatch.setattr(process, "_run_as_graph", lambda **_: run)
        device = torch.device("cuda:0")
        maps = [[torch.zeros(2, 9 * n, *size, device=device) for size in sizes] for n in (3, 4)]
        anchors = [torch.zeros(9 * height * width, 4, device=device) for height, width in sizes]
        process(*maps, anchors, [(60, 90)] * 2, [(120, 180)] * 2, labels=[0, 2])
    assert seen == [0], counts.report()


def test_maps_of_a_forward_pass_are_not_changed_by_later_ones(log: Log) -> None:
    model = built()
    outputs = [model(batch_of(seed, model)) for seed in range(4)]
    assert len(log.graphs) == 1
    model._graphs = None
    for seed, output in enumerate(outputs):
        expected = model(batch_of(seed, model))
        for ours, theirs in zip(
            [*output.logits, *output.box_deltas],
            [*expected.logits, *expected.box_deltas],
            strict=True,
        ):
            assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.stride() == theirs.stride()


def replace_head(model: OptimizedRetinaNet) -> None:
    model.head = copy.deepcopy(model.head)
    next(model.head.parameters()).mul_(0.5)


def replace_data(model: OptimizedRetinaNet) -> None:
    for parameter in model.backbone.parameters():
        parameter.data = parameter.data * 0.5


def change_in_place(model: OptimizedRetinaNet) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def assign(model: OptimizedRetinaNet) -> None:
    state = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.usefixtures("on_accelerator")
@pytest.mark.parametrize("change", [replace_head, replace_data, change_in_place, assign])
def test_weights_can_change_at_any_time(log: Log, change: Any) -> None:
    model = built()
    for seed in range(2):
        assert_as_without_graphs(model, seed)
    change(model)
    for seed in range(2, 5):
        assert_as_without_graphs(model, seed)
    assert len(log.graphs) == (2 if change is change_in_place else 4)


@pytest.mark.usefixtures("on_accelerator")
def test_moving_the_model_drops_its_graphs(log: Log) -> None:
    model = built()
    for seed in range(2):
        assert_as_without_graphs(model, seed)
    assert model._graphs is not None
    assert model._graphs._entries
    model.double()
    assert not model._graphs._entries
    for seed in range(2):
        assert_as_without_graphs(model, seed)
    assert len(log.graphs) == 4


def test_hooks_are_called(log: Log) -> None:
    model = built()
    for seed in range(2):
        model(batch_of(seed, model))
    seen: list[Any] = []
    handle = model.head.register_forward_hook(lambda *_: seen.append(1))
    for seed in range(3):
        model(batch_of(seed, model))
    assert len(seen) == 3
    handle.remove()
    calls: list[Any] = []
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        model(batch_of(0, model))
    finally:
        everywhere.remove()
    assert len(calls) > 3
    model(batch_of(0, model))
    assert len(log.graphs) == 1


@pytest.mark.usefixtures("log")
def test_a_replaced_method_is_called() -> None:
    model = built()
    for seed in range(2):
        model(batch_of(seed, model))
    own = type(model).forward_maps
    calls: list[int] = []

    def forward_maps(images: Tensor) -> Any:
        calls.append(1)
        return own(model, images)

    model.forward_maps = forward_maps  # type: ignore[method-assign]
    model(batch_of(2, model))
    assert calls == [1]


def test_gradients_reach_the_images_and_autocast_is_followed(log: Log) -> None:
    model = built()
    for seed in range(2):
        model(batch_of(seed, model))
    batch = batch_of(2, model)
    with torch.enable_grad():
        images = batch.tensor.requires_grad_()
        model(batch._replace(tensor=images)).logits[0].sum().backward()
    assert images.grad is not None
    assert bool(images.grad.any())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(batch_of(2, model)).logits[0].dtype == torch.bfloat16
    assert len(log.graphs) == 1


@pytest.mark.usefixtures("on_accelerator")
def test_copies_and_pickles_of_a_model_capture_their_own_graphs(log: Log) -> None:
    model = built()
    for seed in range(2):
        detect(model, seed)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for count, other in enumerate(
        (copy.deepcopy(model), torch.load(stream, weights_only=False)), start=2
    ):
        assert other._graphs is other.postprocess._graphs is not model._graphs
        for seed in range(2):
            assert_as_without_graphs(other, seed)
        assert len(log.graphs) == 2 * count


def test_a_model_without_graphs_is_the_default() -> None:
    model = RetinaNet.from_config(TINY_CONFIG, backbone=TinyBackbone())
    assert model.optimize_for_inference()._graphs is None
    optimised = model.optimize_for_inference(cuda_graphs=True)
    assert isinstance(optimised._graphs, GraphCache)
    assert model.postprocess._graphs is None
    [first, second] = [optimised.predict(torch.rand(3, 64, 96))[0] for _ in range(2)]
    assert len(first) == len(second) > 0  # on a CPU, where graphs are not used
    assert not optimised._graphs._entries
