"""A logger that keeps all values, so that a script can print and draw them at its end."""

from typing import Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


class CurveLogger(Logger):
    """A Lightning logger in memory: one curve a key."""

    def __init__(self) -> None:
        super().__init__()
        self._points: dict[str, dict[int, float]] = {}

    @property
    def name(self) -> str:
        """Name of the logger; nothing is written under it."""
        return "curves"

    @property
    def version(self) -> str:
        """Version of the logger; nothing is written under it."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are not curves."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep the values of one step."""
        for key, value in metrics.items():
            self._points.setdefault(key, {})[step or 0] = float(value)

    def curve(self, key: str) -> Curve:
        """Steps and values logged under ``key``, in order of steps."""
        points = sorted(self._points.get(key, {}).items())
        return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points])
