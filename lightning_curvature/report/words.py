"""A run in three sentences, each of them computed from what was logged."""

import math
from collections.abc import Mapping

import numpy as np

from lightning_curvature.functional.regime import REGIMES
from lightning_curvature.report.series import EDGES, SHARES, Points, Series, symbol

# A share of this much counts as near the edge: measured curvatures hover around it at the edge of stability.
NEAR = 0.9
# A run is near the edge from the first step after which this share of the values is; of fewer nobody can tell.
_MOSTLY, _FEWEST = 0.9, 5
# A value that changes by less, relative to the first one, is the same.
_SAME = 0.05
_MOST_DIGITS = 4


def three_sentences(one: Series) -> list[str]:
    """Return where the run stands with respect to the edge, how curvature and loss moved, and what can be relied on."""
    return [edge_sentence(one), course_sentence(one), trust_sentence(one)]


def edge_sentence(one: Series) -> str:
    """Return where the first known share of the edge stands, and since when."""
    shares = {key: points.finite for key, points in one.shares.items() if points.finite.steps.size}
    if not shares:
        return "No share of the edge of stability was logged, so that the logs do not say how near to it the run is."
    key, points = next(iter(shares.items()))
    name, steps, values = _with_edge(key), points.steps, points.values
    last = f"{measured(points)} at step {steps[-1]}"
    count, near = len(values), values >= NEAR
    if (start := near_since(values)) is not None:
        inside = f"{int(near[start:].sum())} of {count - start} finite values"
        since = "From its first value" if start == 0 else f"From step {steps[start]}"
        return f"{since} on, {name} was at {NEAR:g} or more in {inside}; the last is {last}."
    top = int(values.argmax())
    if not near.any():
        if count == 1:
            return f"{_capital(name)} was measured once, and is {last}, below the edge at 1."
        highest = f"at most {number(values[top])}, at step {steps[top]}"
        return f"{_capital(name)} stayed below {NEAR:g} in all {count} finite values: it was {highest}, and is {last}."
    at = np.flatnonzero(near)
    ends = f", first at step {steps[at[0]]} and last at step {steps[at[-1]]}" if len(at) > 1 else ""
    return (
        f"{_capital(name)} was at {NEAR:g} or more in {len(at)} of {count} finite values{ends}: its largest is "
        f"{number(values[top])} at step {steps[top]}, its last {last}."
    )


def near_since(values: np.ndarray) -> int | None:
    """Return the first place from which nine in ten of the values to the end are near the edge, or None."""
    near = values >= NEAR
    left = np.arange(len(values), 0, -1)
    shares = near[::-1].cumsum()[::-1] / left
    places = np.flatnonzero(near & (shares >= _MOSTLY) & (left >= _FEWEST))
    return int(places[0]) if places.size else None


def course_sentence(one: Series) -> str:
    """Return how the first known curvature and the first loss moved from their first value to their last."""
    curvatures = {key: one.values[key].finite for key in one.values if key in EDGES or key == "batch_sharpness"}
    losses = {name: points.finite for name, points in one.losses.items()}
    parts = [_capital(f"{symbol(key)} {_moved(points)}") for key, points in _first(curvatures).items()]
    parts += [f"{name} {_moved(points)}" for name, points in _first(losses).items()]
    return f"{'; '.join(parts)}." if parts else "Neither a curvature nor a loss was logged."


def _first(curves: Mapping[str, Points]) -> dict[str, Points]:
    """Return the first curve with points, none where there is none."""
    return dict([(key, points) for key, points in curves.items() if points.steps.size][:1])


def _moved(points: Points) -> str:
    first, last = points.values[0], points.values[-1]
    at = f"at step {points.steps[0]}", f"at step {points.steps[-1]}"
    if len(points.values) == 1:
        return f"was measured once, {measured(points)} {at[0]}"
    errors = np.zeros(1) if points.errors is None else points.errors[[0, -1]]
    unsure = float(np.where(np.isfinite(errors), errors, 0.0).sum())
    change = last - first
    if abs(change) <= max(_SAME * abs(first), unsure):
        verb = "hardly changed between its ends"
    else:
        verb = "rose" if change > 0.0 else "fell"
    moved = f"{verb}, from {number(first)} {at[0]} to {measured(points)} {at[1]}"
    top = int(points.values.argmax())
    if points.values[top] > max(first, last) + max(_SAME * abs(max(first, last)), unsure):
        moved += f", with its largest {number(points.values[top])} at step {points.steps[top]}"
    return moved


