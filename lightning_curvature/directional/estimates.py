"""Quadratic forms along the step with their errors, from the numbers of one measurement.

All inputs are numbers of the whole job. All errors are relative, a rounding part (one deviation) and a truncation part.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from lightning_curvature.directional.options import EXACT
from lightning_curvature.directional.rounding import Numbers, Rounding, pair_slope
from lightning_curvature.functional import ErrorModel

# Above this rounding part noise hides a value, which is NaN.
NOISE_LIMIT = 0.1
# The truncation of the second difference, in units of defect/signal: φ⁗ε²/12 against the squared ratio of the
# outputs' second to their first derivative. Measured between 2 and 7 on smooth networks.
_DIFFERENCE_TRUNCATION = 4.0
# That of the symmetric KL in the same units, ε²⟨z‴,z′⟩/(3|z′|²) against ε²|z″|²/(4|z′|²): measured between 1 and 12,
# the more the further activations saturate. Where the outputs move so far that the softmax's own fourth order counts,
# networks saturate too: a quarter of that share is added. ε is chosen by the sum.
_SYMMETRIC_TRUNCATION, _SATURATION = 3.0, 0.25
# The reported error knows z‴ where gᵀd is known: ε²⟨z‴,r⟩/(6⟨z′,r⟩), r = ∂ℓ/∂z, is the distance of the slope by the
# outputs to it, and a form has twice such a share. It may vanish by chance: so much of the sum above is taken at least,
# and twice the sum where gᵀd tells nothing (benchmarks/calibration.py).
_OF_SLOPE, _LEAST_OF_SUM, _MOST_OF_SUM = 2.0, 2.0 / 3.0, 2.0
# The sum over positions is carried by P/10 of them or more.
_CONCENTRATION = 10.0
# The network's share in that of the one-sided KL, in units of |δ|/|z|.
_ONE_SIDED_TRUNCATION = 0.5
# The slope's truncation r = εφ‴/(6q) is known from the gradient; with φ⁗ ~ φ‴²/q the second difference has 3r².
_SLOPE_TRUNCATION = 3.0
# The pair's slope and gᵀd may differ by this share of the slope: across the kinks of a ReLU network they did by 30 %.
_SLOPE_DISAGREEMENT = 0.5
# The slope by the outputs may differ from gᵀd by this share: the truncation of a pair.
_SAME_SLOPE = 0.1
# Below these shares it is the truncation of a pair, or rounding in float32: no reason to doubt.
_ALIKE = {"kl": 0.02, "gauss_newton": 1e-3}
# The slope of a pair of a larger error is no evidence.
_WELL_BEHAVED = 0.3
# What kinks between the ends add to the divergence, in units of what they add to the second difference, both relative
# to the slope.
_KINKS_SHARE = 0.3
# The error of gᵀd as a share of its bound (see _with_slope). Measured in bf16: 0.2 to 0.3, one time in ten 1.
_SLOPE_SHARE = 0.5
# The reported error of an estimate with an ε, in units of what its model expects: then nine true errors in ten are
# below it (benchmarks/calibration.py).
_COVERAGE = 1.5
# The KL estimators share ε with the second difference and weigh more: they resolve curvature that the loss rounds away.
_KL_WEIGHT = {False: 5.0, True: 25.0}  # in half precision the loss hardly resolves curvature at any ε


@dataclass(frozen=True)
class Estimate:
    """A quadratic form along the step with its relative error.

    Attributes:
        quadratic: dᵀHd or dᵀGd; NaN where rounding hides it.
        model: how the relative error depends on ε, None where there is no ε.
    """

    quadratic: float
    error: float
    model: ErrorModel | None = None

    def judged(self, off: float, largest: float) -> "Estimate":
        """Return it with what else it is off by, and without a value of which not even the size is known."""
        error = self.error + off
        return Estimate(self.quadratic if error <= largest or math.isinf(largest) else math.nan, error, self.model)


def estimate(
    wanted: Collection[str], values: Numbers, epsilon: float, distance: float, rounding: Rounding
) -> dict[str, Estimate]:
    """Return the estimates of one measurement by estimator; ``distance`` is ε‖d‖, ``rounding`` learns from them."""
    if "loss_plus" in values:
        rounding.learn(values, epsilon, distance)
    return estimate_again(wanted, values, epsilon, rounding)


def estimate_again(wanted: Collection[str], values: Numbers, epsilon: float, rounding: Rounding) -> dict[str, Estimate]:
    """Return the same of numbers that ``rounding`` has learned from."""
    values = values | {"descent": _differentiated(values, epsilon, values["descent"])}
    estimates: dict[str, Estimate] = {}
    if "kl" in wanted:
        estimates["kl"] = _kl(values, epsilon, rounding)
    if "finite_difference" in wanted:
        estimates["finite_difference"] = _finite_difference(values, epsilon, rounding)
    # A few roundings in sequence reach the result of automatic differentiation; sums average theirs.
    error = torch.finfo(rounding.dtype).eps * (2.0 if rounding.half else 32.0)
    estimates |= {name: Estimate(values[f"{name}_quadratic"], error) for name in EXACT if name in wanted}
    return {name: _with_slope(one, values, rounding) for name, one in estimates.items()}


def _exact_descent(values: Numbers) -> float | None:
    """Return gᵀd of the first exact product, if there is one."""
    return next((values[key] for name in EXACT if (key := f"{name}_descent") in values), None)


def _differentiated(values: Numbers, epsilon: float, kept: float, share: float = _SAME_SLOPE) -> float:
    """Return gᵀd of the loss itself where a measurement has it: hooks may have changed the gradient that was kept.

    ``share`` of the kept one is below what tells them apart.
    """
    exact = _exact_descent(values)
    if exact is not None:
        return exact
    by_outputs = values.get("head_slope", math.nan) / epsilon
    if "outputs_slope" in values and "loss_plus" in values:
        # A reading of the batch may be wrong: not where the loss itself has its slope.
        read, pair = values["outputs_slope"] / epsilon, pair_slope(values) / epsilon
        by_outputs = read if abs(read - pair) <= _SAME_SLOPE * abs(pair) else math.nan
    return by_outputs if abs(by_outputs - kept) > share * abs(kept) else kept


def _finite_difference(values: Numbers, epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀHd from the second difference of the loss; truncation from ``defect``, or without outputs from the slope."""
    second = (values["loss_plus"] - values["loss"]) + (values["loss_minus"] - values["loss"])
    size = abs(second)
    if size == 0.0 or not math.isfinite(second):
        return _lost(overflow=size != 0.0)
    noise = math.sqrt(6.0) * rounding.loss_deviation(values) / size
    slope = pair_slope(values)
    difference = slope - epsilon * values["descent"]
    kinks = rounding.kinks() / size if values.get("crossed", 0.0) > 0.0 else 0.0
    if "signal" not in values:
        ratio = max(abs(difference) - rounding.offset.level * abs(slope), 0.0) / size
        # In half precision the slope's rounding hides its truncation.
        model = ErrorModel(noise, ratio if rounding.half else _SLOPE_TRUNCATION * ratio**2)
        return _known(second / epsilon**2, model, kinks)
    network = _DIFFERENCE_TRUNCATION * _excess(values, rounding) * max(abs(values["signal"]), size) / size
    model = ErrorModel(noise, network + abs(values["fourth"]) / (12.0 * size))
    if rounding.half:
        return _known(second / epsilon**2, model, doubt=model.truncation)
    # Kinks between the ends that nobody knows of: no ε is small enough, and no output shows them. But they add to the
    # slope as much as to the second difference, and more than a smooth third order would.
    bent = max(abs(difference - values["third"] / 6.0) / size - noise, 0.0)
    return _known(second / epsilon**2, model, doubt=max(min(_SLOPE_TRUNCATION * bent**2, bent), kinks))


