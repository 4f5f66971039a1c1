"""From the numbers of one measurement to curvatures with their errors, and to the next ε.

All inputs are plain numbers of the whole job; all errors are relative and add a rounding part (one standard
deviation) and a truncation part.

Rounding of the outputs. A forward in a type with unit roundoff u returns z + n with n about κ·u·rms(z), independent
from one ε to the next. Measured on networks of 3 to 12 layers: κ between 1 and 2.3 in float32, where dot products
accumulate their own rounding, and between 0.3 and 0.8 in bf16 and fp16, where they accumulate in float32 and only
their result is rounded. From the symmetric pair the same noise can be read: it makes up 3/2 σ² of ``defect``, so
defect/1.5 bounds it from above.

Rounding of the loss. Each position's value is rounded at unit scale (log(1 + small) loses what lies below u), the
mean over n positions at its own; and each position sees the noise of its outputs through ∂ℓ/∂z. Positions are
independent: δL = u·(|L| + 1/√n) + κ·u·√(E‖∂ℓ/∂z‖²z²/n).
"""

import math
from dataclasses import dataclass

import torch

from lightning_curvature.functional import ErrorModel, choose_epsilon

# κ above, at the upper end of what was measured.
_GROWTH = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# Above this rounding part a value cannot be told from noise and is NaN.
NOISE_LIMIT = 0.1

# The truncation of the second difference, in units of defect/signal: φ⁗ε²/12 against the squared ratio of the
# outputs' second to their first derivative. Measured between 2 and 7 on smooth networks.
_DIFFERENCE_TRUNCATION = 4.0
# That of the symmetric KL in the same units; measured between 0.5 and 1.2.
_SYMMETRIC_TRUNCATION = 1.0
# That of the one-sided KL, in units of ``departure`` (which is the softmax's share of the third order): the
# network's own share is of the same size.
_ONE_SIDED_TRUNCATION = 2.0
# Without outputs: the slope's truncation r = εφ‴/(6q) is known from the gradient; with φ⁗ ~ φ‴²/q the second
# difference has 3r².
_SLOPE_TRUNCATION = 3.0

# The KL estimators share one ε with the second difference and have the first word on it: they resolve curvature in
# precisions where the loss does not.
_KL_WEIGHT = 10.0


@dataclass(frozen=True)
class Estimate:
    """A second-order form along the update with its relative error.

    Attributes:
        quadratic: dᵀHd or dᵀGd; NaN where it cannot be told from rounding.
        error: relative error.
        model: how that error depends on ε, None where there is no ε.
    """

    quadratic: float
    error: float
    model: ErrorModel | None = None


def unit_roundoff(dtype: torch.dtype, coarse_products: bool = False) -> float:
    """Relative rounding of one operation; ``coarse_products``: TF32, eleven bits in matrix products."""
    return max(torch.finfo(dtype).eps / 2.0, 2.0**-11 if coarse_products else 0.0)


@dataclass
class Rounding:
    """Rounding of the forward pass, as known before and during a run.

    Attributes:
        dtype: coarsest type of the forward pass.
        loss_dtype: type of the loss.
        coarse_products: whether matrix products run in TF32.
        growth: κ; raised when smaller steps turn out to give larger defects.
        last: ε and defect/signal of the last measurement.
    """

    dtype: torch.dtype
    loss_dtype: torch.dtype
    coarse_products: bool = False
    growth: float = 0.0
    last: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.growth = self.growth or _GROWTH.get(self.dtype, 1.0)

    @property
    def unit(self) -> float:
        """κ·u."""
        return self.growth * unit_roundoff(self.dtype, self.coarse_products)

    def outputs_variance(self, values: dict[str, float]) -> float:
        """σ² of the outputs in the units of the quadratic forms."""
        prior = self.unit**2 * values["noise_gain"]
        return min(prior, values["defect"] / 1.5) if "defect" in values else prior

    def loss_deviation(self, values: dict[str, float]) -> float:
        """Standard deviation δL of the loss."""
        loss = abs(values["loss"])
        if "loss_noise_gain" not in values:
            return unit_roundoff(self.dtype, self.coarse_products) * loss
        root = math.sqrt(max(values["positions"], 1.0))
        own = unit_roundoff(self.loss_dtype) * (loss + 1.0 / root)
        return own + self.unit * math.sqrt(max(values["loss_noise_gain"], 0.0)) / root

    def learn(self, values: dict[str, float], epsilon: float) -> None:
        """Correct κ by what the symmetric pair shows.

        Down where the defect bounds it from above. Up where a clearly smaller ε than last time gave a larger ratio of
        defect to signal: truncation would have fallen with ε, so what rises is rounding.
        """
        if not values["signal"] > 0.0 or not values["noise_gain"] > 0.0:
            return
        bound = math.sqrt(values["defect"] / 1.5 / values["noise_gain"]) / unit_roundoff(
            self.dtype, self.coarse_products
        )
        ratio = values["defect"] / values["signal"]
        rising = self.last is not None and epsilon < 0.7 * self.last[0] and ratio > self.last[1]
        if bound > 0.0 and (rising or bound < self.growth):
            self.growth = bound
        self.last = (epsilon, ratio)


