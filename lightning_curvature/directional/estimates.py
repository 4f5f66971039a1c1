"""From the numbers of one measurement to curvatures with their errors, and to the next ε.

All inputs are plain numbers of the whole job; all errors are relative and add a rounding part (one standard
deviation) and a truncation part.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from lightning_curvature.directional.rounding import Rounding
from lightning_curvature.functional import ErrorModel, choose_epsilon

# Above this rounding part a value cannot be told from noise and is NaN.
NOISE_LIMIT = 0.1

# The truncation of the second difference, in units of defect/signal: φ⁗ε²/12 against the squared ratio of the
# outputs' second to their first derivative. Measured between 2 and 7 on smooth networks.
_DIFFERENCE_TRUNCATION = 4.0
# That of the symmetric KL in the same units, ε²⟨z‴,z′⟩/(3|z′|²) against ε²|z″|²/(4|z′|²): measured between 1 and 12,
# the more the further activations saturate. Where the outputs move so far that the softmax's own fourth order counts,
# networks saturate too: a quarter of that share is added. ε is chosen by the sum; the reported error takes it twice.
_SYMMETRIC_TRUNCATION, _SATURATION = 3.0, 0.25
# The sum over positions is carried by P/10 of them or more.
_CONCENTRATION = 10.0
# The network's share in that of the one-sided KL, in units of |δ|/|z|.
_ONE_SIDED_TRUNCATION = 0.5
# The slope's truncation r = εφ‴/(6q) is known from the gradient; with φ⁗ ~ φ‴²/q the second difference has 3r².
_SLOPE_TRUNCATION = 3.0

# The pair's slope and gᵀd may differ by this share of the slope: across the kinks of a ReLU network they did by 30 %.
_SLOPE_DISAGREEMENT = 0.5

# That of a pair that may be asked.
_WELL_BEHAVED = 0.3

# The error of gᵀd as a share of its bound (see _with_slope). Measured in bf16: 0.2 to 0.3, one time in ten 1.
_SLOPE_SHARE = 0.5

# The KL estimators share one ε with the second difference and have the first word on it: they resolve curvature in
# precisions where the loss does not.
_KL_WEIGHT = {False: 5.0, True: 25.0}  # in half precision the loss hardly resolves curvature at any ε


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


def finite_difference_estimate(values: dict[str, float], epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀHd from the second difference of the loss; truncation from ``defect``, or without outputs from the slope."""
    second = (values["loss_plus"] - values["loss"]) + (values["loss_minus"] - values["loss"])
    size = abs(second)
    if size == 0.0 or not math.isfinite(second):
        return _lost(overflow=size != 0.0)
    noise = math.sqrt(6.0) * rounding.loss_deviation(values) / size
    slope = (values["loss_plus"] - values["loss_minus"]) / 2.0
    if "signal" not in values:
        ratio = rounding.beyond_offset(abs(slope - epsilon * values["descent"]), abs(slope)) / size
        # In half precision the slope's rounding hides what its truncation may be.
        return _known(second / epsilon**2, ErrorModel(noise, ratio if rounding.half else _SLOPE_TRUNCATION * ratio**2))
    network = _DIFFERENCE_TRUNCATION * _excess(values, rounding) * max(values["signal"], size) / size
    model = ErrorModel(noise, network + abs(values["fourth"]) / (12.0 * size))
    if rounding.half:
        return _known(second / epsilon**2, model, doubt=model.truncation)
    # Kinks of the loss (ReLU, max pooling) between the ends: no ε is small enough, and no output shows them. But they
    # add to the slope as much as to the second difference, and more than a smooth third order would.
    bent = max(abs(slope - epsilon * values["descent"] - values["third"] / 6.0) / size - noise, 0.0)
    return _known(second / epsilon**2, model, doubt=min(_SLOPE_TRUNCATION * bent**2, bent))