def _kl(values: Numbers, epsilon: float, rounding: Rounding) -> Estimate:
    """dᵀGd from the symmetric pair of outputs; where there is none, from twice the KL divergence at θ − εd."""
    symmetric = "signal" in values
    quadratic = values["signal" if symmetric else "twice_divergence"]
    signal = abs(quadratic)  # a loss that is not convex in the outputs has both signs
    if signal == 0.0 and values.get("head_slope", 0.0) != 0.0:
        return Estimate(0.0, 0.0)  # a loss that is linear in the outputs where they are
    if not 0.0 < signal < math.inf:
        return _lost(overflow=signal != 0.0)
    # Two outputs with noise n are halved in the pair's difference, and not in the other.
    variance = (1.0 if symmetric else 4.0) * rounding.outputs_variance(values)
    crossed = math.sqrt(2.0 * variance / signal * _CONCENTRATION / max(values["positions"], _CONCENTRATION))
    if "crossing" in values:
        # Twice the deviation of 2uᵀ(∇²ℓ)n: a form that is not convex cancels, and its share of rounding is larger.
        direct = math.sqrt(2.0 if symmetric else 8.0) * rounding.unit * values["crossing"] / signal
        crossed = max(crossed, 2.0 * direct)
    noise, weight = 0.5 * variance / signal, _KL_WEIGHT[rounding.half]
    if symmetric:
        truncation = _SYMMETRIC_TRUNCATION * _excess(values, rounding)
        truncation += _SATURATION * abs(values["fourth"]) / (12.0 * signal)
        kinks = _KINKS_SHARE * rounding.kinks() / abs(pair_slope(values)) if values.get("crossed", 0.0) > 0.0 else 0.0
        model = ErrorModel(noise, truncation, 2, weight, crossed)
        third = math.nan if rounding.half else _third_order(values, epsilon)
        told = _MOST_OF_SUM * truncation
        if third <= max(_ALIKE["kl"], 3.0 * told):  # else something else is wrong: see checked_by_slope
            told = max(_LEAST_OF_SUM * truncation, _OF_SLOPE * third)
        return _known(quadratic / epsilon**2, model, doubt=told - truncation + kinks)
    # The network bends on the scale of the outputs, √(signal/spread gain) = |δ|/|z|; the bend of the softmax is known.
    spread = values["spread_gain"]
    truncation = _ONE_SIDED_TRUNCATION * math.sqrt(signal / spread) if spread > 0 else math.inf
    truncation += values["departure"] / signal
    # In half precision ε is so large that the network's own third order matters, which one point does not show. The
    # loss at that point bends by dᵀHd + O(ε): where it agrees with the KL divergence, both are right.
    bend = 2.0 * (values["loss_minus"] - values["loss"] + epsilon * values["descent"])
    doubt = abs(bend - quadratic) / signal if rounding.half else 0.0
    return _known(quadratic / epsilon**2, ErrorModel(noise, truncation, 1, weight, crossed), doubt)