def finite_difference_estimate(values: dict[str, float], epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀHd from the second difference of the loss; its truncation from ``defect``, or without outputs from the slope."""
    second = (values["loss_plus"] - values["loss"]) + (values["loss_minus"] - values["loss"])
    size = abs(second)
    if size == 0.0 or not math.isfinite(second):
        return _lost(overflow=size != 0.0)
    noise = math.sqrt(6.0) * rounding.loss_deviation(values) / size
    if "signal" in values:
        coefficient = _DIFFERENCE_TRUNCATION * max(values["signal"], size) / size
        truncation = coefficient * _excess(values, rounding)
        bound = coefficient * values["defect"] / values["signal"] if values["signal"] > 0.0 else truncation
    else:
        slope = (values["loss_plus"] - values["loss_minus"]) / 2.0
        bound = truncation = _SLOPE_TRUNCATION * ((slope - epsilon * values["descent"]) / size) ** 2
    return _known(second / epsilon**2, ErrorModel(noise, truncation), bound)


def symmetric_kl_estimate(values: dict[str, float], epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀGd from the symmetric pair of outputs."""
    signal = values["signal"]
    if not 0.0 < signal < math.inf:
        return _lost(overflow=signal != 0.0)
    variance = rounding.outputs_variance(values)
    truncation = _SYMMETRIC_TRUNCATION * _excess(values, rounding)
    model = ErrorModel(0.5 * variance / signal, truncation, 2, _KL_WEIGHT)
    return _known(signal / epsilon**2, model, _SYMMETRIC_TRUNCATION * values["defect"] / signal)


def one_sided_kl_estimate(values: dict[str, float], epsilon: float, rounding: Rounding, gaussian: bool) -> Estimate:
    """dᵀGd from twice the KL divergence at θ − εd."""
    signal = values["twice_divergence"]
    if not 0.0 < signal < math.inf:
        return _lost(overflow=signal != 0.0)
    noise = 2.0 * rounding.outputs_variance(values) / signal
    if gaussian:
        # The Gaussian KL is quadratic in the outputs; only the network bends, on the scale of the outputs themselves.
        truncation = 0.5 * math.sqrt(signal / values["noise_gain"]) if values["noise_gain"] > 0 else math.inf
    else:
        truncation = _ONE_SIDED_TRUNCATION * values["departure"] / signal
    return _known(signal / epsilon**2, ErrorModel(noise, truncation, 1, _KL_WEIGHT), truncation)


def _excess(values: dict[str, float], rounding: Rounding) -> float:
    """Part of defect/signal that rounding does not explain."""
    if not values["signal"] > 0.0:
        return 0.0
    return max(values["defect"] - 1.5 * rounding.outputs_variance(values), 0.0) / values["signal"]


def _known(quadratic: float, model: ErrorModel, truncation_bound: float) -> Estimate:
    """Estimate whose reported error takes the truncation at its bound; ε is chosen by the likelier value."""
    lost = not model.noise <= NOISE_LIMIT
    return Estimate(math.nan if lost else quadratic, model.noise + truncation_bound, model)


def _lost(overflow: bool) -> Estimate:
    """No value: ε was so small that nothing moved, or so large that the loss overflowed."""
    hopeless = 1e6
    return Estimate(math.nan, math.nan, ErrorModel(0.0, hopeless) if overflow else ErrorModel(hopeless, 0.0))


def estimate(values: dict[str, float], epsilon: float, rounding: Rounding, gaussian: bool) -> dict[str, Estimate]:
    """All estimates that the numbers of one measurement allow, by name of the estimator."""
    found: dict[str, Estimate] = {}
    if "signal" in values:
        rounding.learn(values, epsilon)
        found["kl"] = symmetric_kl_estimate(values, epsilon, rounding)
    elif "twice_divergence" in values:
        found["kl"] = one_sided_kl_estimate(values, epsilon, rounding, gaussian)
    if "loss_plus" in values:
        found["finite_difference"] = finite_difference_estimate(values, epsilon, rounding)
    for name, short in (("hvp", "hvp"), ("gauss_newton", "gn")):
        if f"{short}_quadratic" in values:
            # A handful of roundings in sequence reach the result of automatic differentiation; sums average theirs.
            error = 4.0 * torch.finfo(rounding.dtype).eps
            found[name] = Estimate(values[f"{short}_quadratic"], error)
    return found


def loss_descent(
    values: dict[str, float], epsilon: float, rounding: Rounding, estimates: dict[str, Estimate]
) -> tuple[float, bool]:
    """gᵀd, and whether the gradient kept after backward is that of the loss.

    Of the loss itself where a probe differentiated it; else of the kept gradient, unless the symmetric pair shows
    that something changed it: then the slope of the pair.
    """
    for exact in ("hvp_descent", "gn_descent"):
        if exact in values:
            return values[exact], True
    kept = values["descent"]
    pair = estimates.get("finite_difference")
    if pair is None or not math.isfinite(pair.quadratic):
        return kept, True
    slope = (values["loss_plus"] - values["loss_minus"]) / (2.0 * epsilon)
    # The slope's own error: three deviations of its rounding, and εφ‴/6 with φ‴ as in _SLOPE_TRUNCATION.
    allowed = 3.0 * rounding.loss_deviation(values) / epsilon + 2.0 * epsilon * abs(pair.quadratic) * math.sqrt(
        pair.error
    )
    if abs(slope - kept) > allowed + 0.05 * abs(slope):
        return slope, False
    return kept, True


def next_epsilon(epsilon: float, estimates: list[Estimate]) -> float:
    """Choose the ε of the next measurement from the errors of this one."""
    return choose_epsilon(epsilon, [e.model for e in estimates if e.model is not None])
