"""``predict``: kinds of input, order, errors, modes, thresholds and the progress bar."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet import Detections, RetinaNet


def photo(width: int = 80, height: int = 64, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(expected) > 0
    assert_close(found.boxes, expected.boxes)
    assert_close(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_every_kind_of_source_gives_the_same_detections(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    image = photo()
    image.save(tmp_path / "photo.png")
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    [expected] = tiny_model.predict(image)
    sources: list[Any] = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        np.asarray(image),
        pixels,
        pixels.float() / 255,
        pixels.double() / 255,
        tmp_path,
        [image],
        iter([image]),
        pixels[None],
    ]
    for source in sources:
        [found] = tiny_model.predict(source)
        assert_same(found, expected)
        assert found.image_size == (64, 80)
        assert found.class_names == ("cat", "dog", "owl")


def test_results_are_in_order_and_name_their_files(tiny_model: RetinaNet, tmp_path: Path) -> None:
    for index in (2, 0, 1):
        photo(60 + index).save(tmp_path / f"{index}.png")
    found = tiny_model.predict(tmp_path, batch_size=2)
    assert [f.image_size[1] for f in found] == [60, 61, 62]
    assert [f.source for f in found] == [str(tmp_path / f"{index}.png") for index in range(3)]


def test_a_photo_with_exif_orientation_gives_the_boxes_of_the_upright_photo(
    tiny_model: RetinaNet, tmp_path: Path
) -> None:
    upright = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert_same(tiny_model.predict(tmp_path / "turned.png")[0], tiny_model.predict(upright)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_unreadable_files_raise_or_give_none(
    tiny_model: RetinaNet, tmp_path: Path, batch_size: int
) -> None:
    stream = io.BytesIO()
    photo().save(stream, "JPEG")
    (tmp_path / "b.jpg").write_bytes(stream.getvalue()[:-500])
    (tmp_path / "c.jpg").write_text("not a photo")
    photo().save(tmp_path / "a.jpg")
    photo().save(tmp_path / "d.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg"):
        tiny_model.predict(tmp_path, batch_size=batch_size)
    with pytest.warns(UserWarning, match=r"(b|c)\.jpg") as warned:
        found = tiny_model.predict(tmp_path, batch_size=batch_size, on_error="skip")
    assert len(warned) == 2
    assert [f is None for f in found] == [False, True, True, False]
    assert len(tiny_model.predict(photo())) == 1


def test_the_modes_of_all_modules_are_restored(tiny_model: RetinaNet) -> None:
    tiny_model.train()
    tiny_model.backbone.eval()  # as is common when fine-tuning
    before = [module.training for module in tiny_model.modules()]
    statistics = tiny_model.state_dict()["backbone.bn1.running_mean"].clone()
    tiny_model.predict(photo())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tiny_model.predict("nowhere.jpg")
    assert [module.training for module in tiny_model.modules()] == before
    assert torch.equal(statistics, tiny_model.state_dict()["backbone.bn1.running_mean"])


def test_an_error_in_a_generator_reaches_the_caller(tiny_model: RetinaNet) -> None:
    taken = []

    def camera() -> Any:
        for index in range(5):
            taken.append(index)
            if index == 4:
                raise RuntimeError("the camera failed")
            yield photo(seed=index)

    with pytest.raises(RuntimeError, match="the camera failed"):
        tiny_model.predict(camera(), batch_size=2)
    assert taken == [0, 1, 2, 3, 4]


def test_options_are_honoured_and_checked(tiny_model: RetinaNet) -> None:
    [all_found] = tiny_model.predict(photo(), score_threshold=0.0)
    [few] = tiny_model.predict(photo(), score_threshold=float(all_found.scores[3]))
    assert len(few) == 3
    with pytest.raises(ValueError, match=r"score_threshold.*2"):
        tiny_model.predict([], score_threshold=2)  # checked before any image is read
    with pytest.raises(ValueError, match="batch_size.*0"):
        tiny_model.predict(photo(), batch_size=0)
    with pytest.raises(ValueError, match="on_error 'ignore'.*'raise' or 'skip'"):
        tiny_model.predict(photo(), on_error="ignore")  # type: ignore[call-overload]


def test_no_images_give_no_results(tiny_model: RetinaNet) -> None:
    assert tiny_model.predict([]) == []


def test_a_progress_bar_is_shown_on_request_if_tqdm_is_installed(
    tiny_model: RetinaNet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    tiny_model.predict([photo()] * 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    tiny_model.predict([photo()] * 12, batch_size=12)  # the output is not a terminal
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    tiny_model.predict([photo()], progress=True)
    assert capsys.readouterr().err == ""
