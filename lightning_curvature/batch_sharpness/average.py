"""Running means of mini-batch sharpness over the last measurements of a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_curvature.reporting.names import AVERAGE

# End of the key of the standard error of a mean.
ERROR = f"{AVERAGE}_stderr"


class RunningMeans:
    """Means of values over the last measurements that gave them, with the standard errors of the draws.

    A value without a standard error, of a single batch, has in its mean that of the scatter over the measurements.

    Args:
        over: most measurements of a mean.
    """

    def __init__(self, over: int) -> None:
        self._over = over
        self._last: dict[str, list[tuple[float, float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the last values with their standard errors, by key."""
        return {key: [list(pair) for pair in pairs] for key, pairs in self._last.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the last values of a checkpoint."""
        self._last = {key: [(value, error) for value, error in pairs][-self._over :] for key, pairs in state.items()}

    def add(self, values: Mapping[str, float], keys: Sequence[str]) -> dict[str, float]:
        """Add the values of a measurement, and return means and standard errors by key; NaN changes no mean."""
        found = {}
        for key in keys:
            pairs = self._last.setdefault(key, [])
            if math.isfinite(values[key]):
                pairs.append((values[key], values[f"{key}_stderr"]))
                del pairs[: -self._over]
            found[f"{key}{AVERAGE}"], found[f"{key}{ERROR}"] = _mean(pairs)
        return found


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not pairs:
        return math.nan, math.nan
    count, mean = len(pairs), math.fsum(value for value, _ in pairs) / len(pairs)
    variance = math.fsum(error * error for _, error in pairs) / count**2
    if math.isnan(variance) and count > 1:
        variance = math.fsum((value - mean) ** 2 for value, _ in pairs) / (count * (count - 1))
    return mean, math.sqrt(variance)
