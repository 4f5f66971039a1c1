"""Where batch sharpness settles under an optimizer, as far as that is known."""

import math

from lightning_curvature.functional import sharpness_plateaus
from lightning_curvature.optimizers.stability import stability_rule
from lightning_curvature.optimizers.update import HasParameterGroups


def momentum_plateaus(optimizer: HasParameterGroups) -> tuple[float, float] | None:
    """Return where batch sharpness settles with small and with large mini-batches under momentum.

    None without momentum, where both are 2/η, and where no plateau is known: for optimizers other than torch's SGD,
    for ``maximize=True``, and for groups with momentum of several kinds. η is that of ``stability_rule``, and weight
    decay is left out. See ``sharpness_plateaus`` in :mod:`lightning_curvature.functional`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> momentum_plateaus(torch.optim.SGD([weight], lr=0.5, momentum=0.5))
        (2.0, 6.0)
    """
    settings = _momenta(optimizer)
    if len(settings) != 1:
        return None
    ((momentum, dampening, nesterov),) = settings
    lr = stability_rule(optimizer).lr
    return sharpness_plateaus(lr, momentum, dampening=dampening, nesterov=nesterov) if momentum else None


def plateau_note(optimizer: HasParameterGroups) -> str | None:
    """Return one sentence where batch sharpness does not settle at 2/η, or that is not known; None where it does."""
    settings, name = _momenta(optimizer), type(optimizer).__name__
    if len(settings) == 1:
        if not any(momentum for momentum, *_ in settings):
            return None
        return (
            "under momentum batch sharpness does not settle at 2/η, but at plateau_small_batch where batches are "
            "small, and at plateau_large_batch where they are large."
        )
    index = "StabilityMonitor's index, or at " * (not math.isnan(stability_rule(optimizer).preconditioned))
    return (
        f"2/η is where batch sharpness settles under SGD without momentum, and no such value is known for the {name} "
        f"at hand: look at {index}'update_sharpness'."
    )


def _momenta(optimizer: HasParameterGroups) -> set[tuple[float, float, bool]]:
    """Return momentum, dampening and whether it is Nesterov's of all groups; none where SGD is not what steps."""
    rule = stability_rule(optimizer)
    if math.isnan(rule.hessian) or math.isnan(rule.preconditioned):
        return set()
    return {
        (float(group["momentum"]), float(group["dampening"]) if group["momentum"] else 0.0, bool(group["nesterov"]))
        for group in optimizer.param_groups
    }
