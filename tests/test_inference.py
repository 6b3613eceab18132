"""``optimize_for_inference``: a copy with folded norms gives the same detections."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.retinanet import OptimizedRetinaNet, RetinaNetOutput

if TYPE_CHECKING:
    from focaldet import Detections

IMAGES = [(64, 80), (50, 96)]


def with_lively_norms(model: RetinaNet) -> RetinaNet:
    """Give every BatchNorm statistics that differ from the defaults, which folding must keep."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.3, 0.3),
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 2.0),
            ):
                getattr(module, name).data.uniform_(low, high)
    return model


def built(**options: Any) -> RetinaNet:
    # Without suppression: among nearly equal scores, rounding decides which of two boxes suppresses the
    # other. The copy shares the post-processing of the model, so nothing is left untested.
    config = RetinaNetConfig(
        num_classes=3, min_size=64, max_size=96, fpn_channels=32, head_depth=1, nms_threshold=1.0
    )
    options = {"backbone": "resnet18", "backbone_norm": "batch", **options}
    return with_lively_norms(RetinaNet.from_config(config.replace(**options)).eval())


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]


def assert_same_detections(optimised: OptimizedRetinaNet, model: RetinaNet) -> None:
    images = [torch.rand(3, *size) for size in IMAGES]
    with torch.no_grad():
        output = model(images)
    optimised_output = optimised(images)
    for ours, theirs in zip(
        [*optimised_output.logits, *optimised_output.box_deltas],
        [*output.logits, *output.box_deltas],
        strict=True,
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = model.detections(output, score_threshold=0.0)
    found = optimised.detections(optimised_output, score_threshold=0.0)
    for ours, theirs in zip(found, plain, strict=True):
        assert len(ours) == len(theirs) > 10
        assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
        near = (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=2) < 0.01
        near &= ours.labels[:, None] == theirs.labels
        # Rounding decides which of several nearly equal scores is the hundredth.
        assert bool((near.any(dim=1) | (ours.scores < ours.scores[-1] + 1e-5)).all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backbone": "resnet50", "head_norm": "group"},
        {"head_norm": "batch"},
        {"head_norm": "batch", "head_box_norm": "group"},
        {"backbone": "mobilenet_v2"},
        {"backbone": "mobilenet_v3_large"},
        {"backbone": "resnext50_32x4d", "stride_in_1x1": True},
    ],
    ids=str,
)
def test_every_norm_of_the_known_backbones_is_folded_and_detections_are_the_same(
    options: Any,
) -> None:
    model = built(**options)
    optimised = model.optimize_for_inference()
    assert norms(optimised) == []
    assert_same_detections(optimised, model)


@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_frozen_norms_are_folded() -> None:
    model = built(backbone_norm="frozen", backbone_norm_eps=1e-3)
    optimised = model.optimize_for_inference()
    assert norms(optimised) == []
    assert_same_detections(optimised, model)


def test_the_folding_is_exact_in_double_precision() -> None:
    model = built().double()
    optimised = model.optimize_for_inference()
    image = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    for found, expected in zip(
        optimised.forward_maps(image), model.forward_maps(image), strict=True
    ):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float64
            assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_model_is_left_unchanged() -> None:
    model = built().train()
    model.backbone.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    optimised = model.optimize_for_inference(torch.bfloat16)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert not any(module.training for module in optimised.modules())
    assert not any(parameter.requires_grad for parameter in optimised.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert_close(after[name], value, rtol=0, atol=0)
        assert after[name].is_contiguous(), name
    memory = {parameter.data_ptr() for parameter in model.parameters()}
    assert memory.isdisjoint(parameter.data_ptr() for parameter in optimised.parameters())


def test_maps_are_channels_last() -> None:
    optimised = built().optimize_for_inference()
    for maps in optimised.forward_maps(torch.rand(1, 3, 64, 96)):
        assert maps[0].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_keeps_geometry_in_float32() -> None:
    model = built()
    optimised = model.optimize_for_inference(torch.bfloat16)
    image = torch.rand(3, 64, 96)
    output, expected = optimised([image]), model([image])
    assert {m.dtype for m in output.logits + output.box_deltas} == {torch.bfloat16}
    for ours, theirs in zip(output.anchors, expected.anchors, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    [found] = optimised.predict(image)
    assert found.boxes.dtype == found.scores.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["save_pretrained", "push_to_hub", "optimize_for_inference", "criterion"]
)
def test_the_copy_lacks_what_only_the_original_has_and_says_so(name: str) -> None:
    optimised = built().optimize_for_inference()
    for copied in (optimised, copy.deepcopy(optimised)):
        assert not isinstance(copied, RetinaNet)
        assert not hasattr(copied, name)
        with pytest.raises(AttributeError, match=f"optimised copy.*{name}.*original"):
            getattr(copied, name)
    with pytest.raises(
        AttributeError, match="'OptimizedRetinaNet' object has no attribute 'other'"
    ):
        optimised.other  # noqa: B018


def test_the_copy_runs_like_a_model_in_evaluation_and_takes_no_targets() -> None:
    model = built()
    optimised = model.optimize_for_inference()
    assert optimised.config == model.config
    images = [torch.rand(3, *size) for size in IMAGES]
    output = optimised(images)
    assert isinstance(output, RetinaNetOutput)
    assert output.losses is None
    batch = model.preprocess(images)
    assert_close(optimised(batch).logits, output.logits, rtol=0, atol=0)
    unresized = optimised([torch.rand(3, 96, 160)], resize=False)
    assert unresized.sizes == unresized.original_sizes == [(96, 160)]
    with pytest.raises(TypeError, match="targets"):
        optimised(images, targets=[{}, {}])
    with pytest.raises(ValueError, match=r"images\[1\].*\[1, 50, 96\]"):
        optimised([images[0], images[1][:1]])


def test_is_optimized_still_works_with_a_warning() -> None:
    model = built()
    for instance, expected in ((model, False), (model.optimize_for_inference(), True)):
        with pytest.warns(DeprecationWarning, match="isinstance") as warned:
            assert instance.is_optimized is expected
        assert warned[0].filename == __file__


class OneDetection(RetinaNet):
    def detections(self, *arguments: Any, **options: Any) -> list[Detections]:
        return [found[:1] for found in super().detections(*arguments, **options)]


def test_methods_that_a_subclass_overrides_are_named_in_a_warning() -> None:
    model = built()
    model.__class__ = OneDetection
    with pytest.warns(UserWarning, match="OneDetection overrides detections") as warned:
        model.optimize_for_inference()
    assert warned[0].filename == __file__


def test_an_unsupported_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"dtype.*int8.*torch\.float32"):
        built().optimize_for_inference(torch.int8)


