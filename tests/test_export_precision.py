"""Files in INT8 and float16: what they contain, how they are checked, and what is refused."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import Detections, RetinaNet
from focaldet.box_coder import BoxCoder
from focaldet.cli import main
from focaldet.errors import CheckpointError
from focaldet.export import (
    Agreement,
    Calibration,
    ExportError,
    ExportMetadata,
    ExportReport,
    LayerGroup,
    OnnxDetector,
    Tolerances,
    export_onnx,
)
from focaldet.export._agreement import agreement_of
from focaldet.export._candidates import map_error
from focaldet.export._processor import missing_units
from focaldet.export._quantization import read_shapes_of_sums
from focaldet.export._sessions import shared_core
from focaldet.postprocess import PostProcess
from tests.helpers.tiny_export import make_model, photo

if TYPE_CHECKING:
    from pathlib import Path

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Weights drawn at random lose more in INT8 than trained ones.
_BUDGET = 0.04
_TOLERANCES = Tolerances(unmatched=0.3, scores=0.1, boxes=0.2)


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return make_model(pre_nms_top_k=300, score_threshold=0.05)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(16):
        photo(96 - index, 64 + index, index).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def exported(
    model: RetinaNet, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    report = export_onnx(
        model,
        path,
        postprocess=False,  # which takes half a minute; the slow tests export it, too
        precision="int8",
        calibration=photos,
        error_budget=_BUDGET,
        tolerances=_TOLERANCES,
    )
    return path, report


def convolutions(path: Path) -> dict[bool, int]:
    """Count the convolutions of a file, by whether their weights are in INT8."""
    graph = onnx.load(str(path)).graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    found = {True: 0, False: 0}
    for node in graph.node:
        if node.op_type == "Conv":
            found[node.input[1] in dequantized] += 1
    return found


def test_an_int8_file_finds_nearly_what_the_model_finds(
    model: RetinaNet, exported: tuple[Path, ExportReport]
) -> None:
    path, _ = exported
    pictures = [photo(90, 70, 100 + index) for index in range(3)]  # not those of the calibration
    found = OnnxDetector(path, threads=1).predict(pictures)
    agreement = agreement_of(model.predict(pictures), found, model.postprocess)
    assert agreement.detections > 100
    assert agreement.within(_TOLERANCES), agreement
    assert agreement.scores > 0  # it is not the float file


def test_the_report_lists_groups_size_and_agreement(
    exported: tuple[Path, ExportReport],
) -> None:
    path, report = exported
    assert report.path == path
    assert report.precision == "int8"
    assert report.comparisons == ()
    calibration, size = report.calibration, report.size
    assert calibration is not None
    assert size is not None
    assert calibration.images == 16
    names = [group.name for group in calibration.groups]
    assert names[0] == "stem"
    assert {"backbone.c4", "head.class_logits"} <= set(names)
    assert "fpn" not in names  # its error alone is above the budget, so its layers are groups
    assert "fpn.output.0" in names
    assert max(calibration.score_error, calibration.box_error) <= _BUDGET
    assert size[0] == path.stat().st_size < 0.7 * size[1]  # smaller if all groups are in INT8
    assert report.agreement is not None
    assert report.agreement.images == 8
    for text in (
        "int8",
        "head.class_logits: 3 convolutions",
        "calibrated on 16 images",
        "in float32",
    ):
        assert text in str(report)


def test_groups_that_exceed_the_budget_stay_in_float32(
    exported: tuple[Path, ExportReport],
) -> None:
    path, report = exported
    assert report.calibration is not None
    wanted = {True: 0, False: 0}
    for group in report.calibration.groups:
        wanted[group.precision == "int8"] += group.convolutions
    assert convolutions(path) == wanted
    kept = [group for group in report.calibration.groups if group.precision == "float32"]
    others = [group for group in report.calibration.groups if group.precision == "int8"]
    assert kept  # so that the budget decides something here
    assert min(group.error for group in kept) >= max(group.error for group in others)


def test_the_metadata_tell_precision_and_calibration(
    exported: tuple[Path, ExportReport], caplog: pytest.LogCaptureFixture
) -> None:
    path, report = exported
    with caplog.at_level(logging.WARNING, "focaldet"):
        detector = OnnxDetector(path, threads=1)
    assert detector.metadata.precision == "int8"
    assert detector.metadata.calibration == report.calibration
    assert "int8" in repr(detector)
    missing = missing_units("int8", torch.cpu.get_capabilities())
    assert ("no units for int8" in caplog.text) == (missing is not None)
    stored = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert stored["focaldet.format"] == "2"  # older versions refuse it
    assert not any(node.metadata_props for node in onnx.load(str(path)).graph.node)


def test_a_file_that_was_not_measured_in_a_runtime_warns_there(
    exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    path, report = exported
    assert report.calibration is not None
    assert report.calibration.runtimes == ("onnxruntime", "openvino")
    assert "onnxruntime" in report.runtime
    assert "openvino" in report.runtime.lower()
    OnnxDetector(path, runtime="openvino", threads=1)  # does not warn
    content = onnx.load(str(path))
    for entry in content.metadata_props:
        if entry.key == "focaldet.calibration":
            entry.value = json.dumps({**json.loads(entry.value), "runtimes": ["onnxruntime"]})
    onnx.save(content, str(tmp_path / "changed.onnx"))
    with pytest.warns(UserWarning, match=r"changed\.onnx' was calibrated without openvino"):
        OnnxDetector(tmp_path / "changed.onnx", runtime="openvino", threads=1)
    OnnxDetector(tmp_path / "changed.onnx", threads=1)


def test_files_in_float32_keep_their_format(model: RetinaNet) -> None:
    metadata = ExportMetadata.of_model(model, "detections", None, 20)
    values = metadata.to_strings()
    assert values["focaldet.format"] == "1"
    assert "focaldet.precision" not in values
    assert ExportMetadata.from_strings("x", values) == metadata


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": 3}', '{"groups": 3}', '{"groups": [{"name": "stem"}]}']
)
def test_damaged_calibrations_are_reported(model: RetinaNet, text: str) -> None:
    values = ExportMetadata.of_model(model, "detections", None, 20, "int8").to_strings()
    values["focaldet.calibration"] = text
    with pytest.raises(CheckpointError, match="calibration is damaged"):
        ExportMetadata.from_strings("model.onnx", values)


def test_calibrations_survive_json() -> None:
    group = LayerGroup(
        name="stem", convolutions=1, score_error=0.25, box_error=0.5, precision="float32"
    )
    calibration = Calibration(
        images=20,
        method="extremes",
        groups=(group,),
        score_error=0.0,
        box_error=0.125,
        runtimes=("onnxruntime",),
    )
    assert Calibration.from_json(calibration.to_json()) == calibration
    assert calibration.float_groups == ("stem",)
    wrong = json.loads(calibration.to_json())
    wrong["groups"][0]["precision"] = "int4"
    with pytest.raises(ValueError, match="calibration is damaged"):
        Calibration.from_json(json.dumps(wrong))


def test_openvino_runs_the_same_file(model: RetinaNet, exported: tuple[Path, ExportReport]) -> None:
    pytest.importorskip("openvino")
    pictures = [photo(80, 70, 200)]
    found = OnnxDetector(exported[0], runtime="openvino", threads=1).predict(pictures)
    assert agreement_of(model.predict(pictures), found, model.postprocess).within(_TOLERANCES)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_openvino_computes_float_files_in_other_precisions(
    model: RetinaNet,
    exported: tuple[Path, ExportReport],
    precision: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    openvino = pytest.importorskip("openvino")
    capabilities = shared_core(openvino).get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    name = {"bfloat16": "BF16", "float16": "FP16"}[precision]
    with caplog.at_level(logging.WARNING, "focaldet"):
        detector = OnnxDetector(exported[0], runtime="openvino", precision=precision, threads=1)
    assert (f"no {precision} kernels" in caplog.text) == (name not in capabilities)
    pictures = [photo(80, 70, 200)]
    found = detector.predict(pictures)
    assert agreement_of(model.predict(pictures), found, model.postprocess).within(_TOLERANCES)


def test_the_precision_of_onnxruntime_is_that_of_the_file(
    exported: tuple[Path, ExportReport],
) -> None:
    with pytest.raises(ValueError, match="precision='bfloat16' requires runtime='openvino'"):
        OnnxDetector(exported[0], precision="bfloat16")
    with pytest.raises(ValueError, match="Unknown precision 'int8'"):
        OnnxDetector(exported[0], runtime="openvino", precision="int8")  # type: ignore[arg-type]


def test_a_file_that_misses_its_tolerances_is_kept_aside(model: RetinaNet, tmp_path: Path) -> None:
    path = tmp_path / "owls.onnx"
    strict = Tolerances(unmatched=0, scores=0, boxes=0)
    with pytest.raises(ExportError, match=r"owls\.rejected\.onnx.*raise the tolerances"):
        export_onnx(
            model,
            path,
            postprocess=False,
            precision="float16",
            tolerances=strict,
            check_image=photo(90, 60),
        )
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["owls.rejected.onnx", "owls.rejected.txt"]
    assert "float16" in (tmp_path / "owls.rejected.txt").read_text()
    assert OnnxDetector(tmp_path / "owls.rejected.onnx", threads=1).metadata.precision == "float16"


def annotations_of(folder: Path) -> Path:
    """Write a COCO file with one box in each of two photos."""
    images = [
        {"id": index, "file_name": f"{index}.png", "width": 96 - index, "height": 64 + index}
        for index in range(2)
    ]
    boxes = [
        {"id": index, "image_id": index, "category_id": 1, "bbox": [8, 8, 40, 30], "iscrowd": 0}
        for index in range(2)
    ]
    names = [{"id": index, "name": name} for index, name in enumerate(("cat", "dog", "owl"))]
    content = {"images": images, "annotations": boxes, "categories": names}
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_the_command_exports_float16_and_evaluates_it(
    model: RetinaNet,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("focaldet.cli._export.load_model", lambda _: model)
    path = tmp_path / "half.onnx"
    image = photos / "3.png"
    arguments = [
        "export",
        "any",
        str(path),
        "--precision",
        "float16",
        "--maps",
        "--image",
        str(image),
    ]
    arguments += ["--evaluate", str(annotations_of(tmp_path)), "--images", str(photos)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "float16, opset 20" in output
    assert "model: AP " in output
    assert "file:  AP " in output
    weights = [w for w in onnx.load(str(path)).graph.initializer if w.name.endswith("weight")]
    assert weights
    assert {weight.data_type for weight in weights} == {onnx.TensorProto.FLOAT16}
    [expected], [found] = model.predict(image), OnnxDetector(path, threads=1).predict(image)
    agreement = agreement_of([expected], [found], model.postprocess)
    assert agreement.unmatched < 0.03
    assert agreement.scores < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "Unknown precision 'int4'"),
        ({"precision": "bfloat16"}, r"runtime='openvino', precision='bfloat16'"),
        ({"precision": "int8"}, "requires calibration=: a folder of photos"),
        ({"calibration": ["a.jpg"]}, "calibration is for precision='int8' only, got 'float32'"),
        ({"precision": "float16", "error_budget": 0.1}, "error_budget is for precision='int8'"),
        ({"precision": "int8", "calibration": []}, "calibration is empty"),
        ({"precision": "int8", "calibration": ["a"], "error_budget": 2}, "error_budget must be in"),
        ({"tolerances": Tolerances()}, "tolerances are for precision='int8' and 'float16' only"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_the_precision_are_errors(
    model: RetinaNet, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_calibration_folder_without_images_is_an_error(model: RetinaNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(calibration\) contains no images"):
        export_onnx(model, tmp_path / "model.onnx", precision="int8", calibration=tmp_path)


def test_a_missing_calibration_photo_is_named_by_its_argument(
    model: RetinaNet, tmp_path: Path
) -> None:
    photos = [tmp_path / "missing.jpg"]
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg' \(calibration\[0\]\)"):
        export_onnx(model, tmp_path / "model.onnx", precision="int8", calibration=photos)


@pytest.mark.parametrize(
    ("count", "seeds", "message"),
    [(3, 3, "has only 3 images"), (20, 2, "has 20 images, but only 2 that differ visibly")],
)
def test_few_or_similar_calibration_images_are_reported(
    model: RetinaNet, count: int, seeds: int, message: str
) -> None:
    from focaldet.export._calibration_images import CalibrationImages

    metadata = ExportMetadata.of_model(model, "detections", None, 20, "int8")
    images = [photo(40, 30, index % seeds) for index in range(count)]
    with pytest.warns(UserWarning, match=message):
        CalibrationImages(images, model, metadata)


def test_tolerances_must_be_shares() -> None:
    with pytest.raises(ValueError, match=r"tolerances\.boxes must be in \[0, 1\], got 2"):
        Tolerances(boxes=2)
    with pytest.raises(TypeError, match=r"tolerances\.scores must be a number"):
        Tolerances(scores="high")  # type: ignore[arg-type]


def detections(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        torch.tensor(boxes).float().view(-1, 4),
        torch.tensor(scores).float(),
        torch.tensor(labels).long(),
        (100, 100),
    )


def test_agreement_weighs_detections_by_their_scores() -> None:
    expected = detections([[0, 0, 10, 10], [50, 50, 60, 60]], [0.75, 0.25], [0, 0])
    found = detections([[0, 0, 10, 8], [50, 50, 60, 60]], [0.5, 0.25], [0, 1])
    agreement = agreement_of([expected], [found], PostProcess(BoxCoder(), score_threshold=0.05))
    # The first box matches; the second has another class, and is missing on both sides.
    assert agreement.detections == 2
    assert agreement.unmatched == pytest.approx(2 * (0.25 - 0.05) / 1.75)
    assert agreement.scores == pytest.approx(0.25)
    assert agreement.boxes == pytest.approx(0.2)
    assert not agreement.within(Tolerances(unmatched=0.2, scores=1, boxes=1))
    assert agreement.within(Tolerances(unmatched=0.3, scores=0.3, boxes=0.3))


def test_a_detection_that_the_other_side_had_no_room_for_hardly_counts() -> None:
    expected = detections([[0, 0, 10, 10], [50, 50, 60, 60]], [0.75, 0.5], [0, 0])
    found = detections([[0, 0, 10, 10], [30, 0, 40, 10]], [0.75, 0.5625], [0, 0])
    full = PostProcess(BoxCoder(), score_threshold=0.05, max_detections=2)
    agreement = agreement_of([expected], [found], full)
    assert agreement.unmatched == pytest.approx((0.5625 - 0.5) / 2.5625)


def test_images_without_detections_are_reported_as_such() -> None:
    nothing = detections([], [], [])
    agreement = agreement_of([nothing], [nothing], PostProcess(BoxCoder()))
    assert "no detections to compare" in str(agreement)


def test_the_loss_of_ap_counts_against_its_tolerance(tmp_path: Path) -> None:
    class Result:
        def __init__(self, ap: float) -> None:
            self.ap = ap

    agreement = Agreement(images=1, detections=1, unmatched=0, scores=0, boxes=0)
    results: dict[str, Any] = {"model_result": Result(0.5), "file_result": Result(0.48)}
    report = ExportReport(tmp_path, 20, "x", (), agreement=agreement, **results)
    assert not report.within(Tolerances(average_precision=0.01))
    assert report.within(Tolerances(average_precision=0.03))


def test_map_errors_are_measured_where_either_side_finds_objects() -> None:
    model = make_model()
    with torch.no_grad():
        logits, deltas = model.forward_maps(torch.randn(1, 3, 64, 64))
    expected = [level.clone() for level in (*logits, *deltas)]
    error = map_error(model, expected, expected, (64, 64))
    assert error.scores == 0
    assert error.boxes == pytest.approx(0.0, abs=1e-5)
    worse = [level.clone() for level in expected]
    worse[0][0, 0, 0, 0] = 20.0  # a new object
    assert map_error(model, expected, worse, (64, 64)).scores > 0.005
    moved = [level.clone() for level in expected]
    for level in moved[len(logits) :]:
        level[:, 0::4] += 1.0
    error = map_error(model, expected, moved, (64, 64))
    assert error.scores == 0
    assert error.boxes > 0.1


def test_units_are_looked_up_by_processor() -> None:
    assert missing_units("bfloat16", {"architecture": "x86_64"}) == "AVX512-BF16 or AMX-BF16"
    assert missing_units("bfloat16", {"architecture": "x86_64", "amx_bf16": True}) is None
    assert missing_units("int8", {"architecture": "aarch64", "dot": True}) is None
    assert missing_units("int8", {"architecture": "riscv"}) is None  # not known
    assert missing_units("float32", {"architecture": "x86_64"}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt2", "--precision", "int8"], "--precision is for .onnx files only"),
        (["model.pt2", "--calibration", "a.jpg"], "--calibration is for .onnx files only"),
        (["model.onnx", "--split", "val"], "say how to read --evaluate"),
    ],
)
def test_options_of_the_command_that_do_not_fit_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "missing", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_shape_of_a_summand_is_read_from_the_sum() -> None:
    helper = onnx.helper
    sizes = ["batch", 2, "height", "width"]
    float_type = onnx.TensorProto.FLOAT

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, float_type, sizes)

    file = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Relu", ["images"], ["map"]),
                helper.make_node("Shape", ["map"], ["size"]),
                helper.make_node("Identity", ["size"], ["same_size"]),
                helper.make_node("Shape", ["map"], ["part_of_the_sum"]),
                helper.make_node("Expand", ["map", "part_of_the_sum"], ["expanded"]),
                helper.make_node("Add", ["map", "expanded"], ["sum"]),
                helper.make_node("Shape", ["images"], ["other"]),
                helper.make_node("Expand", ["sum", "same_size"], ["out"]),
            ],
            "test",
            [value("images")],
            [value("out"), helper.make_tensor_value_info("other", onnx.TensorProto.INT64, [4])],
            value_info=[value("map"), value("sum")],
        )
    )
    read_shapes_of_sums(file)
    onnx.checker.check_model(file, full_check=True)
    assert {n.output[0]: n.input[0] for n in file.graph.node if n.op_type == "Shape"} == {
        "size": "sum",
        "part_of_the_sum": "map",
        "other": "images",
    }
