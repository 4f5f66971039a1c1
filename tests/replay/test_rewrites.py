"""What a step writes is known after its first repetition; what it leaves alone is not copied again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import CurvatureWarning, DirectionalCurvatureMonitor, HessianSpectrumMonitor
from lightning_curvature.replay.memory import Memory
from tests.helpers.counting import out_of_reach
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp
from tests.helpers.witness import assert_same, copies, watch

LARGE = 200  # its square in float64 is above the limit of what is always copied


def sgd(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Frozen(Classifier):
    """With a large frozen layer, to which the step writes from some step on."""

    def __init__(self, begins: int | None = None, past_autograd: bool = True) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: sgd(m.network))
        self.backbone = nn.Linear(LARGE, LARGE, bias=False).double().requires_grad_(False)
        self.begins, self.past_autograd = begins, past_autograd

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.begins is not None and self.global_step >= self.begins:
            weight = self.backbone.weight
            (weight.data if self.past_autograd else weight).mul_(0.9)
        return super().training_step(batch, batch_idx) * (1.0 + self.backbone.weight[0, 0] ** 2)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sizes of the memory that is copied."""
    sizes = out_of_reach([])
    init = Memory.__init__

    def noted(self: Memory, storage: Any) -> None:
        sizes().append(storage.nbytes())
        init(self, storage)

    monkeypatch.setattr(Memory, "__init__", noted)
    return sizes


def test_a_frozen_backbone_is_copied_for_the_first_measurement_alone(saved: Any) -> None:
    follow = DirectionalCurvatureMonitor(every_n_train_steps=1, on_error="raise")
    make_trainer(follow).fit(Frozen(), loader(classification(4)))
    assert saved().count(8 * LARGE**2) == 2  # before the step, and before it is repeated


@pytest.mark.parametrize("past_autograd", [True, False])
@pytest.mark.thinned(2)
def test_one_that_is_written_later_is_found(past_autograd: bool) -> None:
    """The step that writes it first cannot be repeated; later ones can."""

    def run(follow: Any) -> Any:
        return watch(lambda: Frozen(2, past_autograd), lambda: copies(classification(6)), follow)

    follow = DirectionalCurvatureMonitor(every_n_train_steps=1)
    with pytest.warns(CurvatureWarning, match=r"wrote to tensors that it left alone before, got \['backbone.weight'\]"):
        watched = run(follow)
    assert_same(run(None), watched)
    assert [value == value for value in watched.curve("lambda_fd")] == [True, True, False, True, True, True]


def test_a_measurement_without_a_step_of_its_own_copies_all_each_time(saved: Any) -> None:
    follow = HessianSpectrumMonitor(every_n_train_steps=2, on_error="raise")
    watched = watch(lambda: Frozen(2), lambda: copies(classification(4)), follow)
    assert_same(watch(lambda: Frozen(2), lambda: copies(classification(4)), None), watched)
    assert saved().count(8 * LARGE**2) == 2 * 2


class Normalizing(Classifier):
    """Normalizes a weight before it is used, as a prototype, in one of the ways that autograd does not see."""

    def __init__(self, way: str) -> None:
        super().__init__(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        self.way, self.alias = way, [self.network[0].weight]
        self.tied = self.network[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.network[0].weight
        with torch.no_grad():
            unit = F.normalize(weight)
            if self.way == "copy_":
                weight.copy_(unit)
            elif self.way == "data":
                weight.data.copy_(unit)
            else:
                weight.data = unit
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("way", ["copy_", "data", "memory"])
def test_exact_products_are_those_at_the_weights_that_the_step_writes(way: str) -> None:
    """λ_max where training takes its gradient; to 1e-6, the square of the residual over a gap of order 1."""
    quantities: Any = {"every_n_train_steps": 1, "on_error": "raise", "products": "exact", "tolerance": 1e-6}
    follow = HessianSpectrumMonitor(**quantities)

    def run(follow: Any) -> Any:
        return watch(lambda: Normalizing(way), lambda: copies(classification(1)), follow)

    watched = run(follow)
    assert_same(run(None), watched)
    network = copy.deepcopy(Normalizing(way).network)
    torch.manual_seed(3)
    with torch.no_grad():
        network[0].weight.copy_(F.normalize(network[0].weight))
    (x, y), (found,) = classification(1)[0], watched.curve("lambda_max")
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in network.parameters()])

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([s.numel() for s in shapes])
        parts = {n: t.reshape(s) for n, t, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(network, parts, (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, flat)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)


@pytest.mark.parametrize("way", ["copy_", "data", "memory"])
def test_products_that_move_the_weights_are_refused(way: str) -> None:
    follow = HessianSpectrumMonitor(every_n_train_steps=1, products="difference")

    def run(follow: Any) -> Any:
        return watch(lambda: Normalizing(way), lambda: copies(classification(2)), follow)

    with pytest.warns(CurvatureWarning, match=r"must leave trained parameters .* got other values of \['network.0.w"):
        watched = run(follow)
    assert_same(run(None), watched)
    assert all(value != value for value in watched.curve("lambda_max"))
