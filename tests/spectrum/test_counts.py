"""What a measurement costs, counted at the network and at the products, and that other steps cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from lightning_curvature.linalg.krylov import KrylovSpace
from lightning_curvature.operators import graphs
from lightning_curvature.replay.objective import StepObjective
from lightning_curvature.spectrum import measurement
from tests.helpers.counting import Passes, Reads
from tests.helpers.runs import GROUPS, Capture, Classifier, make_trainer, mlp
from tests.helpers.spectrum import BATCH, SAMPLES, samples

MICRO = 4  # 8 + 8 + 8 + 6
STEPS, EVERY = 8, 3
MEASURED = (0, 3, 6)


class Products(pl.Callback):
    """Counts the products of each measured step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        step = KrylovSpace.step

        def counted(space: KrylovSpace) -> None:
            self.counts[-1] += 1
            step(space)

        patch.setattr(KrylovSpace, "step", counted)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in MEASURED:
            self.counts.append(0)


def fit(
    *callbacks: Any, follow: HessianSpectrumMonitor | None, module: Any = None, data: Any = None, **options: Any
) -> Capture:
    capture = Capture()
    module = module or learner()
    data = data or DataLoader(TensorDataset(*samples()), batch_size=BATCH, shuffle=True)
    trainer = make_trainer(*callbacks, *([follow] if follow else []), logger=capture, **({"max_epochs": 2} | options))
    trainer.fit(module, data)
    return capture


def learner() -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.2))


def monitor(*quantities: str, **options: Any) -> HessianSpectrumMonitor:
    given: Any = quantities or ("lambda_max",)
    return HessianSpectrumMonitor(
        **({"quantities": given, "every_n_train_steps": EVERY, "on_error": "raise"} | options)
    )


def expected(extra: int) -> list[int]:
    """Forwards of each step; before the first measurement the step is repeated once to check it."""
    return [1 + (extra if step in MEASURED else 0) + (step == MEASURED[0]) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("quantities", "operators"),
    [
        (("lambda_max",), 1),
        (("lambda_max", "lambda_min", "hessian_trace", "spectral_density"), 1),  # of one Hessian
        (("gauss_newton_lambda_max",), 1),
        (("preconditioned_lambda_max",), 1),
        (("second_moment_contraction",), 1),
        (("lambda_max", "gauss_newton_lambda_max", "preconditioned_lambda_max"), 3),
    ],
)
@pytest.mark.thinned(6)
def test_one_forward_of_each_micro_batch_and_operator(quantities: Any, operators: int) -> None:
    """With kept graphs, however many products there are."""
    module = learner()
    passes = Passes(module.network)
    fit(passes, follow=monitor(*quantities, keep_graph=True, tolerance=1e-8), module=module)
    assert passes.forwards == expected(MICRO * operators)


