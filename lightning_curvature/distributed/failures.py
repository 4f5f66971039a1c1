"""What a failure means: to this rank, and to the others, which must not wait for it."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.distributed.reduce import least_over_ranks, mean_of_scalars

Found = TypeVar("Found")

# Words by which torch says that something cannot be differentiated twice.
_LACKING = ("derivative", "differentia", "double backward", "inplace operation", "not implemented")

# How bad an error is: training survives a failure; a mistake ends the run, on all ranks.
FAILED, MISTAKEN = 1.0, 2.0


@dataclass(frozen=True)
class Failure:
    """What ended the products of an operator.

    Attributes:
        cause: the error of this rank, or that another one failed.
        lacking: whether some rank's error may be a lack of second derivatives.
        only_here: whether this rank failed while others did not.
        between: whether some rank failed between products: the others may have come further than it.
    """

    cause: Exception
    lacking: bool
    only_here: bool
    between: bool


def failure_of(trainer: pl.Trainer, own: Exception | None, error: Exception, between: bool = False) -> Failure:
    """Bring together what the ranks know of products that ended on all of them, one collective.

    Args:
        trainer: its ranks.
        own: what failed on this rank of several, and was sent to the others as NaN.
        error: what was raised.
        between: whether it was raised between products.
    """
    cause = (own or error).with_traceback(None)  # which holds graphs
    lacks = isinstance(cause, NotImplementedError) or any(word in str(cause).lower() for word in _LACKING)
    flags = {
        "lacks": torch.tensor(float(lacks)),
        "failed": torch.tensor(float(own is not None)),
        "mistaken": torch.tensor(float(severity(own) == MISTAKEN)),
        "between": torch.tensor(float(between)),
    }
    shares = mean_of_scalars(trainer, flags, trainer.strategy.root_device)
    if own is None and shares["failed"] > 0.0:
        cause = elsewhere("a product", MISTAKEN if shares["mistaken"] > 0.0 else FAILED)
    only_here = own is not None and shares["failed"] < 1.0
    return Failure(cause, shares["lacks"] > 0.0, only_here, shares["between"] > 0.0)


def severity(error: Exception | None) -> float:
    """How bad an error is; 0 is none."""
    if error is None:
        return 0.0
    return MISTAKEN if isinstance(error, MisconfigurationException) else FAILED


def elsewhere(what: str, worst: float) -> Exception:
    """The error of a rank that did not fail itself; as bad as the worst, so that all ranks go on or none."""
    kind = MisconfigurationException if worst == MISTAKEN else RuntimeError
    return kind(f"{what} failed on another rank, which tells more")


@contextlib.contextmanager
def noted(errors: list[Exception]) -> Generator[None, None, None]:
    """Keep an error for later, when the others can be told, in a list that this rank's others are in."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def attempted(part: Callable[[], Found], fail: Callable[[Exception], None]) -> Found | None:
    """Return what a part of a measurement gives; where it fails, call ``fail`` and return None.

    The error comes without its frames, which hold graphs and vectors.
    """
    errors: list[Exception] = []
    with noted(errors):
        return part()
    fail(errors.pop().with_traceback(None))
    return None


def agree(trainer: pl.Trainer, errors: list[Exception], what: str, number: float = 0.0) -> float:
    """Raise on every rank if one has failed, one collective. To be reached by all of them.

    Args:
        trainer: its ranks.
        errors: of this rank; emptied, since an error holds frames that hold the list.
        what: what failed, for the others.
        number: any that is not negative.

    Returns:
        The least of the numbers.

    Raises:
        Exception: the first error of this rank, or that another one failed.
    """
    own = errors[0] if errors else None
    errors.clear()
    least = least_over_ranks(trainer, number if own is None else -severity(own))
    if least < 0.0:
        try:
            raise own or elsewhere(what, -least)
        finally:
            own = None
    return least
