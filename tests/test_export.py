"""Exported files give the same results as the model, have metadata, and are written atomically."""

from __future__ import annotations

import copy
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import focaldet
from focaldet import RetinaNet, RetinaNetConfig
from focaldet.cli import main
from focaldet.export import (
    Comparison,
    ExportError,
    ExportMetadata,
    ExportReport,
    OnnxDetector,
    export_onnx,
    export_program,
)
from tests.helpers.tiny_export import (
    SHAPES,
    TinyBackbone,
    assert_same_as_model,
    batch_of,
    expected_of,
    make_model,
    photo,
    with_many_detections,
)
from tests.helpers.tiny_model import MapsBackbone

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return make_model(pre_nms_top_k=300, nms_threshold=0.45)


@pytest.fixture(scope="module")
def program_file(model: RetinaNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    assert len(export_program(model, path).comparisons) == 2
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {}),
        ("torchvision_v1", {}),
        ("torchvision_v2", {"class_agnostic_nms": True}),
        ("paper", {"clip_to": "image_after_nms", "drop_empty": True, "max_detections": None}),
        ("paper", {"clip_to": "batch", "inclusive_corners": True, "log_scale_clamp": None}),
        ("paper", {"clip_to": "last_pixel", "box_encoding": "corners", "strided_padding": "same"}),
    ],
    ids=str,
)
def test_an_onnx_file_with_dynamic_sizes_matches_the_model(
    tmp_path: Path, preset: str, changes: dict[str, Any]
) -> None:
    config: RetinaNetConfig = getattr(RetinaNetConfig, preset)(num_classes=11)
    model = make_model(config, **changes, pre_nms_top_k=300, fpn_channels=64)
    report = export_onnx(model, tmp_path / "model.onnx")
    assert all(comparison.ok and comparison.detections for comparison in report.comparisons)
    detector = OnnxDetector(tmp_path / "model.onnx", threads=1)
    assert_same_as_model(detector.run, model, SHAPES)


def test_a_program_with_dynamic_sizes_matches_the_model(
    model: RetinaNet, program_file: Path
) -> None:
    function = torch.export.load(program_file).module()

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        names = ("boxes", "scores", "labels", "count")
        return dict(zip(names, function(images, sizes), strict=True))

    assert_same_as_model(run, model, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [0, 1])
def test_files_can_find_no_object_or_one(tmp_path: Path, wanted: int) -> None:
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
    model = make_model(pre_nms_top_k=None)  # not supported with post-processing
    export_program(model, tmp_path / "model.pt2", postprocess=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SHAPES:
        images, _ = batch_of(*shape)
        with torch.no_grad():
            logits, box_deltas = model.forward_maps(images)
        for ours, theirs in zip(program(images), logits + box_deltas, strict=True):
            assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("channels", "levels", "fpn_channels", "last_output"),
    [
        pytest.param((8, 8, 8, 8), (2, 3, 4, 5, 6, 7), 32, "box_deltas_p7", marks=pytest.mark.slow),
        ((8,), (5,), None, "box_deltas_p5"),
    ],
)
def test_maps_of_any_levels_are_exported_with_their_names(
    channels: tuple[int, ...],
    levels: tuple[int, ...],
    fpn_channels: int | None,
    last_output: str,
    tmp_path: Path,
) -> None:
    config = RetinaNetConfig(
        num_classes=2,
        levels=levels,
        fpn_channels=fpn_channels,
        anchor_sizes=tuple(4 * 2**level for level in levels),
        head_depth=1,
        min_size=64,
        max_size=96,
    )
    backbone = MapsBackbone(channels, first_stride=4 if len(channels) > 1 else 16)
    model = with_many_detections(RetinaNet.from_config(config, backbone=backbone))
    export_program(model, tmp_path / "model.pt2", postprocess=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in SHAPES:
        images, _ = batch_of(*shape)
        with torch.no_grad():
            logits, box_deltas = model.forward_maps(images)
        for ours, theirs in zip(program(images), logits + box_deltas, strict=True):
            assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    metadata = ExportMetadata.of_model(model, "maps", None)
    assert metadata.strides == backbone.strides
    assert (metadata.outputs[0], metadata.outputs[-1]) == (f"logits_p{levels[0]}", last_output)
    assert len(metadata.outputs) == 2 * len(levels)
    assert ExportMetadata.from_strings("model.pt2", metadata.to_strings()) == metadata


def test_a_program_has_metadata(model: RetinaNet, program_file: Path) -> None:
    metadata = ExportMetadata.of_model(model, "detections", None)
    found = dict.fromkeys(metadata.to_strings(), "")
    torch.export.load(program_file, extra_files=found)
    assert ExportMetadata.from_strings("model.pt2", found) == metadata
    assert json.loads(found["focaldet.thresholds"])["nms_threshold"] == 0.45


def test_a_program_names_no_folder_of_this_machine(program_file: Path) -> None:
    with zipfile.ZipFile(program_file) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    assert b"conv2d" in content
    for module in (focaldet, torch):
        assert os.fsencode(Path(module.__file__ or "").parent) not in content


def test_an_optimised_copy_raises(tmp_path: Path, model: RetinaNet) -> None:
    copy: Any = model.optimize_for_inference()
    with pytest.raises(TypeError, match="optimize_for_inference.*original"):
        export_program(copy, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_unchanged(tmp_path: Path) -> None:
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    export_program(model, tmp_path / "model.pt2", fixed_shape=(1, 64, 64), postprocess=False)
    assert model.training
    assert model.backbone.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_report_prints_the_differences() -> None:
    sizes = ((64, 96), (32, 96))
    found = Comparison(sizes, 7, 0, 0.00123, 4.2e-7)
    report = ExportReport(Path("a.onnx"), 20, "onnxruntime 1.31", (found, found))
    assert str(report).splitlines() == [
        "a.onnx: opset 20, compared with the model in onnxruntime 1.31",
        *["  64x96 and 32x96: 7 detections, boxes within 0.0012 px, scores within 4.2e-07"] * 2,
    ]
    nothing = "no detections to compare; pass a photo with objects as check_image"
    assert str(Comparison(sizes[:1], 0)) == f"64x96: {nothing}"
    maps = Comparison(sizes[:1], map_difference=2.5e-6)
    assert str(maps) == "64x96: maps within 2.5e-06 of their maximum"


def test_a_file_with_different_results_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old content")
    model = make_model()
    module = sys.modules["focaldet.export._program"]

    def drifting(model: RetinaNet, *others: Any) -> Any:
        moved = copy.deepcopy(model)
        moved.head.box_deltas.bias.data += 0.05  # type: ignore[union-attr]
        return trace(moved, *others)

    trace = module.trace
    monkeypatch.setattr(module, "trace", drifting)
    with pytest.raises(ExportError, match=r"(?s)different results.*0\.02 px.*Nothing was written"):
        export_program(model, path, fixed_shape=(1, 64, 64))
    assert path.read_bytes() == b"old content"
    assert list(tmp_path.iterdir()) == [path]


def test_differences_above_the_tolerances_are_not_ok() -> None:
    sizes = ((64, 64),)
    assert Comparison(sizes, 3, 0, 0.019, 4e-5).ok
    assert not Comparison(sizes, 3, 1).ok
    assert not Comparison(sizes, 3, 0, 0.021).ok
    assert not Comparison(sizes, 3, 0, 0.0, 6e-5).ok
    assert not Comparison(sizes, map_difference=0.01).ok
    assert "1 without a match" in str(Comparison(sizes, 3, 1))


class Branching(TinyBackbone):
    def forward(self, images: Tensor) -> list[Tensor]:
        if images.sum() > 3:
            images = images / 2
        return super().forward(images)


def test_a_backbone_that_cannot_be_traced_raises_with_the_reason(tmp_path: Path) -> None:
    config = make_model().config
    model = with_many_detections(RetinaNet.from_config(config, backbone=Branching()))
    for export, name in ((export_onnx, "a.onnx"), (export_program, "a.pt2")):
        with pytest.raises(
            ExportError, match=r"(?s)torch\.export failed: .*custom backbone.*depend on the values"
        ):
            export(model, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "a.onnx"), (export_program, "a.pt2")])