def symmetric_kl_estimate(values: dict[str, float], epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀGd from the symmetric pair of outputs."""
    signal = values["signal"]
    if not 0.0 < signal < math.inf:
        return _lost(overflow=signal != 0.0)
    variance = rounding.outputs_variance(values)
    truncation = _SYMMETRIC_TRUNCATION * _excess(values, rounding)
    truncation += _SATURATION * abs(values["fourth"]) / (12.0 * signal)
    crossed = math.sqrt(2.0 * variance / signal * _CONCENTRATION / max(values["positions"], _CONCENTRATION))
    model = ErrorModel(0.5 * variance / signal, truncation, 2, _KL_WEIGHT[rounding.half], crossed)
    return _known(signal / epsilon**2, model, doubt=truncation)


def one_sided_kl_estimate(values: dict[str, float], epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀGd from twice the KL divergence at θ − εd."""
    signal = values["twice_divergence"]
    if not 0.0 < signal < math.inf:
        return _lost(overflow=signal != 0.0)
    variance = rounding.outputs_variance(values)
    noise = 2.0 * variance / signal
    crossed = math.sqrt(8.0 * variance / signal * _CONCENTRATION / max(values["positions"], _CONCENTRATION))
    # The network bends on the scale of the outputs themselves, √(signal/spread gain) = |δ|/|z|; the softmax's own bend,
    # none for a Gaussian, is known.
    truncation = (
        _ONE_SIDED_TRUNCATION * math.sqrt(signal / values["spread_gain"]) if values["spread_gain"] > 0 else math.inf
    )
    truncation += values["departure"] / signal
    found = _known(signal / epsilon**2, ErrorModel(noise, truncation, 1, _KL_WEIGHT[rounding.half], crossed))
    if not rounding.half:
        return found
    # In half precision ε is so large that the network's own third order matters, which one point does not show. The
    # loss at that point bends by dᵀHd + O(ε): where it agrees with the KL divergence, both are right.
    bend = 2.0 * (values["loss_minus"] - values["loss"] + epsilon * values["descent"])
    return replace(found, error=found.error + abs(bend - signal) / signal)


def _excess(values: dict[str, float], rounding: Rounding) -> float:
    """Part of defect/signal that rounding does not explain."""
    if not values["signal"] > 0.0:
        return 0.0
    return max(values["defect"] - 1.5 * rounding.outputs_variance(values), 0.0) / values["signal"]


def _known(quadratic: float, model: ErrorModel, doubt: float = 0.0) -> Estimate:
    """Estimate whose reported error is that of the model and ``doubt``, which has no say in the choice of ε."""
    lost = not model.noise + model.crossed <= NOISE_LIMIT
    return Estimate(math.nan if lost else quadratic, model.total() + doubt, model)


def _lost(overflow: bool) -> Estimate:
    """No value: ε was so small that nothing moved, or so large that the loss overflowed."""
    hopeless = 1e6
    return Estimate(math.nan, math.nan, ErrorModel(0.0, hopeless) if overflow else ErrorModel(hopeless, 0.0))


def estimate(
    wanted: Collection[str],
    values: dict[str, float],
    epsilon: float,
    distance: float,
    rounding: Rounding,
) -> dict[str, Estimate]:
    """Estimates of one measurement by name of the estimator.

    Args:
        wanted: names of the estimators.
        values: numbers of the whole job, as the probes call them.
        epsilon: ε in steps.
        distance: ε‖d‖.
        rounding: what is known of the forward pass; learns from this measurement.
    """
    found: dict[str, Estimate] = {}
    if "signal" in values:
        rounding.learn(values, distance)
    if "loss_plus" in values:
        rounding.learn_offset(values, epsilon, distance)
    if "kl" in wanted and "signal" in values:
        found["kl"] = symmetric_kl_estimate(values, epsilon, rounding)
    elif "kl" in wanted:
        found["kl"] = one_sided_kl_estimate(values, epsilon, rounding)
    if "finite_difference" in wanted:
        found["finite_difference"] = finite_difference_estimate(values, epsilon, rounding)
    for name, short in (("hvp", "hvp"), ("gauss_newton", "gn")):
        if name in wanted:
            # A few roundings in sequence reach the result of automatic differentiation; sums average theirs.
            error = torch.finfo(rounding.dtype).eps * (2.0 if rounding.half else 32.0)
            found[name] = Estimate(values[f"{short}_quadratic"], error)
    return {name: _with_slope(one, values, rounding) for name, one in found.items()}


def _with_slope(one: Estimate, values: dict[str, float], rounding: Rounding) -> Estimate:
    """Add the error of gᵀd, and drop what is lost.

    The gradient is that of the rounded network, whose outputs are off by n; along the step that makes dᵀJᵀSn, at most
    √(dᵀGd · nᵀSn).
    """
    slope = 0.0
    if values["descent"] > 0.0 and math.isfinite(one.quadratic) and "noise_gain" in values:
        bound = math.sqrt(abs(one.quadratic) * rounding.unit**2 * values["noise_gain"])
        slope = _SLOPE_SHARE * bound / values["descent"]
    error = one.error + slope
    noise = one.model.noise if one.model is not None else 0.0
    # In half precision rounding and truncation are of one size and sit in the same numbers: their sum decides, rounding
    # at twice its deviation.
    lost = rounding.half and not error + noise <= NOISE_LIMIT
    # A lost value never comes with an error that looks as if it could be had.
    return Estimate(math.nan if lost else one.quadratic, max(error, NOISE_LIMIT) if lost else error, one.model)


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
    if pair is None or pair.model is None or not math.isfinite(pair.quadratic):
        return kept, True
    if pair.model.total() > _WELL_BEHAVED:
        return kept, True  # the pair left the range in which its slope could tell
    slope = (values["loss_plus"] - values["loss_minus"]) / (2.0 * epsilon)
    # The slope's own error: rounding, and the third order: the softmax's share is known, the network's estimated as in
    # _SLOPE_TRUNCATION.
    rounded = 3.0 * rounding.loss_deviation(values)
    bent = abs(values.get("third", 0.0)) / 6.0 + 2.0 * epsilon**2 * abs(pair.quadratic) * math.sqrt(pair.error)
    if abs(slope - kept) > (rounded + bent) / epsilon + _SLOPE_DISAGREEMENT * abs(slope):
        return slope, False
    return kept, True


def next_epsilon(epsilon: float, estimates: list[Estimate]) -> float:
    """Choose the ε of the next measurement from the errors of this one."""
    return choose_epsilon(epsilon, [e.model for e in estimates if e.model is not None])
