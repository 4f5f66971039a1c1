"""When drawing ends: with the standard error of the value that is logged, quantity by quantity."""

from __future__ import annotations

import functools

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import BatchSharpnessMonitor
from tests.helpers.batch_sharpness import DRAWN, Dense, Run, estimate, fit, learner, loader, monitor
from tests.oracles.hessian_spectrum import Curvature

QUANTITIES = ("batch_sharpness", "modified_batch_sharpness", "ias", "gni")


@pytest.mark.parametrize(("least", "most"), [(4, 40), (10, 40), (4, 6), (5, 41)])
@pytest.mark.thinned(4)
def test_first_pair_after_which_the_error_is_small_enough(least: int, most: int) -> None:
    goal = 0.15
    follow = monitor(*QUANTITIES, min_batches=least, num_batches=most, relative_error=goal)
    run = fit(follow)
    ends = set()
    for step, row in run.rows.items():
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        batches = run.beside.draws(step, most + 1)
        for name in QUANTITIES:
            alone = 1 if "batch_sharpness" in name else 2  # batches of a draw
            for end in range(2, most + 2, 2):
                terms = dense.terms(name, batches[:end])
                assert len(terms) == end // alone
                value, error = estimate(terms) if end > 2 else (1.0, float("inf"))
                # Whole pairs: one more batch than an odd number.
                if (end >= least and error <= goal * abs(value)) or end >= most:
                    break
            assert row[f"{name}_batches"] == end, (step, name)
            ends.add(end)
    if most >= 40:
        assert len(ends) > 3
        assert min(ends) >= least
        assert any(least < end < most for end in ends)
    else:
        assert max(ends) == 6


@functools.cache
def ends(quantities: tuple[str, ...], count: int) -> Run:
    """A run of some quantities, made once."""
    return fit(monitor(*quantities, relative_error=0.1, batches_at_once=count))


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.thinned(6)
def test_each_quantity_by_itself(name: str, count: int) -> None:
    """Beside the others it is what it is alone: nobody draws on because somebody else has to."""
    alone, together = ends((name,), count), ends(DRAWN, count)
    assert list(alone.rows) == list(together.rows) == [0, 2]
    for step, row in alone.rows.items():
        for key in (name, f"{name}_stderr", f"{name}_batches"):
            # λ_max^b is searched for from the last batch's eigenvector in both.
            assert row[key] == together.rows[step][key], key


def hinge(z: Tensor, y: Tensor) -> Tensor:
    """Samples that have passed it have neither gradient nor Hessian."""
    return (F.relu(z.sum(dim=1) - y.to(z)) ** 2).mean()


@pytest.mark.parametrize("goal", [1e-9, 0.3])
@pytest.mark.thinned(2)
def test_batches_without_a_gradient_are_left_out_and_counted(goal: float) -> None:
    """Of single samples most have none: few that have one must not pass for many."""
    least, most = 4, 60
    options = {"relative_error": goal, "num_batches": most, "batch_size": 1, "every_n_train_steps": 1}
    found = fit(monitor("batch_sharpness", "modified_batch_sharpness", "ias", **options), learner(loss=hinge))
    counts, ends = [], []
    for step, row in found.rows.items():
        dense = Dense(Curvature(found.module.network, hinge, found.moment(step)))
        drawn = int(max(row[key] for key in row if key.endswith("_batches") and "zero" not in key))
        batches = found.beside.draws(step, drawn)
        empty = [not bool(dense.of(batch)[0].any()) for batch in batches]
        counts.append(sum(empty))
        assert row["zero_gradient_batches"] == sum(empty)
        for name in ("batch_sharpness", "modified_batch_sharpness", "ias"):
            end = int(row[f"{name}_batches"])
            ends.append(end)
            some = [batch for batch, none in zip(batches[:end], empty, strict=False) if not none]
            if name == "ias":
                terms = [(x, y) for x, y in dense.terms(name, batches[:end]) if y > 0.0]
                told = 2 * len(terms)
            else:
                terms, told = dense.terms(name, some), len(some)
            assert end == most or told >= least, name
            value, error = estimate(terms)
            assert row[name] == pytest.approx(value, rel=1e-10), name
            # Of two alike samples the roundings are all there is.
            assert row[f"{name}_stderr"] == pytest.approx(error, rel=1e-8, abs=1e-12 * value), name
    assert all(10 < count < most for count in counts)
    assert goal < 0.3 or any(end < most for end in ends)


def test_draws_that_are_all_zero_are_no_reason_to_stop() -> None:
    """A loss without curvature: that of another batch might have some."""
    module = learner(loss=lambda z, y: z.sum(dim=1).mean())
    module.network = nn.Linear(4, 3).double()
    run = fit(monitor("batch_sharpness", "ias", "gni"), module, max_steps=1)
    (row,) = run.rows.values()
    for name in ("batch_sharpness", "ias", "gni"):
        assert (row[name], row[f"{name}_stderr"], row[f"{name}_batches"]) == (0.0, 0.0, 24.0)


def test_defaults_stop_at_five_percent() -> None:
    follow = BatchSharpnessMonitor(every_n_train_steps=2, on_error="raise")
    assert follow.quantities == ("batch_sharpness",)
    run = fit(follow, data=loader(2))
    for row in run.rows.values():
        assert 16 <= row["batch_sharpness_batches"] <= 256
        assert row["batch_sharpness_stderr"] <= 0.05 * row["batch_sharpness"] or row["batch_sharpness_batches"] == 256