def _third_order(values: Numbers, epsilon: float) -> float:
    """Return the share of z‴ in the slope by the outputs of a pair; NaN where gᵀd is that slope, or the loss's."""
    slope, descent = values.get("outputs_slope", math.nan) / epsilon, values["descent"]
    if "slope_taken" in values or slope == descent or descent == 0.0:
        return math.nan
    return abs(slope / descent - 1.0)


def _excess(values: Numbers, rounding: Rounding) -> float:
    """Part of defect/signal that rounding does not explain."""
    if values["signal"] == 0.0:
        return 0.0
    return max(values["defect"] - 1.5 * rounding.outputs_variance(values), 0.0) / abs(values["signal"])


def _known(quadratic: float, model: ErrorModel, doubt: float = 0.0) -> Estimate:
    """Estimate whose reported error is that of the model and ``doubt``, which has no say in the choice of ε."""
    lost = not model.noise + model.crossed <= NOISE_LIMIT
    return Estimate(math.nan if lost else quadratic, model.total() + doubt, model)


def _lost(overflow: bool) -> Estimate:
    """No value: ε was so small that nothing moved, or so large that the loss overflowed."""
    hopeless = 1e6
    return Estimate(math.nan, math.nan, ErrorModel(0.0, hopeless) if overflow else ErrorModel(hopeless, 0.0))


def _with_slope(one: Estimate, values: Numbers, rounding: Rounding) -> Estimate:
    """Add the error of gᵀd, and drop a value that it hides.

    The gradient is that of the rounded network, whose outputs are off by n; along the step that makes dᵀJᵀSn, at most
    √(dᵀGd · nᵀSn).
    """
    # In half precision it decides whether there is a value.
    error = one.error * (1.0 if rounding.half or one.model is None else _COVERAGE)
    if values["descent"] > 0.0 and math.isfinite(one.quadratic) and "noise_gain" in values:
        bound = math.sqrt(abs(one.quadratic) * rounding.unit**2 * values["noise_gain"])
        error += _SLOPE_SHARE * bound / values["descent"]
    noise = one.model.noise if one.model is not None else 0.0
    # In half precision rounding and truncation are equally large and inseparable: their sum decides, rounding doubled.
    if rounding.half and not error + noise <= NOISE_LIMIT:
        # A lost value never comes with an error that looks small.
        return Estimate(math.nan, max(error, NOISE_LIMIT), one.model)
    return replace(one, error=error)


