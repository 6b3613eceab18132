"""Export a model as an ONNX file, in float32, float16 or INT8."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from focaldet._atomic import atomic_write, atomic_write_text
from focaldet._checks import check_choice, check_integer, check_number, check_range
from focaldet._extras import import_extra
from focaldet.errors import ExportError
from focaldet.export._agreement import DEFAULT_TOLERANCES, Agreement, Tolerances, agreement_of
from focaldet.export._calibration_images import CalibrationImages
from focaldet.export._comparison import ExportReport, compare, noise
from focaldet.export._detector import OnnxDetector
from focaldet.export._exporter_calls import exporter_warnings_ignored, raising_export_errors
from focaldet.export._metadata import ExportMetadata
from focaldet.export._quantization import quantize
from focaldet.export._sessions import open_session
from focaldet.export._trace import checked_target, copy_for_export, fold_model, trace

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import Tensor

    from focaldet.datasets import AnnotationTable
    from focaldet.evaluation import CocoResult
    from focaldet.export._metadata import FilePrecision, Kind, Shape
    from focaldet.images import ImageSource
    from focaldet.retinanet import RetinaNet

__all__ = ["OPSET", "export_onnx"]

OPSET = 20
"""The default ONNX opset. onnxruntime supports it since 1.17, OpenVINO since 2024.0."""

_ERROR_BUDGET = 0.03
_COMPARED_IMAGES = 8
_MIN_OPSET = 18  # the lowest that torch's exporter writes


def export_onnx(
    model: RetinaNet,
    path: str | os.PathLike[str],
    *,
    postprocess: bool = True,
    fixed_shape: Shape | None = None,
    opset: int = OPSET,
    check_image: ImageSource | None = None,
    precision: FilePrecision = "float32",
    calibration: ImageSource | Iterable[ImageSource] | None = None,
    error_budget: float | None = None,
    tolerances: Tolerances | None = None,
    evaluate: str | os.PathLike[str] | AnnotationTable | None = None,
) -> ExportReport:
    """Write a model as a single ONNX file, for onnxruntime, OpenVINO and other runtimes.

    Its inputs and outputs are those of :class:`~focaldet.export.ExportableDetector`, named
    ``images``, ``sizes``, ``boxes``, ``scores``, ``labels``, ``count``; or those of
    :class:`~focaldet.export.ExportableMaps`, named ``images``, ``logits_p3`` .. ``box_deltas_p7``
    for the default levels. The file's metadata contains the model's config, class names, preprocessing, thresholds and versions,
    under keys that begin with "focaldet."; :class:`~focaldet.export.OnnxDetector` reads them.

    Args:
        model: The model to export. It is exported in evaluation mode and left unchanged.
        path: The file to write, ending with ".onnx". The file is checked before it gets this name.
        postprocess: Whether the file includes the post-processing and returns detections. Otherwise
            it returns the network's maps.
        fixed_shape: ``(batch, height, width)``, the only shape that the file then accepts. Height and
            width must be multiples of ``size_divisor``. None accepts any shape.
        opset: ONNX opset, at least 18.
        check_image: The image on which the written file, run by onnxruntime, is compared with the
            model. None uses some of the calibration images, or noise without them.
        precision: What the network computes in. The post-processing is always in float32.

            - "float32" gives the model's results, except for rounding.
            - "float16" halves the file. It is for GPUs and processors with float16 units; others
              convert back to float32.
            - "int8" gives a file of a quarter of the size, for processors, especially those with
              VNNI or AMX, and requires ``calibration``. Convolutions have INT8 weights with a scale per output
              channel. Those that would cost too much accuracy stay in float32: groups of them are
              measured on the calibration images, and the report lists them. They are measured in
              onnxruntime, and in OpenVINO too if it is installed, which computes some layers of some
              models wrong. Install it if the file will run there.

            A file in bfloat16 is not supported; run a float32 file with
            ``OnnxDetector(path, runtime="openvino", precision="bfloat16")`` instead.

            .. versionadded:: 0.3.0
        calibration: Images that are like those the file will see, for "int8" only: a folder, paths,
            or whatever else :meth:`~focaldet.RetinaNet.predict` accepts. They are preprocessed as in
            ``predict``. 16 to 300 are enough; no annotations are needed.

            .. versionadded:: 0.3.0
        error_budget: Maximum mean error that INT8 may cause in the scores, and in the boxes as
            1 - IoU, of the best candidates of the calibration images. Lower values leave more
            convolutions in float32. None uses 0.03. For "int8" only.

            .. versionadded:: 0.3.0
        tolerances: How far the file may be from the model. None uses the defaults of the precision.
            For "int8" and "float16" only; in float32 only rounding is tolerated.

            .. versionadded:: 0.3.0
        evaluate: A dataset on which the average precision of model and file is computed: a table, or
            a path that :func:`~focaldet.datasets.read_annotations` reads. Use other images than
            those of ``calibration``.

            .. versionadded:: 0.3.0

    Returns:
        How far the file's results are from the model's.

    Raises:
        ExportError: If the model cannot be exported, or the file gives different results. Nothing is
            written then, except that a file in reduced precision which misses its tolerances is kept
            as "NAME.rejected.onnx", with the report in "NAME.rejected.txt".
        FileNotFoundError: If the folder of ``path`` or a calibration image does not exist.
        ImportError: If a package of the extra ``export`` is missing.
        TypeError: If ``model`` is not a RetinaNet, or is a copy made by ``optimize_for_inference``.
        ValueError: If an argument is invalid, the model is not in float32, or one of its options
            cannot be exported.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(package, purpose="export_onnx", install="focaldet[export]")
    check_integer("opset", opset)
    check_range("opset", opset, _MIN_OPSET)
    _check_precision(precision, calibration, error_budget, tolerances)
    target = checked_target(path, ".onnx")
    table = _table_of(evaluate)
    reference = copy_for_export(model)
    kind: Kind = "detections" if postprocess else "maps"
    metadata = ExportMetadata.of_model(model, kind, fixed_shape, opset, precision)
    images = None if calibration is None else CalibrationImages(calibration, reference, metadata)
    # First, because a dataset that does not fit the model should be an error before anything else runs.
    model_result = None if table is None else _evaluate(model, table)
    dtype = torch.float16 if precision == "float16" else None
    program = _to_onnx(trace(fold_model(reference, dtype), kind, fixed_shape), metadata, opset)
    with atomic_write(target) as temporary:
        size = None
        if images is None:
            with raising_export_errors("Writing the ONNX file"), exporter_warnings_ignored():
                program.save(temporary, external_data=False)
        else:
            budget = _ERROR_BUDGET if error_budget is None else error_budget
            metadata, size = _write_int8(
                program, temporary, metadata, model=reference, images=images, budget=budget
            )
        if precision == "float32":
            report = _check_file(temporary, reference, metadata, check_image)
        else:
            pictures = _pictures(check_image, images, metadata)
            report = _check_reduced(temporary, reference, metadata, pictures)
        report = replace(report, path=target, model_result=model_result, size=size)
        if table is not None:
            report = replace(report, file_result=_evaluate(_opened(temporary), table))
        limits = tolerances or DEFAULT_TOLERANCES.get(precision)
        if limits is not None and not report.within(limits):
            _keep_rejected(temporary, target, report, limits)
        return report


