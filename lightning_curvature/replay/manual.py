"""Manual optimization: the loss is what training_step hands to ``manual_backward`` between two optimizer steps."""

import contextlib
from collections.abc import Generator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.replay.isolation import inert, patched


class BackwardLog:
    """Losses handed to ``manual_backward``, in segments that end with an optimizer step."""

    def __init__(self) -> None:
        self.segments: list[list[Tensor]] = [[]]

    def add(self, loss: Tensor) -> None:
        """Append a loss to the segment under way."""
        self.segments[-1].append(loss)

    def close(self) -> None:
        """Note that the optimizer stepped."""
        self.segments.append([])

    def loss(self, segment: int) -> Tensor:
        """Sum of the losses of one segment, the function whose gradient that step used.

        Raises:
            ValueError: if the segment holds none.
        """
        losses = self.segments[segment] if segment < len(self.segments) else []
        if not losses:
            raise ValueError(
                "training_step must hand its loss to self.manual_backward before the optimizer steps, got no such "
                "call: use self.manual_backward(loss), or give objective=."
            )
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextlib.contextmanager
def recording_backward(module: pl.LightningModule, log: BackwardLog) -> Generator[None, None, None]:
    """Note the losses of a step that runs for real."""
    original = module.manual_backward

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        log.add(loss.detach())
        original(loss, *args, **kwargs)

    with patched(module, manual_backward=manual_backward):
        yield


@contextlib.contextmanager
def inert_optimization(module: pl.LightningModule, log: BackwardLog) -> Generator[None, None, None]:
    """Let a step run without backward, without optimizer or scheduler steps; note its losses with their graphs."""
    optimizers, schedulers = module.optimizers, module.lr_schedulers

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        log.add(loss)

    with patched(
        module,
        manual_backward=manual_backward,
        optimizers=lambda *args, **kwargs: inert(optimizers(*args, **kwargs), log.close),
        lr_schedulers=lambda *args, **kwargs: inert(schedulers(*args, **kwargs), None),
        clip_gradients=_nothing,
        toggle_optimizer=_nothing,
        untoggle_optimizer=_nothing,
    ):
        yield
