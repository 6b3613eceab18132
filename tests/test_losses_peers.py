"""What docs/focal_loss.md says about the focal losses of other projects, checked against them.

The numbers are in that page only. Each test reads its row and recomputes it with the installed
package, or is skipped if the package is missing; ``pip install 'focaldet[peers]'`` installs most.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from focaldet import focal_star_loss, sigmoid_focal_loss, softmax_focal_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Loss = Callable[[Tensor, Tensor, float | None, float], Tensor]  # x, targets, alpha, gamma

PAGE = Path(__file__).parents[1] / "docs" / "focal_loss.md"
PEERS = ("torchvision", "fvcore", "mmdet", "MONAI", "kornia", "SMP")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # raised by the peers
]


def import_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Import a module of an installed package without running its parent packages.

    Those import backbones, image readers and compiled operators that the loss does not need.
    """
    package, *rest = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    for part in rest:
        bare = types.ModuleType(package)
        bare.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, package, bare)
        package, folder = f"{package}.{part}", folder / part
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # undone after the test
    del sys.modules[name]
    return importlib.import_module(name)


def entries_of(peer: str, monkeypatch: pytest.MonkeyPatch) -> Loss:
    """Return the peer's sigmoid focal loss without reduction, with a common signature."""
    if peer == "torchvision":
        ops = importlib.import_module("torchvision.ops")
        return lambda x, t, a, g: ops.sigmoid_focal_loss(x, t, -1 if a is None else a, g)
    if peer == "fvcore":
        fvcore = pytest.importorskip("fvcore.nn")
        return lambda x, t, a, g: fvcore.sigmoid_focal_loss(x, t, -1 if a is None else a, g)
    if peer == "mmdet":
        # Its operators are compiled, and its registry imports half of the project.
        operators, registry = types.ModuleType("mmcv.ops"), types.ModuleType("mmdet.registry")
        operators.sigmoid_focal_loss = None  # type: ignore[attr-defined]
        models = types.SimpleNamespace(register_module=lambda: lambda kind: kind)
        registry.MODELS = models  # type: ignore[attr-defined]
        for module in (types.ModuleType("mmcv"), operators, registry):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        mmdet = import_alone(monkeypatch, "mmdet.models.losses.focal_loss")

        def of_mmdet(x: Tensor, t: Tensor, alpha: float | None, gamma: float) -> Tensor:
            factor = 1.0 if alpha is not None else 2.0  # it cannot disable alpha
            given = 0.5 if alpha is None else alpha
            loss = mmdet.py_sigmoid_focal_loss(x, t, gamma=gamma, alpha=given, reduction="none")
            return factor * loss  # type: ignore[no-any-return]

        return of_mmdet
    if peer == "MONAI":
        monai = pytest.importorskip("monai.losses.focal_loss")
        return lambda x, t, a, g: monai.sigmoid_focal_loss(x, t, g, a)
    if peer == "kornia":
        kornia = pytest.importorskip("kornia.losses")
        return lambda x, t, a, g: kornia.binary_focal_loss_with_logits(
            x[None], t[None], a, g, reduction="none"
        )[0]
    smp = import_alone(monkeypatch, "segmentation_models_pytorch.losses._functional")
    return lambda x, t, a, g: smp.focal_loss_with_logits(
        x, t, gamma=g, alpha=a, reduction="none"
    ).clone()


def ours(x: Tensor, t: Tensor, alpha: float | None, gamma: float) -> Tensor:
    return sigmoid_focal_loss(x, t, alpha=alpha, gamma=gamma, reduction="none")