def _check_precision(
    precision: str,
    calibration: object,
    error_budget: float | None,
    tolerances: Tolerances | None,
) -> None:
    """Raise unless the arguments that depend on the precision fit it."""
    if precision == "bfloat16":
        raise ValueError(
            "precision='bfloat16' is not supported for files, because onnxruntime has no bfloat16 "
            "convolutions for processors. Export the model in float32, and let OpenVINO compute in "
            "bfloat16: OnnxDetector(path, runtime='openvino', precision='bfloat16')."
        )
    check_choice("precision", precision, ("float32", "float16", "int8"))
    if precision == "int8" and calibration is None:
        raise ValueError(
            "precision='int8' requires calibration=: a folder of photos, or a list of them, that are "
            "like those the file will see."
        )
    if precision != "int8":
        for name, value in (("calibration", calibration), ("error_budget", error_budget)):
            if value is not None:
                raise ValueError(f"{name} is for precision='int8' only, got {precision!r}.")
    if error_budget is not None:
        check_number("error_budget", error_budget)
        check_range("error_budget", error_budget, 0, 1)
    if tolerances is not None:
        if not isinstance(tolerances, Tolerances):
            raise TypeError(f"tolerances must be Tolerances, got {type(tolerances).__name__}.")
        if precision == "float32":
            raise ValueError(
                "tolerances are for precision='int8' and 'float16' only. A file in float32 gives the "
                "model's results, except for rounding."
            )


def _table_of(evaluate: str | os.PathLike[str] | AnnotationTable | None) -> AnnotationTable | None:
    from focaldet.datasets import AnnotationTable, read_annotations

    if evaluate is None or isinstance(evaluate, AnnotationTable):
        return evaluate
    return read_annotations(evaluate)


def _evaluate(detector: RetinaNet | OnnxDetector, table: AnnotationTable) -> CocoResult:
    from focaldet.evaluation import coco_results, evaluate_coco

    return evaluate_coco(table, coco_results(detector, table))


