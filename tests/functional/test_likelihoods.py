"""KL divergences and output forms against the textbook formulas, in float64 and where those need 60 digits."""

import decimal
import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.functional import (
    LIKELIHOODS,
    divergence_statistics,
    kl_divergence,
    output_noise_gain,
    output_quadratic_form,
    positions,
)
from lightning_curvature.functional.likelihoods import exponential_remainder

U32 = 2.0**-24  # unit roundoffs
U64 = 2.0**-53


def _textbook(z: Tensor, shifted: Tensor, likelihood: str) -> Tensor:
    """Divergence of each position as a sum of p·(log p − log q), in float64."""
    z, shifted = z.double(), shifted.double()
    if likelihood == "gaussian":
        return 0.5 * (z - shifted).square().sum(-1)
    if likelihood == "bernoulli":
        ones = z.sigmoid() * (F.logsigmoid(z) - F.logsigmoid(shifted))
        zeros = (-z).sigmoid() * (F.logsigmoid(-z) - F.logsigmoid(-shifted))
        return (ones + zeros).sum(-1)
    log_p, log_q = z.log_softmax(-1), shifted.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _loss(z: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Negative log-likelihood of one position."""
    if likelihood == "gaussian":
        return 0.5 * (z - y).square().sum()
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return F.cross_entropy(z, y.argmax(-1))


def _exact(z: Tensor, shifted: Tensor, likelihood: str) -> float:
    """Mean textbook divergence in 60 digits: its differences of logarithms keep more than 15 however small δ is."""
    if likelihood == "bernoulli":  # two outcomes a component, with logits (z, 0)
        z, shifted = (torch.stack([t, torch.zeros_like(t)], -1) for t in (z, shifted))
    rows = zip(z.reshape(-1, z.shape[-1]).tolist(), shifted.reshape(-1, z.shape[-1]).tolist(), strict=True)
    positions = z[..., 0].numel() if likelihood == "categorical" else len(z)
    with decimal.localcontext(decimal.Context(prec=60)):
        total = Decimal(0)
        for row, other in rows:
            a, b = [Decimal(v) for v in row], [Decimal(v) for v in other]
            weights = [v.exp() for v in a]
            whole = sum(weights)
            shift = (sum(v.exp() for v in b) / whole).ln()
            total += sum(w / whole * (p - q + shift) for w, p, q in zip(weights, a, b, strict=True))
        return float(total / positions)


def _outputs(scale: float, change: float, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(*shape, generator=g)
    return z, z + change * torch.randn(*shape, generator=g)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("masked", [False, True])
def test_float64_equals_the_textbook(likelihood: str, masked: bool) -> None:
    z, shifted = (t.double() for t in _outputs(1.0, 0.5, 4, 5, 3))
    weights = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)).double() * (torch.arange(5) != 2)
    w = weights if masked else torch.ones(4, 5).double()
    value = kl_divergence(z, shifted, likelihood, weights if masked else None)  # type: ignore[arg-type]
    # The textbook's differences of logarithms of size 1 lose 8 units beside a KL of 0.1; sums average the rest.
    assert value.item() == pytest.approx(
        ((w * _textbook(z, shifted, likelihood)).sum() / w.sum()).item(), rel=100 * U64
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_quadratic_form_is_the_second_derivative_of_the_loss(likelihood: str) -> None:
    z, delta = (t.double() for t in _outputs(1.5, 1.0, 6, 4))
    y = torch.eye(4).double()[:3].repeat(2, 1)
    expected = 0.0
    for row, change, target in zip(z, delta, y, strict=True):
        h = torch.autograd.functional.hessian(lambda t, target=target: _loss(t, target, likelihood), row)
        expected += float(change @ h @ change) / len(z)
    # Sums of a dozen positive products on either side.
    assert output_quadratic_form(z, delta, likelihood).item() == pytest.approx(expected, rel=100 * U64)  # type: ignore[arg-type]


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("scale", [0.1, 5.0, 30.0])
@pytest.mark.parametrize("change", [1e-4, 1e-2, 1.0, 30.0])
def test_float32_keeps_its_digits(likelihood: str, scale: float, change: float) -> None:
    z, shifted = _outputs(scale, change, 32, 6)
    value = kl_divergence(z, shifted, likelihood)  # type: ignore[arg-type]
    # p carries the rounding of z − max z, relatively as large as that difference; centring δ against the likeliest
    # outcome adds three roundings of max|δ|/|x| ≤ 3 to x, which counts twice; exp, the series with its factor of 20 at
    # worst (|x| = 0.1), the sum and the mean make up 40 more. The logarithm turns the change's range absolute: /KL < 1.
    reach = (z.max(-1).values - z.min(-1).values).max().item()
    moved = (shifted - z).abs().max().item()
    assert value.item() == pytest.approx(_exact(z, shifted, likelihood), rel=(reach + moved + 60) * U32)


@pytest.mark.parametrize("margin", [20.0, 40.0, 80.0])
@pytest.mark.parametrize("change", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_confident_rows_keep_their_digits(margin: float, change: float, likelihood: str) -> None:
    """1 − p is below the rounding of p: all of the divergence lies in what the likeliest outcome leaves."""
    z = torch.tensor([[margin, 0.5, -1.0]]) if likelihood == "categorical" else torch.tensor([[margin], [-margin]])
    shifted = z + change * torch.tensor([0.3, 1.0, -0.7])[: z.shape[-1]]
    assert math.exp(-margin) < U32  # the premise
    truth = _exact(z, shifted, likelihood)
    # As above. δ = shifted − z itself is exact for the float32 numbers given.
    value = kl_divergence(z, shifted, likelihood).item()  # type: ignore[arg-type]
    assert value == pytest.approx(truth, rel=(margin + 2 * change + 60) * U32)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, U32), (torch.float64, U64)])
def test_remainder_of_the_exponential(dtype: torch.dtype, unit: float) -> None:
    positive = torch.cat([torch.logspace(-8, 1, 300).double(), torch.linspace(0.09, 0.11, 200).double()])
    x = torch.cat([positive, -positive]).to(dtype)
    with decimal.localcontext(decimal.Context(prec=60)):
        exact = [float(Decimal(v).exp() - 1 - Decimal(v)) for v in x.tolist()]
    error = (exponential_remainder(x).double() / torch.tensor(exact, dtype=torch.float64) - 1.0).abs() / unit
    # The series: five roundings at full size, those before scaled down by x/3, and the first term left out. Beyond it
    # one unit in the last place of expm1(x) ≈ x (2u) against x²/2, a factor of 2/x ≤ 20; and the final rounding.
    small = x.abs() < 0.1
    assert error[small].max() <= 6
    assert error[~small].max() <= 2 * 20 + 2


def test_a_common_shift_of_all_logits_costs_no_digits() -> None:
    g = torch.Generator().manual_seed(0)
    # On a grid of 2⁻¹² the change, shift included, is a float32 number: what is lost is lost in the formula.
    z, change = ((torch.randn(32, 6, generator=g) * s).round() / 2**12 for s in (2**12, 2**6))
    shifted = z + (change + 512.0)
    assert torch.equal(shifted - z, change + 512.0)
    # The terms of test_float32_keeps_its_digits; reach and change are below 10.
    assert kl_divergence(z, shifted).item() == pytest.approx(_exact(z, shifted, "categorical"), rel=80 * U32)


def test_the_textbook_difference_in_float32_is_lost_there() -> None:
    """Without this the tests above would show nothing that a plain formula does not do."""
    z, shifted = _outputs(5.0, 1e-4, 32, 6)
    log_p, log_q = z.log_softmax(-1), shifted.log_softmax(-1)
    naive = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert abs(naive / _exact(z, shifted, "categorical") - 1.0) > 1.0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("change", [100.0, 1e4])
def test_large_changes_do_not_overflow(likelihood: str, change: float) -> None:
    z, shifted = _outputs(30.0, change, 16, 8)
    value = kl_divergence(z, shifted, likelihood)  # type: ignore[arg-type]
    # Here the divergence is of the size of the change, and every step is good to a few units; softmax as above.
    assert value.item() == pytest.approx(_textbook(z, shifted, likelihood).mean().item(), rel=200 * U32)


def test_an_outcome_whose_probability_is_zero_in_float32_still_counts() -> None:
    z = torch.tensor([[0.0, -150.0]])  # e⁻¹⁵⁰ = 7e-66
    shifted = torch.tensor([[0.0, 5.0]])
    # KL = log(1 + e⁵) up to e⁻¹⁵⁰·150; 150 and 155 enter an exponent, at half a unit each.
    assert kl_divergence(z, shifted).item() == pytest.approx(5.006715348, rel=(155 / 5) * U32)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_worked_on_in_float32(likelihood: str, dtype: torch.dtype) -> None:
    z, shifted = (t.to(dtype) for t in _outputs(3.0, 0.3, 32, 6))
    value = kl_divergence(z, shifted, likelihood)  # type: ignore[arg-type]
    assert value.dtype == torch.float32
    assert value.item() == kl_divergence(z.float(), shifted.float(), likelihood).item()  # type: ignore[arg-type]
    # The bound of the float32 test for a reach of 20; the reference sees the same rounded outputs.
    assert value.item() == pytest.approx(_textbook(z, shifted, likelihood).mean().item(), rel=80 * U32)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_small_changes_approach_the_quadratic_form(likelihood: str) -> None:
    z, shifted = (t.double() for t in _outputs(1.0, 1.0, 8, 5))
    departures = []
    for size in (1e-2, 1e-3):
        s = divergence_statistics(z, z + size * (shifted - z), likelihood)  # type: ignore[arg-type]
        assert abs(2 * s.divergence - s.quadratic) <= s.departure * (1 + 1e-12)  # the mean of the absolute values
        departures.append((s.departure / s.quadratic).item())
    # The third order of the divergence: relative departure ∝ size; O(size²) on top, at most size itself.
    expected = 0.0 if likelihood == "gaussian" else departures[0] / 10
    assert departures[1] == pytest.approx(expected, rel=0.02, abs=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("function", [kl_divergence, output_quadratic_form])
def test_pieces_add_up_to_the_whole(
    likelihood: str, function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    z, shifted = (t.double() for t in _outputs(2.0, 0.5, 7, 11, 3))
    weights = (torch.arange(77) % 4 != 0).reshape(7, 11)
    whole = function(z, shifted, likelihood, weights)
    monkeypatch.setattr(positions, "_ELEMENTS_PER_PIECE", 24)  # 8 rows of 3, and a last piece of 5
    # Sums of 77 positive terms in another order.
    assert function(z, shifted, likelihood, weights).item() == pytest.approx(whole.item(), rel=77 * U64)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_positions_without_weight_count_for_nothing_whatever_they_hold(likelihood: str) -> None:
    z, shifted = _outputs(1.0, 0.5, 6, 4)
    kept = kl_divergence(z[:4], shifted[:4], likelihood)  # type: ignore[arg-type]
    z[4], shifted[5] = torch.nan, torch.inf
    mask = torch.tensor([True] * 4 + [False] * 2)
    # The same four numbers, summed in another order.
    assert kl_divergence(z, shifted, likelihood, mask).item() == pytest.approx(kept.item(), rel=4 * U32)  # type: ignore[arg-type]
    form = output_quadratic_form(z, shifted, likelihood, mask)  # type: ignore[arg-type]
    assert torch.isfinite(form)
    assert kl_divergence(z, shifted, likelihood, torch.zeros(6)).isnan()  # type: ignore[arg-type]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_noise_gain_is_the_form_of_independent_errors_as_large_as_the_outputs(likelihood: str) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, generator=g).double()
    draws = 40_000
    errors = torch.randn(draws, 3, 4, generator=g).double()
    # Categorical: one size for all components of a position; else each component errs by its own.
    size = z.square().mean(-1, keepdim=True).sqrt() if likelihood == "categorical" else z.abs()
    sampled = output_quadratic_form(z.expand(draws, 3, 4), size * errors, likelihood)  # type: ignore[arg-type]
    # χ² with at least 3 degrees of freedom in effect: a draw scatters by √(2/3), the mean by 0.4 %; four deviations.
    assert output_noise_gain(z, likelihood).item() == pytest.approx(sampled.item(), rel=0.017)  # type: ignore[arg-type]


def test_single_logits_are_bernoulli() -> None:
    z, shifted = _outputs(1.0, 0.5, 16, 1)
    assert kl_divergence(z[:, 0], shifted[:, 0], "bernoulli") == kl_divergence(z, shifted, "bernoulli")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (torch.zeros(2, 3), torch.zeros(2, 3), "poisson"),
            r"likelihood must be 'categorical', .* got 'poisson': name",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(3, 2)),
            r"must be \(…, C\) with … = \(2,\) of outputs, C = 3 of outputs, got \(3, 2\): evaluate all",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2, 3), "gaussian", torch.ones(3)),
            r"2 positions of outputs, got 3: give a mask",
        ),
        ((torch.zeros(5), torch.zeros(5)), r"two components for 'categorical', got shape \(5,\): use 'bernoulli'"),
        ((torch.zeros(5, 1), torch.zeros(5, 1)), r"two components .* got shape \(5, 1\): use 'bernoulli'"),
    ],
)
def test_bad_arguments_are_explained(arguments: tuple[object, ...], sentence: str) -> None:
    for function in (kl_divergence, output_quadratic_form):
        with pytest.raises(ValueError, match=sentence):
            function(*arguments)  # type: ignore[arg-type]