def test_wrong_arguments_are_named(tmp_path: Path, export: Any, name: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"path must end with '\.(onnx|pt2)'.*a\.pth"):
        export(model, tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"none.*path"):
        export(model, tmp_path / "none" / name)
    with pytest.raises(TypeError, match="model.*RetinaNet.*Linear"):
        export(nn.Linear(1, 1), tmp_path / name)
    with pytest.raises(ValueError, match=r"float32.*bfloat16.*model\.float\(\)"):
        export(copy.deepcopy(model).bfloat16(), tmp_path / name)
    with pytest.raises(ValueError, match=r"size_divisor=32.*\(1, 60, 64\).*64 and 64"):
        export(model, tmp_path / name, fixed_shape=(1, 60, 64))
    with pytest.raises(ValueError, match=r"fixed_shape.*\(batch, height, width\).*\(64, 64\)"):
        export(model, tmp_path / name, fixed_shape=(64, 64))
    with pytest.raises(ValueError, match="fixed_shape.*0"):
        export(model, tmp_path / name, fixed_shape=(0, 64, 64))
    with pytest.raises(TypeError, match=r"fixed_shape.*64\.0"):
        export(model, tmp_path / name, fixed_shape=(1, 64.0, 64))
    with pytest.raises(ValueError, match="pre_nms_top_k=None"):
        export(make_model(pre_nms_top_k=None), tmp_path / name)
    with pytest.raises(ValueError, match=r"scale_before_nms=True.* maps \(postprocess=False\)"):
        export(make_model(scale_before_nms=True), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unsupported_opset_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset.*18.*11"):
        export_onnx(make_model(), tmp_path / "a.onnx", opset=11)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"requires {package}.*'focaldet\[export\]'"):
        export_onnx(make_model(), tmp_path / "a.onnx")


def test_the_command_writes_a_file_and_prints_the_report(
    tmp_path: Path, tiny_config: RetinaNetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    RetinaNet.from_config(tiny_config).save_pretrained(tmp_path / "model")
    photo(96, 64).save(tmp_path / "photo.png")
    arguments = [str(tmp_path / "model"), str(tmp_path / "a.pt2"), "--shape", "1", "64", "96"]
    assert main(["export", *arguments, "--maps", "--image", str(tmp_path / "photo.png")]) == 0
    assert "a.pt2: compared with the model in torch" in capsys.readouterr().out
    assert (tmp_path / "a.pt2").is_file()
    assert main(["export", arguments[0], str(tmp_path / "a.onnx"), "--opset", "3"]) == 2
    assert capsys.readouterr().err == "error: opset must be at least 18, got 3.\n"
