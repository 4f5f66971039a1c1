"""Metric of sample growth: the mean power of the increment of one more sample, over draws of a probe."""

from typing import Any

import torch
from torch import Tensor

from lightning_curvature.functional import merge_moments
from lightning_curvature.metrics.sharpness import RatioOfMeans


class StabilizationCriterion(RatioOfMeans):
    r"""Criterion of sample growth by Monte Carlo: the mean of :math:`|L_{k+1}(w_s) - L_k(w_s)|^p` over probes w_s.

    .. math:: \Delta_p(k+1) = \operatorname{E}_{w \sim q} |L_{k+1}(w) - L_k(w)|^p

    ``update`` takes ``increments`` of S independent probes, (S,), or (S, candidates) where several samples stand for
    the next one: their mean is what a probe gives. :func:`~lightning_curvature.functional.increment` makes them of a
    loss and a mean loss. ``compute`` gives the mean, a float64 scalar; see :class:`RatioOfMeans` for ``standard_error``
    and ``count``, over the probes. States of several ranks merge to those of all probes together.

    Args:
        order: p.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if p is not positive, or ``increments`` have no dimension of probes.

    Source: P1, eq. 1 and section 5 (direct and quadratic Monte Carlo).

    Example:
        >>> metric = StabilizationCriterion()
        >>> metric.update(torch.tensor([0.1, -0.3]))
        >>> metric.update(torch.tensor([[0.1, 0.1]]))  # one probe, two samples
        >>> metric.compute(), metric.count()
        (tensor(0.0367, dtype=torch.float64), 3)
    """

    def __init__(self, order: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not order > 0.0:
            raise ValueError(f"order must be positive, got {order}: 2 is the mean square.")
        self.order = order

    def update(self, increments: Tensor) -> None:  # type: ignore[override]
        """Add probes."""
        if increments.ndim == 0:
            raise ValueError("increments must have a dimension of probes, got a scalar: give (S,) or (S, candidates).")
        if not increments.numel():
            return
        powers = increments.detach().to(self.moments).abs() ** self.order
        draws = powers.reshape(len(powers), -1).mean(1)
        own = torch.zeros_like(self.moments)
        own[0], own[1], own[2] = len(draws), draws.mean(), 1.0
        own[3] = (draws - own[1]).square().sum()
        self.moments = merge_moments(torch.stack([self.moments, own]))
