"""Metric of stabilization: the mean power of the increment by one more sample, over random perturbations."""

from typing import Any

from torch import Tensor

from lightning_curvature.arguments import checked, positive
from lightning_curvature.functional import add_to_moments
from lightning_curvature.metrics.sharpness import RatioOfMeans


class StabilizationCriterion(RatioOfMeans):
    r"""Criterion of stabilization by Monte Carlo: the mean of :math:`|L_{k+1}(w_s) - L_k(w_s)|^p` over points w_s.

    .. math:: \Delta_p(k+1) = \operatorname{E}_{w \sim q} |L_{k+1}(w) - L_k(w)|^p

    ``update`` takes ``increments`` at S independent perturbations, (S,), or (S, candidates) for several candidates of
    the next sample, whose mean is one draw; :func:`~lightning_curvature.functional.increment` makes them. ``compute``
    gives the mean, a float64 scalar; see :class:`RatioOfMeans` for ``standard_error`` and ``count``, over the
    perturbations. States merge over ranks.

    Args:
        order: p.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: if p is not positive, or ``increments`` is a scalar.

    Source: Curvature-aligned probing (2026), eq. 1 and section 5 (direct and quadratic Monte Carlo).

    Example:
        >>> import torch
        >>> metric = StabilizationCriterion()
        >>> metric.update(torch.tensor([0.1, -0.3]))
        >>> metric.update(torch.tensor([[0.1, 0.1]]))  # one perturbation, two samples
        >>> metric.compute(), metric.count()
        (tensor(0.0367, dtype=torch.float64), 3)
    """

    @checked(order=positive("2 is the mean square"))
    def __init__(self, order: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.order = order

    @checked()
    def update(self, increments: Tensor) -> None:  # type: ignore[override]
        """Add perturbations."""
        if increments.ndim == 0:
            raise ValueError("increments must have a dimension of draws, got a scalar: give (S,) or (S, candidates).")
        if not increments.numel():
            return
        powers = increments.detach().to(self.moments).abs() ** self.order
        draws = powers.reshape(len(powers), -1).mean(1)
        self.moments = add_to_moments(self.moments, draws)
