"""The metrics that collect batches, against the dense matrix of all of them."""

import matplotlib
import pytest
import torch
import torch.nn.functional as F

from lightning_curvature.metrics import HessianDensity, HessianEigenvalues, HessianTrace
from tests.helpers.runs import mlp
from tests.helpers.spectrum_metrics import dense, ragged

# Residuals are below 1e-9 relative to the eigenvalue, in float64; the eigenvalue is within its residual.
TIGHT = {"tolerance": 1e-9}


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_eigenvalues_of_all_batches(curvature: str) -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metric = HessianEigenvalues(network, F.cross_entropy, k=3, curvature=curvature, **TIGHT)  # type: ignore[arg-type]
    for x, y in batches:
        metric.update(x, y)
    expected = torch.linalg.eigvalsh(dense(network, batches, curvature == "gauss_newton")).flip(0)[:3]
    torch.testing.assert_close(metric.compute(), expected, rtol=2e-9, atol=0.0)
    assert metric.pairs is not None
    assert all(metric.pairs.converged)


def test_reset_forgets_the_data_and_keeps_the_vectors() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metric = HessianEigenvalues(network, F.cross_entropy, **TIGHT)  # type: ignore[arg-type]
    metric.update(*batches[0])
    metric.compute()
    cold = metric.pairs
    metric.reset()
    metric.update(*batches[1])
    expected = torch.linalg.eigvalsh(dense(network, batches[1:]))[-1]
    torch.testing.assert_close(metric.compute(), expected, rtol=2e-9, atol=0.0)
    metric.reset()
    metric.update(*batches[0])
    metric.compute()
    metric.reset()
    metric.update(*batches[0])
    metric.compute()
    # The same data twice: the second search begins where it ends.
    assert cold is not None
    assert metric.pairs is not None
    assert metric.pairs.matvecs == 1 < cold.matvecs


def test_trace() -> None:
    network, batches = mlp(4, 5, 3), ragged()
    metric = HessianTrace(network, F.cross_entropy, relative_error=0.06)
    for x, y in batches:
        metric.update(x, y)
    value = float(metric.compute())
    assert metric.estimate is not None
    # Products of some hundred roundings of 1e-16 each.
    expected = float(dense(network, batches).trace())
    assert abs(value - expected) <= 3.0 * metric.estimate.standard_error + 1e-13 * expected
    assert metric.estimate.standard_error <= 0.06 * abs(value)


def test_density() -> None:
    matplotlib.use("agg")
    network, batches = mlp(3, 2), [(x[:, :3], y % 2) for x, y in ragged()]
    # As many steps as parameters: every start finds all eigenvalues, and their mean is within its scatter.
    metric = HessianDensity(network, F.cross_entropy, starts=20, steps=8)
    for x, y in batches:
        metric.update(x, y)
    places, values = metric.compute()
    assert metric.density is not None
    # 1,200 points on Gaussians that are many spacings wide.
    assert float(torch.trapezoid(values, places)) == pytest.approx(1.0, abs=1e-3)
    matrix = dense(network, batches)
    for power in (1, 2):
        truth = float(torch.linalg.matrix_power(matrix, power).trace()) / len(matrix)
        assert abs(metric.density.moment(power) - truth) <= 4.0 * metric.density.moment_error(power)
    figure, axes = metric.plot()
    assert axes.get_yscale() == "log"
    assert axes.figure is figure


def test_compute_without_a_batch() -> None:
    metric = HessianEigenvalues(mlp(4, 5, 3), F.cross_entropy)
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match=r"batches must be a non-empty sequence of pairs, got \[\]: give a list"),
    ):
        metric.compute()


def test_a_trace_that_is_not_known_well_enough_is_said() -> None:
    """The trace of a linear map's outer products of either sign: far smaller than its eigenvalues."""
    network, batches = mlp(4, 24, 3), ragged()
    metric = HessianTrace(network, F.cross_entropy, relative_error=1e-4, max_matvecs=20)
    for x, y in batches:
        metric.update(x, y)
    sentence = r"^the trace must be known to 0\.0001 of its value, got .* after 20 products: raise max_matvecs"
    with pytest.warns(UserWarning, match=sentence):
        metric.compute()
    metric = HessianTrace(network, F.cross_entropy, relative_error=1e-4, max_matvecs=250)
    for x, y in batches:
        metric.update(x, y)
    # Complete: of 195 parameters, with some hundred roundings of 1e-16 each.
    expected = float(dense(network, batches).trace())
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
    assert metric.estimate is not None
    assert metric.estimate.converged
    assert metric.estimate.matvecs < 250
