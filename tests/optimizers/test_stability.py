"""Rules and preconditioners of single optimizers: thresholds, notes, wrappers, refusals, coordinates left out."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

from lightning_curvature.optimizers.stability import StabilityRule, preconditioner, stability_rule
from tests.helpers.optimizers import make_parameters, make_steps

U64 = 2.0**-53
Make = Callable[..., Any]


# ----------------------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    ("make", "hessian", "preconditioned"),
    [
        (lambda p: SGD(p, lr=0.1), 20.0, 20.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), 38.0, 38.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 0.28, 3.8 / 0.28),
        (lambda p: SGD(p, lr=0.1, dampening=0.5), 20.0, 20.0),
        (lambda p: SGD(p, lr=0.1, weight_decay=0.5), 19.5, 19.5),
        (lambda p: SGD(p, lr=torch.tensor(0.5)), 4.0, 4.0),
        (lambda p: Adam(p, lr=0.1), math.nan, 380.0),
        (lambda p: AdamW(p, lr=0.1, weight_decay=0.0), math.nan, 380.0),
        (lambda p: AdamW(p, lr=0.1, weight_decay=1.0), math.nan, 361.0),
        (lambda p: Adamax(p, lr=0.1), math.nan, 380.0),
        (lambda p: RMSprop(p, lr=0.1, momentum=0.9), math.nan, 38.0),
        (lambda p: Adagrad(p, lr=0.1, lr_decay=1.0), math.nan, 20.0),
    ],
)
def test_rules_before_the_first_step(make: Make, hessian: float, preconditioned: float) -> None:
    rule = stability_rule(make(make_parameters(3)))
    assert rule.hessian == pytest.approx(hessian, rel=8 * U64, nan_ok=True)
    assert rule.preconditioned == pytest.approx(preconditioned, rel=8 * U64)
    assert rule.note is None


def test_corrections_are_those_of_the_last_step() -> None:
    parameters = make_parameters(3)
    adam, adagrad = Adam(parameters, lr=0.1), Adagrad(parameters, lr=0.1, lr_decay=1.0)
    for optimizer in (adam, adagrad):
        make_steps(optimizer, parameters, 3)
    # Steps are counted in float32, small whole numbers exactly.
    assert stability_rule(adam).preconditioned == pytest.approx(380.0 * (1.0 - 0.9**3), rel=8 * U64)
    assert stability_rule(adagrad).preconditioned == pytest.approx(20.0 * (1.0 + 2.0), rel=8 * U64)


def test_eta_is_that_of_the_first_group_that_moves() -> None:
    frozen, still, first, second = make_parameters(1, 1, 1, 1)
    frozen.requires_grad_(False)
    groups = [{"params": [p], "lr": lr} for p, lr in ((frozen, 9.0), (still, 0.0), (first, 0.5), (second, 0.5))]
    assert stability_rule(SGD(groups)) == StabilityRule(0.5, 4.0, 4.0, None)


def test_without_a_learning_rate_the_threshold_is_infinite() -> None:
    parameters = make_parameters(2)
    optimizer = Adam(parameters, lr=0.1)
    make_steps(optimizer, parameters, 2)
    (before,) = preconditioner(optimizer, parameters)
    optimizer.param_groups[0]["lr"] = 0.0  # the end of a schedule, or a warm-up from 0
    assert stability_rule(optimizer).preconditioned == math.inf
    assert torch.equal(preconditioner(optimizer, parameters)[0], before)
    assert stability_rule(SGD(parameters, lr=0.0)).hessian == math.inf
    assert stability_rule(NAdam(parameters, lr=0.0)).hessian == math.inf


def test_unequal_groups_are_named() -> None:
    a, b = make_parameters(1, 1)
    rule = stability_rule(SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1, "momentum": 0.9}]))
    assert (rule.lr, rule.hessian) == (0.5, 4.0)
    assert rule.note == "parameter groups differ in lr and momentum: the threshold on λ_max(H) is the first group's."
    rule = stability_rule(Adam([{"params": [a], "lr": 0.5}, {"params": [b], "betas": (0.8, 0.999)}], lr=0.1))
    assert rule.note == "parameter groups differ in lr and betas: P is scaled to the first group's."
    decays = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    assert stability_rule(AdamW(decays)).note is None


class Halving(torch.optim.Optimizer):
    """Somebody's own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None: ...


class Renamed(Adam):
    """A subclass that steps as its parent does."""


