"""Compiled modules: values of the eager run, the same run as without a monitor, no compilation at each probe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_curvature import CurvatureWarning
from tests.compatibility.monitors import MONITORS
from tests.helpers.manual import Manual, momentum
from tests.helpers.runs import Batch, Classifier, MakeOptimizer, classification, mlp, rows, run
from tests.helpers.witness import ALL, FORWARD_ONLY, LAMBDAS, Record, Witness, assert_same, copies, watch
from tests.oracles.along_step import DIFFERENCE, EXACT, monitors

# BatchNorm couples samples; and torch's counter of operations hooks modules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:BatchNorm in training mode"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks"),
    pytest.mark.filterwarnings("ignore:the loss is not the mean categorical"),
]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.05)


def whole(module: Classifier, backend: Any) -> Any:
    """What the guide of Lightning shows: forward and the steps, each one graph where it has no breaks."""
    return torch.compile(module, backend=backend)


def in_place(module: Classifier, backend: Any) -> Any:
    module.compile(backend=backend)
    return module


def submodule(module: Classifier, backend: Any) -> Any:
    module.network = torch.compile(module.network, backend=backend)  # type: ignore[assignment]
    return module


def submodule_in_place(module: Classifier, backend: Any) -> Any:
    module.network.compile(backend=backend)
    return module


Way = Callable[[Classifier, Any], Any]
WAYS: dict[str, Way] = {way.__name__: way for way in (whole, in_place, submodule, submodule_in_place)}


class Quiet(Classifier):
    """Without logs, each of which breaks a graph in two and takes seconds to trace."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def network() -> nn.Module:
    """Draws random numbers, and moves statistics."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(pl.Callback):
    """Notes how many graphs had been compiled when each batch ended, before the monitor looks at that end."""

    def __init__(self, counter: Any) -> None:
        self.counter, self.counts = counter, list[int]()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(self.counter.frame_count)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(self.counter.frame_count)


def fit(
    way: Way | None,
    monitor: pl.Callback | None,
    steps: int = 3,
    kind: type[Classifier] = Quiet,
    backend: str = "aot_eager",
) -> tuple[Record, list[int]]:
    """A run, and how many graphs had been compiled by each batch. These backends ask for no C++ compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    graphs = Graphs(counter)

    def make() -> Any:
        module = kind(network(), adam)
        return module if way is None else way(module, counter)

    record = watch(make, lambda: copies(classification(steps)), monitor, lambda: [graphs])
    assert (counter.frame_count > 0) == (way is not None)
    assert graphs.counts[-1] == counter.frame_count
    return record, graphs.counts


alone = functools.cache(lambda way: fit(WAYS[way], None))
eager = functools.cache(lambda name: fit(None, MONITORS[name].thorough(every_n_train_steps=2))[0])
# Compiling takes most of the time: the values and the graphs of one run are looked at by two tests.
compiled = functools.cache(lambda way, name: fit(WAYS[way], MONITORS[name].thorough(every_n_train_steps=2)))

# Errors of values, and how far the search for an eigenvalue got: not themselves known to many digits.
ROUGH = ("_error", "_stderr", "epsilon", "_upper")
ALONG_DIFFERENCES = ("lambda_fd", "lambda_kl", "critical_sharpness")


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.thinned(13)
def test_values_and_run(way: str, name: str) -> None:
    """Operations in another order: a value is as far from the eager run's as each of them may be from the truth."""
    watched, _ = compiled(way, name)
    assert_same(alone(way)[0], watched)
    found, expected = rows(watched.logger), rows(eager(name).logger)
    assert list(found) == list(expected) == [0, 2]
    for step, row in found.items():
        assert row.keys() == expected[step].keys()
        for key in (key for key in row if not key.endswith(ROUGH)):
            tolerance = DIFFERENCE if key in ALONG_DIFFERENCES else EXACT
            assert row[key] == pytest.approx(expected[step][key], rel=tolerance, nan_ok=True), key
    words = ("lambda", "sharpness", "delta", "noise")
    values = [value for key, value in row.items() if any(word in key for word in words)]
    assert sum(math.isfinite(value) for value in values) > len(values) / 2


# A graph of the run's own steps, one for those whose outputs are watched, one without gradients.
GRAPHS = 3


