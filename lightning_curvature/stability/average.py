"""A moving average of the parameters, one pass over them a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.distributed.shards import local


class MovingAverage:
    r"""The mean of the last θ, :math:`\propto \sum_k \beta^k \theta_{t-k}`, of this rank's part of each parameter.

    Its weights add up to 1 from the first step on, so that nothing of the start stays in it.

    Args:
        decay: β.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.steps = 0
        self._known: list[int] = []
        self._mean: list[Tensor] = []

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor]) -> bool:
        """Take up the parameters before a step; begin anew where they are other ones, and return whether that is so."""
        now = [local(p).detach() for p in parameters]
        known, wide = [id(p) for p in parameters], [t.to(torch.promote_types(t.dtype, torch.float32)) for t in now]
        other = bool(self._known) and known != self._known
        if known != self._known or any(m.shape != t.shape for m, t in zip(self._mean, now, strict=True)):
            self._known, self.steps = known, 0
            self._mean = [t.clone() for t in wide]
        self.steps += 1
        weight = (1.0 - self._decay) / (1.0 - self._decay**self.steps)
        if self.steps > 1:
            torch._foreach_lerp_(self._mean, wide, weight)
        return other

    def is_ready(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it has seen these parameters for as many steps as it averages over."""
        return [id(p) for p in parameters] == self._known and self.steps >= int(1.0 / (1.0 - self._decay))

    def displacement(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return θ minus the average, of this rank's part of each parameter."""
        return [local(p).detach().to(m.dtype) - m for p, m in zip(parameters, self._mean, strict=True)]
