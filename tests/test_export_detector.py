"""OnnxDetector finds the same objects as the model, and reports wrong files and inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import focaldet
from focaldet import RetinaNet, RetinaNetConfig, export
from focaldet.errors import CheckpointError
from focaldet.export import ExportError, ExportMetadata, OnnxDetector, export_onnx, export_program
from tests.helpers.tiny_export import (
    SHAPES,
    assert_same,
    assert_same_as_model,
    batch_of,
    make_model,
    photo,
    with_many_detections,
)
from tests.helpers.tiny_model import MapsBackbone

if TYPE_CHECKING:
    from focaldet import Detections
    from focaldet.retinanet import OptimizedRetinaNet

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return make_model(pre_nms_top_k=300, score_threshold=0.05)


@pytest.fixture(scope="module")
def file(model: RetinaNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    report = export_onnx(model, path)
    assert all(comparison.ok and comparison.detections for comparison in report.comparisons)
    return path


@pytest.fixture(scope="module")
def maps_file(model: RetinaNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "maps.onnx"
    export_onnx(model, path, postprocess=False, opset=18)
    return path


@pytest.fixture(scope="module")
def fixed_file(model: RetinaNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "fixed.onnx"
    export_onnx(model, path, fixed_shape=(2, 64, 96))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images of different sizes, one of which cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, (width, height) in enumerate([(80, 64), (64, 80), (200, 50), (33, 35)]):
        photo(width, height, seed=index).save(folder / f"{index}.png")
    (folder / "2b.png").write_bytes(b"not an image")
    return folder


def test_results_are_yielded_as_from_the_model(model: RetinaNet, file: Path, photos: Path) -> None:
    detector = OnnxDetector(file)
    with pytest.warns(UserWarning, match=r"2b\.png"):
        found = list(detector.predict_iter(photos, batch_size=2, on_error="skip"))
    assert [one is None for one in found] == [False, False, False, True, False]
    paths = sorted(photos.glob("?.png"))
    for ours, expected in zip(filter(None, found), model.predict_iter(paths), strict=True):
        assert_same(ours, expected)


def test_a_file_with_dynamic_sizes_matches_the_model(model: RetinaNet, file: Path) -> None:
    assert_same_as_model(OnnxDetector(file, threads=1).run, model, SHAPES)


def test_a_file_of_maps_matches_the_network(model: RetinaNet, maps_file: Path) -> None:
    detector = OnnxDetector(maps_file, threads=1)
    levels = ("p3", "p4", "p5")
    for shape in SHAPES:
        images, _ = batch_of(*shape)
        outputs = detector.run(images)
        assert list(outputs) == [f"{p}_{v}" for p in ("logits", "box_deltas") for v in levels]
        with torch.no_grad():
            logits, box_deltas = model.forward_maps(images)
        for ours, theirs in zip(outputs.values(), logits + box_deltas, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("postprocess", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("channels", "first_stride", "changes"),
    [
        pytest.param((8, 8, 8, 8), 4, {"levels": (2, 3, 4, 5, 6, 7)}, marks=pytest.mark.slow),
        ((32,), 16, {"levels": (5,), "fpn_channels": None, "clip_to": "batch"}),
    ],
)
def test_files_of_other_levels_predict_as_the_model(
    channels: tuple[int, ...],
    first_stride: int,
    changes: dict[str, Any],
    postprocess: bool,
    tmp_path: Path,
) -> None:
    options = {"fpn_channels": 32, "head_depth": 1, "min_size": 64, "max_size": 96}
    sizes = tuple(4 * 2**level for level in changes["levels"])
    config = RetinaNetConfig(
        num_classes=2, anchor_sizes=sizes, pre_nms_top_k=100, **(options | changes)
    )
    model = with_many_detections(
        RetinaNet.from_config(config, backbone=MapsBackbone(channels, first_stride))
    )
    export_onnx(model, tmp_path / "model.onnx", postprocess=postprocess)
    detector = OnnxDetector(tmp_path / "model.onnx", threads=1)
    assert detector.metadata.strides == tuple(first_stride * 2**i for i in range(len(channels)))
    for image in (photo(80, 64), photo(50, 90)):
        [found], [expected] = detector.predict(image), model.predict(image)
        assert_same(found, expected)


def test_a_file_names_no_folder_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    assert b"Conv" in content
    for module in (focaldet, torch):
        assert os.fsencode(Path(module.__file__ or "").parent) not in content


def test_a_file_has_metadata(model: RetinaNet, file: Path, maps_file: Path) -> None:
    loaded = onnx.load(file)
    found = {entry.key: entry.value for entry in loaded.metadata_props}
    assert opset_of(loaded) == json.loads(found["focaldet.opset"]) == 20
    assert RetinaNetConfig.from_json(found["focaldet.config"]) == model.config
    assert found["focaldet.version"] == focaldet.__version__
    assert found["focaldet.made_with"].startswith(f"torch {torch.__version__}, Python 3.")
    assert json.loads(found["focaldet.class_names"]) == ["cat", "dog", "owl"]
    assert json.loads(found["focaldet.thresholds"])["score_threshold"] == 0.05
    preprocessing = json.loads(found["focaldet.preprocessing"])
    assert preprocessing["color_order"].startswith("RGB")
    assert preprocessing["resize"]["short_side"] == 64
    assert preprocessing["size_divisor"] == 32
    metadata = ExportMetadata.from_strings("model.onnx", found)
    assert metadata == ExportMetadata.of_model(model, "detections", None, 20)
    assert set(json.loads(found["focaldet.inputs"])) == set(metadata.inputs)
    assert set(json.loads(found["focaldet.outputs"])) == set(metadata.outputs)
    assert [one.name for one in loaded.graph.input] == ["images", "sizes"]
    images = loaded.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in images] == ["batch", 3, "height", "width"]
    assert [one.name for one in loaded.graph.output] == ["boxes", "scores", "labels", "count"]
    assert opset_of(onnx.load(maps_file)) == OnnxDetector(maps_file).metadata.opset == 18


def opset_of(loaded: Any) -> int:
    [opset] = [one.version for one in loaded.opset_import if one.domain in ("", "ai.onnx")]
    return int(opset)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("which", ["file", "maps_file"])
def test_predict_matches_the_model(
    model: RetinaNet, photos: Path, which: str, batch_size: int, request: pytest.FixtureRequest
) -> None:
    detector = OnnxDetector(request.getfixturevalue(which), threads=1)
    with pytest.warns(UserWarning, match="Skipped an image"):
        found = detector.predict(photos, batch_size=batch_size, on_error="skip")
    with pytest.warns(UserWarning, match="Skipped an image"):
        expected = model.predict(photos, batch_size=batch_size, on_error="skip")
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours is not None
            assert_same(ours, theirs, count=10)


def test_predict_accepts_every_kind_of_source(model: RetinaNet, file: Path) -> None:
    detector = OnnxDetector(file, threads=1)
    image = photo(80, 64)
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    [expected] = model.predict(image)
    for source in (image, pixels, tensor, tensor.double() / 255, [image], tensor[None]):
        [found] = detector.predict(source)
        assert_same(found, expected)
    assert detector.predict([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "clip_to": "batch",
            "inclusive_corners": True,
            "uniform_rescale": True,
            "size_rounding": "round",
            "antialias": True,
            "round_pixels": True,
            "always_pad": True,
        },
        {"size_divisor": 1},
    ],
    ids=["others", "no divisor"],
)
def test_options_around_the_network_are_honoured(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make_model(**changes, pre_nms_top_k=300)
    export_onnx(model, tmp_path / "model.onnx")
    images = [photo(81, 65), photo(64, 90)]
    found = OnnxDetector(tmp_path / "model.onnx", threads=1).predict(images, batch_size=2)
    for ours, theirs in zip(found, model.predict(images, batch_size=2), strict=True):
        assert_same(ours, theirs)


def test_the_maps_of_a_file_are_suppressed_as_by_the_model(tmp_path: Path) -> None:
    model = make_model(suppression="linear", nms_threshold=0.2, pre_nms_top_k=300)
    export_onnx(model, tmp_path / "maps.onnx", postprocess=False)
    [found] = OnnxDetector(tmp_path / "maps.onnx", threads=1).predict(photo(81, 65))
    [expected] = model.predict(photo(81, 65))
    assert_same(found, expected)


def test_a_higher_threshold_is_honoured_and_a_lower_one_raises(
    model: RetinaNet, file: Path, maps_file: Path
) -> None:
    image = photo(80, 64)
    [everything] = model.predict(image)
    threshold = float(everything.scores[3:5].mean())
    [expected] = model.predict(image, score_threshold=threshold)
    assert 0 < len(expected) < len(everything)
    for path in (file, maps_file):
        [found] = OnnxDetector(path, threads=1).predict(image, score_threshold=threshold)
        assert_same(found, expected)
    with pytest.raises(ValueError, match=r"score_threshold.*0\.05.*0\.01.*Export"):
        OnnxDetector(file).predict(image, score_threshold=0.01)
    with pytest.raises(ValueError, match="score_threshold.*2"):
        OnnxDetector(file).predict(image, score_threshold=2)
    [found] = OnnxDetector(maps_file, threads=1).predict(image, score_threshold=0.01)
    assert_same(found, model.predict(image, score_threshold=0.01)[0])


def test_a_file_with_a_fixed_shape_fills_its_batch(model: RetinaNet, fixed_file: Path) -> None:
    detector = OnnxDetector(fixed_file, threads=1)
    images = [photo(96, 64, seed=i) for i in range(3)]
    found = detector.predict(images)  # two, then one
    for ours, theirs in zip(found, model.predict(images), strict=True):
        assert_same(ours, theirs)
    with pytest.raises(ValueError, match="64x96.*80x64.*80x64.*without fixed_shape"):
        detector.predict(photo(64, 80))
    with pytest.raises(ValueError, match="batch_size.*2.*3.*without fixed_shape"):
        detector.predict(images, batch_size=3)
    with pytest.raises(ValueError, match=r"\[2, 3, 64, 96\].*\[1, 3, 64, 96\]"):
        detector.run(torch.zeros(1, 3, 64, 96))
    assert repr(detector).startswith(
        "OnnxDetector(detections of 3 classes, shape (2, 64, 96), onnx"
    )


def test_the_detector_describes_itself(model: RetinaNet, maps_file: Path) -> None:
    detector = OnnxDetector(maps_file)
    assert detector.config == model.config
    assert detector.metadata.kind == "maps"
    assert detector.runtime.startswith("onnxruntime 1.")
    assert "OnnxDetector(maps of 3 classes, any shape" in repr(detector)


def test_old_names_still_work_with_a_warning(maps_file: Path) -> None:
    detector = OnnxDetector(maps_file)
    with pytest.warns(DeprecationWarning, match="use metadata") as warned:
        assert detector.facts is detector.metadata
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="ExportMetadata"):
        assert export.FileFacts is ExportMetadata


def test_wrong_inputs_are_named(file: Path) -> None:
    detector = OnnxDetector(file)
    images = torch.zeros(2, 3, 64, 96)
    assert detector.run(images)["count"].shape == (2,)
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((images.numpy(),), TypeError, "images.*ndarray"),
        ((images, [[64, 96]] * 2), TypeError, "sizes.*list"),
        ((images.double(),), TypeError, "images.*float32.*float64"),
        ((images[:, :1],), ValueError, r"images.*\[B, 3, H, W\].*\[2, 1, 64"),
        ((images[0],), ValueError, r"images.*\[B, 3, H, W\].*\[3, 64, 96\]"),
        (
            (images[..., :90],),
            ValueError,
            "size_divisor=32.*90.*Pad",
        ),
        ((images, torch.ones(2, 2)), TypeError, "sizes.*int64.*float32"),
        ((images, torch.tensor([[9, 9]])), ValueError, r"sizes.*\[2, 2\].*\[1, 2\]"),
        ((images, torch.tensor([[9, 9], [65, 9]])), ValueError, r"sizes\[1\].*64, 96.*65, 9"),
        ((images, torch.tensor([[9, 9], [0, 9]])), ValueError, r"sizes\[1\].*64, 96.*0, 9"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            detector.run(*arguments)
    with pytest.raises(ValueError, match="batch_size.*0"):
        detector.predict(photo(64, 64), batch_size=0)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        detector.predict("none.jpg")


def test_files_that_were_not_exported_by_focaldet_raise(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "other.onnx"
    other = onnx.load(file)
    ours = {entry.key: entry.value for entry in other.metadata_props}

    def rewrite(metadata: dict[str, str]) -> None:
        del other.metadata_props[:]
        onnx.helper.set_model_props(other, metadata)
        onnx.save(other, path)

    rewrite({})
    with pytest.raises(CheckpointError, match=r"other\.onnx' was not exported by focaldet"):
        OnnxDetector(path)
    rewrite({**ours, "focaldet.format": "99"})
    with pytest.raises(
        CheckpointError, match=rf"format '99'.*formats '1' and '2'.*{focaldet.__version__}"
    ):
        OnnxDetector(path)
    rewrite({**ours, "focaldet.config": "{}"})
    with pytest.raises(CheckpointError, match=r"other\.onnx' is damaged"):
        OnnxDetector(path)
    rewrite({**ours, "focaldet.kind": "masks"})
    with pytest.raises(ValueError, match="damaged.*kind 'masks'"):
        OnnxDetector(path)
    rewrite({key: value for key, value in ours.items() if key != "focaldet.strides"})
    with pytest.raises(ValueError, match="damaged: 'strides' is missing"):
        OnnxDetector(path)
    other.graph.output.pop()
    rewrite(ours)
    with pytest.raises(
        CheckpointError, match="changed.*images, sizes.*boxes, scores, labels, but.*count"
    ):
        OnnxDetector(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("strides", "[" * 100_000, "strides is not valid JSON .it is nested too deeply"),
        ("config", "[" * 100_000, "config.*nested too deeply"),
        ("opset", "[" * 100_000, "opset is not valid JSON"),
        ("strides", "8", "strides must be 3 positive integers, got 8"),
        ("strides", "[8, 16]", r"strides must be 3 positive integers, got \[8, 16\]"),
        ("strides", "[8, 16, -32]", "strides must be 3 positive integers"),
        ("strides", "[8, 16, 1e400]", "strides must be 3 positive integers"),
        ("strides", "[8, 16, true]", "strides must be 3 positive integers"),
        ("fixed_shape", "{}", "fixed_shape must be 3 positive integers, got {}"),
        ("fixed_shape", "[1, 64, NaN]", "fixed_shape must be 3 positive integers"),
        ("fixed_shape", "", "fixed_shape is not valid JSON"),
        ("opset", "2.5", "opset must be a positive integer, got 2.5"),
        ("opset", "9" * 5000, "opset is not valid JSON"),
        ("kind", "\x1b[2J", r"kind '\\x1b\[2J'"),
        ("config", "null", "config.json must contain one JSON object"),
    ],
)
def test_a_wrong_value_in_the_metadata_is_named(field: str, value: str, message: str) -> None:
    model = make_model()
    values = ExportMetadata.of_model(model, "maps", (1, 64, 64), 20).to_strings()
    assert ExportMetadata.from_strings("owls.onnx", values).fixed_shape == (1, 64, 64)

    with pytest.raises(CheckpointError, match=rf"metadata of 'owls\.onnx' is damaged: .*{message}"):
        ExportMetadata.from_strings("owls.onnx", {**values, f"focaldet.{field}": value})


def test_a_detector_does_not_build_the_head_of_the_metadata(file: Path, tmp_path: Path) -> None:
    loaded = onnx.load(file)
    for entry in loaded.metadata_props:
        if entry.key == "focaldet.config":
            config = json.loads(entry.value)
            entry.value = json.dumps({**config, "num_classes": 10**6, "class_names": None})
    onnx.save(loaded, tmp_path / "many.onnx")

    detector = OnnxDetector(tmp_path / "many.onnx")  # the head would have 83 GB

    assert detector.config.num_classes == 10**6


def test_damaged_files_are_named(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "damaged.onnx"
    whole = file.read_bytes()
    for content in (b"", b"not an ONNX file", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged\.onnx.*not an ONNX file"):
            OnnxDetector(path)
    with pytest.raises(FileNotFoundError, match=r"none\.onnx.*path"):
        OnnxDetector(tmp_path / "none.onnx")


def test_wrong_options_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = "tensorrt"
    with pytest.raises(ValueError, match="runtime 'tensorrt'.*'onnxruntime' or 'openvino'"):
        OnnxDetector(file, runtime=wrong)
    with pytest.raises(ValueError, match="threads.*0"):
        OnnxDetector(file, threads=0)
    with pytest.raises(ValueError, match="providers.*Abacus.*CPUExecutionProvider"):
        OnnxDetector(file, providers=["AbacusExecutionProvider"])
    with pytest.raises(ValueError, match="providers.*CPUExecutionProvider.*onnxruntime"):
        OnnxDetector(file, runtime="openvino", providers=["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="requires openvino.*pip install 'openvino'"):
        OnnxDetector(file, runtime="openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"requires onnxruntime.*'focaldet\[export\]'"):
        OnnxDetector(file)


def test_a_signal_after_openvino_files_are_closed_does_not_end_the_process(file: Path) -> None:
    pytest.importorskip("openvino")
    code = (
        "import signal, sys; from focaldet.export import OnnxDetector\n"
        "first = OnnxDetector(sys.argv[1], runtime='openvino', threads=1)\n"
        "second = OnnxDetector(sys.argv[1], runtime='openvino', threads=1)\n"
        "del first, second\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGTERM)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    assert done.stdout == "handled\n"


@pytest.mark.parametrize("which", ["file", "maps_file"])
def test_openvino_matches_the_model(
    model: RetinaNet, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    detector = OnnxDetector(request.getfixturevalue(which), runtime="openvino", threads=1)
    assert detector.runtime.startswith("openvino 20")
    for size in ((80, 64), (64, 96)):
        [expected] = model.predict(photo(*size))
        [found] = detector.predict(photo(*size))
        assert_same(found, expected)
    images = [photo(96, 64), photo(64, 80)]
    for found, expected in zip(
        detector.predict(images, batch_size=2), model.predict(images, batch_size=2), strict=True
    ):
        assert_same(found, expected)
    (tmp_path / "damaged.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(CheckpointError, match=r"damaged\.onnx.*not an ONNX file"):
        OnnxDetector(tmp_path / "damaged.onnx", runtime="openvino")


@pytest.mark.parametrize(
    ("which", "kind"),
    [
        ("model", ""),
        ("optimized", ""),
        *((which, kind) for which in ("onnxruntime", "openvino") for kind in ("file", "maps_file")),
    ],
)
def test_several_threads_may_use_one_detector(
    model: RetinaNet, which: str, kind: str, request: pytest.FixtureRequest
) -> None:
    detector: RetinaNet | OptimizedRetinaNet | OnnxDetector
    if which in ("model", "optimized"):
        detector = model if which == "model" else model.optimize_for_inference()
    else:
        pytest.importorskip(which)
        runtime: Any = which
        detector = OnnxDetector(request.getfixturevalue(kind), runtime=runtime, threads=1)
    images = [photo(64 + 16 * (seed % 2), 64, seed) for seed in range(4)]
    expected = [detector.predict(image)[0] for image in images]
    start = threading.Barrier(4)

    def predict(index: int) -> list[Detections]:
        start.wait()
        return [detector.predict(images[index])[0] for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(predict, range(4)))

    for run, once in zip(runs, expected, strict=True):
        for found in run:
            assert_same(found, once)


@pytest.mark.slow
@pytest.mark.parametrize("postprocess", [True, False])
def test_a_model_of_four_channels_is_exported(postprocess: bool, tmp_path: Path) -> None:
    config = RetinaNetConfig(
        num_classes=2,
        backbone="resnet18",
        backbone_norm="batch",
        in_channels=4,
        image_mean=(0.5,) * 4,
        image_std=(0.25,) * 4,
        fpn_channels=32,
        head_depth=1,
        min_size=64,
        max_size=96,
    )
    model = with_many_detections(RetinaNet.from_config(config))
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 4), dtype=np.uint8)

    export_program(model, tmp_path / "four.pt2", postprocess=postprocess, check_image=image)
    export_onnx(model, tmp_path / "four.onnx", postprocess=postprocess, check_image=image)

    [found] = OnnxDetector(tmp_path / "four.onnx").predict(image)
    [expected] = model.predict(image)
    assert_same(found, expected)


def test_an_error_of_the_runtime_is_reported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = OnnxDetector(file)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(detector._session, "_session", type("Broken", (), {"run": fail})())
    with pytest.raises(
        ExportError, match="Running the ONNX file failed: RuntimeError: out of memory"
    ):
        detector.run(torch.zeros(1, 3, 64, 64))
