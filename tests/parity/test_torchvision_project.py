"""A project that was written for torchvision's RetinaNet, run with it and with one import changed.

The project does what others do around the class: it subclasses it together with the mixin of the Hugging
Face Hub, replaces the head for its own classes, changes thresholds between calls, takes losses in
evaluation from parts that it calls by hand, and trains, saves and loads.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close
from torchvision.models import detection, resnet18
from torchvision.models.detection import retinanet as torchvisions
from torchvision.ops import nms
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focaldet import torchvision as drop_in
from tests.helpers.torchvision_pairs import CHANNELS, images, targets

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.parity

hub = pytest.importorskip("huggingface_hub")


def project(retinanet: Any) -> Any:
    """Return the project's module, with its one import of RetinaNet from elsewhere."""
    here = types.SimpleNamespace()

    class TreeDetector(retinanet.RetinaNet, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        """The network with the names of its classes, which the Hub's config.json keeps."""

        def __init__(
            self,
            label_dict: dict[str, int],
            score_thresh: float = 0.05,
            nms_thresh: float = 0.05,
            **options: Any,
        ) -> None:
            backbone = detection.backbone_utils.BackboneWithFPN(
                resnet18(weights=None),
                {"layer2": "0", "layer3": "1", "layer4": "2"},
                [128, 256, 512],
                CHANNELS,
                LastLevelP6P7(CHANNELS, CHANNELS),
            )
            super().__init__(
                backbone,
                num_classes=len(label_dict),
                min_size=96,
                max_size=128,
                score_thresh=score_thresh,
                nms_thresh=nms_thresh,
                **options,
            )
            self.label_dict = label_dict
            self.update_config()

        def update_config(self) -> None:
            names = ("score_thresh", "nms_thresh", "detections_per_img", "label_dict")
            self._hub_mixin_config = {name: getattr(self, name) for name in names}
            del self._hub_mixin_config["detections_per_img"]

    def with_other_labels(model: Any, label_dict: dict[str, int]) -> Any:
        """Replace the head by one for other classes, and keep its box branch."""
        head = retinanet.RetinaNetHead(
            CHANNELS, model.anchor_generator.num_anchors_per_location()[0], len(label_dict)
        )
        head.regression_head.load_state_dict(model.head.regression_head.state_dict())
        model.head, model.label_dict = head, label_dict
        model.update_config()
        return model

    def validation_losses(model: Any, given: Any, wanted: Any) -> dict[str, float]:
        """Return the losses in evaluation mode, which the class itself does not give."""
        with torch.no_grad():
            batch, scaled = model.transform(given, wanted)
            features = list(model.backbone(batch.tensors).values())
            outputs = model.head(features)
            anchors = model.anchor_generator(batch, features)
            losses = model.compute_loss(scaled, outputs, anchors)
        return {name: float(value) for name, value in losses.items()}

    def predict_tiles(model: Any, image: torch.Tensor, size: int) -> torch.Tensor:
        """Return the boxes of all tiles of an image, merged by suppression, as whole pixels."""
        model.eval()
        boxes, scores = [torch.zeros(0, 4)], [torch.zeros(0)]
        for top in range(0, image.shape[1] - size + 1, size // 2):
            for left in range(0, image.shape[2] - size + 1, size // 2):
                with torch.no_grad():
                    [found] = model([image[:, top : top + size, left : left + size]])
                boxes.append(found["boxes"] + torch.tensor([left, top, left, top]))
                scores.append(found["scores"])
        keep = nms(torch.cat(boxes), torch.cat(scores), model.nms_thresh)
        return torch.cat(boxes)[keep].round()

    def train(model: Any, given: Any, wanted: Any, steps: int) -> list[float]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        history = []
        for _ in range(steps):
            loss = sum(model(given, wanted).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        return history

    here.TreeDetector, here.with_other_labels = TreeDetector, with_other_labels
    here.validation_losses, here.predict_tiles, here.train = validation_losses, predict_tiles, train
    return here


def story(retinanet: Any, folder: Path, trained: Any = None) -> dict[str, Any]:
    """Do a day's work with the project, and return everything that came out.

    After training, the weights ``trained`` replace the model's, since rounding grows in training.
    """
    here = project(retinanet)
    torch.manual_seed(0)
    model = here.TreeDetector({"Tree": 0})
    seen: dict[str, Any] = {"first loss": here.train(model, images(), targets(1), steps=1)}
    model = here.with_other_labels(model, {"Alive": 0, "Dead": 1})
    seen["history"] = here.train(model, images(), targets(2), steps=6)
    model.eval()
    if trained is None:
        torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.1)
    else:
        model.load_state_dict(trained)
    seen["trained"] = model.state_dict()
    seen["validation"] = here.validation_losses(model, images(), targets(2))
    model.score_thresh, model.nms_thresh = 0.01, 0.5
    model.update_config()
    model.save_pretrained(folder)
    again = here.TreeDetector.from_pretrained(folder).eval()
    assert again.label_dict == {"Alive": 0, "Dead": 1}
    assert (again.score_thresh, again.nms_thresh) == (0.01, 0.5)
    with torch.no_grad():
        seen["detections"] = again(images())
    seen["tiles"] = here.predict_tiles(again, torch.cat([images()[0]] * 2, dim=2), size=64)
    return seen


def test_a_project_with_one_import_changed_gets_the_same_results(tmp_path: Path) -> None:
    theirs = story(torchvisions, tmp_path / "theirs")
    mine = story(drop_in, tmp_path / "mine", theirs["trained"])
    assert theirs.keys() == mine.keys()
    assert len(theirs["detections"][0]["boxes"]) > 20
    assert len(theirs["tiles"]) > 20
    assert_close(mine["first loss"], theirs["first loss"], rtol=1e-5, atol=1e-6)
    assert_close(mine["history"], theirs["history"], rtol=0.05, atol=0.01)
    assert_close(mine["validation"], theirs["validation"], rtol=1e-5, atol=1e-6)
    for one, other in zip(mine["detections"], theirs["detections"], strict=True):
        assert_close(one["scores"], other["scores"], rtol=0, atol=1e-6)
    assert len(mine["tiles"]) == len(theirs["tiles"])


def test_weights_go_from_one_to_the_other(tmp_path: Path) -> None:
    theirs, mine = project(torchvisions), project(drop_in)
    torch.manual_seed(0)
    model = theirs.TreeDetector({"Tree": 0}, score_thresh=0.01)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.1)
    model.save_pretrained(tmp_path)
    again = mine.TreeDetector.from_pretrained(tmp_path)
    assert set(again.uses_focaldet.values()) == {"yes"}
    with torch.no_grad():
        expected, found = model.eval()(images()), again.eval()(images())
    for one, other in zip(found, expected, strict=True):
        assert len(other["boxes"]) > 20
        assert_close(one["scores"], other["scores"], rtol=0, atol=1e-6)
