"""BatchSharpnessMonitor against dense matrices in float64, for the very mini-batches that it draws."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_curvature.batch_sharpness.options import OF_UPDATES
from tests.helpers.batch_sharpness import DRAWN, fit, monitor, plain_run


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.thinned(4)
def test_exact_products_with_all_samples(kind: Any, size: int | None) -> None:
    """Batches are those of the pairs; each is multiplied with the matrix of all samples."""
    options: dict[str, Any] = {"curvature": kind, "micro_batch_size": size, "num_batches": 8}
    run = fit(monitor(full_hessian="exact", **options))
    run.check(kind, exact=True)
    pairs = fit(monitor(batches_at_once=1, **options))
    for step, row in run.rows.items():
        for name in ("ias", "gni", "lambda_gen"):
            assert abs(row[name] / pairs.rows[step][name] - 1.0) > 1e-3
        assert row["batch_sharpness"] == pairs.rows[step]["batch_sharpness"]


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.thinned(2)
def test_values_of_the_batches_drawn(kind: Any) -> None:
    # Labels are noise: H and G are far apart.
    run = plain_run(kind)
    assert list(run.rows) == [0, 2]
    run.check(kind)
    for row in run.rows.values():
        # None is a view of another, but of GNI and batch sharpness under SGD; they do not all stop together.
        values = [row[name] for name in DRAWN if name not in OF_UPDATES]
        assert all(abs(a / b - 1.0) > 1e-3 for i, a in enumerate(values) for b in values[:i])
        assert len({row[f"{name}_batches"] for name in DRAWN}) > 1
        assert row["zero_gradient_batches"] == 0.0


def test_the_other_matrix_would_not_have_passed() -> None:
    with pytest.raises(AssertionError):
        plain_run().check("gauss_newton", quantities=["ias"])