@pytest.mark.parametrize("outputs", [None, "network"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.thinned(7)
def test_forward_only_probes_compile_once(way: str, outputs: str | None) -> None:
    def graphs(steps: int, estimators: Any) -> list[int]:
        monitor = MONITORS["directional"].make(every_n_train_steps=2, estimators=estimators, outputs=outputs)
        record, counts = fit(WAYS[way], monitor, steps, backend="eager")
        assert len(record.curve("lambda_kl")) == (steps + 1) // 2
        assert all(math.isfinite(value) for value in record.curve("lambda_kl"))
        return counts

    counts = graphs(9, FORWARD_ONLY)
    # By the end of the fourth batch: those of the probes of steps 0 and 2. Three more probes compile nothing.
    few = counts[3]
    assert 2 <= few <= GRAPHS
    assert counts[-1] == few
    # What is not compiled does not count here: the exact products, by the eager module, add nothing.
    assert graphs(3, ALL)[-1] == few


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["spectrum", "sharpness", "stabilization", "noise"])
def test_exact_products_compile_nothing(name: str, way: str) -> None:
    assert compiled(way, name)[1][-1] == alone(way)[1][-1]


class ByHand(Manual):
    def __init__(self, network: nn.Module, make: MakeOptimizer) -> None:
        super().__init__(network, momentum)  # Adam's step takes three times as long to compile


by_hand = functools.cache(lambda: fit(whole, None, 3, ByHand, "eager"))


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.slow
def test_steps_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's step is compiled with the module, and all that it calls: the hooks of callbacks, once."""
    # Those of the test are not the monitor's, and are many.
    monkeypatch.setattr(Witness, "note", torch.compiler.disable(Witness.note))
    follow = functools.partial(MONITORS[name].thorough, every_n_train_steps=2)
    steps = 7 if name == "directional" else 3
    watched, counts = fit(whole, follow(), steps, ByHand, "eager")
    plain, graphs = by_hand() if steps == 3 else fit(whole, None, steps, ByHand, "eager")
    assert_same(plain, watched)
    # Compiled for this backend, operations are the same ones in the same order.
    assert str(rows(watched.logger)) == str(rows(fit(None, follow(), steps, ByHand)[0].logger))
    if name == "directional":
        # Two probes compile what they need, two more nothing.
        assert counts[-1] == counts[3]
    else:
        assert counts[-1] == graphs[-1]


class Otherwise(Quiet):
    """Computes something else where it is compiled, as dropout does that draws its masks in compiled kernels."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return 1.01 * loss if torch.compiler.is_compiling() else loss


@pytest.mark.parametrize("estimator", ["hvp", "gauss_newton"])
@pytest.mark.thinned(2)
def test_exact_products_of_another_loss_are_refused(estimator: str) -> None:
    estimators = ("kl", "finite_difference", estimator)
    monitor = MONITORS["directional"].make(every_n_train_steps=2, estimators=estimators, on_error="warn")
    with pytest.warns(CurvatureWarning, match=r"step must have the loss it had.*fallback_random = True"):
        watched, _ = fit(whole, monitor, kind=Otherwise)
    assert all(math.isnan(value) for value in watched.curve(LAMBDAS[estimator]))
    assert all(math.isfinite(value) for value in watched.curve("lambda_fd"))


def squared_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return (z.softmax(-1) - nn.functional.one_hot(y, 3)).square().sum(-1).mean()


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, squared_probabilities])
@pytest.mark.parametrize("whole_step", [True, False])
def test_values_through_a_likelihood_and_through_a_head(whole_step: bool, loss: Any) -> None:
    """Also of layers compiled by themselves, the table of whose parameters torch holds elsewhere too."""

    def values(compiling: bool) -> list[dict[str, float]]:
        torch._dynamo.reset()
        layers = mlp(4, 5, 3)
        if compiling and not whole_step:
            layers = nn.Sequential(*(torch.compile(layer, backend="eager") for layer in layers))
        module: Any = Quiet(layers, momentum, loss)
        module = torch.compile(module, backend="eager") if compiling and whole_step else module
        outcome = run(module, classification(3), *monitors())
        return [row for prefix in ("curvature", "pair") for row in rows(outcome.capture, prefix).values()]

    for compiled_row, eager_row in zip(values(True), values(False), strict=True):
        for key in LAMBDAS.values():
            if key in eager_row:
                tolerance = EXACT if key in ("lambda_dir", "lambda_gn") else DIFFERENCE
                assert compiled_row[key] == pytest.approx(eager_row[key], rel=tolerance, nan_ok=True), key
