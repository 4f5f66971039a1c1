"""Measures the cost of one product: in forward+backwards, and against the number of parameters and of samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from spectrum_nets import Net, Rows
from spectrum_tools import KeepGraph
from timing import Clock, Spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import _example

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import GaussNewtonOperator, GradientDifferenceOperator, HessianOperator

# Vectors multiplied at once by ``is_grads_batched``.
_BATCHED = 4
_MLP_INPUTS, _MLP_CLASSES, _MLP_DEPTH = 64, 10, 4

Action = Callable[[], object]


def mlp_net(parameters: int, samples: int, micro_batch: int, device: torch.device) -> Net:
    """An MLP of about so many parameters on random data."""
    # (depth − 1) w² + (inputs + classes + depth) w + classes parameters
    a, b = _MLP_DEPTH - 1, _MLP_INPUTS + _MLP_CLASSES + _MLP_DEPTH
    width = round((math.sqrt(b * b + 4 * a * (parameters - _MLP_CLASSES)) - b) / (2 * a))
    torch.manual_seed(0)
    network = _example("models").MLP(in_features=_MLP_INPUTS, width=width, depth=_MLP_DEPTH).to(device)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, _MLP_INPUTS, generator=g), torch.randint(_MLP_CLASSES, (samples,), generator=g)
    batches = list(zip(x.to(device).split(micro_batch), y.to(device).split(micro_batch), strict=True))
    count = sum(p.numel() for p in network.parameters())
    return Net(f"MLP, {count:,} parameters", Rows(network), batches)


def part(net: Net, count: int = 2) -> Net:
    """The first micro-batches: the cost of each is the same. Two, since a single graph is kept in any case."""
    return Net(net.title, net.rows, net.batches[:count])


def _forward_backward(net: Net) -> None:
    for x, y in net.batches:
        torch.autograd.grad(F.cross_entropy(net.rows(x), y), net.parameters)


def vector_of(net: Net) -> Tensor:
    """A random unit vector."""
    space = VectorSpace(net.parameters)
    vector = space.random(torch.Generator(net.device).manual_seed(0))
    return vector / space.norm(vector)


def hessian_of(net: Net, keep_graph: KeepGraph) -> HessianOperator:
    """The operator of this package."""
    operator = HessianOperator.of(net.rows, F.cross_entropy, net.batches, keep_graph=keep_graph)
    assert isinstance(operator, HessianOperator)
    return operator


def in_turns(clock: Clock, actions: dict[str, Action], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            start = clock.now()
            action()
            if turn:
                seconds[name].append(clock.now() - start)
    return seconds


def cheapest_product(net: Net, clock: Clock, repeats: int = 5) -> float:
    """Seconds of a product with all samples where every graph is kept, from its first two micro-batches."""
    few = part(net)
    operator, vector = hessian_of(few, True), vector_of(net)
    seconds = median(in_turns(clock, {"": lambda: operator(vector)}, repeats)[""])
    operator.close()
    return seconds * net.samples / few.samples


def _batched_product(net: Net) -> Action:
    graphs = []
    for x, y in net.batches:
        with sdpa_kernel(SDPBackend.MATH):
            graphs.append(torch.autograd.grad(F.cross_entropy(net.rows(x), y), net.parameters, create_graph=True))
    vectors = [torch.stack(_BATCHED * [view]) for view in VectorSpace(net.parameters).views(vector_of(net))]

    def product() -> None:
        for gradients in graphs:
            torch.autograd.grad(gradients, net.parameters, vectors, is_grads_batched=True, retain_graph=True)

    return product


PRODUCT_LEGEND = f"""\
One product with two micro-batches of the data, in forward+backwards of the same data in the network's own kernels,
timed in turns; median of the ratios [quartiles]. *{_BATCHED} at once*: `is_grads_batched` on kept graphs, time per
vector.
"""


def products(nets: Sequence[Net], clock: Clock, repeats: int) -> list[str]:
    """Table of the cost of one product."""
    columns = ["kept graph", "not kept", "Gauss–Newton, kept", "difference of gradients", f"{_BATCHED} at once"]
    lines = [f"| network | forward+backward, ms | {' | '.join(columns)} |", f"|{(2 + len(columns)) * '---|'}"]
    for net in map(part, nets):
        vector = vector_of(net)
        of = (net.rows, F.cross_entropy, net.batches)
        operators = [
            HessianOperator.of(*of, keep_graph=True),
            HessianOperator.of(*of, keep_graph=False),
            GaussNewtonOperator.of(*of, keep_graph=True),
            # On a copy: it moves the parameters in place, and kept graphs do not outlive that.
            GradientDifferenceOperator.of(copy.deepcopy(net.rows), *of[1:]),
        ]
        actions: dict[str, Action] = {"plain": lambda net=net: _forward_backward(net)}  # type: ignore[misc]
        for name, operator in zip(columns, operators, strict=False):
            actions[name] = lambda operator=operator, vector=vector: operator(vector)  # type: ignore[misc]
        note = ""
        try:
            batched = _batched_product(net)
            batched()
            actions[columns[-1]] = batched
        except RuntimeError as error:
            note = f"fails: {str(error).splitlines()[0][:60]}"
        seconds = in_turns(clock, actions, repeats)
        plain = seconds["plain"]
        cells = []
        for name in columns:
            share = 1 / _BATCHED if name == columns[-1] else 1.0
            ratios = [share * s / p for s, p in zip(seconds.get(name, []), plain, strict=False)]
            spread = Spread.of(ratios) if ratios else None
            cells.append(f"{spread.middle:.2f} [{spread.low:.2f}, {spread.high:.2f}]" if spread else note)
        lines.append(f"| {net.title} | {1e3 * median(plain):.1f} | {' | '.join(cells)} |")
        for operator in operators:
            operator.close()
    return lines


LINEAR_LEGEND = """\
Seconds of one product with all samples, with and without kept graphs, median, and the same in forward+backwards. A
least-squares fit over the rows gives the exponent p of seconds ∝ sizeᵖ: 1 is linear; below 1 a part of the work does
not grow with the size.
"""


def _exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def linear(clock: Clock, parameters: Sequence[int], samples: int, micro_batch: int, repeats: int) -> list[str]:
    """Two tables: against the number of parameters, and of samples."""
    middle = parameters[len(parameters) // 2]
    several = [samples // 4, samples // 2, samples, 2 * samples]
    lines = []
    for title, cases in (
        (f"{samples} samples", [(count, samples) for count in parameters]),
        (f"{middle:,} parameters", [(middle, n) for n in several]),
    ):
        lines += [
            f"MLP, {title}, micro-batches of {micro_batch}:",
            "",
            "| parameters | samples | kept, s | in forward+backwards | not kept, s | in forward+backwards |",
            "|---|---|---|---|---|---|",
        ]
        sizes, kept, dropped = [], [], []
        for count, n in cases:
            net = mlp_net(count, n, micro_batch, clock.device)
            operators = hessian_of(net, True), hessian_of(net, False)
            vector = vector_of(net)
            actions: dict[str, Action] = {"plain": lambda net=net: _forward_backward(net)}  # type: ignore[misc]
            for name, operator in zip(("kept", "dropped"), operators, strict=True):
                actions[name] = lambda operator=operator, vector=vector: operator(vector)  # type: ignore[misc]
            took = {name: median(seconds) for name, seconds in in_turns(clock, actions, repeats).items()}
            for operator in operators:
                operator.close()
            exact = sum(p.numel() for p in net.parameters)
            sizes.append(exact if title.endswith("samples") else n)
            kept.append(took["kept"])
            dropped.append(took["dropped"])
            lines.append(
                f"| {exact:,} | {n} | {took['kept']:.4f} | {took['kept'] / took['plain']:.2f} | "
                f"{took['dropped']:.4f} | {took['dropped'] / took['plain']:.2f} |"
            )
        lines += [
            "",
            f"Exponent: {_exponent(sizes, kept):.2f} with kept graphs, {_exponent(sizes, dropped):.2f} without.",
            "",
        ]
    return lines
