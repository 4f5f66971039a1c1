"""Straight lines through points by least squares, and the power law of a decay."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked, sentence

_SIZES = Rule("count the samples before the new one", least=1, empty=True)
_VALUES = Rule("measure one at each k", finite=False, empty=True)


class LineFit(NamedTuple):
    """A line y = slope · x + intercept.

    Attributes:
        slope: NaN for fewer than two distinct x.
        standard_error: of the slope, from the scatter about the line; NaN for two points.
        intercept: y at x = 0.
    """

    slope: float
    standard_error: float
    intercept: float


class DecaySlope(LineFit):
    """A power law fitted to a decay: ``slope`` is the exponent of k + 1, ``intercept`` the log of the factor.

    Squared criteria of independent samples have the exponent −2.
    """


def fit_line(x: Tensor, y: Tensor) -> LineFit:
    """Return the line through points, (n,) float64 each."""
    centred = x - x.mean() if len(x) else x
    spread = float(centred.square().sum())
    # The mean of equal numbers can round: their spread need not be 0.
    if len(x) < 2 or not spread or bool((x == x[0]).all()):
        return LineFit(math.nan, math.nan, math.nan)
    slope = float(centred @ (y - y.mean())) / spread
    intercept = float(y.mean() - slope * x.mean())
    freedom = len(x) - 2
    scatter = float((y - intercept - slope * x).square().sum())
    return LineFit(slope, math.sqrt(scatter / freedom / spread) if freedom else math.nan, intercept)


@checked(sample_sizes=_SIZES, values=_VALUES)
def decay_slope(sample_sizes: Sequence[int], values: Sequence[float]) -> DecaySlope:
    r"""Return the fit of :math:`\log \Delta = s \log(k+1) + \text{const}` by least squares.

    Args:
        sample_sizes: k.
        values: Δ at each k; those not positive and finite are left out. The fit is NaN if fewer than two remain.

    Raises:
        ValueError: unless there is one value for each k, at least 1.

    Source: Curvature-aligned probing (2026), figure 2, and theorem 2 for the exponent −2.

    Example:
        >>> round(decay_slope([1, 3, 7], [1.0, 0.25, 0.0625]).slope, 9)
        -2.0
    """
    if len(values) != len(sample_sizes):
        counts = f"{len(values)} for {len(sample_sizes)}"
        raise sentence("values", "hold one for each of sample_sizes", counts, "measure both together")
    points = [
        (math.log(k + 1), math.log(value))
        for k, value in zip(sample_sizes, values, strict=True)
        if value > 0.0 and math.isfinite(value)
    ]
    return DecaySlope(*fit_line(*torch.tensor(points, dtype=torch.float64).reshape(-1, 2).unbind(-1)))
