"""Logged curves in their groups: values with errors and edges, diagnostics, shares of the edge, values by module."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_curvature.arguments import sentence
from lightning_curvature.report.reading import Curve, Run
from lightning_curvature.reporting.names import AVERAGE, by_module, full_name, is_diagnostic, over_edge

# Keys as the field writes them, in the order of tables; other keys stand as they are, behind these.
SYMBOLS: dict[str, str] = {
    "edge_ratio": "edge ratio",
    "stability_index": "stability index",
    "stability_index_drift": "drift of the index",
    "stability_index_noise": "noise of the index",
    "lambda_max": "λ_max",
    "preconditioned_lambda_max": "preconditioned λ_max",
    "gauss_newton_lambda_max": "λ_max(G)",
    "lambda_min": "λ_min",
    "hessian_trace": "tr H",
    "lambda_dir": "λ_dir",
    "lambda_fd": "λ_FD",
    "lambda_kl": "λ_KL",
    "lambda_gn": "λ_GN",
    "critical_sharpness": "critical sharpness",
    "lambda_osc": "λ_osc",
    "batch_sharpness": "batch sharpness",
    "step_sharpness": "step sharpness",
    "modified_batch_sharpness": "modified batch sharpness",
    "update_sharpness": "update sharpness",
    "ias": "IAS",
    "gni": "GNI",
    "lambda_gen": "λ_gen",
    "lambda_max_b": "λ_max of mini-batches",
    "second_moment_contraction": "second-moment contraction",
    "headroom": "headroom",
    "stability_headroom": "stability headroom",
    "two_over_lr": "2/η",
    "oscillation_edge": "edge of λ_osc",
    "lambda_max_threshold": "threshold of λ_max",
    "preconditioned_lambda_max_threshold": "threshold of the preconditioned λ_max",
    "plateau_small_batch": "plateau of small batches",
    "plateau_large_batch": "plateau of large batches",
    "descent": "gᵀΔθ",
    "update_norm": "‖Δθ‖",
    "oscillation_ratio": "λ_osc over its edge",
    "oscillation_cosine": "cosine of the oscillation",
    "oscillation_growth": "growth of the oscillation",
}
# The edge of each value, by key. That of sharpness along mini-batches depends on the optimizer: the monitor knows it.
EDGES: dict[str, str] = {
    **dict.fromkeys(("lambda_dir", "lambda_fd", "lambda_kl", "lambda_gn", "critical_sharpness"), "two_over_lr"),
    "lambda_osc": "oscillation_edge",
    "lambda_max": "lambda_max_threshold",
    "preconditioned_lambda_max": "preconditioned_lambda_max_threshold",
}
# Values whose edge is 1.
SHARES = ("stability_index",)
_LOSS = re.compile(r"(^|[/_.\s-])loss($|[/_.\s-])", re.IGNORECASE)
_LARGEST = re.compile(r"lambda_(\d+)")


@dataclass(frozen=True)
class Points:
    """Values of one key with their errors.

    Attributes:
        steps: (points,) int.
        values: (points,).
        errors: of the values, in their units, NaN where not known; None where none were logged.
    """

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray | None = None

    @property
    def finite(self) -> "Points":
        """Those points whose value is finite."""
        known = np.isfinite(self.values)
        return Points(self.steps[known], self.values[known], None if self.errors is None else self.errors[known])


@dataclass(frozen=True)
class Series:
    """All curves of one run that a report draws.

    Attributes:
        run: where they come from.
        prefix: of the monitors.
        values: by key, with edges and thresholds among them.
        diagnostics: by key: errors, counts and flags.
        shares: values over their edges, by key.
        modules: by key, then by module.
        losses: by logged name.
    """

    run: Run
    prefix: str
    values: Mapping[str, Points]
    diagnostics: Mapping[str, Points]
    shares: Mapping[str, Points]
    modules: Mapping[str, Mapping[str, Points]]
    losses: Mapping[str, Points] = field(default_factory=dict)


def series_of(run: Run, prefix: str) -> Series:
    """Group the curves of a run by their names; old logs have diagnostics beside the values, and no shares."""
    values: dict[str, Curve] = {}
    diagnostics: dict[str, Curve] = {}
    for name, curve in run.curves.items():
        key = name.rpartition("/")[2]
        if name in (f"{prefix}/{key}", full_name(prefix, key)):
            (diagnostics if is_diagnostic(key) else values)[key] = curve
    points = {key: _with_errors(key, values[key], diagnostics) for key in in_order(values)}
    modules: dict[str, dict[str, Curve]] = {}
    for name, curve in run.curves.items():
        key, slash, module = name.removeprefix(f"{by_module(prefix)}/").partition("/")
        if slash and name.startswith(f"{by_module(prefix)}/"):
            modules.setdefault(key, {})[module] = curve
    by_key = {key: _of_modules(key, modules) for key in modules if not is_diagnostic(key)}
    others = {name: curve for name, curve in run.curves.items() if _is_loss(name) and name.rpartition("/")[0] != prefix}
    losses = {name: Points(curve.steps, curve.values) for name, curve in others.items()}
    return Series(
        run=run,
        prefix=prefix,
        values=points,
        diagnostics={key: Points(curve.steps, curve.values) for key, curve in diagnostics.items()},
        shares={key: share for key in in_order(points) if (share := _share(run, prefix, key, points)) is not None},
        modules=by_key,
        losses=losses,
    )


def all_series(runs: Sequence[Run], prefix: str) -> list[Series]:
    """Return the series of runs.

    Raises:
        ValueError: if no run has values of the prefix.
    """
    found = [series_of(run, prefix) for run in runs]
    if not any(one.values or one.modules for one in found):
        others = prefixes(runs)
        if others:
            raise sentence("--prefix", "be one of the logged values", repr(prefix), f"try {' or '.join(others)}")
        raise sentence(
            "DIR", "hold values of a monitor", "none in its logs", "add a monitor to the Trainer's callbacks"
        )
    return found


def prefixes(runs: Iterable[Run]) -> list[str]:
    """Return the prefixes under which values of monitors were logged."""
    pairs = [name.rpartition("/") for run in runs for name in run.curves]
    return sorted({prefix for prefix, _, key in pairs if key in SYMBOLS and not prefix.endswith("_over_edge")})


def in_order(keys: Iterable[str]) -> list[str]:
    """Return keys in the order of tables; λ_2, λ_3, … stand behind λ_max."""
    places = {key: place for place, key in enumerate(SYMBOLS)}

    def place(key: str) -> tuple[int, int, str]:
        largest = _LARGEST.fullmatch(key)
        return (places["lambda_max"], int(largest[1]), key) if largest else (places.get(key, len(places)), 0, key)

    return sorted(keys, key=place)


def symbol(key: str) -> str:
    """Return the key as the field writes it."""
    largest = _LARGEST.fullmatch(key)
    if key.endswith(AVERAGE):
        return f"{symbol(key.removesuffix(AVERAGE))}, running mean"
    return f"λ_{largest[1]}" if largest else SYMBOLS.get(key, key)


def _with_errors(key: str, curve: Curve, diagnostics: Mapping[str, Curve]) -> Points:
    """Join values with their errors: ``_stderr`` is in the units of the value, ``_error`` relative to it."""
    for ending, scale in (("_stderr", 1.0), ("_error", np.abs(curve.values))):
        if (error := diagnostics.get(f"{key}{ending}")) is not None:
            with np.errstate(invalid="ignore"):  # infinity times 0
                return Points(curve.steps, curve.values, _at(curve.steps, error) * scale)
    return Points(curve.steps, curve.values)


def _at(steps: np.ndarray, curve: Curve) -> np.ndarray:
    """Return the values of a curve at some steps; NaN where it has none."""
    known = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    return np.array([known.get(step, np.nan) for step in steps.tolist()], dtype=np.float64)


def _share(run: Run, prefix: str, key: str, points: Mapping[str, Points]) -> Points | None:
    """Return a value over its edge as it was logged, or the quotient; the edge ratio is one by itself."""
    one = points[key]
    if key == "edge_ratio" or key in SHARES:
        return one
    logged, edge = run.curves.get(over_edge(prefix, key)), points.get(EDGES.get(key, ""))
    if logged is not None:
        shares = _at(one.steps, logged)
    elif edge is not None:
        shares = _quotient(one.values, _at(one.steps, Curve(edge.steps, edge.values)))
    else:
        return None
    scale = _quotient(shares, one.values)
    return Points(one.steps, shares, None if one.errors is None else one.errors * np.abs(scale))


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above / below


def _of_modules(key: str, modules: Mapping[str, Mapping[str, Curve]]) -> dict[str, Points]:
    errors = modules.get(f"{key}_stderr", {})
    return {
        module: Points(curve.steps, curve.values, _at(curve.steps, errors[module]) if module in errors else None)
        for module, curve in modules[key].items()
    }


def _is_loss(name: str) -> bool:
    return _LOSS.search(name) is not None
