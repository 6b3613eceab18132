"""Exported files give what the model gives, say what they are, and are whole or not there."""

from __future__ import annotations

import copy
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import focaldet
from focaldet import RetinaNet, RetinaNetConfig
from focaldet.export import (
    Comparison,
    ExportError,
    FileFacts,
    OnnxDetector,
    export_onnx,
    export_program,
)
from focaldet.export.__main__ import main
from tests.export_tiny import (
    TinyBackbone,
    assert_rows,
    batch_of,
    expected_of,
    make_model,
    photo,
    talkative,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# A batch of one, levels of one cell, unlike sides.
SHAPES = [(1, 32, 32), (3, 64, 96), (2, 160, 64), (1, 320, 256)]


def assert_file_gives_what_the_model_gives(
    run: Callable[[Tensor, Tensor], dict[str, Tensor]],
    model: RetinaNet,
    shapes: list[tuple[int, int, int]],
) -> None:
    for shape in shapes:
        images, sizes = batch_of(*shape)
        outputs = run(images, sizes)
        for index, expected in enumerate(expected_of(model, images, sizes)):
            count = int(outputs["count"][index])
            rows = [outputs[name][index, :count] for name in ("boxes", "scores", "labels")]
            assert count > 0
            assert_rows(rows, expected)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        pytest.param("paper", {}, marks=pytest.mark.slow),
        ("torchvision_v1", {}),
        pytest.param("torchvision_v2", {"class_agnostic_nms": True}, marks=pytest.mark.slow),
        ("paper", {"clip_to": "image_after_nms", "drop_empty": True, "max_detections": None}),
        pytest.param(
            "paper",
            {"clip_to": "batch", "inclusive_corners": True, "log_scale_clamp": None},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_an_onnx_file_of_open_sizes_gives_what_the_model_gives(
    tmp_path: Path, preset: str, changes: dict[str, Any]
) -> None:
    config: RetinaNetConfig = getattr(RetinaNetConfig, preset)(num_classes=11)
    model = make_model(config, **changes, pre_nms_top_k=300, fpn_channels=64)
    report = export_onnx(model, tmp_path / "model.onnx")
    assert all(comparison.ok and comparison.detections for comparison in report.comparisons)
    detector = OnnxDetector(tmp_path / "model.onnx", threads=1)
    assert_file_gives_what_the_model_gives(detector.run, model, SHAPES)


def test_a_program_of_open_sizes_gives_what_the_model_gives(tmp_path: Path) -> None:
    model = make_model()
    report = export_program(model, tmp_path / "model.pt2")
    assert len(report.comparisons) == 2
    function = torch.export.load(tmp_path / "model.pt2").module()

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        names = ("boxes", "scores", "labels", "count")
        return dict(zip(names, function(images, sizes), strict=True))

    assert_file_gives_what_the_model_gives(run, model, SHAPES)


@pytest.mark.parametrize("wanted", [0, 1])
def test_files_find_nothing_or_a_single_object(tmp_path: Path, wanted: int) -> None:
    model = make_model(pre_nms_top_k=300)
    images, sizes = batch_of(1, 64, 96)
    best = expected_of(model, images, sizes)[0].scores[:2].tolist()
    threshold = (best[0] + (best[1] if wanted else 1.0)) / 2
    model.postprocess.score_threshold = threshold
    export_program(model, tmp_path / "model.pt2")
    count = torch.export.load(tmp_path / "model.pt2").module()(images, sizes)[3]
    assert count.tolist() == [wanted]
    export_onnx(model, tmp_path / "model.onnx")
    session = OnnxDetector(tmp_path / "model.onnx", threads=1)
    assert session.run(images, sizes)["count"].tolist() == [wanted]


def test_maps_are_exported_without_post_processing(tmp_path: Path) -> None:
    model = make_model(pre_nms_top_k=None)  # which post-processing could not be exported with
    export_onnx(model, tmp_path / "model.onnx", postprocess=False)
    export_program(model, tmp_path / "model.pt2", postprocess=False)
    detector = OnnxDetector(tmp_path / "model.onnx", threads=1)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SHAPES:
        images, _ = batch_of(*shape)
        with torch.no_grad():
            logits, box_deltas = model.forward_maps(images)
        outputs = detector.run(images)
        levels = ("p3", "p4", "p5", "p6", "p7")
        assert list(outputs) == [
            f"{p}_{level}" for p in ("logits", "box_deltas") for level in levels
        ]
        for ours, theirs in zip(outputs.values(), logits + box_deltas, strict=True):
            assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(program(images), logits + box_deltas, strict=True):
            assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    model = make_model(score_threshold=0.125)
    export_onnx(model, tmp_path / "model.onnx", opset=18)
    loaded = onnx.load(tmp_path / "model.onnx")
    found = {entry.key: entry.value for entry in loaded.metadata_props}
    assert [one.version for one in loaded.opset_import if one.domain in ("", "ai.onnx")] == [18]
    assert RetinaNetConfig.from_json(found["focaldet.config"]) == model.config
    assert found["focaldet.version"] == focaldet.__version__
    assert json.loads(found["focaldet.class_names"]) == ["cat", "dog", "owl"]
    assert json.loads(found["focaldet.thresholds"])["score_threshold"] == 0.125
    preprocessing = json.loads(found["focaldet.preprocessing"])
    assert preprocessing["color_order"].startswith("RGB")
    assert preprocessing["resize"]["short_side"] == 64
    assert preprocessing["size_divisor"] == 32
    assert json.loads(found["focaldet.opset"]) == 18
    facts = FileFacts.from_strings("model.onnx", found)
    assert facts == FileFacts.of_model(model, "detections", None, 18)
    assert set(json.loads(found["focaldet.inputs"])) == set(facts.inputs)
    assert set(json.loads(found["focaldet.outputs"])) == set(facts.outputs)
    assert [one.name for one in loaded.graph.input] == ["images", "sizes"]
    images = loaded.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in images] == ["batch", 3, "height", "width"]
    assert [one.name for one in loaded.graph.output] == ["boxes", "scores", "labels", "count"]


def test_a_program_says_what_it_is(tmp_path: Path) -> None:
    model = make_model()
    export_program(model, tmp_path / "model.pt2", fixed_shape=(1, 64, 96))
    facts = FileFacts.of_model(model, "detections", (1, 64, 96))
    found = dict.fromkeys(facts.to_strings(), "")
    torch.export.load(tmp_path / "model.pt2", extra_files=found)
    assert FileFacts.from_strings("model.pt2", found) == facts


def test_a_model_optimised_for_inference_is_exported_too(tmp_path: Path) -> None:
    model = make_model(pre_nms_top_k=300)
    export_onnx(model.optimize_for_inference(), tmp_path / "model.onnx")
    detector = OnnxDetector(tmp_path / "model.onnx", threads=1)
    assert_file_gives_what_the_model_gives(detector.run, model, [(2, 64, 96)])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    export_program(model, tmp_path / "model.pt2", fixed_shape=(1, 64, 64))
    assert model.training
    assert model.backbone.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_report_is_text_to_read(tmp_path: Path) -> None:
    image = photo(96, 64)
    report = export_onnx(
        make_model(), tmp_path / "a.onnx", fixed_shape=(2, 64, 96), check_image=image
    )
    first, line = str(report).splitlines()
    assert first.startswith(
        f"{tmp_path / 'a.onnx'}: opset 20, compared with the model in onnxruntime"
    )
    assert line.startswith("  64x96 and 64x96: ")
    assert "detections, boxes within 0.0" in line
    silent = make_model(score_threshold=1.0)
    report = export_program(silent, tmp_path / "a.pt2", fixed_shape=(1, 64, 64))
    assert "nothing found by either; give a photo with objects" in str(report)
    maps = export_program(silent, tmp_path / "a.pt2", fixed_shape=(1, 64, 64), postprocess=False)
    assert "maps within" in str(maps)


def test_a_file_that_gives_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"what was there")
    model = make_model()
    module = sys.modules["focaldet.export._program"]
    frozen_copy = module.frozen_copy

    def drifting(model: RetinaNet, *others: Any) -> Any:
        moved = frozen_copy(model)
        moved.head.box_deltas.bias.data += 0.05
        return trace(moved, *others)

    trace = module.trace
    monkeypatch.setattr(module, "trace", drifting)
    with pytest.raises(ExportError, match="does not give what the model gives, within 0.02 px"):
        export_program(model, path, fixed_shape=(1, 64, 64))
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_differences_beyond_tolerance_are_not_ok() -> None:
    sizes = ((64, 64),)
    assert Comparison(sizes, 3, 0, 0.019, 4e-5).ok
    assert not Comparison(sizes, 3, 1).ok
    assert not Comparison(sizes, 3, 0, 0.021).ok
    assert not Comparison(sizes, 3, 0, 0.0, 6e-5).ok
    assert not Comparison(sizes, map_difference=0.01).ok
    assert "1 found by one alone" in str(Comparison(sizes, 3, 1))


