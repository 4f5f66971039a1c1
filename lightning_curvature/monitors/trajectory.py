"""Evaluations of the checkpoints of a run, over its steps."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_curvature.monitors.evaluation import COLUMNS, Evaluation, imported
from lightning_curvature.reporting.points import draw_curves
from lightning_curvature.reporting.tables import text_table

_COLUMNS = ("step", *COLUMNS, "checkpoint")


@dataclass(frozen=True)
class Trajectory:
    """Evaluations of checkpoints, in the order of their optimizer steps.

    Attributes:
        steps: optimizer steps before each checkpoint, ascending.
        checkpoints: their paths.
        evaluations: one for each.

    Example:
        >>> one, other = Evaluation({"lambda_max": 8.0}), Evaluation({"lambda_max": 12.5})
        >>> trajectory = Trajectory((0, 100), ("first.ckpt", "last.ckpt"), (one, other))
        >>> trajectory.curve("lambda_max")
        [8.0, 12.5]
        >>> print(trajectory)
        step  lambda_max
        0              8
        100         12.5
    """

    steps: tuple[int, ...]
    checkpoints: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]

    def curve(self, key: str) -> list[float]:
        """Return the value of a key at each checkpoint, NaN where it has none."""
        return [one.values.get(key, math.nan) for one in self.evaluations]

    @property
    def _drawn(self) -> list[str]:
        return list(dict.fromkeys(key for one in self.evaluations for key in one.drawn))

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for step, path, one in zip(self.steps, self.checkpoints, self.evaluations, strict=True):
            yield from ((step, *row, path) for row in one.rows())

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each step and key, and the columns of an evaluation's.

        ``frame["value"].unstack()`` has a column for each key.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        pandas = imported("pandas", "to_pandas()")
        return pandas.DataFrame(self._rows(), columns=_COLUMNS).set_index(["step", "key"])

    def to_csv(self, path: Path | str) -> None:
        """Write a line for each step and key, with the columns of :meth:`to_pandas`; the path may be a URL."""
        with get_filesystem(path).open(str(path), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(["" if value != value else value for value in row] for row in self._rows())

    def plot(self, *keys: str) -> Any:
        """Return a matplotlib figure of values over the steps, with bands of errors, and edges where known.

        Args:
            *keys: which values; default: all but counts, flags and edges.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        imported("matplotlib", "plot()")
        names = keys or self._drawn
        errors = {key: [one.errors.get(key, math.nan) for one in self.evaluations] for key in names}
        edges = {key: [one.edges.get(key, math.nan) for one in self.evaluations] for key in names}
        return draw_curves(self.steps, {key: self.curve(key) for key in names}, errors, edges)

    def __str__(self) -> str:
        """Return a table with a line for each checkpoint, and the values without counts, flags and edges."""
        columns = [[f"{value:.4g}" for value in self.curve(key)] for key in self._drawn]
        return text_table(("step", *self._drawn), zip(map(str, self.steps), *columns, strict=True))
