"""Metrics of the curvature along the true update."""

from typing import Any

import torch
from torch import Tensor

from lightning_curvature.arguments import checked, not_negative
from lightning_curvature.functional import Likelihood, directional_curvature, kl_divergence, output_quadratic_form
from lightning_curvature.functional import headroom as _headroom
from lightning_curvature.functional.directional import (
    EPSILON,
    FACTOR,
    LR,
    SCALE,
    Scalar,
    divergence_quadratic,
    finite_difference_forms,
)
from lightning_curvature.functional.likelihoods import LIKELIHOOD, OUTPUTS, WEIGHTS
from lightning_curvature.metrics.model import CurvatureMetric, as_draws

_WEIGHT = not_negative("1 counts every step alike")


class DirectionalCurvature(CurvatureMetric):
    r"""Curvature along the optimizer's steps as a ratio of weighted sums.

    .. math:: \lambda = \frac{\sum w\, d^\top H d / \eta^2}{\sum w\, g^\top d / \eta}

    Reset after every step, it is λ_dir of that step, merged over the ranks, each with its share of the data. Without a
    reset it is the generalized directional curvature along the trajectory,

    .. math:: \lambda_{\text{gen}} =
        \frac{\operatorname{tr}(H\, \mathbb E[\Delta\theta\Delta\theta^\top])}{g^\top \mathbb E[\Delta\theta]}

    ``update`` takes ``quadratic`` (dᵀHd), ``descent`` (gᵀd), ``lr`` (η; 1 gives the unit-free s with edge 2) and
    ``weight``; ``compute`` gives λ, in units of 1/η with the edge 2/η, NaN where Σ gᵀd ≤ 0.

    Source: Directional curvature (2026), eqs. 1 and 10.

    Example:
        >>> metric = DirectionalCurvature()
        >>> metric.update(quadratic=0.5, descent=1.0, lr=0.25)
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    numerator: Tensor
    denominator: Tensor
    weight: Tensor
    lr_sum: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("numerator", "denominator", "weight", "lr_sum"):
            # float64 keeps the digits of differences of losses and of sums over a trajectory.
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @checked(lr=LR, weight=_WEIGHT)
    def update(self, quadratic: Scalar, descent: Scalar, lr: Scalar = 1.0, weight: Scalar = 1.0) -> None:
        """Add one step: dᵀHd, gᵀd, η and the weight of its data; or several, (n,) each."""
        quadratic, descent, lr, weight = as_draws(
            self.device, quadratic=quadratic, descent=descent, lr=lr, weight=weight
        )
        self.numerator = self.numerator + (weight * quadratic / lr**2).sum()
        self.denominator = self.denominator + (weight * descent / lr).sum()
        self.weight = self.weight + weight.sum()
        self.lr_sum = self.lr_sum + (weight * lr).sum()

    def compute(self) -> Tensor:
        """Return λ."""
        return directional_curvature(self.numerator, self.denominator)

    def headroom(self) -> Tensor:
        """Return (2/η)/λ at the mean learning rate of the steps of all ranks, which must call it; 1 is the edge."""
        with self._over_ranks():
            return _headroom(self.numerator * self.lr_sum / self.weight, self.denominator)


class FiniteDifferenceCurvature(DirectionalCurvature):
    r"""Finite-difference estimate λ_FD of the directional curvature; two extra forwards a step.

    ``update`` takes the arguments of :func:`~lightning_curvature.functional.finite_difference_curvature` and a
    ``weight``.

    Source: Directional curvature (2026), eq. 5.

    Example:
        >>> metric = FiniteDifferenceCurvature()
        >>> metric.update(loss_plus=1.25, loss=1.0, loss_minus=0.85, epsilon=1.0)  # dᵀHd = 0.1, gᵀd = 0.2
        >>> round(metric.compute().item(), 6)
        0.5
    """

    @checked(epsilon=EPSILON, lr=LR, weight=_WEIGHT)
    def update(  # type: ignore[override]
        self,
        loss_plus: Scalar,
        loss: Scalar,
        loss_minus: Scalar,
        epsilon: Scalar,
        lr: Scalar = 1.0,
        descent: Scalar | None = None,
        weight: Scalar = 1.0,
    ) -> None:
        """Add one step."""
        super().update(*finite_difference_forms(loss_plus, loss, loss_minus, epsilon, descent), lr, weight)


class KLCurvature(DirectionalCurvature):
    r"""KL estimate λ_KL of the curvature; one extra forward a step.

    ``update`` takes the outputs at θ and at θ−εd, (..., C), ε, ``descent`` and η of
    :func:`~lightning_curvature.functional.kl_curvature`, a ``mask`` of the positions, (...), and a ``weight``.

    Args:
        likelihood: "categorical", "gaussian" or "bernoulli".
        scale: the loss as a multiple of the mean negative log-likelihood of a position.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown likelihood.

    Source: Directional curvature (2026), eq. 8.

    Example:
        >>> metric = KLCurvature(likelihood="gaussian")
        >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2), epsilon=2.0, descent=0.25)
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @checked(likelihood=LIKELIHOOD, scale=SCALE)
    def __init__(self, likelihood: Likelihood = "categorical", scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.likelihood = likelihood
        self.scale = scale

    @checked(outputs=OUTPUTS, shifted_outputs=OUTPUTS, epsilon=EPSILON, lr=LR, mask=WEIGHTS, weight=_WEIGHT)
    def update(  # type: ignore[override]
        self,
        outputs: Tensor,
        shifted_outputs: Tensor,
        epsilon: Scalar,
        descent: Scalar,
        lr: Scalar = 1.0,
        mask: Tensor | None = None,
        weight: Scalar = 1.0,
    ) -> None:
        """Add one step."""
        divergence = kl_divergence(outputs, shifted_outputs, self.likelihood, mask).double()
        super().update(divergence_quadratic(divergence, epsilon, self.scale), descent, lr, weight)


class GaussNewtonCurvature(KLCurvature):
    r"""Gauss–Newton curvature λ_GN from the tangent u = J d of the outputs; no ε.

    ``update`` takes outputs and tangent, (..., C), ``descent`` and η of
    :func:`~lightning_curvature.functional.gauss_newton_curvature`, a ``mask`` and a ``weight``. Arguments as for
    :class:`KLCurvature`.

    Source: Directional curvature (2026), eqs. 11-13.

    Example:
        >>> metric = GaussNewtonCurvature(likelihood="gaussian")
        >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2), descent=0.5)
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    @checked(outputs=OUTPUTS, tangent=OUTPUTS, lr=LR, mask=WEIGHTS, weight=_WEIGHT)
    def update(  # type: ignore[override]
        self,
        outputs: Tensor,
        tangent: Tensor,
        descent: Scalar,
        lr: Scalar = 1.0,
        mask: Tensor | None = None,
        weight: Scalar = 1.0,
    ) -> None:
        """Add one step."""
        quadratic = output_quadratic_form(outputs, tangent, self.likelihood, mask).double()
        DirectionalCurvature.update(self, self.scale * quadratic, descent, lr, weight)


class CriticalSharpness(DirectionalCurvature):
    r"""Critical sharpness 2/η_c; at the learning rate η_c a step would begin to raise the loss.

    ``update`` takes ``critical_factor`` (η_c/η), η and a ``weight``; over several steps the value is
    :math:`2 \sum w / \sum w\, \eta_c`. A NaN factor, of a step without a boundary, makes the value NaN.

    Source: Kalra et al. 2026 (arXiv 2601.16979).

    Example:
        >>> metric = CriticalSharpness()
        >>> metric.update(critical_factor=4.0, lr=0.25)
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    @checked(critical_factor=FACTOR, lr=LR, weight=_WEIGHT)
    def update(self, critical_factor: Scalar, lr: Scalar = 1.0, weight: Scalar = 1.0) -> None:  # type: ignore[override]
        """Add one step."""
        # With dᵀHd = 2η² and gᵀd = η·η_c the ratio of the base class is Σ 2w / Σ w η_c.
        factor, lr = as_draws(self.device, critical_factor=critical_factor, lr=lr)
        super().update(2.0 * lr**2, factor * lr**2, lr, weight)
