"""What the measurements of a fit cost, in steps of the run, and an interval that keeps the cost within bounds."""

import math
import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch

from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.reporting.loggers import inform

clock: Callable[[], float] = time.perf_counter

# A plain step is known when so many have been timed.
ENOUGH = 10
# The interval is halved only where the cost then stays this far below its bound: noise shall not move it to and fro.
_EASE = 0.7


def now(device: torch.device) -> float:
    """Return the time at which a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock()


class Price:
    """Time of one monitor in one fit, beside the time of plain steps.

    A plain step is what the run takes a step without what monitors spend in their hooks, with validation and reading
    of data. The first step of a fit, which warms up, does not count.
    """

    def __init__(self) -> None:
        self._spent, self._entered = 0.0, math.nan
        self._begun, self._mark = 0, math.nan  # measurements, and what was spent when the first or second one began
        self._first_step: int | None = None
        self._is_told = False
        self._since: tuple[int, float, float] | None = None  # a step, and when it began, in all and of the monitors

    def enter(self) -> None:
        """Begin a hook."""
        self._entered = clock()

    def leave(self) -> None:
        """End a hook."""
        self._spent, self._entered = self.spent, math.nan

    @property
    def spent(self) -> float:
        """Seconds in the hooks of this monitor."""
        return self._spent if math.isnan(self._entered) else self._spent + clock() - self._entered

    def pass_by(self, trainer: pl.Trainer) -> None:
        """Note the step that a batch begins; to be asked at the start of every batch."""
        step = trainer.global_step
        if self._first_step is None:
            self._first_step = step
        elif self._since is None and step > self._first_step:
            self._since = step, clock(), _spent_by_all(trainer)

    def begin(self, device: torch.device) -> None:
        """Begin a measurement; the steps before it, which an accelerator may still be at, are no part of it."""
        arrived = clock()
        self._entered += now(device) - arrived
        if self._begun < 2:
            self._mark = self.spent
        self._begun += 1

    @property
    def cost(self) -> float:
        """Seconds of a measurement; NaN before the first.

        It is the mean of those after the first, which reads data and starts from nothing, and of the first until there
        are others.
        """
        return (self.spent - self._mark) / max(self._begun - 1, 1)

    def plain(self, trainer: pl.Trainer, enough: int = ENOUGH) -> float:
        """Seconds of a plain step; NaN where fewer than ``enough`` have been timed."""
        if self._since is None or trainer.global_step - self._since[0] < enough:
            return math.nan
        step, at, spent = self._since
        seconds = clock() - at - (_spent_by_all(trainer) - spent)
        return seconds / (trainer.global_step - step) if seconds > 0.0 else math.nan

    def together(self, trainer: pl.Trainer) -> tuple[float, float]:
        """Return seconds of a measurement and its cost in plain steps, by means over the ranks; one all-reduce."""
        seconds, add = torch.tensor([self.cost, self.plain(trainer)]), sum_over_ranks(trainer)
        if add is not None:
            seconds = add(seconds.to(trainer.strategy.root_device)) / trainer.world_size
        cost, plain = seconds.tolist()
        return cost, cost / plain

    def tell(self, monitor: str, trainer: pl.Trainer, interval: int | None, enough: int = ENOUGH) -> None:
        """Say once what measurements cost, and what one every ``interval`` steps adds to the run."""
        if self._is_told or not self._begun or math.isnan(steps := self.cost / self.plain(trainer, enough)):
            return
        self._is_told = True
        what = "the measurement took" if self._begun == 1 else "a measurement takes"
        message = f"{monitor}: {what} {short(self.cost)} s, the time of {short(steps)} steps"
        if interval is not None:
            longer = f"{short(100.0 * steps / interval)} % longer"
            message += f"; at that price one every {interval} steps makes the run {longer}"
        inform(f"{message}.")


def stretched(interval: int, steps: float, bound: float, least: int) -> int:
    """Return an interval of ``least`` times a power of two in which a measurement adds a share of at most ``bound``.

    Powers of two, so that the steps of a longer interval are some of those of a shorter one.

    Args:
        interval: the one so far.
        steps: cost of a measurement in plain steps; NaN keeps the interval.
        bound: largest share.
        least: the shortest interval.
    """
    while steps > bound * interval:
        interval *= 2
    while interval > least and steps <= _EASE * bound * (interval // 2):
        interval //= 2
    return interval


def short(value: float) -> str:
    """Return a positive number with two digits or more, and no exponent where it is large."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def _spent_by_all(trainer: pl.Trainer) -> float:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return sum(price.spent for one in callbacks if isinstance(price := getattr(one, "_price", None), Price))
