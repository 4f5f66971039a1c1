"""What a measurement of the noise covariance costs: forwards, products, eigenvalue problems, and what is held."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.functional.noise import KroneckerSum
from lightning_curvature.noise.options import QUANTITIES
from tests.helpers.counting import out_of_reach
from tests.helpers.noise import BATCH, module_of, monitor, network, samples
from tests.helpers.runs import Classifier, make_trainer
from tests.helpers.setups import sgd

MICRO = 3  # micro-batches


class Counted(Classifier):
    """Counts its steps: those of single samples apart, and those without gradients."""

    def __init__(self) -> None:
        super().__init__(network(), sgd)
        notes = out_of_reach([])
        self.note, self.steps = lambda kind: notes().append(kind), lambda: Counter(notes())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        single = len(batch[1]) == 1
        self.note("single" if single else "with graph" if torch.is_grad_enabled() else "without")
        return super().training_step(batch, batch_idx)


def measured(name: str, **options: Any) -> Counter[str]:
    module = Counted()
    monitor(name, **options).evaluate(module, DataLoader(samples(), batch_size=BATCH), trainer=make_trainer())
    return module.steps()


def test_forwards() -> None:
    """Of a micro-batch one with its graph, and one of its single samples, at once; a few more to see which way to go.

    The first batch is looked at once more with and once without a graph, and a sample twice to check the step.
    """
    found = measured("0.weight")
    assert found["with graph"] == MICRO + 1
    assert found["without"] == 1
    # All samples at once without gradients, one of a sample alone, and the mean.
    assert found["single"] == MICRO + 3 + 2
    assert measured("0.weight", quantities=QUANTITIES, micro_batch_size=BATCH) == found
    general = measured("0.bias", quantities=("noise_gamma",))
    # Gradients of the samples, and the mean with its graph; whether it is the mean of theirs.
    assert general["with graph"] == MICRO
    assert general["without"] == MICRO
    assert general["single"] == 2 * MICRO + 3 + 2
    # Once more through all samples for their products.
    assert measured("0.bias")["single"] == general["single"] + MICRO


@pytest.mark.parametrize(("name", "outputs"), [("0.weight", 5), ("2.weight", 3)])
def test_backwards_through_what_comes_after_the_layer(name: str, outputs: int, monkeypatch: Any) -> None:
    """One for the gradient, and one for each output, at once; none through what comes before."""
    rows: list[int] = []
    real = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        batched = options.get("is_grads_batched", False)
        rows.append(len(grad_outputs[0]) if batched else 1)
        return real(outputs, inputs, grad_outputs, **options)

    follow = monitor(name)
    module = module_of(network())
    loader = DataLoader(samples(), batch_size=BATCH)
    monkeypatch.setattr(torch.autograd, "grad", counted)
    follow.evaluate(module, loader, trainer=make_trainer())
    # The first batch is differentiated once more to compare, with a gradient and a product.
    assert sum(rows) == (MICRO + 1) * (1 + outputs) + 2


def test_eigenvalue_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of D × D; small ones of the chain alone."""
    shapes: list[tuple[int, ...]] = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: shapes.append(tuple(a.shape)) or real(a))
    measured("0.weight")
    assert shapes == [(20, 20)]
    shapes.clear()
    measured("0.weight", quantities=QUANTITIES)
    assert shapes.count((20, 20)) == 1
    assert {shape[1:] for shape in shapes if len(shape) == 3} == {(5, 5)}
    shapes.clear()
    measured("0.bias")
    assert shapes == [(5, 5)]


class Largest(TorchDispatchMode):
    """Notes the sizes of all tensors that come about."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and "expand" not in str(func):
            self.numbers = max(self.numbers, found.numel())
        return found


def test_no_matrix_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor is that of some D × D matrices, however many samples there are."""
    # No blocks of out × out numbers wait for others, of which there are up to 32 MB.
    monkeypatch.setattr(KroneckerSum, "_MOST", 1)
    sizes = []
    for count in (8, 64, 256):
        torch.manual_seed(0)
        module = module_of(nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double())
        with Largest() as seen:
            monitor("0.weight", micro_batch_size=16).evaluate(
                module, DataLoader(samples(count), batch_size=16), trainer=make_trainer()
            )
        sizes.append(seen.numbers)
    # g gᵀ, h and h², D = 48.
    assert sizes == [3 * 48**2] * 3
    # A Hessian of each sample would be more.
    assert sizes[0] < 16 * 48**2


def test_steps_that_are_not_measured_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_at: list[int] = []

    class Noting(NoiseCovarianceMonitor):
        def _measure_now(self, trainer: Any, *args: Any) -> None:
            measured_at.append(trainer.global_step)
            super()._measure_now(trainer, *args)

    module = Counted()
    follow = Noting(parameter="network.0.weight", at_steps=(4,), at_end=False, on_error="raise")
    make_trainer(follow, max_epochs=3).fit(module, DataLoader(samples(), batch_size=BATCH))
    assert measured_at == [4]
    assert module.steps().total() == 3 * MICRO + measured("0.weight").total()