def row_of(peer: str, table: str = "values") -> list[str]:
    """Return the cells of a row in one of the page's two tables, without the name."""
    text = PAGE.read_text(encoding="utf-8").split(f"<!-- {table} -->")[1]
    text = text.split(f"<!-- end of {table} -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    [found] = [row[1:] for row in rows if row[0].split(" ")[0] == peer]
    return found


X = torch.tensor([0.3, -1.2, 2.0])
SOFT = torch.tensor([0.5, 0.2, 0.9])


def check_values(row: list[str], loss: Loss) -> None:
    wanted = [float(number) for number in re.findall(r"\d\.\d+", row[0])]
    values = [round(value, 5) for value in loss(X, SOFT, 0.25, 2.0).tolist()]
    assert values == wanted


@pytest.mark.parametrize("peer", PEERS)
def test_the_values_for_soft_targets_are_those_of_the_page(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = entries_of(peer, monkeypatch)
    row = row_of(peer)
    check_values(row, loss)
    same = loss(X, SOFT, 0.25, 2.0) - ours(X, SOFT, 0.25, 2.0)
    assert row[1] == ("yes" if bool((same.abs() < 1e-6).all()) else "no")


def test_the_values_of_focaldet_are_those_of_the_page() -> None:
    check_values(row_of("focaldet"), ours)


def signature_of(peer: str, monkeypatch: pytest.MonkeyPatch) -> inspect.Signature:
    """Return the signature of the function or class that users of the peer call."""
    if peer == "mmdet":
        entries_of(peer, monkeypatch)
        return inspect.signature(sys.modules["mmdet.models.losses.focal_loss"].FocalLoss)
    if peer == "SMP":
        smp = import_alone(monkeypatch, "segmentation_models_pytorch.losses.focal")
        return inspect.signature(smp.FocalLoss)
    home, name = {
        "focaldet": ("focaldet", "FocalLoss"),
        "torchvision": ("torchvision.ops", "sigmoid_focal_loss"),
        "fvcore": ("fvcore.nn", "sigmoid_focal_loss"),
        "MONAI": ("monai.losses", "FocalLoss"),
        "kornia": ("kornia.losses", "focal_loss"),
    }[peer]
    return inspect.signature(getattr(pytest.importorskip(home), name))


@pytest.mark.parametrize("peer", ["focaldet", *PEERS])
def test_the_defaults_are_those_of_the_page(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = signature_of(peer, monkeypatch).parameters
    alpha, _, reduction = [cell.strip("`") for cell in row_of(peer, "defaults")][:3]
    default = parameters["alpha"].default
    assert alpha == ("required" if default is inspect.Parameter.empty else f"{default}")
    assert reduction == getattr(parameters["reduction"].default, "value", None) or (
        reduction == parameters["reduction"].default
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("peer", PEERS)
def test_all_agree_on_hard_targets(
    peer: str, alpha: float | None, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = entries_of(peer, monkeypatch)
    x = torch.randn(200, 3) * 3
    targets = (torch.rand(200, 3) < 0.3).float()
    wanted = ours(x, targets, alpha, gamma)
    torch.testing.assert_close(loss(x, targets, alpha, gamma), wanted, rtol=1e-3, atol=1e-6)


def gradient(loss: Loss, x: Tensor, targets: Tensor, gamma: float) -> Tensor:
    x = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(loss(x, targets, None, gamma).sum(), x)
    return slopes


@pytest.mark.parametrize("peer", PEERS)
def test_gradients_of_confident_correct_logits_are_as_in_the_page(
    peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = entries_of(peer, monkeypatch)
    x, targets = torch.tensor([40.0, 200.0, -40.0, -200.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    finite = gradient(loss, x, targets, 0.5).isfinite().all()
    assert row_of(peer)[2] == ("finite" if finite else "NaN")
    got = gradient(ours, x, targets, 0.5)
    assert got.isfinite().all()
    assert got.abs().max() < 1e-8


def test_at_gamma_0_the_means_of_focaldet_equal_those_of_torch() -> None:
    x, targets = torch.randn(50, 4), torch.randint(4, (50,))
    one_hot = F.one_hot(targets, 4).float()
    torch.testing.assert_close(
        sigmoid_focal_loss(x, targets, alpha=None, gamma=0.0),
        F.binary_cross_entropy_with_logits(x, one_hot),
    )
    torch.testing.assert_close(
        softmax_focal_loss(x, targets, gamma=0.0), F.cross_entropy(x, targets)
    )


def test_kornia_divides_its_softmax_mean_by_the_classes_and_counts_ignored_rows() -> None:
    x, targets = torch.randn(50, 4), torch.randint(4, (50,))
    targets[0] = -100
    kornia = pytest.importorskip("kornia.losses")
    mean = kornia.focal_loss(x, targets, alpha=None, gamma=0.0, reduction="mean")
    torch.testing.assert_close(mean, F.cross_entropy(x, targets, reduction="sum") / (50 * 4))


def test_monai_divides_its_softmax_mean_by_the_classes() -> None:
    x, targets = torch.randn(50, 4), torch.randint(4, (50,))
    monai = pytest.importorskip("monai.losses")
    loss = monai.FocalLoss(gamma=0.0, use_softmax=True, to_onehot_y=True)
    torch.testing.assert_close(loss(x, targets[:, None]), F.cross_entropy(x, targets) / 4)


def test_the_sum_of_monai_is_a_mean_over_places() -> None:
    x, targets = torch.randn(2, 3, 4, 5), (torch.rand(2, 3, 4, 5) < 0.3).float()
    monai = pytest.importorskip("monai.losses")
    got = monai.FocalLoss(gamma=2.0, reduction="sum")(x, targets)
    torch.testing.assert_close(got, ours(x, targets, None, 2.0).sum() / 20)


def test_a_vector_alpha_of_monai_weights_only_positives() -> None:
    x, targets = torch.randn(20, 3), (torch.rand(20, 3) < 0.3).float()
    weights = torch.tensor([0.2, 0.5, 0.9])
    monai = pytest.importorskip("monai.losses.focal_loss")
    plain = ours(x, targets, None, 2.0)
    wanted = torch.where(targets == 1, weights * plain, plain)
    torch.testing.assert_close(monai.sigmoid_focal_loss(x, targets, 2.0, weights), wanted)
    both = torch.where(targets == 1, weights, 1 - weights) * plain
    got = sigmoid_focal_loss(x, targets, alpha=weights, reduction="none")
    torch.testing.assert_close(got, both)


@pytest.mark.parametrize("peer", ["MONAI", "kornia"])
def test_a_scalar_alpha_of_a_softmax_loss_weights_class_0_by_1_minus_alpha(peer: str) -> None:
    x, targets = torch.randn(50, 4), torch.randint(4, (50,))
    if peer == "MONAI":
        monai = pytest.importorskip("monai.losses.focal_loss")
        got = monai.softmax_focal_loss(x, F.one_hot(targets, 4).float(), 2.0, 0.3)
    else:
        kornia = pytest.importorskip("kornia.losses")
        got = kornia.focal_loss(x, targets, alpha=0.3, gamma=2.0, reduction="none")
    weights = torch.tensor([0.7, 0.3, 0.3, 0.3])
    wanted = softmax_focal_loss(x, targets, alpha=weights, gamma=2.0, reduction="none")
    torch.testing.assert_close(got.sum(1), wanted)


def test_the_multiclass_mode_of_smp_is_one_sigmoid_per_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smp = import_alone(monkeypatch, "segmentation_models_pytorch.losses.focal")
    x, targets = torch.randn(2, 4, 3, 5), torch.randint(4, (2, 3, 5))
    wanted = sigmoid_focal_loss(x, targets, alpha=None)
    torch.testing.assert_close(smp.FocalLoss("multiclass")(x, targets), wanted)


def test_fl_star_of_fvcore_is_ours_with_beta_0() -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    x, targets = torch.randn(20, 3), (torch.rand(20, 3) < 0.3).float()
    got = focal_star_loss(x, targets, alpha=0.25, gamma=2.0, beta=0.0, reduction="none")
    wanted = fvcore.sigmoid_focal_loss_star(x, targets, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(got, wanted)
