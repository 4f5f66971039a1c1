"""The result of an evaluation by hand, of one shape for every monitor."""

import importlib
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lightning_curvature.monitors.protocol import Result
from lightning_curvature.reporting.names import is_diagnostic, is_edge, split_errors
from lightning_curvature.reporting.points import draw_points
from lightning_curvature.reporting.tables import text_table

# Columns of tables, and the attributes that are mappings by key beside the values.
COLUMNS = ("key", "value", "error", "edge", "reason")
_BY_KEY = ("errors", "edges", "reasons")


@dataclass(frozen=True)
class Evaluation:
    """Values of one module on given data: the result of ``evaluate`` of every monitor.

    Attributes:
        values: by key: what the monitor logs, with thresholds, counts and flags, and without errors.
        errors: absolute errors by key, of the values that have one; standard errors where they are known.
        edges: the edge of stability of each value that has one, by the key of the value.
        reasons: why a value is NaN, by key.
        result: the result of the monitor's own kind, with tables and eigenvalues of all sorts.

    Example:
        >>> evaluation = Evaluation({"lambda_max": 12.5}, {"lambda_max": 0.01}, {"lambda_max": 20.0}, {}, None)
        >>> print(evaluation)
        key         value  error  edge
        lambda_max   12.5   0.01    20
    """

    values: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    edges: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    result: Any = None

    @classmethod
    def of(cls, result: Result, numbers: Mapping[str, float], edges: Mapping[str, str | None]) -> "Evaluation":
        """Return the evaluation of a result with all numbers, errors among them, and the keys of the edges."""
        values, errors = split_errors(numbers)
        known = {key: 1.0 if edge is None else values.get(edge) for key, edge in edges.items() if key in values}
        reasons = {key: _reason(key, result.reasons) for key, value in values.items() if math.isnan(value)}
        return cls(
            values,
            errors,
            {key: edge for key, edge in known.items() if edge is not None},
            {key: reason for key, reason in reasons.items() if reason},
            result,
        )

    @classmethod
    def joined(cls, evaluations: Sequence["Evaluation"]) -> "Evaluation":
        """Return the evaluations of several monitors as one, whose ``result`` is the tuple of theirs.

        Raises:
            ValueError: if two of them give different values of one key.
        """
        if len(evaluations) == 1:
            return evaluations[0]
        values: dict[str, float] = {}
        for one in evaluations:
            for key, value in one.values.items():
                if key in values and not (values[key] == value or math.isnan(value)):
                    raise ValueError(
                        f"monitors must give different values, got {key!r} of two of them, {values[key]:g} and "
                        f"{value:g}: evaluate them one after the other."
                    )
                values[key] = value
        merged = (dict(ChainMap(*(dict(getattr(e, name)) for e in evaluations))) for name in _BY_KEY)
        errors, edges, reasons = merged
        return cls(values, errors, edges, reasons, tuple(e.result for e in evaluations))

    def rows(self) -> list[tuple[str, float, float, float, str]]:
        """Return key, value, error, edge and reason of each value; NaN and "" where there is none."""
        missing = (math.nan, math.nan, "")
        columns = [getattr(self, name) for name in _BY_KEY]
        return [
            (key, value, *(column.get(key, none) for column, none in zip(columns, missing, strict=True)))
            for key, value in self.values.items()
        ]

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each key, and the columns value, error, edge and reason.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        return imported("pandas", "to_pandas()").DataFrame(self.rows(), columns=COLUMNS).set_index("key")

    @property
    def drawn(self) -> dict[str, float]:
        """The values that are worth a picture: no counts, flags and edges."""
        return {key: value for key, value in self.values.items() if not is_diagnostic(key) and not is_edge(key)}

    def plot(self) -> Any:
        """Return a matplotlib figure: the picture of the result where it has one, else values with error bars.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        imported("matplotlib", "plot()")
        own = self.result.draw() if hasattr(self.result, "draw") else None
        return own or draw_points(self.drawn, self.errors, self.edges)

    def __str__(self) -> str:
        """Return a table: first values with their errors and edges, then counts, flags and bounds."""
        rows = []
        for key in sorted(self.values, key=is_diagnostic):
            numbers = (f"{self.values[key]:.5g}", _shown(self.errors.get(key)), _shown(self.edges.get(key)))
            rows.append((key, *numbers, self.reasons.get(key, "")))
        return text_table(COLUMNS, rows, words=("reason",))


def imported(package: str, what: str) -> ModuleType:
    """Return a package that is optional, or say what needs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: run `pip install {package}`, or take .values."
        ) from error


def _shown(number: float | None) -> str:
    return "" if number is None or math.isnan(number) else f"{number:.4g}"


def _reason(key: str, reasons: Mapping[str, str]) -> str:
    """Return the reason of a key, or of the quantity that it belongs to."""
    names = [name for name in reasons if key == name or key.startswith(f"{name}_")]
    return reasons[max(names, key=len)] if names else ""
