"""RetinaNet as a whole: the forward pass, custom backbones, frozen stages, copies, dtypes."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from focaldet import FPN, RetinaNet, RetinaNetConfig
from focaldet.heads import flatten_maps
from focaldet.structures import ImageBatch
from tests.helpers.tiny_model import MapsBackbone

if TYPE_CHECKING:
    from pathlib import Path

TARGET: Any = {"boxes": torch.tensor([[8.0, 8, 40, 50]]), "labels": torch.tensor([1])}


def test_the_output_has_the_same_structure_in_training_and_evaluation(
    tiny_model: RetinaNet,
) -> None:
    images = [torch.rand(3, 64, 80), torch.rand(3, 50, 40)]
    for training in (True, False):
        output = tiny_model.train(training)(images, [TARGET] * 2)
        assert len(output.logits) == len(output.box_deltas) == len(output.anchors) == 5
        assert set(output.losses) == {"classification", "box_regression"}
        assert tiny_model(images).losses is None
        assert [d.image_size for d in tiny_model.detections(output)] == [(64, 80), (50, 40)]


def test_training_reduces_the_losses(tiny_model: RetinaNet) -> None:
    image = torch.rand(3, 64, 64)
    optimizer = torch.optim.Adam(tiny_model.parameters(), lr=1e-3)
    history = []
    for _ in range(20):
        loss = sum(tiny_model.train()([image], [TARGET]).losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


def test_a_batch_tensor_gives_the_same_maps_as_a_list(tiny_model: RetinaNet) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        a, b = tiny_model(images), tiny_model(list(images))
    assert_close(flatten_maps(a.logits, 9), flatten_maps(b.logits, 9))


def test_a_batch_without_objects_gives_gradients(tiny_model: RetinaNet) -> None:
    empty: Any = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    output = tiny_model.train()([torch.rand(3, 64, 64)] * 2, [empty] * 2)
    sum(output.losses.values()).backward()
    assert all(p.grad is not None for p in tiny_model.parameters())


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([torch.rand(3, 64, 64)], [TARGET] * 2, r"targets.*2"),
        ([torch.rand(1, 64, 64)], [TARGET], r"images\[0\].*\[1, 64, 64\]"),
        (
            [torch.rand(3, 40, 30)],
            [TARGET],  # the message has the input's pixels, although the model resizes to 64
            r"targets\[0\]\['boxes'\].*40 pixels high and 30 wide",
        ),
    ],
)
def test_bad_input_raises_and_leaves_the_model_usable(
    tiny_model: RetinaNet, images: Any, targets: Any, message: str
) -> None:
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(ValueError, match=message):
        tiny_model.train()(images, targets)
    for key, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert tiny_model([torch.rand(3, 64, 64)], [TARGET]).losses is not None


def test_validation_can_be_turned_off(tiny_model: RetinaNet) -> None:
    wrong = {**TARGET, "boxes": torch.tensor([[8.0, 8, 400, 500]])}
    assert tiny_model([torch.rand(3, 64, 64)], [wrong], validate=False).losses is not None


def test_a_custom_backbone_defines_the_strides(tiny_config: RetinaNetConfig) -> None:
    class Plain(nn.Module):
        channels, strides = (4, 6, 8), (4, 8, 16)

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 4, stride=4)
            self.c4, self.c5 = nn.Conv2d(4, 6, 2, stride=2), nn.Conv2d(6, 8, 2, stride=2)

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            c3 = self.stem(images)
            c4 = self.c4(c3)
            return [c3, c4, self.c5(c4)]

    config = tiny_config.replace(backbone="custom")
    model = RetinaNet.from_config(config, backbone=Plain())
    assert model.anchor_generator.strides == (4, 8, 16, 32, 64)
    assert model([torch.rand(3, 64, 64)], [TARGET]).losses is not None
    with pytest.raises(TypeError, match="config.backbone is 'custom', so backbone= is required"):
        RetinaNet.from_config(config)
    with pytest.raises(TypeError, match=r"'resnet18', but backbone= was also given \(Plain\)"):
        RetinaNet.from_config(tiny_config, backbone=Plain())
    with pytest.raises(TypeError, match="backbone.*'channels' with one number per map.*Linear"):
        RetinaNet.from_config(config, backbone=nn.Linear(1, 1))


def test_stages_are_frozen_only_if_they_have_weights(
    tiny_config: RetinaNetConfig, tmp_path: Path
) -> None:
    fresh = RetinaNet.from_config(tiny_config)
    fresh.save_pretrained(tmp_path)
    for model in (fresh, RetinaNet.from_pretrained(tmp_path)):
        assert model.config.trainable_stages == 5
        assert all(p.requires_grad for p in model.parameters())
    weights = fresh.backbone.state_dict()
    tuned = RetinaNet.from_config(tiny_config, backbone_weights=weights)
    frozen = {n.split(".")[1] for n, p in tuned.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    tuned.save_pretrained(tmp_path)
    again = RetinaNet.from_pretrained(tmp_path)
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in tuned.parameters()
    ]


def test_a_frozen_norm_without_weights_is_warned_of(tiny_config: RetinaNetConfig) -> None:
    with pytest.warns(UserWarning, match="BatchNorm is frozen.*backbone_norm='batch'"):
        RetinaNet.from_config(tiny_config.replace(backbone_norm="frozen"))


def test_the_paper_preset_matches_the_paper() -> None:
    with pytest.warns(UserWarning, match="frozen"):
        model = RetinaNet.from_config(RetinaNetConfig.paper())
    assert isinstance(model.fpn, FPN)
    assert model.fpn.p6.in_channels == 2048  # from C5
    assert model.fpn.p7_relu
    assert model.criterion.normalizer == "batch"
    assert model.head.class_logits.out_channels == 9 * 80
    assert model.anchor_generator.mode == "exact"


def test_the_network_compiles_as_one_graph(tiny_model: RetinaNet) -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    image = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(tiny_model.forward_maps, fullgraph=True, backend=count)
    with torch.no_grad():
        assert_close(compiled(image)[0][0], tiny_model.forward_maps(image)[0][0])
    assert len(graphs) == 1


def test_copies_and_pickles_give_the_same_maps(tiny_model: RetinaNet) -> None:
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        expected = tiny_model([image]).logits[0]
        for copied in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):  # noqa: S301
            assert_close(copied([image]).logits[0], expected)


def test_bfloat16_models_give_float32_boxes(tiny_model: RetinaNet) -> None:
    [found] = tiny_model.bfloat16().predict(torch.rand(3, 64, 64))
    assert len(found) > 0
    assert found.boxes.dtype == torch.float32


def test_autocast_keeps_geometry_in_float32(tiny_model: RetinaNet) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tiny_model([torch.rand(3, 64, 64)], [TARGET])
        [found] = tiny_model.detections(output)
    assert output.logits[0].dtype == torch.bfloat16
    assert output.anchors[0].dtype == found.boxes.dtype == torch.float32
    assert output.losses is not None
    assert all(loss.dtype == torch.float32 for loss in output.losses.values())


# --- any number of maps and levels ---------------------------------------------------------------


def level_config(levels: tuple[int, ...], **changes: Any) -> RetinaNetConfig:
    options: dict[str, Any] = {
        "levels": levels,
        "anchor_sizes": tuple(4 * 2**level for level in levels),
        "backbone_norm": "batch",
        "fpn_channels": 32,
        "head_depth": 1,
        "min_size": 64,
        "max_size": 128,
        "score_threshold": 0.0,
        "nms_threshold": 1.0,
        "max_detections": 50,
    }
    return RetinaNetConfig(num_classes=2, **(options | changes))


LEVELS: dict[str, tuple[RetinaNetConfig, tuple[int, ...] | None, int]] = {
    "a P2 level": (level_config((2, 3, 4, 5, 6, 7), backbone="resnet18"), None, 4),
    "a P2 level of a MobileNet": (
        level_config((2, 3, 4, 5, 6, 7), backbone="mobilenet_v2"),
        None,
        4,
    ),
    "P1 to P4": (level_config((1, 2, 3, 4), backbone="resnet18"), None, 2),
    "P8": (level_config((4, 5, 6, 7, 8), backbone="mobilenet_v2"), None, 16),
    "C5 alone": (level_config((5,), backbone="resnet18"), None, 32),
    "one map of a custom backbone": (level_config((5, 6)), (8,), 16),
    "five maps": (level_config((1, 2, 3, 4, 5, 6)), (4, 8, 8, 8, 8), 4),
    "no pyramid": (
        level_config((5,), fpn_channels=None, octave_scales=(0.25, 0.5, 1.0, 2.0, 4.0)),
        (32,),
        16,
    ),
    "two maps without a pyramid": (level_config((4, 5), fpn_channels=None), (16, 16), 8),
    "a named backbone without a pyramid": (
        level_config((4,), fpn_channels=None, backbone="mobilenet_v2"),
        None,
        16,
    ),
}


def build_levels(name: str) -> tuple[RetinaNet, Any]:
    """Return a model of the table, and a new backbone if it has a custom one."""
    config, channels, stride = LEVELS[name]

    def custom() -> Any:
        return None if channels is None else MapsBackbone(channels, stride)

    return RetinaNet.from_config(config, backbone=custom()), custom()


@pytest.mark.parametrize("name", LEVELS)
def test_models_of_any_levels_train_save_predict_and_are_optimised(
    name: str, tmp_path: Path
) -> None:
    config, _, first_stride = LEVELS[name]
    model, backbone = build_levels(name)
    strides = tuple(first_stride * 2**i for i in range(len(config.levels)))
    assert model.anchor_generator.strides == strides
    assert model.postprocess.first_stride == first_stride

    images = [torch.rand(3, 64, 80), torch.rand(3, 120, 64)]
    output = model.train()(images, [TARGET] * 2)
    assert [tuple(level.shape[2:]) for level in output.logits] == [
        (-(-128 // stride), -(-96 // stride)) for stride in strides
    ]
    sum(output.losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    model.eval().save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path, backbone=backbone)
    assert loaded.config == model.config
    expected = model.predict(images)
    optimised = loaded.optimize_for_inference(winograd=False)
    assert not [m for m in optimised.modules() if isinstance(m, nn.BatchNorm2d)]
    for found, wanted in zip(loaded.predict(images), expected, strict=True):
        assert len(wanted) == 50
        assert_close(found.boxes, wanted.boxes, rtol=0, atol=0)
        assert_close(found.scores, wanted.scores, rtol=0, atol=0)
    for found, wanted in zip(optimised.predict(images), expected, strict=True):
        assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)


def test_small_objects_are_assigned_to_the_p2_level() -> None:
    model: Any = build_levels("a P2 level")[0]
    target: Any = {"boxes": torch.tensor([[20.0, 24, 36, 40]]), "labels": torch.tensor([1])}
    output = model([torch.rand(3, 64, 64)], [target])
    matched = model.criterion.assigner(target["boxes"], torch.cat(output.anchors))
    counts = [len(level) for level in output.anchors]
    positive = [int((level >= 0).sum()) for level in matched.split(counts)]
    assert positive[0] > 0
    assert positive[2:] == [0, 0, 0, 0]


def test_the_constructor_takes_identity_for_the_pyramid() -> None:
    reference, backbone = build_levels("no pyramid")
    reference.eval()
    config = reference.config.replace(clip_to="batch")
    backbone.load_state_dict(reference.backbone.state_dict())
    postprocess = copy.deepcopy(reference.postprocess)
    postprocess.clip_to = "batch"
    model = RetinaNet(
        config,
        backbone=backbone,
        fpn=nn.Identity(),
        head=reference.head,
        anchor_generator=reference.anchor_generator,
        criterion=reference.criterion,
        postprocess=postprocess,
        preprocess=reference.preprocess,
    ).eval()
    assert model.head.num_anchors == 15
    assert model.current_config() == config
    image = torch.rand(3, 64, 90)
    with torch.no_grad():
        ours, theirs = model([image]), reference([image])
    assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
    assert ours.logits[0].shape[1:] == (30, 4, 6)
    padded = ImageBatch(torch.rand(1, 3, 96, 128), [(70, 90)], [(70, 90)])
    with torch.no_grad():
        [found] = model.detections(model(padded))
    assert float(found.boxes[:, 2].max()) == 128  # the padded batch, not the 90 pixels of the image
    assert float(found.boxes[:, 3].max()) == 96


def test_a_backbone_without_the_maps_of_the_levels_is_an_error() -> None:
    message = (
        r"config.levels is \(3, 4, 5, 6, 7\), of which the 3 up to 5 .*MapsBackbone.channels is "
        r"\(8,\). Set config.levels to a range with 1 up to 5"
    )
    with pytest.raises(ValueError, match=message):
        RetinaNet.from_config(level_config((3, 4, 5, 6, 7)), backbone=MapsBackbone((8,)))
    config = level_config((4, 5), fpn_channels=None)
    with pytest.raises(
        ValueError, match=r"fpn_channels is None.*MapsBackbone.channels is \(8, 16\)"
    ):
        RetinaNet.from_config(config, backbone=MapsBackbone((8, 16)))


def test_a_backbone_that_returns_a_tensor_is_an_error() -> None:
    class Features(MapsBackbone):
        def forward(self, images: torch.Tensor) -> Any:
            return super().forward(images)[0]

    for channels in (None, 32):
        model = RetinaNet.from_config(
            level_config((5,), fpn_channels=channels), backbone=Features((32,))
        )
        with pytest.raises(TypeError, match="features must be a list with one map per level"):
            model([torch.rand(3, 64, 64)])
