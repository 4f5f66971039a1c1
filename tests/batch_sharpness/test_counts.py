"""What a measurement costs, counted at the network and at the products, and that other steps cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature.batch_sharpness.options import OF_UPDATES
from lightning_curvature.operators import GaussNewtonOperator, HessianOperator
from lightning_curvature.optimizers.trial_steps import TrialSteps
from lightning_curvature.replay.objective import StepObjective
from tests.helpers.batch_sharpness import BATCH, SAMPLES, counted, learner, loader, samples, sgd
from tests.helpers.batch_sharpness import monitor as of_values
from tests.helpers.counting import Reads
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp

STEPS, EVERY, DRAWS = 8, 3, 6
MEASURED = (0, 3, 6)
WHOLE = 4  # micro-batches of all samples: 4, 4, 4, 2
OWN, CROSS = ("batch_sharpness", "modified_batch_sharpness"), ("ias", "gni")


def monitor(*quantities: str, **options: Any) -> Any:
    """One mini-batch after the other; many at once are counted in ``test_sharpness_at_once.py``."""
    exactly = {"num_batches": DRAWS, "min_batches": DRAWS, "every_n_train_steps": EVERY, "batches_at_once": 1}
    return of_values(*quantities, **(exactly | options))


def fit(follow: Any, *callbacks: Any, module: Any = None, data: Any = None, **options: Any) -> Capture:
    capture = Capture()
    trainer = make_trainer(*callbacks, *([follow] if follow else []), logger=capture, **({"max_epochs": 2} | options))
    trainer.fit(module or learner(), data or loader())
    return capture


@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize(
    ("quantities", "products"),
    [
        (("batch_sharpness",), 1),
        (OWN, 1),
        (CROSS, 1),
        (("lambda_gen",), 1),
        (("update_sharpness",), 1),
        ((*OWN, *CROSS, *OF_UPDATES), 4),
    ],
)
def test_products_a_batch(
    quantities: Sequence[str], products: int, operator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trials = counted(monkeypatch, operator, "product_of"), counted(monkeypatch, TrialSteps, "update_for")
    fit(monitor(*quantities, curvature="hessian" if operator is HessianOperator else "gauss_newton"))
    assert len(made) == products * DRAWS * len(MEASURED)
    assert len(trials) == (DRAWS * len(MEASURED) if set(OF_UPDATES) & set(quantities) else 0)


def test_one_product_for_step_sharpness(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch, HessianOperator, "product_of")
    fit(monitor("step_sharpness", every_n_train_steps=1), accumulate_grad_batches=2)
    assert len(made) == 8  # of two micro-batches each


def test_no_more_products_than_a_quantity_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is known well enough is left alone, while another goes on. The micro-batch is the whole batch."""
    made = counted(monkeypatch, HessianOperator, "product_of")
    options = {"num_batches": 40, "min_batches": 4, "relative_error": 0.2}
    capture = fit(monitor("batch_sharpness", "gni", **options))
    counts = [capture.curve(f"curvature_diagnostics/{name}_batches") for name in ("batch_sharpness", "gni")]
    assert counts[0] != counts[1]
    assert len(made) == sum(map(sum, counts))


def test_about_eight_products_for_an_eigenvalue(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch, HessianOperator, "product_of")
    # Of 195 parameters: in up to 128 dimensions the search makes sure of the largest, by a dozen products.
    fit(monitor("lambda_max_b", tolerance=0.01), module=Classifier(mlp(4, 24, 3), sgd, F.cross_entropy))
    assert 5 <= len(made) / (DRAWS * len(MEASURED)) <= 10


@pytest.mark.parametrize("subset", [None, 9])
def test_samples_are_read_once_a_fit(subset: int | None) -> None:
    data = Reads()
    data.tensors = samples()
    fit(None, data=DataLoader(data, batch_size=BATCH))
    plain, Reads.count = Reads.count, 0
    follow = monitor("batch_sharpness", "gni", probe_samples=subset)
    for _ in range(2):
        fit(follow, data=DataLoader(data, batch_size=BATCH))
        assert Reads.count == plain + (subset or SAMPLES)
        Reads.count = 0
        assert follow._data is None  # let go of when training ends
    fit(monitor("step_sharpness"), data=DataLoader(data, batch_size=BATCH))
    assert Reads.count == plain  # that needs no others


def test_nothing_happens_on_other_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No state is saved, no batch is kept, nothing is written."""
    from lightning_curvature.monitors import step_calls

    entered: list[int] = []
    kept: list[int] = []
    untouched, copied = StepObjective.untouched, step_calls.copied
    monkeypatch.setattr(StepObjective, "untouched", lambda *args: entered.append(1) or untouched(*args))
    monkeypatch.setattr(step_calls, "copied", lambda batch: kept.append(1) or copied(batch))
    capture = fit(monitor("step_sharpness", "batch_sharpness"), accumulate_grad_batches=2, max_epochs=4)
    assert len(entered) == len(MEASURED)
    assert len(kept) == 2 * len(MEASURED)
    measured = [step for step, row in capture.rows.items() if any(key.startswith("curvature") for key in row)]
    assert tuple(measured) == MEASURED


def test_graphs_of_two_batches_at_most_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a pair; one where nothing is crossed."""
    from lightning_curvature.batch_sharpness import pairs as sharpness

    alive: set[int] = set()
    most: list[int] = [0]
    real = sharpness.MiniBatch

    class Watched(real):  # type: ignore[misc, valid-type]
        @property
        def gradient(self) -> Tensor:
            alive.add(id(self))
            most[0] = max(most[0], len(alive))
            return real.gradient.func(self)  # type: ignore[attr-defined]

        def close(self) -> None:
            alive.discard(id(self))
            super().close()

    monkeypatch.setattr(sharpness, "MiniBatch", Watched)
    for quantities, bound in ((("batch_sharpness",), 1), (("ias", "batch_sharpness"), 2)):
        most[0] = 0
        fit(monitor(*quantities))
        assert most[0] == bound
        assert alive == set()


def test_exact_products_take_the_whole_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward of all samples, whose graphs are kept; then for each pair one product of each vector with them."""
    made = counted(monkeypatch, HessianOperator, "product_of")
    fit(monitor("ias", "gni", full_hessian="exact", min_batches=DRAWS, num_batches=DRAWS))
    micro_batches = -(-SAMPLES // BATCH)
    assert len(made) == DRAWS * micro_batches * len(MEASURED)