def _slope_share(values: Numbers, epsilon: float, rounding: Rounding) -> float:
    """Return by what share the slope by the outputs may differ from gᵀd: it has the truncation of the form by them."""
    known = {"head_slope", "outputs_slope"} & values.keys()
    if not known or rounding.half or values.get("crossed", 1.0) > 0.0:
        return _SAME_SLOPE
    error = _with_slope(_kl(values, epsilon, rounding), values, rounding).error
    return min(_SAME_SLOPE, max(_ALIKE["kl"], 3.0 * error))


def loss_descent(
    values: Numbers, epsilon: float, rounding: Rounding, pair: Estimate | None
) -> tuple[float, bool, bool]:
    """Return gᵀd, whether the gradient kept after backward is that of the loss, and whether the pair has that slope.

    gᵀd is that of the loss itself where an exact product differentiated it; else of the kept gradient, unless the
    outputs or the symmetric pair show that something changed it: then their slope. Where the loss was differentiated
    and the pair has another slope, the loss elsewhere is another function: a target without gradient moves along.
    """
    kept = values["descent"]
    exact = _exact_descent(values)
    by_outputs = values["head_slope"] / epsilon if "head_slope" in values else None
    share = _slope_share(values, epsilon, rounding)
    loss = _differentiated(values, epsilon, kept, share)
    changed, slope = False, kept
    if pair is not None and pair.model is not None and math.isfinite(pair.quadratic):
        slope = pair_slope(values) / epsilon
        # Its error: rounding, and the third order, known of the softmax, of the network as in _SLOPE_TRUNCATION.
        rounded = 3.0 * rounding.loss_deviation(values)
        bent = abs(values.get("third", 0.0)) / 6.0 + 2.0 * epsilon**2 * abs(pair.quadratic) * math.sqrt(pair.error)
        far = abs(slope - loss) > (rounded + bent) / epsilon + _SLOPE_DISAGREEMENT * abs(slope)
        changed = far and pair.model.total() <= _WELL_BEHAVED
    if exact is not None:
        return exact, True, not changed
    if by_outputs is not None:
        rounded = 3.0 * rounding.loss_deviation(values) / epsilon
        same = abs(kept - by_outputs) <= share * abs(by_outputs) + rounded
        return (kept, True, not changed) if same else (by_outputs, False, not changed)
    return (slope, False, True) if changed else (loss, loss == kept, True)


def checked_by_slope(
    estimates: Mapping[str, Estimate], values: Numbers, epsilon: float, descent: float, rounding: Rounding
) -> tuple[dict[str, Estimate], bool]:
    """Return the estimates with what the slope by the outputs says of their error, and whether their loss is in doubt.

    A loss that is a function of the outputs has the slope gᵀd by them too. Where it has another, a reading of the batch
    reproduces the loss by chance (class weights while all classes are alike), or a repeated step moves something beside
    the outputs, such as a teacher that follows the weights. A quadratic form is off by twice the share of the slope.
    """
    checked, doubt = dict(estimates), False
    rounded = 3.0 * rounding.loss_deviation(values)
    slopes = {"kl": "head_slope" if "head_slope" in values else "outputs_slope", "gauss_newton": "gauss_newton_slope"}
    for name, key in slopes.items():
        unit, noise = (epsilon, rounded) if name == "kl" else (1.0, rounded / epsilon if rounding.half else 0.0)
        off = max(abs(values.get(key, math.nan) - descent * unit) - noise, 0.0) / abs(descent * unit or math.nan)
        # The truncation of a pair moves its slope too: that much is in the error already.
        if name in checked and off > max(_ALIKE[name], 3.0 * checked[name].error):
            doubt = True
            checked[name] = replace(checked[name], error=checked[name].error + 2.0 * off)
    return checked, doubt
