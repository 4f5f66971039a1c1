"""The one way in which ranks add numbers and learn who failed: one all-reduce for both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.distributed.reduce import sum_over_ranks

Tensors = Mapping[str, Tensor]
Value = TypeVar("Value")

# Words by which torch says that something cannot be differentiated twice.
_LACKING = ("derivative", "differentia", "double backward", "inplace operation", "not implemented")


def is_mistake(error: Exception) -> bool:
    """Return whether an error is the user's mistake, which ends the run on all ranks; training survives any other."""
    return isinstance(error, MisconfigurationException)


def lacks_derivatives(error: Exception | None) -> bool:
    """Return whether an error may be a lack of derivatives."""
    return isinstance(error, NotImplementedError) or any(word in str(error or "").lower() for word in _LACKING)


def elsewhere(what: str, mistake: bool) -> Exception:
    """Return the error of a rank that did not fail itself: of the same kind, so that all ranks go on or none."""
    kind = MisconfigurationException if mistake else RuntimeError
    return kind(f"{what} failed on another rank; see that rank's log")


def attempted(part: Callable[[], Value], fail: Callable[[Exception], None]) -> Value | None:
    """Return the value of a part of a measurement; where it raises, call ``fail`` with the error and return None.

    The error comes without its frames, which hold graphs and vectors.
    """
    try:
        return part()
    except Exception as error:
        caught = error.with_traceback(None)
    try:
        fail(caught)
    finally:
        del caught
    return None


@dataclass(frozen=True)
class Outcome:
    """Sums over the ranks, and which of them failed.

    Attributes:
        sums: the sums by name; those of ranks that failed hold what these sent in place.
        error: this rank's error, or where only others failed one that says so; None where no rank failed.
        here: whether this rank failed.
        failed: number of ranks that failed.
        lacking: whether some rank's error may be a lack of second derivatives.
    """

    sums: dict[str, Tensor]
    error: Exception | None
    here: bool
    failed: int
    lacking: bool


def attempt_together(trainer: pl.Trainer, make: Callable[[], Tensors], instead: Tensors, what: str) -> Outcome:
    """Add tensors that every rank makes, and learn which ranks failed to make them. One all-reduce.

    Every rank must call it, also one that failed before: its ``make`` raises that error. So no rank waits for one
    that has left.

    Args:
        trainer: its ranks.
        make: makes this rank's tensors; may raise, must not communicate.
        instead: what this rank sends where ``make`` raises: the same names and shapes; on one device, of one type.
        what: what failed, for the error of the other ranks.
    """
    error: Exception | None = None
    own: Tensors = instead
    try:
        own = make()
    except Exception as caught:
        error = caught.with_traceback(None)  # whose frames hold graphs and vectors
    reduce, here = sum_over_ranks(trainer), error is not None
    lacking = lacks_derivatives(error)
    if reduce is None:
        return Outcome(dict(own), error, here, int(here), lacking)
    home = next(iter(instead.values()), torch.zeros((), dtype=torch.float64, device="cpu"))
    flags = home.new_tensor([here, error is not None and is_mistake(error), lacking])
    names = sorted(instead)
    packed = torch.cat([flags, *(own[name].detach().reshape(-1).to(flags) for name in names)])
    summed = reduce(packed.to(trainer.strategy.root_device)).to(home.device)
    failed, mistaken, lacked = (round(count) for count in summed[:3].tolist())
    parts = summed[3:].split([instead[name].numel() for name in names])
    sums = {name: part.view_as(instead[name]) for name, part in zip(names, parts, strict=True)}
    if failed and error is None:
        error = elsewhere(what, mistake=mistaken > 0)
    return Outcome(sums, error, here, failed, lacked > 0)


def together(trainer: pl.Trainer, make: Callable[[], Tensors], instead: Tensors, what: str) -> dict[str, Tensor]:
    """Add tensors that every rank makes, one all-reduce; where one rank fails, all of them raise.

    Arguments are those of :func:`attempt_together`.

    Returns:
        The sums by name; on one process what ``make`` returned.

    Raises:
        Exception: this rank's error, or one that says that another rank failed (a MisconfigurationException if its
            error was one).
    """
    if trainer.world_size == 1:
        return dict(make())
    outcome = attempt_together(trainer, make, instead, what)
    if outcome.error is not None:
        try:
            raise outcome.error from None
        finally:
            del outcome  # a cycle through the error's own frame
    return outcome.sums


def means_together(
    trainer: pl.Trainer, make: Callable[[], Tensors], names: tuple[str, ...], what: str
) -> dict[str, float]:
    """Average scalars that every rank makes, one all-reduce and one synchronization; where one fails, all raise.

    Args:
        trainer: see :func:`attempt_together`.
        make: makes this rank's scalars, in any type and on any device.
        names: all names, the same on every rank; NaN stands for one that ``make`` leaves out.
        what: see :func:`attempt_together`.

    Raises:
        Exception: see :func:`together`.
    """
    device = trainer.strategy.root_device
    missing = torch.full((), torch.nan, dtype=torch.float64, device=device)

    def packed() -> Tensors:
        values = make()
        scalars = [values.get(name, missing).detach().to(device, torch.float64).reshape(()) for name in names]
        return {"scalars": torch.stack(scalars)}

    instead = {"scalars": torch.zeros(len(names), dtype=torch.float64, device=device)}
    sums = together(trainer, packed, instead, what)["scalars"] / trainer.world_size
    return dict(zip(names, sums.tolist(), strict=True))


def cause_together(trainer: pl.Trainer, failure: Exception | None, error: Exception) -> Exception:
    """Return what ended products on all ranks at once: this rank's failure, another's, or else the error itself.

    A product to which one rank contributed NaN raises on every rank; this tells the rank's failure from a loss that is
    not finite. One all-reduce.

    Args:
        trainer: its ranks.
        failure: this rank's failure, which it sent as NaN, or None.
        error: what the product raised here.
    """

    def make() -> Tensors:
        if failure is not None:
            raise failure
        return {}

    return attempt_together(trainer, make, {}, "a product").error or error.with_traceback(None)
