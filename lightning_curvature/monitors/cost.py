"""What a measurement costs before there is a fit: in forward+backwards, by the clock."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.price import now, short

_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Cost of a measurement.

    Attributes:
        seconds: of a first measurement, without reading data; later ones of eigenvalues take a fifth to a half, since
            they start from the last ones.
        forward_backward: seconds of a forward and backward of one batch.

    Example:
        >>> print(Cost(seconds=0.3, forward_backward=0.02))
        a measurement takes 0.3 s, the time of 15 forward+backwards of a batch: one every 150 steps adds 10 %
    """

    seconds: float
    forward_backward: float

    @property
    def forward_backwards(self) -> float:
        """The cost in forward+backwards of one batch."""
        return self.seconds / self.forward_backward

    def interval(self, overhead: float) -> int:
        """Return the least ``every_n_train_steps`` at which measurements add at most a share of the steps' time.

        A step is taken to be one forward+backward.

        Args:
            overhead: the share, as ``max_overhead``.
        """
        return max(1, round(self.forward_backwards / overhead))

    def __str__(self) -> str:
        """Return a sentence."""
        return (
            f"a measurement takes {short(self.seconds)} s, the time of {short(self.forward_backwards)} "
            f"forward+backwards of a batch: one every {self.interval(0.1)} steps adds 10 %"
        )


def forward_backward(trainer: pl.Trainer, loss: ProbeLoss, batch: Any, parameters: Sequence[Tensor]) -> float:
    """Return the seconds of a forward and backward of a batch: the median of a few, after one that warms up."""
    times, device = [], trainer.strategy.root_device
    for _ in range(1 + _REPEATS):
        start = now(device)
        torch.autograd.grad(loss.loss_of(batch, seed=0), parameters, allow_unused=True)
        times.append(now(device) - start)
    return statistics.median(times[1:])
