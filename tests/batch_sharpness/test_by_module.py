"""Terms of batch sharpness by module, against dense matrices of the very mini-batches that were drawn, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.batch_sharpness import EXACT, Dense, Run, fit, learner, monitor
from tests.helpers.counting import Passes
from tests.helpers.runs import rows
from tests.oracles.hessian_spectrum import Curvature

NAMES = ("network.0", "network.2")
SIZES = [4 * 3 + 3, 3 * 3 + 3]


def terms_of(run: Run, step: int) -> torch.Tensor:
    """g·(Hg)/‖g‖² of the parameters of both layers, of each mini-batch, (mini-batches, 2)."""
    dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
    batches = run.beside.draws(step, int(run.rows[step]["batch_sharpness_batches"]))
    found = [dense.of(batch) for batch in batches]
    return torch.stack([torch.stack([p.sum() for p in (g * (h @ g) / (g @ g)).split(SIZES)]) for g, h in found])


def by_module(run: Run) -> dict[int, dict[str, float]]:
    return rows(run.capture, "curvature_by_module")


@pytest.mark.parametrize("at_once", [1, 8])
def test_terms_add_up_to_batch_sharpness(at_once: int) -> None:
    follow = monitor("batch_sharpness", "ias", by_module=True, batches_at_once=at_once)
    run = fit(follow)
    assert ((follow._measurement.pairs_at_once or 1) > 1) == (at_once > 1)
    found = by_module(run)
    assert list(found) == [0, 2]
    for step, row in found.items():
        terms = terms_of(run, step)
        whole = run.rows[step]["batch_sharpness"]
        values = [row[f"batch_sharpness/{name}"] for name in NAMES]
        assert values == pytest.approx(terms.mean(0).tolist(), rel=0.0, abs=EXACT * whole)
        assert sum(values) == pytest.approx(whole, rel=1e-12)
        # Squares of terms are summed, whose rounding of 1e-16 each has a root of 1e-8.
        errors = terms.std(0) / len(terms) ** 0.5
        assert [row[f"batch_sharpness_stderr/{name}"] for name in NAMES] == pytest.approx(errors.tolist(), rel=1e-7)
        assert len(row) == 4
    assert follow.result is not None
    assert follow.result.modules is not None
    assert follow.result.modules.values() == row
    assert follow.charts(run.trainer)["curvature: batch_sharpness by module"] == [
        f"curvature_by_module/batch_sharpness/{name}" for name in NAMES
    ]


def test_no_pass_more_and_the_same_training() -> None:
    counts, trained, values = [], [], []
    for wanted in (False, True):
        module = learner()
        passes = Passes(module.network)
        run = fit(monitor("batch_sharpness", "gni", by_module=wanted), module, callbacks_before=[passes])
        counts.append((passes.forwards, passes.backwards))
        trained.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
        values.append(run.rows)
    assert counts[0] == counts[1]
    assert torch.equal(*trained)
    assert values[0] == values[1]


def test_without_a_gradient_there_are_no_terms() -> None:
    module = learner(loss=lambda z, y: F.cross_entropy(z, y) * 0.0)
    with pytest.warns(UserWarning, match="no mini-batch that was drawn has a gradient"):
        run = fit(monitor("batch_sharpness", by_module=1), module)
    found: list[Any] = list(by_module(run)[0].values())
    assert len(found) == 2
    assert all(value != value for value in found)


def test_it_needs_batch_sharpness() -> None:
    with pytest.raises(ValueError) as caught:
        monitor("ias", by_module=True)
    assert str(caught.value) == (
        "by_module must come with 'batch_sharpness', got True with ['ias']: add it, or leave by_module out."
    )
