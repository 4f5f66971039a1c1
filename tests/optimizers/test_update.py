"""The true update of a step: what it is, where it can take the parameters, what it keeps alive."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.optimizers.update import ParameterUpdate

U64 = 2.0**-53


class SignDescent(torch.optim.Optimizer):
    """An optimizer that is not in torch.optim and replaces the data of its parameters."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - group["lr"] * p.grad.sign()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "foreign": lambda p: SignDescent(p, lr=0.1),
}


def _network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return network, torch.randn(5, 3, dtype=dtype)


def _flat(parameters: Iterator[Tensor]) -> Tensor:
    return torch.cat([p.detach().double().reshape(-1).clone() for p in parameters])


def _step(network: nn.Module, x: Tensor, optimizer: Any, **options: Any) -> tuple[ParameterUpdate, Tensor, Tensor]:
    """One step; the update, θ_t and g."""
    optimizer.zero_grad()
    network(x).square().mean().backward()
    before, gradient = _flat(network.parameters()), _flat(p.grad for p in network.parameters())  # type: ignore[misc]
    update = ParameterUpdate(optimizer, **options)
    optimizer.step()
    update.complete()
    return update, before, gradient


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_displacement_of_any_optimizer(name: str) -> None:
    network, x = _network()
    optimizer = OPTIMIZERS[name](network.parameters())
    for _ in range(3):  # from the second step on momentum and preconditioners count
        update, before, gradient = _step(network, x, optimizer)
        d = before - _flat(network.parameters())
        # Thirty products of numbers of one size.
        assert update.descent.item() == pytest.approx((gradient @ d).item(), rel=30 * U64, abs=30 * U64)
        assert update.squared_norm.item() == pytest.approx((d @ d).item(), rel=30 * U64)
        assert update.lr == 0.1
        assert update.uniform_lr
        with update.direction() as direction:
            assert torch.equal(torch.cat([part.reshape(-1) for part in direction]), d)


def test_positions_along_the_step() -> None:
    network, x = _network()
    update, before, _ = _step(network, x, OPTIMIZERS["adamw"](network.parameters()))
    after = _flat(network.parameters())
    for position, exact in ((0.0, before), (1.0, after)):
        with update.at(position):
            assert torch.equal(_flat(network.parameters()), exact)
    for position in (-30.0, -1.0, 0.1, 0.5, 2.0, 30.0):
        with update.at(position):
            expected = before - position * (before - after)
            # One product and one sum of numbers up to |θ| + 30|d| < 8.
            torch.testing.assert_close(_flat(network.parameters()), expected, rtol=0, atol=4 * 8 * U64)
        assert torch.equal(_flat(network.parameters()), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", ["at", "direction"])
def test_parameters_come_back_bit_for_bit_after_an_error(dtype: torch.dtype, use: str) -> None:
    network, x = _network(dtype)
    update, _, _ = _step(network, x, OPTIMIZERS["adamw"](network.parameters()))
    after = [p.detach().clone() for p in network.parameters()]

    def probe() -> None:
        with update.at(7.3) if use == "at" else update.direction():
            assert any(not torch.equal(p, a) for p, a in zip(network.parameters(), after, strict=True))
            raise RuntimeError("inside a probe")

    with pytest.raises(RuntimeError, match="inside a probe"):
        probe()
    assert all(torch.equal(p, a) for p, a in zip(network.parameters(), after, strict=True))


def test_an_error_while_the_parameters_are_being_set_puts_them_back_too() -> None:
    network, x = _network()
    update, _, _ = _step(network, x, OPTIMIZERS["sgd"](network.parameters()))
    after = _flat(network.parameters())
    update._start[2] = torch.zeros(7, 7).double()  # the third of four cannot be copied
    with pytest.raises(RuntimeError), update.at(0.5):
        pass
    assert torch.equal(_flat(network.parameters()), after)


def test_direction_sets_the_start_of_the_step() -> None:
    network, x = _network()
    update, before, _ = _step(network, x, OPTIMIZERS["nesterov"](network.parameters()))
    with update.direction():
        assert torch.equal(_flat(network.parameters()), before)


def test_only_parameters_with_a_gradient_take_part() -> None:
    network, x = _network()
    network[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    # Weight decay would move a frozen parameter with gradient None nowhere: optimizers skip it.
    optimizer = torch.optim.AdamW([*network.parameters(), unused], lr=0.1)
    network(x).square().mean().backward()
    update = ParameterUpdate(optimizer)
    names = [n for n, p in network.named_parameters() if any(p is q for q in update.parameters)]
    assert names == ["0.weight", "2.weight", "2.bias"]
    assert len(update.parameters) == 3


@pytest.mark.parametrize(
    ("rates", "lr", "uniform"),
    [((0.1, 0.1), 0.1, True), ((0.2, 0.1), 0.2, False), ((0.0, 0.1), 0.1, True), ((0.0, 0.0), 0.0, True)],
)
def test_learning_rate_of_several_groups(rates: tuple[float, float], lr: float, uniform: bool) -> None:
    network, x = _network()
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(network[::2], rates, strict=True)]
    unused = {"params": [nn.Parameter(torch.ones(2))], "lr": 9.0}  # a group without gradients does not count
    optimizer = torch.optim.SGD([unused, *groups], lr=1.0)
    network(x).square().mean().backward()
    update = ParameterUpdate(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 5.0  # as a scheduler that moves before the measurement
    assert (update.lr, update.uniform_lr) == (lr, uniform)


def test_learning_rate_in_a_tensor() -> None:
    network, x = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=torch.tensor(0.25))
    update, _, _ = _step(network, x, optimizer)
    assert update.lr == 0.25


def test_scaled_and_kept_gradients() -> None:
    """Unscaled by 1/8; and what a callback did to p.grad after backward is not the gradient."""
    network, x = _network()
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    network(x).square().mean().backward()
    before, gradient = _flat(network.parameters()), _flat(p.grad for p in network.parameters())  # type: ignore[misc]
    kept = {id(p): p.grad.clone() for p in network.parameters()}  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    update = ParameterUpdate(optimizer, gradient_scale=0.125, gradients=kept)
    optimizer.step()
    update.complete()
    d = before - _flat(network.parameters())
    assert d.norm().item() == pytest.approx(1e-4, rel=1e-2)  # clipped; torch adds 1e-6 to the norm it divides by
    # gᵀd of the unclipped gradient; d is the difference of numbers of size 1, 1e-4 long.
    assert update.descent.item() == pytest.approx(0.125 * (gradient @ d).item(), rel=30 * U64)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 3, sparse=True).double()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.5)
    (embedding(torch.tensor([1, 4, 1])) ** 2).sum().backward()
    gradient = embedding.weight.grad.to_dense()  # type: ignore[union-attr]
    update = ParameterUpdate(optimizer)
    optimizer.step()
    update.complete()
    assert update.descent.item() == pytest.approx(0.5 * gradient.square().sum().item(), rel=20 * U64)