def test_graphs_are_kept_within_half_of_the_free_memory_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four graphs some: the values are the same to the last bit, and only the others are built again."""
    said: list[str] = []
    monkeypatch.setattr(measurement, "inform", said.append)
    whole = fit(follow=monitor(keep_graph=True))
    module = learner()
    passes, products = Passes(module.network), Products(monkeypatch)
    # With the first, of 2,080 bytes, four times as much is free: two of them fit into half of it.
    monkeypatch.setattr(graphs, "available_memory", lambda device, processes: 3 * 2080)
    capture = fit(passes, products, follow=monitor(), module=module)
    keys = [key for key in whole.rows[0] if key.startswith(GROUPS)]
    assert [[capture.rows[step][key] for key in keys] for step in MEASURED] == [
        [whole.rows[step][key] for key in keys] for step in MEASURED
    ]
    (sentence,) = said
    assert sentence.startswith("keep_graph='auto' keeps the gradient graphs of 2 of 4 micro-batches, 0 MiB within half")
    extra = [passes.forwards[step] - 1 - (step == MEASURED[0]) for step in MEASURED]
    assert extra == [2 + 2 * count for count in products.counts]


def test_one_forward_a_product_without_kept_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = learner()
    passes, products = Passes(module.network), Products(monkeypatch)
    fit(passes, products, follow=monitor(keep_graph=False), module=module)
    extra = [passes.forwards[step] - 1 - (step == MEASURED[0]) for step in MEASURED]
    assert extra == [MICRO * count for count in products.counts]
    assert [passes.forwards[step] for step in range(STEPS) if step not in MEASURED] == [1] * 5


def test_two_forwards_and_backwards_a_product_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    module = learner()
    passes, products = Passes(module.network), Products(monkeypatch)
    fit(passes, products, follow=monitor(products="difference"), module=module)
    for step, count in zip(MEASURED, products.counts, strict=True):
        first = step == MEASURED[0]
        # One more for the error of λ_max; before the first one seven measure the distance, and a forward of each
        # micro-batch looks for kinks: there are none. The step is checked once.
        assert passes.backwards[step] == 1 + 2 * MICRO * (count + 1 + 7 * first)
        assert passes.forwards[step] == passes.backwards[step] + (MICRO + 1) * first


def test_a_product_is_two_more_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs: one for the gradient of each micro-batch, then one along its double backward."""
    module = learner()
    passes, products = Passes(module.network), Products(monkeypatch)
    fit(passes, products, follow=monitor(keep_graph=True), module=module)
    for step, count in zip(MEASURED, products.counts, strict=True):
        assert passes.backwards[step] == 1 + MICRO * (1 + count)


def test_warm_searches_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small learning rate the eigenvectors of the step before are nearly those of this one."""

    def counts(forget: bool) -> list[int]:
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=1e-4))

        class Forgets(pl.Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                if forget:
                    follow._measurement.trackers = {}

        follow = monitor(tolerance=1e-3)
        with monkeypatch.context() as patch:
            products = Products(patch)
            fit(products, Forgets(), follow=follow, module=module)
        return products.counts

    warm, cold = counts(forget=False), counts(forget=True)
    assert warm[0] == cold[0]
    assert len(warm) == len(MEASURED)
    # And the gradient's graph.
    assert all(later <= 2 < first for later, first in zip(warm[1:], cold[1:], strict=True))


def test_products_end_at_their_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products(monkeypatch)
    capture = fit(products, follow=monitor(tolerance=1e-12, max_products=20, k=3))
    assert products.counts == [20] * len(MEASURED)
    assert capture.curve("curvature_diagnostics/lambda_3_converged") == [0.0] * len(MEASURED)


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for pair in zip(*samples(), strict=True):
            self.count += 1
            yield pair


@pytest.mark.parametrize("subset", [None, 12])
def test_probe_set_is_read_once_a_fit(subset: int | None) -> None:
    data = Reads()
    fit(follow=None, data=DataLoader(data, batch_size=BATCH))
    plain, Reads.count = Reads.count, 0
    follow = monitor(probe_samples=subset)
    for _ in range(2):
        fit(follow=follow, data=DataLoader(data, batch_size=BATCH))
        assert Reads.count == plain + (subset or SAMPLES)
        Reads.count = 0
        assert follow._data is None  # let go of when training ends


def test_nothing_happens_on_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No state is saved, no data looked at, nothing is written."""

    entered: list[int] = []
    untouched = StepObjective.untouched
    monkeypatch.setattr(StepObjective, "untouched", lambda *args: entered.append(1) or untouched(*args))
    capture = fit(follow=monitor())
    assert len(entered) == len(MEASURED)
    measured = [step for step, row in capture.rows.items() if any(key.startswith("curvature") for key in row)]
    assert tuple(measured) == MEASURED


def test_accumulation_is_measured_at_the_start_of_its_window() -> None:
    module = learner()
    passes = Passes(module.network)
    follow = monitor(every_n_train_steps=1)
    fit(passes, follow=follow, module=module, accumulate_grad_batches=2)
    # Batches 0, 2, 4 and 6 begin a step.
    assert passes.forwards == [2 + MICRO, 1, *[1 + MICRO, 1] * 3]
