"""Comparison of the quadratic model of an increment with the increment itself."""

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_curvature.arguments import Rule, checked, not_negative, positive, shaped

# NaN where a loss is.
_ROUNDING = not_negative("0.0 is none", finite=False)
_SIGMAS = Rule("give the widths that were compared", above=0.0, empty=True)
_ERRORS = Rule("give the error at each width", least=0.0, finite=False, empty=True)


@checked(true=shaped("..."), model=shaped("...", "evaluate both at the same points"), rounding=_ROUNDING)
def relative_model_error(true: Tensor, model: Tensor, rounding: float = 0.0) -> float:
    r"""Return the relative error of the quadratic model, root mean square over perturbations (and samples).

    .. math:: r = \sqrt{\frac{\sum (f - q)^2}{\sum f^2}}, \qquad
        \left|\sqrt{\Delta_2[f]} - \sqrt{\Delta_2[q]}\right| \le r \sqrt{\Delta_2[f]}

    By the second relation r bounds the relative error of the root of the criterion.

    Args:
        true: f at the perturbations.
        model: q at the same perturbations.
        rounding: largest ``|f|`` that counts as zero.

    Returns:
        r; NaN if f is zero everywhere, infinite if f or q is not finite.

    Example:
        >>> import torch
        >>> relative_model_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        0.1
    """
    true, model = true.double(), model.double()
    square, off = float(true.square().sum()), float((true - model).square().sum())
    if not math.isfinite(square + off):
        return math.inf
    return math.sqrt(off / square) if bool((true.abs() > rounding).any()) else math.nan


@checked(sigmas=_SIGMAS, errors=_ERRORS, tolerance=positive("0.1 accepts an error of 10 %"))
def validated_sigma(sigmas: Sequence[float], errors: Sequence[float], tolerance: float = 0.1) -> float:
    """Return the largest σ at which, and below which, the error of the quadratic model is within the tolerance.

    Args:
        sigmas: σ at which the model was compared, in any order.
        errors: :func:`relative_model_error` at each σ.
        tolerance: largest relative error.

    Returns:
        One of ``sigmas``; NaN if the smallest is not within the tolerance.

    Raises:
        ValueError: unless there is one error for each σ.

    Example:
        >>> validated_sigma([1e-4, 1e-3, 1e-2], [0.001, 0.02, 3.0])
        0.001
    """
    if len(sigmas) != len(errors):
        raise ValueError(
            f"errors must hold one for each of sigmas, got {len(errors)} for {len(sigmas)}: measure both together."
        )
    valid = math.nan
    for sigma, error in sorted(zip(sigmas, errors, strict=True)):
        if not error <= tolerance:  # also NaN
            break
        valid = sigma
    return valid