def _write_int8(
    program: torch.onnx.ONNXProgram,
    target: Path,
    metadata: ExportMetadata,
    *,
    model: RetinaNet,
    images: CalibrationImages,
    budget: float,
) -> tuple[ExportMetadata, tuple[int, int]]:
    """Write an INT8 file, and return its metadata, its size and that of the file in float32."""
    onnx: Any = import_extra("onnx", purpose="export_onnx", install="focaldet[export]")
    with tempfile.TemporaryDirectory(prefix="focaldet-") as name:
        folder = Path(name)
        source = folder / "float.onnx"
        with raising_export_errors("Writing the ONNX file"), exporter_warnings_ignored():
            program.save(source, external_data=False)
        converted, calibration = quantize(
            source, model=model, images=images, error_budget=budget, folder=folder
        )
        whole = source.stat().st_size
    metadata = replace(metadata, calibration=calibration)
    onnx.helper.set_model_props(converted, metadata.to_strings())
    onnx.save(converted, str(target))
    return metadata, (target.stat().st_size, whole)


def _pictures(
    check_image: ImageSource | None, images: CalibrationImages | None, metadata: ExportMetadata
) -> list[Any]:
    """Return the images on which a file of reduced precision is compared with its model."""
    if check_image is not None:
        return [check_image]
    return [noise(metadata.num_channels)] if images is None else images.some(_COMPARED_IMAGES)


def _check_reduced(
    path: Path, model: RetinaNet, metadata: ExportMetadata, pictures: list[Any]
) -> ExportReport:
    """Load a file of reduced precision and compare what it finds with its model.

    An INT8 file is compared in all runtimes in which it was measured, and the worst result counts.
    """
    expected = model.predict(pictures, progress=False)
    calibration = metadata.calibration
    agreements, names = [], []
    for runtime in ("onnxruntime",) if calibration is None else calibration.runtimes:
        detector = _opened(path, runtime)
        found = detector.predict(pictures, progress=False)
        agreements.append(agreement_of(expected, found, model.postprocess))
        names.append(detector.runtime)
    return ExportReport(
        path,
        metadata.opset,
        " and ".join(names),
        (),
        precision=metadata.precision,
        calibration=calibration,
        agreement=functools.reduce(Agreement.worse, agreements),
    )


def _opened(path: Path, runtime: Any = "onnxruntime") -> OnnxDetector:
    return OnnxDetector(path, runtime=runtime, threads=torch.get_num_threads())


def _keep_rejected(
    temporary: Path, target: Path, report: ExportReport, tolerances: Tolerances
) -> NoReturn:
    """Rename a file that misses its tolerances, write the report next to it, and raise."""
    rejected = target.with_suffix(".rejected.onnx")
    text = rejected.with_suffix(".txt")
    temporary.replace(rejected)
    report = replace(report, path=rejected)
    atomic_write_text(text, f"{report}\n{tolerances}")
    remedy = (
        "lower error_budget, pass more calibration images" if report.calibration else "use float32"
    )
    losses = [str(report.agreement)]
    if report.model_result is not None and report.file_result is not None:
        losses.append(f"AP {report.file_result.ap:.3f} instead of {report.model_result.ap:.3f}")
    raise ExportError(
        f"The file in {report.precision} is further from the model than the tolerances allow: "
        f"{'; '.join(losses)}. The limits are {tolerances}. It was kept as {str(rejected)!r}, with the "
        f"report in {str(text)!r}. To get a file that passes, {remedy}, or raise the tolerances."
    )


def _to_onnx(
    program: torch.export.ExportedProgram, metadata: ExportMetadata, opset: int
) -> torch.onnx.ONNXProgram:
    with (
        raising_export_errors("torch.onnx.export"),
        exporter_warnings_ignored(),
        torch.no_grad(),
    ):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=metadata.inputs,
            output_names=metadata.outputs,
            external_data=False,
            verbose=False,
        )
    assert converted is not None  # noqa: S101  # dynamo=True always returns a program
    converted.model.metadata_props.update(metadata.to_strings())
    if metadata.fixed_shape is None:
        _name_dynamic_sizes(converted.model.graph, metadata.num_channels)
    return converted


def _name_dynamic_sizes(graph: Any, num_channels: int) -> None:
    """Replace names such as "s34" and "32*s39" by ones that make sense in a viewer."""
    images, *others = graph.inputs
    images.shape = type(images.shape)(["batch", num_channels, "height", "width"])
    for value in (*others, *graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


def _check_file(
    path: Path, model: RetinaNet, metadata: ExportMetadata, image: ImageSource | None
) -> ExportReport:
    """Load the file in onnxruntime and compare it with its model."""
    session = open_session(path, "onnxruntime", None, torch.get_num_threads())

    def run(images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        return session.run({"images": images, "sizes": sizes})

    comparisons = compare(model, metadata, image, run)
    return ExportReport(path, metadata.opset, session.runtime, comparisons)
