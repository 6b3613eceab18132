"""The drop-in for torchvision's RetinaNet beside torchvision's own class, after the same treatment."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection import _utils as tv_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

from focaldet import torchvision as drop_in
from focaldet.detections import Detections
from tests.helpers import reference_torchvision
from tests.helpers.torchvision_pairs import ARCHITECTURES, CHANNELS, build_pair, images, targets

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.parity


def assert_same_detections(theirs: Any, mine: Any, given: Any = None, *, some: bool = True) -> None:
    """Require equal keys, counts, order, labels and dtypes, and boxes and scores up to rounding."""
    given = images() if given is None else given
    with torch.no_grad():
        expected, found = theirs(given), mine(given)
    assert len(found) == len(expected)
    assert not some or sum(len(one["scores"]) for one in expected) > 20
    for one, other in zip(found, expected, strict=True):
        assert [(k, v.dtype) for k, v in one.items()] == [(k, v.dtype) for k, v in other.items()]
    of_mine = [Detections(**one, image_size=(1, 1)) for one in found]
    reference_torchvision.assert_same_detections(
        of_mine, expected, boxes_atol=1e-3, scores_atol=1e-6
    )


def assert_same_training(theirs: Any, mine: Any, wanted: Any = None) -> None:
    """Require equal losses and gradients of a training step, in float64, where rounding is small."""
    if wanted is None:
        wanted = targets(theirs.head.classification_head.num_classes, torch.float64)
    before = copy.deepcopy(wanted)
    losses, gradients = [], []
    for original in (theirs, mine):
        model = copy.deepcopy(original).double().train()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eval()  # the statistics of small maps would amplify rounding
        torch.manual_seed(1)
        losses.append(model(images(torch.float64), wanted))
        sum(losses[-1].values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert list(losses[1]) == list(losses[0])
    # torchvision scales boxes by factors that it rounds to float32.
    assert_close(losses[1], losses[0], rtol=1e-7, atol=1e-9)
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6 * scale, msg=name)
    assert_close(wanted, before, rtol=0, atol=0)  # targets are not changed in place


QUICK = {("v1", 1), ("v2", 2), ("mobilenet", 1), ("one map", 91)}


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(ARCHITECTURES, (1, 2, 21, 91))
    ],
)
def test_detections_losses_and_gradients_are_torchvisions(name: str, num_classes: int) -> None:
    theirs, mine = build_pair(name, num_classes)
    assert set(mine.uses_focaldet.values()) == {"yes"}
    assert_same_detections(theirs, mine)
    assert_same_training(theirs, mine)


def test_state_dicts_load_both_ways() -> None:
    theirs, mine = build_pair()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        mine.head.classification_head.cls_logits.bias.add_(0.5)
    theirs.load_state_dict(mine.state_dict())
    assert_same_detections(theirs, mine)
    assert isinstance(mine, detection.RetinaNet)
    old = {  # the spelling before torchvision 0.14
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if ".conv." in key
        else key: value
        for key, value in mine.state_dict().items()
    }
    old = {
        ".".join(
            str(2 * int(part)) if i == 3 and ".conv." in key else part
            for i, part in enumerate(key.split("."))
        ): value
        for key, value in old.items()
    }
    assert "head.classification_head.conv.6.weight" in old
    mine.load_state_dict(old)


@pytest.mark.parametrize("way", ["copy", "pickle", "torch.save"])
def test_copies_are_whole_models(way: str) -> None:
    theirs, mine = build_pair()
    if way == "copy":
        again = copy.deepcopy(mine)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(mine))  # noqa: S301
    else:
        file = io.BytesIO()
        torch.save(mine, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert type(again) is drop_in.RetinaNet
    assert_same_detections(theirs, again)


def test_frozen_layers_get_no_gradients() -> None:
    pair = build_pair()
    for model in pair:
        for part in (model.backbone.body.conv1, model.backbone.body.layer1):
            part.requires_grad_(requires_grad=False)
    assert_same_training(*pair)


def changed_thresholds(model: Any) -> None:
    model.score_thresh, model.nms_thresh, model.detections_per_img = 0.4, 0.2, 7
    model.topk_candidates = 30


def changed_sizes(model: Any) -> None:
    model.transform.min_size = (64,)
    model.transform.max_size = 80


def a_limit_below_the_size(model: Any) -> None:
    model.transform.min_size = (128,)
    model.transform.max_size = 90


def several_sizes(model: Any) -> None:
    model.transform.min_size = (48, 64, 80)


def a_fixed_size(model: Any) -> None:
    model.transform.fixed_size = (100, 70)


def other_padding_and_normalisation(model: Any) -> None:
    model.transform.size_divisible = 64
    model.transform.image_mean = [0.1, 0.2, 0.3]
    model.transform.image_std = [1.0, 0.5, 0.25]


def images_as_they_are(model: Any) -> None:
    model.transform._skip_resize = True


def other_anchors(model: Any) -> None:
    sizes = tuple((4 * 2**i, 5 * 2**i, 6 * 2**i) for i in range(5))
    model.anchor_generator = AnchorGenerator(sizes, ((0.25, 1.0, 4.0),) * 5)


def other_matching(model: Any) -> None:
    model.proposal_matcher = tv_utils.Matcher(0.6, 0.3, allow_low_quality_matches=False)


def a_new_class_layer(model: Any) -> None:
    torch.manual_seed(2)
    head = model.head.classification_head
    spread = float(head.cls_logits.weight.detach().std())
    head.cls_logits = nn.Conv2d(CHANNELS, 9 * 5, 3, padding=1)
    nn.init.normal_(head.cls_logits.weight, std=spread)
    nn.init.constant_(head.cls_logits.bias, -2.0)
    head.num_classes = 5


def a_new_class_head(model: Any) -> None:
    torch.manual_seed(2)
    model.head.classification_head = RetinaNetClassificationHead(CHANNELS, 9, 4)


def a_head_with_batch_norm(model: Any) -> None:
    torch.manual_seed(2)
    model.head = RetinaNetHead(CHANNELS, 9, 4, norm_layer=nn.BatchNorm2d)


def other_box_weights(model: Any) -> None:
    coder = tv_utils.BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    model.box_coder = model.head.regression_head.box_coder = coder


CHANGES = (changed_thresholds, other_matching, a_new_class_head)
MORE_CHANGES = (  # compared on demand
    *(changed_sizes, a_limit_below_the_size, a_fixed_size, other_padding_and_normalisation),
    *(images_as_they_are, a_new_class_layer, a_head_with_batch_norm, other_box_weights),
    *(several_sizes, other_anchors),
)


@pytest.mark.parametrize("name", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [*CHANGES, *(pytest.param(change, marks=pytest.mark.slow) for change in MORE_CHANGES)],
    ids=lambda change: change.__name__,
)
def test_changes_of_a_built_model_have_the_same_effect(
    change: Callable[[Any], None], name: str
) -> None:
    theirs, mine = build_pair(name)
    for model in (theirs, mine):
        model(images())  # so that nothing is remembered from before the change
        change(model)
    assert_same_detections(theirs, mine, some=False)
    if change is not images_as_they_are:
        assert_same_training(theirs, mine)


def test_images_as_they_are_in_training() -> None:
    pair = build_pair(_skip_resize=True)
    assert_same_training(*pair)


@pytest.mark.parametrize(
    "loss",
    [
        *("smooth_l1", "giou", "ciou"),
        *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("l1", "diou")),
    ],
)
def test_every_box_loss_of_torchvision(loss: str) -> None:
    pair = build_pair()
    for model in pair:
        model.head.regression_head._loss_type = loss
    assert pair[1].uses_focaldet["losses"] == "yes"
    assert_same_training(*pair)


def test_float64_models_detect_in_float64() -> None:
    theirs, mine = build_pair()
    assert_same_detections(theirs.double(), mine.double(), images(torch.float64))
    with torch.no_grad():
        assert mine(images(torch.float64))[0]["boxes"].dtype == torch.float64
    assert_same_training(theirs, mine, targets(3, torch.float64))


def test_targets_of_other_types_and_slightly_outside_the_image() -> None:
    wanted = targets(3)
    wanted[0]["boxes"][0, 0] = -0.5
    wanted[0]["labels"] = wanted[0]["labels"].int()
    wanted[2]["boxes"] = wanted[2]["boxes"].double()
    wanted[2]["image_id"] = torch.tensor(5)
    assert_same_training(*build_pair(), wanted)


def test_gradients_of_detections_reach_the_image() -> None:
    gradients = []
    for model in build_pair():
        given = [image.requires_grad_() for image in images()]
        found = model(given)
        sum(one["scores"].sum() + one["boxes"].sum() / 100 for one in found).backward()
        gradients.append([image.grad for image in given])
    for one, other in zip(*gradients, strict=True):
        assert float(other.abs().max()) > 0
        assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_gradients_of_losses_reach_the_image() -> None:
    gradients = []
    for model in build_pair():
        given = [image.requires_grad_() for image in images()]
        model.train()
        sum(model(given, targets(3)).values()).backward()
        gradients.append([image.grad for image in given])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_masks_and_keypoints_go_through_torchvisions_transform() -> None:
    wanted = targets(3)
    for target, image in zip(wanted, images(), strict=True):
        target["masks"] = torch.zeros(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
    assert_same_training(*build_pair(), wanted)


def test_targets_in_evaluation_are_checked_but_not_used() -> None:
    theirs, mine = build_pair()
    for model in (theirs, mine):
        found = model(images(), targets(3))
        assert isinstance(found, list)


def no_targets(model: Any) -> None:
    model(images())


def boxes_in_a_list(model: Any) -> None:
    model(images()[:1], [{"boxes": [[0, 0, 5, 5]], "labels": torch.zeros(1).long()}])


def a_flat_box(model: Any) -> None:
    model(
        images()[:1],
        [{"boxes": torch.tensor([[0.0, 0.0, 5.0, 0.0]]), "labels": torch.zeros(1).long()}],
    )


def one_row_of_boxes(model: Any) -> None:
    model(images()[:1], [{"boxes": torch.zeros(4), "labels": torch.zeros(1).long()}])


def a_batch_of_images_in_one_tensor(model: Any) -> None:
    model([torch.rand(1, 3, 64, 64)], targets(3)[:1])


def bytes_of_an_image(model: Any) -> None:
    model([torch.zeros(3, 64, 64, dtype=torch.uint8)], targets(3)[:1])


def a_label_beyond_the_classes(model: Any) -> None:
    model(
        images()[:1],
        [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([3])}],
    )


MISTAKES = (
    *(no_targets, boxes_in_a_list, a_flat_box, one_row_of_boxes, a_batch_of_images_in_one_tensor),
    *(bytes_of_an_image, a_label_beyond_the_classes),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_raise_the_same_kind_of_error(mistake: Callable[[Any], None]) -> None:
    theirs, mine = build_pair()
    with pytest.raises(Exception, match=r".") as expected:
        mistake(theirs.train())
    with pytest.raises(type(expected.value), match=r".") as found:
        mistake(mine.train())
    if isinstance(expected.value, AssertionError):
        assert str(found.value) == str(expected.value)


def test_validation_is_off_until_it_is_asked_for() -> None:
    _, mine = build_pair()
    wanted = targets(3)
    wanted[0]["boxes"][0, 0] = -0.5
    mine.train()
    mine(images(), wanted)
    mine.validate = True
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\]\[0\].*not inside the image"):
        mine(images(), wanted)
    with pytest.raises(ValueError, match=r"images\[0\]"):
        mine([image * 300 for image in images()], targets(3))


def by_hand(model: Any) -> Any:
    """Call the parts as training scripts do that need more than the model returns."""
    model.train()
    batched, scaled = model.transform(images(), targets(3))
    features = list(model.backbone(batched.tensors).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(batched, features)
    losses = model.compute_loss(scaled, outputs, anchors)
    model.eval()
    counts = [feature.shape[-2] * feature.shape[-1] * 9 for feature in features]
    split = {name: list(rows.split(counts, dim=1)) for name, rows in outputs.items()}
    found = model.postprocess_detections(
        split, [list(rows.split(counts)) for rows in anchors], batched.image_sizes
    )
    sizes = [tuple(image.shape[-2:]) for image in images()]
    return losses, model.transform.postprocess(found, batched.image_sizes, sizes)


def test_parts_called_by_hand() -> None:
    theirs, mine = build_pair()
    for model in (theirs, mine):
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.momentum = 0.0
    assert_close(by_hand(mine), by_hand(theirs), rtol=1e-5, atol=1e-5)
    assert_same_detections(theirs, mine)


class WithOtherLoss(drop_in.RetinaNet):
    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any) -> Any:
        losses = super().compute_loss(targets, head_outputs, anchors)
        return {**losses, "regularisation": head_outputs["cls_logits"].square().mean()}


class WithOtherChoice(drop_in.RetinaNet):
    def postprocess_detections(self, *args: Any) -> Any:
        found = super().postprocess_detections(*args)
        return [{name: values[:2] for name, values in one.items()} for one in found]


def test_overridden_methods_are_called() -> None:
    theirs, mine = build_pair(ours=WithOtherLoss)
    assert mine.uses_focaldet["losses"] == "no: model.compute_loss is overridden"
    assert mine.uses_focaldet["detections"] == "yes"
    assert_same_detections(theirs, mine)
    losses = mine.train()(images(), targets(3))
    assert list(losses) == ["classification", "bbox_regression", "regularisation"]
    theirs, mine = build_pair(ours=WithOtherChoice)
    assert mine.uses_focaldet["detections"] == "no: model.postprocess_detections is overridden"
    assert [len(one["boxes"]) for one in mine(images())] == [2, 2, 2]
    assert_same_training(theirs, mine)


def test_steps_that_torchvision_computes_are_named_and_equal() -> None:
    theirs, mine = build_pair()
    calls = []

    def mirrored(resize: Any, image: Any, target: Any = None) -> Any:
        calls.append(image.shape)
        return resize(image.flip(-1), target)

    for model in (theirs, mine):
        model.transform.resize = partial(mirrored, model.transform.resize)
        model.head.classification_head.register_forward_hook(lambda _, __, rows: rows + 0.1)
    assert mine.uses_focaldet == {
        "preprocessing": "no: transform.resize is overridden",
        "head": "no: head.classification_head has hooks",
        "losses": "yes",
        "detections": "yes",
    }
    assert_same_detections(theirs, mine)
    assert_same_training(theirs, mine)
    assert len(calls) == 12
    mine.detections_per_img = theirs.detections_per_img = 0
    assert mine.uses_focaldet["detections"] == "no: detections_per_img is 0"
    assert_same_detections(theirs, mine, some=False)


def test_hooks_on_the_transform_run() -> None:
    theirs, mine = build_pair()
    for model in (theirs, mine):
        model.transform.register_forward_pre_hook(
            lambda _, given: ([image / 2 for image in given[0]], *given[1:])
        )
    assert mine.uses_focaldet["preprocessing"] == "no: transform has hooks"
    assert_same_detections(theirs, mine)


def test_autocast_keeps_geometry_in_float32() -> None:
    _, mine = build_pair()
    mine.train()
    expected = mine(images(), targets(3))
    with torch.autocast("cpu", torch.bfloat16):
        losses = mine(images(), targets(3))
        found = mine.eval()(images())
    assert_close(losses, expected, rtol=0.05, atol=0.01, check_dtype=False)
    assert found[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_builders_take_torchvisions_arguments_and_draw_the_same_weights(name: str) -> None:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
    models = []
    for module in (detection, drop_in):
        torch.manual_seed(3)
        models.append(getattr(module, name)(**options, min_size=96, max_size=128))
    theirs, mine = models
    assert type(mine) is drop_in.RetinaNet
    assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert [p.requires_grad for p in mine.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]
    assert_same_detections(theirs.eval(), mine.eval(), images()[:1], some=False)
    with pytest.raises(KeyError, match=r"NO_SUCH_WEIGHTS"):
        getattr(drop_in, name)(weights="NO_SUCH_WEIGHTS")


def test_from_torchvision_shares_the_weights() -> None:
    theirs, _ = build_pair()
    mine = drop_in.RetinaNet.from_torchvision(theirs)
    assert type(theirs) is detection.RetinaNet
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.bias.add_(0.3)
    assert_same_detections(theirs, mine)


def test_a_custom_generator_of_anchors_is_used() -> None:
    class Shifted(AnchorGenerator):  # type: ignore[misc]
        def forward(self, image_list: Any, feature_maps: Any) -> Any:
            return [rows + 3 for rows in super().forward(image_list, feature_maps)]

    pair = build_pair()
    for model in pair:
        model.anchor_generator = Shifted(
            model.anchor_generator.sizes, model.anchor_generator.aspect_ratios
        )
    assert_same_detections(*pair)
    assert_same_training(*pair)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_numbers_of_channels(channels: int) -> None:
    pair = build_pair()
    for model in pair:
        torch.manual_seed(0)
        model.backbone.body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        model.transform.image_mean, model.transform.image_std = [0.4] * channels, [0.3] * channels
    given = [image[:1].expand(channels, -1, -1).contiguous() for image in images()]
    assert pair[1].uses_focaldet["preprocessing"] == "yes"
    assert_same_detections(*pair, given)
    assert pair[1].to_focaldet().config.in_channels == channels


def test_a_group_norm_head_with_a_plain_class_head() -> None:
    pair = build_pair("v2")
    for model in pair:
        torch.manual_seed(0)
        model.head.classification_head = RetinaNetClassificationHead(
            CHANNELS, 9, 2, norm_layer=partial(nn.GroupNorm, 16)
        )
    assert_same_training(*pair)