class First(Adam):
    """A subclass as torch leaves it when it is instantiated before its parent: with a wrapper of its own."""

    step = torch.optim.Optimizer.profile_hook_step(Adam.step)


class Otherwise(Adam):
    """A subclass that does not."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [Halving, Otherwise, NAdam, torch.optim.Adadelta])
def test_others_get_gradient_descent_s_edge_and_a_note(cls: Any) -> None:
    parameters = make_parameters(2)
    optimizer = cls(parameters, lr=0.1)
    rule = stability_rule(optimizer)
    assert (rule.lr, rule.hessian) == (0.1, 20.0)
    assert math.isnan(rule.preconditioned)
    assert rule.note == f"{cls.__name__} is not known: 2/η of gradient descent is drawn."
    message = rf"SGD, Adam, AdamW, Adamax, RMSprop, Adagrad, got {cls.__name__}: its preconditioner is not known\."
    with pytest.raises(ValueError, match=message):
        preconditioner(optimizer, parameters)


@pytest.mark.parametrize("cls", [Adam, AdamW, Renamed, First])
def test_subclasses_and_lightning_s_wrapper_are_the_optimizer(cls: Any) -> None:
    parameters = make_parameters(4)
    plain, optimizer = Adam(parameters, lr=0.1), cls(parameters, lr=0.1, weight_decay=0.0)
    for some in (plain, optimizer):
        make_steps(some, parameters, 3)
    wrapped = LightningOptimizer(optimizer)
    for some in (optimizer, wrapped):
        assert repr(stability_rule(some)) == repr(stability_rule(plain))
        assert torch.equal(preconditioner(some, parameters)[0], preconditioner(plain, parameters)[0])
    other = LightningOptimizer(Otherwise(parameters, lr=0.1))
    assert str(stability_rule(other).note).startswith("Otherwise is not known")


@pytest.mark.parametrize("make", [SGD, Adam])
def test_climbing_has_no_threshold_but_a_preconditioner(make: Make) -> None:
    parameters = make_parameters(2)
    optimizer = make(parameters, lr=0.1, maximize=True)
    make_steps(optimizer, parameters, 1)
    rule = stability_rule(optimizer)
    assert math.isnan(rule.hessian)
    assert math.isnan(rule.preconditioned)
    name = type(optimizer).__name__
    assert rule.note == f"{name} with maximize=True climbs: the largest eigenvalue of H has no threshold."
    assert preconditioner(optimizer, parameters)[0].isfinite().all()


def test_momentum_of_one_is_said_to_have_no_threshold() -> None:
    parameters = make_parameters(2)
    optimizer = SGD(parameters, lr=0.1, momentum=1.0)
    rule = stability_rule(optimizer)
    assert math.isnan(rule.hessian)
    expected = "SGD has no threshold, since momentum must lie in [0, 1), got 1.0: from 1 on no step is stable."
    assert rule.note == expected
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\)"):
        preconditioner(optimizer, parameters)


def test_decay_in_an_adaptive_gradient_is_said_to_be_left_out() -> None:
    parameters = make_parameters(2)
    note = stability_rule(Adam(parameters, lr=0.1, weight_decay=0.01)).note
    assert note == "weight_decay=0.01 of Adam acts as H + 0.01·I, which is left out."
    assert stability_rule(AdamW(parameters, lr=0.1, weight_decay=0.01)).note is None


def test_decay_is_decoupled_where_the_group_says_so_or_in_torch_2_6_the_class() -> None:
    adam, adamw = (cls(make_parameters(2), lr=0.1, weight_decay=1.0) for cls in (Adam, AdamW))
    adam.param_groups[0]["decoupled_weight_decay"] = True
    adamw.param_groups[0].pop("decoupled_weight_decay", None)
    assert stability_rule(adam).preconditioned == pytest.approx(361.0, rel=8 * U64)
    assert repr(stability_rule(adam)) == repr(stability_rule(adamw))


# ----------------------------------------------------------------------------------------------------------------------
# P


def test_unequal_learning_rates_go_into_p() -> None:
    a, b = make_parameters(4, 4)
    plain = Adam([a, b], lr=0.1)
    make_steps(plain, [a, b], 3)
    before = preconditioner(plain, [a, b])
    uneven = Adam([{"params": [a]}, {"params": [b], "lr": 0.025}], lr=0.1)
    uneven.state = plain.state
    first, second = preconditioner(uneven, [a, b])
    assert torch.equal(first, before[0])
    torch.testing.assert_close(second, 4.0 * before[1], rtol=8 * U64, atol=0.0)


def test_coordinates_that_do_not_move_are_left_out() -> None:
    moving, frozen, unused, foreign, still = make_parameters(2, 3, 4, 5, 6)
    for make in (SGD, Adam, Adagrad):
        groups = [{"params": [moving, frozen, unused]}, {"params": [still], "lr": 0.0}]
        optimizer = make(groups, lr=0.1)
        make_steps(optimizer, [moving, frozen, still], 2)
        frozen.requires_grad_(False)
        parts = preconditioner(optimizer, [still, moving, frozen, unused, foreign])
        frozen.requires_grad_(True)
        assert [tuple(part.shape) for part in parts] == [(6,), (2,), (3,), (4,), (5,)]
        assert [bool(part.isinf().all()) for part in parts] == [True, False, True, make is not SGD, True]
        assert parts[1].isfinite().all()


@pytest.mark.parametrize("make", [Adam, Adamax, RMSprop, Adagrad])
def test_before_the_first_step_there_is_none(make: Make) -> None:
    parameters = make_parameters(2)
    optimizer = make(parameters)
    message = rf"got {make.__name__} that has not: its preconditioner exists from its first step on\."
    with pytest.raises(ValueError, match=message):
        preconditioner(optimizer, parameters)
    assert all("exp_avg" not in state for state in optimizer.state.values())


def test_a_second_moment_of_zero_leaves_eps() -> None:
    (p,) = make_parameters(2)
    optimizer = Adam([p], eps=1e-6)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert preconditioner(optimizer, [p])[0].tolist() == [1e-6, 1e-6]


def test_a_variance_that_rounds_below_zero_leaves_eps() -> None:
    (p,) = make_parameters(2)
    optimizer = RMSprop([p], eps=1e-6, centered=True)
    make_steps(optimizer, [p], 1)
    optimizer.state[p]["grad_avg"].copy_(optimizer.state[p]["square_avg"].sqrt() * (1.0 + 1e-12))
    assert preconditioner(optimizer, [p])[0].tolist() == [1e-6, 1e-6]


@pytest.mark.parametrize("make", [SGD, Adam, AdamW, Adamax, RMSprop, Adagrad])
def test_half_precision_state_is_widened(make: Make) -> None:
    (p,) = make_parameters(8, dtype=torch.bfloat16)
    optimizer = make([p], lr=0.1)
    make_steps(optimizer, [p], 2)
    (narrow,) = preconditioner(optimizer, [p])
    assert narrow.dtype == torch.float32
    for name, value in optimizer.state[p].items():
        optimizer.state[p][name] = value.double() if value is not None else None
    (wide,) = preconditioner(optimizer, [p])
    # Rounding of the root, the quotient and the sum in float32.
    torch.testing.assert_close(narrow.double(), wide.double(), rtol=4 * 2.0**-24, atol=0.0)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW, Adamax, RMSprop, Adagrad])
def test_the_optimizer_is_left_as_it_was(make: Make) -> None:
    parameters = make_parameters(3, 4, 5)
    optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=0.1)
    make_steps(optimizer, parameters[:2], 2)
    before = copy.deepcopy(optimizer.state_dict())
    stability_rule(optimizer)
    for part in preconditioner(optimizer, parameters):
        part.zero_()
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for key, state in before["state"].items():
        assert all(v is None or torch.equal(v, after["state"][key][name]) for name, v in state.items())


def test_decay_that_is_unstable_in_one_group_is_refused() -> None:
    a, b = make_parameters(2, 2)
    optimizer = SGD([{"params": [a]}, {"params": [b], "weight_decay": 30.0}], lr=0.1)
    with pytest.raises(ValueError, match=r"stable under weight decay alone, got the thresholds 20 and -10: lower lr"):
        preconditioner(optimizer, [a, b])


def test_a_sharded_state_is_read_in_its_local_part() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        (whole,) = make_parameters(6)
        sharded = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        parts = []
        for p in (whole, sharded):
            optimizer = Adam([p], lr=0.1)
            for k in range(2):
                p.grad = torch.cos(p.detach() + k)
                optimizer.step()
            assert stability_rule(optimizer).preconditioned == pytest.approx(380.0 * (1.0 - 0.9**2), rel=8 * U64)
            parts += preconditioner(optimizer, [p])
    finally:
        dist.destroy_process_group()
    assert not isinstance(parts[1], DTensor)
    # The same additions and multiplications; fused or not, a few roundings.
    torch.testing.assert_close(parts[1], parts[0], rtol=8 * U64, atol=0.0)
