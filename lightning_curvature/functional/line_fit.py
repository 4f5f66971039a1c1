"""A straight line through points, by least squares."""

import math
from typing import NamedTuple

from torch import Tensor


class LineFit(NamedTuple):
    """A line y = slope · x + intercept.

    Attributes:
        slope: NaN where there are fewer than two distinct x.
        standard_error: of the slope, from the scatter about the line; NaN for two points.
        intercept: y at x = 0.
    """

    slope: float
    standard_error: float
    intercept: float


def fit_line(x: Tensor, y: Tensor) -> LineFit:
    """Fit a line to points, (n,) float64 each."""
    centred = x - x.mean() if len(x) else x
    spread = float(centred.square().sum())
    # The mean of equal numbers may round: their spread need not be 0.
    if len(x) < 2 or not spread or bool((x == x[0]).all()):
        return LineFit(math.nan, math.nan, math.nan)
    slope = float(centred @ (y - y.mean())) / spread
    intercept = float(y.mean() - slope * x.mean())
    freedom = len(x) - 2
    scatter = float((y - intercept - slope * x).square().sum())
    return LineFit(slope, math.sqrt(scatter / freedom / spread) if freedom else math.nan, intercept)