def trust_sentence(one: Series) -> str:
    """Return regime and alarms where they were logged, how many values are missing, and how large the errors are."""
    parts = [*_regimes(one), *_missing(one), *_errors(one)]
    return f"{_capital('; '.join(parts))}."


def _regimes(one: Series) -> list[str]:
    regimes = one.values.get("regime", Points(np.empty(0, int), np.empty(0))).finite
    if not regimes.steps.size:
        return []
    since = regimes.steps[np.flatnonzero(np.r_[True, np.diff(regimes.values) != 0.0])[-1]]
    said = [f"the last regime is “{REGIMES[int(regimes.values[-1])]}”, since step {since}"]
    if (alarms := one.values.get("regime_alarm")) is not None:
        at = alarms.steps[alarms.values > 0.0]
        some = f"{at.size} alarm{'s' * (at.size > 1)}, {'the first ' * (at.size > 1)}at step {at[0]}" if at.size else ""
        said.append(f"there {'were' if at.size > 1 else 'was'} {some or 'no alarm'}")
    return said


def _missing(one: Series) -> list[str]:
    measured = {key: points.values for key, points in one.values.items() if key not in ("regime", "regime_alarm")}
    lost = {key: int((~np.isfinite(values)).sum()) for key, values in measured.items()}
    total, count = sum(map(len, measured.values())), sum(lost.values())
    if not total:
        return ["no value of a monitor was logged"]
    if not count:
        return [f"all {total:,} logged values are finite" if total > 1 else "the one logged value is finite"]
    most = max(lost, key=lambda key: lost[key])
    of = f", most of them of {symbol(most)} ({lost[most]} of {len(measured[most])})" if lost[most] < count else ""
    of = of or f", all of {symbol(most)} ({lost[most]} of {len(measured[most])})"
    return [f"{count:,} of {total:,} logged values are NaN or infinite{of}"]


def _errors(one: Series) -> list[str]:
    relative: dict[str, float] = {}
    for key, points in one.values.items():
        known = points.finite
        if known.errors is not None and (usable := np.isfinite(known.errors) & (known.values != 0.0)).any():
            relative[key] = float(np.median(known.errors[usable] / np.abs(known.values[usable])))
    if not relative:
        return ["no errors were logged"]
    worst = max(relative, key=lambda key: relative[key])
    one_of = f"the median relative error of {symbol(worst)} is {_percent(relative[worst])}"
    return [one_of + (", the largest of those logged" if len(relative) > 1 else "")]


def number(value: float, digits: int = 3) -> str:
    """Return a number with some digits."""
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "−∞" if value < 0.0 else "∞"
    mantissa, e, exponent = f"{float(f'{value:.{digits}g}'):g}".replace("-", "−").partition("e")
    return f"{mantissa}·10{exponent.lstrip('+').replace('−0', '−').lstrip('0').translate(_RAISED)}" if e else mantissa


_RAISED = str.maketrans("−0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def measured(points: Points) -> str:
    """Return the last value with its error, to the first digit of the error."""
    value, error = points.values[-1], math.nan if points.errors is None else points.errors[-1]
    if not (np.isfinite(value) and np.isfinite(error) and error > 0.0):
        return number(value)
    digits = math.floor(math.log10(abs(value) or error)) - math.floor(math.log10(error)) + 1
    return f"{number(value, min(max(digits, 1), _MOST_DIGITS))} ± {number(error, 1)}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.2g} %" if share >= 1e-4 else "below 0.01 %"


def _with_edge(key: str) -> str:
    if edge := EDGES.get(key):
        return f"{symbol(key)} over {symbol(edge) if edge == 'two_over_lr' else 'its threshold'}"
    return f"the {symbol(key)}" if key in ("edge_ratio", *SHARES) else f"{symbol(key)} over its edge"


def _capital(text: str) -> str:
    # λ stays small: it is a symbol.
    return text if text.startswith("λ") else text[:1].upper() + text[1:]
