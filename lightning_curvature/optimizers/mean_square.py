"""What the index of stability in the mean square must know of an optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curvature.optimizers.stability import momenta, preconditioner, stability_rule
from lightning_curvature.optimizers.update import HasParameterGroups


@dataclass(frozen=True)
class MeanSquareRule:
    """An optimizer near instability in the mean square: drift and noise of each coordinate, in units of the edge.

    Attributes:
        scales: 1/(TP) of each parameter, T the threshold on P^{-1/2}HP^{-1/2}; zero for coordinates that do not move.
        ratios: (1 + β)/(1 − β) of each parameter: how much more noise counts than drift.
        nesterov: β, where all moved parameters have this Nesterov momentum; else None.
    """

    scales: list[Tensor]
    ratios: list[float]
    nesterov: float | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, optimizer: HasParameterGroups, parameters: Sequence[Tensor]) -> "MeanSquareRule":
        """Return the rule of an optimizer with its present settings; weight decay is left out.

        Raises:
            ValueError: for an optimizer that is not known, one that climbs, and groups of which some have Nesterov's
                momentum.
            NotYetSteppedError: a ValueError, before the first step of an adaptive optimizer.
        """
        threshold, settings = stability_rule(optimizer).preconditioned, momenta(optimizer, parameters)
        scales = [(p.reciprocal_() / threshold) for p in preconditioner(optimizer, parameters)]
        if not threshold > 0.0:
            raise ValueError(f"optimizer must have a threshold of stability, got {threshold}: see the spectrum's notes")
        nesterov = {beta for beta, is_nesterov in settings if is_nesterov and beta}
        if nesterov and len({*settings}) > 1:
            raise ValueError(
                f"optimizer must have one momentum in all groups where it is Nesterov's, got {sorted({*settings})}: "
                "give the groups one"
            )
        return cls(scales, [(1.0 + beta) / (1.0 - beta) for beta, _ in settings], nesterov.pop() if nesterov else None)
