"""keras-retinanet's files: parity with a reimplementation, their options, and damaged ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.class_names import COCO_CLASS_NAMES
from focaldet.errors import CheckpointError
from focaldet.pretrained import (
    Checkpoint,
    CheckpointFile,
    _hdf5,
    check_fit,
    for_other_classes,
    load_checkpoint,
    read_tensors,
)
from focaldet.pretrained._loading import convert
from focaldet.pretrained.families import _keras_retinanet
from tests.helpers import reference_keras
from tests.helpers.parity import check_image, load_like
from tests.helpers.reference_models import smooth_image

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Any:
    made = reference_keras.make_reference(50)
    path = tmp_path_factory.mktemp("keras") / "resnet50_coco_best.h5"
    return load_like(reference_keras.write_file(made, path), made), made


# 160 pixels are even at every layer; 161 x 243 are odd at the first layers, 170 x 230 at later ones.
@pytest.mark.parametrize("size", [(160, 192), (161, 243), (170, 230), (119, 121), (333, 400)])
def test_detections_are_the_same_for_even_and_odd_sizes(pair: Any, size: tuple[int, int]) -> None:
    model, reference = pair
    assert check_image(model, reference, smooth_image(*size), other_pixels=0) >= 50


@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_even_sides_need_its_padding(pair: Any) -> None:
    model, reference = pair
    images = reference.prepare(smooth_image(160, 192)).normalised
    config = model.config.replace(strided_padding="symmetric")
    other = RetinaNet.from_config(config).double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        [ours, theirs] = (one.forward_maps(images)[0][0] for one in (model, other))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["converted", "weights"])
def test_each_kind_of_file_holds_the_same_weights(pair: Any, tmp_path: Path, kind: str) -> None:
    model, reference = pair
    checkpoint = load_checkpoint(reference_keras.write_file(reference, tmp_path / "x.h5", kind))
    own = model.state_dict()
    assert checkpoint.tensors.keys() == own.keys()
    assert all(torch.equal(value.double(), own[key]) for key, value in checkpoint.tensors.items())


def file_of(depth: int, name: str = "x.h5", **sizes: int) -> CheckpointFile:
    """Return the contents of a file, on the meta device."""
    shapes = reference_keras.layout(depth, **sizes)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return CheckpointFile(reference_keras.keras_arrays(state), name=name)


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_every_resnet_is_recognised_and_fits(depth: int, norm: Any) -> None:
    file = file_of(depth, classes=80, channels=256)
    config = _keras_retinanet.suggest(file).config
    assert (config.backbone, config.class_names) == (f"resnet{depth}", COCO_CLASS_NAMES)
    config = config.replace(backbone_norm=norm)
    assert RetinaNetConfig.from_json(config.to_json()) == config
    with torch.device("meta"):
        model = RetinaNet.from_config(config)
    check_fit(model.state_dict(), convert(file, _keras_retinanet, config).tensors)


def test_sizes_of_images_are_known_for_published_names_only() -> None:
    known = _keras_retinanet.suggest(file_of(50, "retinanet_resnet50_500_classes_0.4594.h5"))
    assert (known.config.min_size, known.config.max_size) == (768, 1024)
    large = "retinanet_resnet152_level_1_v1.2_converted.h5"
    known = _keras_retinanet.suggest(file_of(152, large))
    assert (known.config.min_size, known.config.max_size) == (600, 800)
    assert not {"min_size", "max_size"} & {*known.assumed}
    coco = _keras_retinanet.suggest(file_of(50, "resnet50_coco_best_v2.1.0.h5"))
    assert coco.config.min_size == 800
    assert "min_size" not in coco.assumed
    mine = _keras_retinanet.suggest(file_of(50, "mine.h5"))
    assert (mine.config.min_size, mine.config.max_size) == (800, 1333)
    assert {"min_size", "max_size", "anchor_sizes", "nms_threshold"} <= {*mine.assumed}


def described(**options: Any) -> CheckpointFile:
    text = json.dumps(reference_keras.model_config(converted=True, **options))
    return file_of(50)._replace(extras={"model_config": text})


def test_options_of_layers_are_read() -> None:
    suggested = _keras_retinanet.suggest(
        described(size=24, std=[0.1] * 4, nms_threshold=0.3, score_threshold=0.2, max_detections=7)
    )
    config = suggested.config
    assert [*config.anchor_sizes] == [24] * 5
    assert [*config.box_weights] == [10] * 4
    assert (config.nms_threshold, config.score_threshold, config.max_detections) == (0.3, 0.2, 7)
    assert suggested.assumed == ("min_size", "max_size")


def test_anchors_per_cell_follow_the_layers() -> None:
    file = described(scales=[1.0, 1.5])
    tensors = dict(file.tensors)
    for layer, channels in ((reference_keras.CLASSES, 6 * 20), (reference_keras.BOXES, 6 * 4)):
        group = f"{layer.split('_')[1]}_submodel/{layer}"
        tensors[f"{group}/kernel:0"] = torch.empty(3, 3, 32, channels, device="meta")
        tensors[f"{group}/bias:0"] = torch.empty(channels, device="meta")
    config = _keras_retinanet.suggest(file._replace(tensors=tensors)).config
    assert (config.num_classes, config.octave_scales) == (20, (1.0, 1.5))
    with pytest.raises(CheckpointError, match="9 anchors per cell.*120 class channels"):
        _keras_retinanet.suggest(CheckpointFile(tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 16}, r"strides \[16\], but only \[8, 16, 32, 64, 128\]"),
        ({"size": "32"}, "anchors_0' .*size='32', which is not a number"),
        ({"ratios": {"value": [1]}}, "ratios=.*which is not a list of numbers"),
        ({"scales": []}, r"scales=\[\], which is not a list"),
        ({"nms": False}, "FilterDetections .* nms=False, but only True"),
        ({"class_specific_filter": False}, "class_specific_filter=False, but only True"),
        ({"mean": [0.1, 0, 0, 0]}, r"RegressBoxes .* mean=\(0\.1, 0, 0, 0\)"),
        ({"std": [0.1, 0.1, 0.2]}, "four deviations"),
        ({"nms_threshold": None}, "nms_threshold=None, which is not a number"),
    ],
)
def test_options_without_a_counterpart_are_errors(options: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _keras_retinanet.suggest(described(**options))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"config": 3}',
        "[" * 100_000,
        '{"config": {"layers": [1]}}',
        '{"config": {"layers": [{"class_name": "Anchors", "config": 3}]}}',
    ],
)
def test_a_description_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(
        CheckpointError, match="model_config of this keras-retinanet model cannot be"
    ):
        _keras_retinanet.suggest(file_of(50)._replace(extras={"model_config": text}))


def test_a_config_for_other_boxes_is_an_error() -> None:
    file = file_of(50)
    suggested = _keras_retinanet.suggest(file).config
    config = suggested.replace(box_encoding="center")
    with pytest.raises(
        CheckpointError, match="config.box_encoding is 'center', but a model of keras"
    ):
        _keras_retinanet.convert(file, config)
    renewed = for_other_classes(Checkpoint(suggested, {}), config, num_classes=20).renewed
    assert renewed == ("head.box_deltas",)


def test_unknown_layers_and_doubled_ones_are_errors() -> None:
    file = file_of(50)
    more = {**file.tensors, "mask_submodel/mask/kernel:0": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match="1 unknown tensor .*keras-retinanet: 'mask_submodel/mask/kernel:0'"
    ):
        _keras_retinanet.suggest(CheckpointFile(more))
    twice = {**file.tensors, "conv1/conv1_1/kernel:0": file.tensors["conv1/conv1/kernel:0"]}
    with pytest.raises(CheckpointError, match="Two tensors .* are called 'conv1/weight'"):
        _keras_retinanet.suggest(CheckpointFile(twice))


def test_scopes_of_a_model_that_was_loaded_twice_do_not_matter() -> None:
    file = file_of(50)
    renamed = {
        key.replace("conv1/conv1/", "conv1/conv1_1/"): value for key, value in file.tensors.items()
    }
    assert renamed.keys() != file.tensors.keys()
    assert _keras_retinanet.suggest(CheckpointFile(renamed)).config.backbone == "resnet50"


# --- Files that are no good ----------------------------------------------------------------------


def hdf5(path: Path, write: Any) -> Path:
    """Write an HDF5 file with one array, and with what a function adds to it."""
    with h5py.File(path, "w") as root:
        group = root.create_group("model_weights")
        group.create_dataset("conv1/conv1/kernel:0", data=np.ones((7, 7, 3, 2), np.float32))
        write(group)
    return path


def soft_link(group: Any) -> None:
    group["link"] = h5py.SoftLink("/model_weights/conv1")


def external_link(group: Any) -> None:
    group["link"] = h5py.ExternalLink("/etc/passwd", "/")


def external_storage(group: Any) -> None:
    group.create_dataset("elsewhere", (4,), np.uint8, external=[("/etc/passwd", 0, 4)])


def virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((4,), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    group.create_virtual_dataset("virtual", layout)


def compressed(group: Any) -> None:
    group.create_dataset("small", data=np.zeros((1000, 1000), np.float32), compression="gzip")


def chunked(group: Any) -> None:
    group.create_dataset("chunked", data=np.zeros((64, 64), np.float32), chunks=(32, 32))


def never_written(group: Any) -> None:
    group.create_dataset("huge", (2**20, 2**20), np.float32)


def doubled(group: Any) -> None:
    array = group.create_dataset("0", data=np.zeros(3000, np.float32))
    for i in range(1, 9):
        group[str(i)] = array


def complex_numbers(group: Any) -> None:
    group.create_dataset("complex", data=np.zeros(3, np.complex64))


def strings(group: Any) -> None:
    group.create_dataset("names", data=["a", "b"], dtype=h5py.string_dtype())


def records(group: Any) -> None:
    group.create_dataset("records", data=np.zeros(3, [("a", "f4"), ("b", "i4")]))


def empty(group: Any) -> None:
    group.create_dataset("empty", data=h5py.Empty("f4"))


def many_dimensions(group: Any) -> None:
    group.create_dataset("cube", data=np.zeros((1,) * 9, np.float32))


def a_type(group: Any) -> None:
    group["type"] = np.dtype("f4")


def cycle(group: Any) -> None:
    group["again"] = group


def many_groups(group: Any) -> None:
    for i in range(60):
        group.create_group(str(i))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (soft_link, "'link' is a link, which is not followed"),
        (external_link, "'link' is a link, which is not followed"),
        (external_storage, "'elsewhere' is stored in another file"),
        (virtual, "'virtual' is not stored in one piece"),
        (compressed, "'small' is compressed"),
        (chunked, "'chunked' is not stored in one piece"),
        (never_written, "'huge' has no values"),
        (strings, "'names' does not contain numbers"),
        (records, "'records' does not contain numbers"),
        (complex_numbers, "'complex' does not contain numbers"),
        (doubled, r"its arrays have \d+ bytes, but the file has \d{5}\)"),
        (empty, "'empty' is not an array"),
        (many_dimensions, "'cube' is not an array of at most 8 dimensions"),
        (a_type, "'type' is neither a group nor an array"),
        (cycle, "groups are nested more than 16 levels"),
        (many_groups, "more than 50 groups and arrays"),
    ],
)
def test_files_with_more_than_keras_writes_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, message: str
) -> None:
    monkeypatch.setattr(_hdf5, "_MAX_OBJECTS", 50)
    path = hdf5(tmp_path / "x.h5", write)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)


def test_newer_formats_are_errors_that_say_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as root:
        root.create_dataset("w", data=np.ones(3, np.float32))
    with pytest.raises(
        CheckpointError, match="version 3 of the HDF5 format, not 0. Save the model"
    ):
        read_tensors(tmp_path / "x.h5")
    with h5py.File(tmp_path / "y.h5", "w") as root:
        group = root.create_group("ordered", track_order=True)
        for i in range(20):
            group.create_dataset(str(i), data=np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match="newer HDF5 format"):
        read_tensors(tmp_path / "y.h5")


@pytest.mark.parametrize("count", [0, 1, 8, 9, 300])
def test_groups_of_any_number_of_arrays_are_read(tmp_path: Path, count: int) -> None:
    def write(group: Any) -> None:
        for i in range(count):
            group.create_dataset(f"many/{i:03d}/kernel:0", data=np.full((2, 1), i, np.float32))

    tensors = read_tensors(hdf5(tmp_path / "x.h5", write))
    assert len(tensors) == count + 1
    assert all(float(tensors[f"many/{i:03d}/kernel:0"].sum()) == 2 * i for i in range(count))


def test_arrays_without_values_or_dimensions_are_read(tmp_path: Path) -> None:
    def write(group: Any) -> None:
        group.create_dataset("none", data=np.zeros((0, 3), np.float32))
        group.create_dataset("scalar", data=np.float32(2.5))

    tensors = read_tensors(hdf5(tmp_path / "x.h5", write))
    assert tensors["none"].shape == (0, 3)
    assert tensors["scalar"].shape == ()
    assert float(tensors["scalar"]) == 2.5


@pytest.mark.parametrize("text", ["é" * 10, "x" * 200_000, ""])
def test_texts_of_any_length_are_read(tmp_path: Path, text: str) -> None:
    path = hdf5(tmp_path / "x.h5", lambda group: group.parent.attrs.create("model_config", text))
    assert _hdf5.read_hdf5(path)[1] == {"model_config": text}
    path = hdf5(
        tmp_path / "y.h5", lambda group: group.parent.attrs.create("backend", np.bytes_(b"tf"))
    )
    assert _hdf5.read_hdf5(path)[1] == {"backend": "tf"}


def test_a_file_with_another_suffix_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    assert len(read_tensors(hdf5(tmp_path / "weights.bin", lambda _: None))) == 1


def test_the_group_of_weights_itself_may_not_be_a_link(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("secret", data=np.ones(3, np.float32))
    with h5py.File(tmp_path / "x.h5", "w") as root:
        root["model_weights"] = h5py.ExternalLink("other.h5", "/")
    with pytest.raises(CheckpointError, match="'model_weights' is a link"):
        read_tensors(tmp_path / "x.h5")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", ">i2", "u1"])
def test_arrays_of_every_number_type_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    path = hdf5(tmp_path / "x.h5", lambda group: group.create_dataset("w", data=values))
    tensors: dict[str, Tensor] = read_tensors(path)
    assert torch.equal(tensors["w"].double(), torch.arange(6.0).double().view(2, 3))
    assert tensors["conv1/conv1/kernel:0"].shape == (7, 7, 3, 2)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_files_are_errors(tmp_path: Path, share: float) -> None:
    path = hdf5(tmp_path / "x.h5", lambda _: None)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="Cannot read '.*x.h5'"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>", "it is a web page"),
        (b"PK\x03\x04 not HDF5", "it has no beginning of an HDF5 file at byte 0"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "damaged"),
    ],
)
def test_other_files_by_that_name_are_errors(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.h5"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path)


def test_another_keras_model_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "x.h5", lambda _: None)
    with pytest.raises(
        CheckpointError, match="most similar format is keras-retinanet, but .*'C5_reduced/kernel'"
    ):
        load_checkpoint(path)