@pytest.mark.parametrize("shapes", [[1, 1, 1, 1], [4 * 2**16]], ids=["parameters", "pieces of one"])
def test_dot_products_are_added_in_float64(shapes: list[int]) -> None:
    """float32 has no 2²⁶ + 1; a dot product has one term that is not 0, so that its own order does not matter."""
    weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    gradient = torch.zeros(4, sum(shapes) // 4)
    gradient[:, 0] = torch.tensor([2.0**26, 1.0, -(2.0**26), 1.0])
    for weight, part in zip(weights, gradient.reshape(-1).split(shapes), strict=True):
        weight.grad = part
    update = ParameterUpdate(torch.optim.SGD(weights, lr=1.0))
    for weight in weights:
        weight.data.sub_(1.0)
    update.complete()
    assert update.descent.item() == 2.0


@pytest.mark.slow
def test_two_copies_of_the_parameters_at_most() -> None:
    """θ_t and g until the step is complete, then θ_t and θ_{t+1} in the memory of g; one and d in :meth:`direction`."""
    gc.collect()
    weight = nn.Parameter(torch.randn(1000))
    weight.grad = torch.randn(1000)
    known = {id(weight), id(weight.grad)}

    def extra() -> int:
        alive = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() == 1000 and id(o) not in known]
        return len({t.untyped_storage().data_ptr() for t in alive} - {weight.data_ptr()})

    optimizer = torch.optim.SGD([weight], lr=0.1)
    start = extra()
    update = ParameterUpdate(optimizer)
    assert extra() - start == 2
    gradient_memory = update._gradients[0].data_ptr()  # type: ignore[index]
    optimizer.step()
    update.complete()
    assert extra() - start == 2
    assert update._end[0].data_ptr() == gradient_memory
    with update.at(-1.0):
        assert extra() - start == 2
    with update.direction() as direction:
        assert len(direction) == 1
        assert extra() - start == 2


def test_order_of_calls_is_explained() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match=r"parameters with gradients, got none: call backward\(\) before creating"):
        ParameterUpdate(optimizer)
    weight.sum().backward()
    update = ParameterUpdate(optimizer)
    for use in (lambda: update.descent, lambda: update.squared_norm, lambda: update.at(0.5).__enter__()):
        with pytest.raises(RuntimeError, match=r"not complete: call complete\(\) after optimizer.step\(\)"):
            use()
    update.complete()
    with pytest.raises(RuntimeError, match=r"got a second call: create one update for each step"):
        update.complete()
