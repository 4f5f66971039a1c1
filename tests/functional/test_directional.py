"""Ratios of second-order to first-order change: on functions whose derivatives are known in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional import (
    critical_sharpness,
    directional_curvature,
    finite_difference_curvature,
    finite_difference_descent,
    finite_difference_quadratic,
    gauss_newton_curvature,
    headroom,
    kl_curvature,
)

U64 = 2.0**-53


def _quadratic() -> tuple[Tensor, Tensor, Tensor]:
    """Hessian, gradient and step of gradient descent on a random quadratic, η = 0.1."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=g).double()
    h, gradient = root @ root.T, torch.randn(5, generator=g).double()
    return h, gradient, 0.1 * gradient


def _losses(epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses at θ + εd, θ, θ − εd of that quadratic, with a constant of 1."""
    h, gradient, d = _quadratic()
    return tuple(1.0 + gradient @ s + 0.5 * s @ h @ s for s in (epsilon * d, 0 * d, -epsilon * d))  # type: ignore[return-value]


def test_gradient_descent_on_a_quadratic() -> None:
    h, gradient, d = _quadratic()
    rayleigh = (gradient @ h @ gradient / (gradient @ gradient)).item()
    value = directional_curvature(d @ h @ d, gradient @ d, lr=0.1)
    # Two dozen float64 operations.
    assert value.item() == pytest.approx(rayleigh, rel=50 * U64)
    assert directional_curvature(d @ h @ d, gradient @ d).item() == pytest.approx(0.1 * rayleigh, rel=50 * U64)


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 8.0])
def test_second_differences_of_a_quadratic_are_exact(epsilon: float) -> None:
    h, gradient, d = _quadratic()
    plus, base, minus = _losses(epsilon)
    # Losses of the size of the largest one, a dozen operations each, divided by the signal ε²dᵀHd or 2ε gᵀd.
    noise = 30 * U64 * max(plus.abs().item(), minus.abs().item(), 1.0)
    quadratic, descent = (d @ h @ d).item(), (gradient @ d).item()
    found = finite_difference_quadratic(plus, base, minus, epsilon).item()
    slope = finite_difference_descent(plus, minus, epsilon).item()
    ratio = finite_difference_curvature(plus, base, minus, epsilon, lr=0.1).item()
    assert found == pytest.approx(quadratic, abs=noise / epsilon**2)
    assert slope == pytest.approx(descent, abs=noise / epsilon)
    relative = noise / (epsilon**2 * quadratic) + noise / (epsilon * descent)
    assert ratio == pytest.approx(quadratic / descent / 0.1, rel=relative)
    given = finite_difference_curvature(plus, base, minus, epsilon, lr=0.1, descent=2.0 * descent).item()
    assert given == pytest.approx(0.5 * quadratic / descent / 0.1, rel=relative)


def test_plain_numbers_keep_float64() -> None:
    """Losses read with .item() differ in digits that float32 does not have."""
    quadratic, descent = 2e-10, 3e-10
    plus, minus = 1.0 + descent + quadratic / 2, 1.0 - descent + quadratic / 2
    # A loss near 1 is known to 2⁻⁵³; the second difference takes four of them.
    assert finite_difference_quadratic(plus, 1.0, minus, 1.0).item() == pytest.approx(quadratic, abs=4 * U64)
    assert finite_difference_descent(plus, minus, 1.0).item() == pytest.approx(descent, abs=2 * U64)
    # A plain gᵀd beside a float64 tensor is not rounded either.
    ratio = finite_difference_curvature(plus, 1.0, minus, 1.0, descent=0.1)
    assert ratio.item() == pytest.approx(quadratic / 0.1, abs=4 * U64 / 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_subtracted_in_float64(dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps
    plus, base, minus = (torch.tensor(v, dtype=dtype) for v in (1.0 + 3 * unit, 1.0 + unit, 1.0))
    found = finite_difference_quadratic(plus, base, minus, 0.5)
    assert found.dtype == torch.float64
    assert found.item() == unit / 0.25  # exactly: (3 − 2·1 + 0) units


@pytest.mark.parametrize("descent", [0.0, -1.0, math.nan])
def test_a_step_that_goes_uphill_has_no_curvature(descent: float) -> None:
    assert directional_curvature(1.0, descent, lr=0.1).isnan()
    assert headroom(1.0, descent).isnan()
    assert directional_curvature(torch.ones(3), torch.tensor([1.0, descent, 2.0])).isnan().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("quadratic", "descent", "expected"),
    [(2.0, 1.0, 1.0), (0.5, 1.0, 4.0), (4.0, 1.0, 0.5), (-1.0, 1.0, math.inf), (0.0, 1.0, math.inf)],
)
def test_headroom(quadratic: float, descent: float, expected: float) -> None:
    assert headroom(quadratic, descent).item() == expected
    assert math.isnan(headroom(math.nan, descent).item())


def test_negative_curvature_keeps_its_sign() -> None:
    assert directional_curvature(-0.5, 1.0, lr=0.25).item() == -2.0


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_kl_converges_to_gauss_newton(likelihood: str) -> None:
    g = torch.Generator().manual_seed(0)
    z, u = (torch.randn(6, 4, generator=g).double() for _ in range(2))
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0]).double()
    options = {"descent": 0.3, "lr": 0.1, "likelihood": likelihood, "weights": mask, "scale": 0.5}
    truth = gauss_newton_curvature(z, u, **options).item()  # type: ignore[arg-type]
    departures = [kl_curvature(z, z - e * u, epsilon=e, **options).item() / truth - 1.0 for e in (1e-3, 1e-4)]  # type: ignore[arg-type]
    # c₁ε + c₂ε² with coefficients of the size of u and u², here about 1 (none for the Gaussian, whose divergence is
    # quadratic; there z − (z − εu) leaves 2⁻⁵³/1e-4 = 1e-12): a tenth of the first is c₁ε' + 10c₂ε'².
    assert abs(departures[0]) < 2e-3
    assert departures[1] == pytest.approx(0.1 * departures[0], abs=1e-11 if likelihood == "gaussian" else 1e-7)


def test_scale_learning_rate_and_descent_enter_as_the_equation_says() -> None:
    z, u = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    assert gauss_newton_curvature(z, u, descent=4.0, lr=0.5, likelihood="gaussian", scale=3.0).item() == 3.0
    assert kl_curvature(z, 2 * u, 2.0, descent=4.0, lr=0.5, likelihood="gaussian", scale=3.0).item() == 3.0
    assert kl_curvature(z, u, 1.0, descent=-1.0, likelihood="gaussian").isnan()


def test_critical_sharpness_is_at_the_edge_where_the_step_is_critical() -> None:
    assert critical_sharpness(1.0, lr=0.25).item() == 2.0 / 0.25
    assert critical_sharpness(4.0, lr=0.25).item() == 2.0
    assert critical_sharpness(math.nan, lr=0.25).isnan()


Z = torch.zeros(1, 2)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    "call",
    [
        lambda e: finite_difference_quadratic(1.0, 1.0, 1.0, e),
        lambda e: finite_difference_descent(1.0, 1.0, e),
        lambda e: finite_difference_curvature(1.0, 1.0, 1.0, e),
        lambda e: kl_curvature(Z, Z, e, 1.0),
    ],
)
def test_epsilon_must_be_positive(call: Callable[[float], Tensor], epsilon: float) -> None:
    with pytest.raises(
        ValueError, match=rf"epsilon must be positive and finite, got {epsilon}: 1.0 is the length of the step"
    ):
        call(epsilon)