def test_copies_and_pickles_predict_the_same() -> None:
    optimised = built().optimize_for_inference()
    stream = io.BytesIO()
    torch.save(optimised, stream)
    stream.seek(0)
    image = torch.rand(3, 64, 80)
    [expected] = optimised.predict(image)
    for other in (copy.deepcopy(optimised), torch.load(stream, weights_only=False)):
        [found] = other.predict(image)
        assert_close(found.boxes, expected.boxes, rtol=0, atol=0)


def test_the_network_can_be_exported_and_compiled_as_one_graph() -> None:
    optimised = built().optimize_for_inference()
    image = torch.rand(1, 3, 64, 96)
    expected = optimised.forward_maps(image)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = optimised

        def forward(self, images: Tensor) -> Any:
            return self.model.forward_maps(images)

    exported = torch.export.export(Network(), (image,)).module()
    whole = torch.compile(optimised.forward_maps, fullgraph=True, backend="eager")
    for found in (exported(image), whole(image)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)


class Custom(nn.Module):
    """A backbone in which some norms can be folded and others cannot."""

    channels, strides = (8, 8, 8), (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.same_stem = self.stem  # registered twice
        self.folds = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.used_twice = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.used_twice_norm = nn.BatchNorm2d(8)
        self.by_hand = nn.Conv2d(8, 8, 1)
        self.by_hand_norm = nn.BatchNorm2d(8)
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.normalised_norm = nn.BatchNorm2d(8)
        self.batch_statistics = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        )
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8, affine=False))

    def forward(self, images: Tensor) -> list[Tensor]:
        c3 = self.folds(self.same_stem(images))
        c3 = self.first(self.shared(c3)) + self.second(self.shared(c3))
        raw = self.used_twice(c3)
        c4 = self.used_twice_norm(raw) + raw
        c4 = self.by_hand_norm(self.by_hand(c4)) * self.by_hand.weight.mean()
        c4 = self.batch_statistics(self.normalised_norm(self.normalised(c4)))
        return [c3, c4, self.plain(c4)]


def test_norms_that_cannot_be_folded_are_kept() -> None:
    config = RetinaNetConfig(num_classes=3, backbone="custom", min_size=64, fpn_channels=32)
    model = with_lively_norms_of(RetinaNet.from_config(config, backbone=Custom()).eval())
    optimised = model.optimize_for_inference()
    backbone: Any = optimised.backbone
    for gone in (backbone.folds, backbone.plain[1]):
        assert isinstance(gone, nn.Identity)
    assert backbone.same_stem is backbone.stem
    assert len(norms(backbone)) == 6
    assert_same_detections(optimised, model)


def with_lively_norms_of(model: RetinaNet) -> RetinaNet:
    for module in norms(model):
        assert isinstance(module, nn.BatchNorm2d)
        if module.affine and module.track_running_stats:
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
    return model


class Branching(Custom):
    """A backbone whose control flow depends on the values of the images."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(-images if images.mean() > 0 else images)


def test_a_backbone_that_cannot_be_traced_keeps_its_norms_with_a_warning() -> None:
    config = RetinaNetConfig(num_classes=3, backbone="custom", min_size=64, fpn_channels=32)
    model = RetinaNet.from_config(config, backbone=Branching()).eval()
    with pytest.warns(UserWarning, match="cannot be traced.*norms") as warned:
        optimised = model.optimize_for_inference()
    assert warned[0].filename == __file__
    assert len(norms(optimised)) == 8
    assert_same_detections(optimised, model)


def test_a_norm_with_a_hook_is_kept() -> None:
    model = built()
    seen: list[Tensor] = []
    model.backbone.get_submodule("bn1").register_forward_hook(
        lambda *arguments: seen.append(arguments[2])
    )
    optimised = model.optimize_for_inference()
    assert len(norms(optimised)) == 1
    assert_same_detections(optimised, model)
    assert len(seen) == 2