class Branching(TinyBackbone):
    def forward(self, images: Tensor) -> list[Tensor]:
        if images.sum() > 3:
            images = images / 2
        return super().forward(images)


def test_a_backbone_that_cannot_be_traced_says_why(tmp_path: Path) -> None:
    config = make_model().config
    model = talkative(RetinaNet.from_config(config, backbone=Branching()))
    for export, name in ((export_onnx, "a.onnx"), (export_program, "a.pt2")):
        with pytest.raises(
            ExportError, match=r"(?s)torch.export failed: .*depends on the values of images"
        ):
            export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "a.onnx"), (export_program, "a.pt2")])
def test_wrong_arguments_are_named(tmp_path: Path, export: Any, name: str) -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match=r"`path` must be a file name that ends in \.(onnx|pt2); got"
    ):
        export(model, tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="`path` must be in an existing folder; got"):
        export(model, tmp_path / "none" / name)
    with pytest.raises(TypeError, match="`model` must be a RetinaNet; got Linear"):
        export(nn.Linear(1, 1), tmp_path / name)
    with pytest.raises(
        ValueError, match="`model` must be of float32 to be exported; got torch.bfl"
    ):
        export(copy.deepcopy(model).bfloat16(), tmp_path / name)
    with pytest.raises(
        ValueError, match=r"size_divisor=32 divides; got \(1, 60, 64\). The next are"
    ):
        export(model, tmp_path / name, fixed_shape=(1, 60, 64))
    with pytest.raises(ValueError, match=r"`fixed_shape` must be \(batch, height, width\); got"):
        export(model, tmp_path / name, fixed_shape=(64, 64))
    with pytest.raises(ValueError, match="`fixed_shape` must be >= 1; got 0"):
        export(model, tmp_path / name, fixed_shape=(0, 64, 64))
    with pytest.raises(ValueError, match="`pre_nms_top_k` must be a number; got None"):
        export(make_model(pre_nms_top_k=None), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_torch_does_not_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`opset` must be >= 18; got 11"):
        export_onnx(make_model(), tmp_path / "a.onnx", opset=11)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package} .*'focaldet\[export\]'"):
        export_onnx(make_model(), tmp_path / "a.onnx")


def test_the_command_writes_a_file_and_prints_the_report(
    tmp_path: Path, tiny_config: RetinaNetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    RetinaNet.from_config(tiny_config).save_pretrained(tmp_path / "model")
    photo(96, 64).save(tmp_path / "photo.png")
    arguments = [str(tmp_path / "model"), str(tmp_path / "a.pt2"), "--shape", "1", "64", "96"]
    assert main([*arguments, "--image", str(tmp_path / "photo.png")]) == 0
    assert "a.pt2: compared with the model in torch" in capsys.readouterr().out
    assert (tmp_path / "a.pt2").is_file()
    assert main([arguments[0], str(tmp_path / "a.onnx"), "--opset", "3"]) == 2
    assert capsys.readouterr().err == "error: `opset` must be >= 18; got 3.\n"
