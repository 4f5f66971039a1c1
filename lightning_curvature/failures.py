"""What the failure of a product means: to this rank, and to the others."""

from dataclasses import dataclass

import lightning.pytorch as pl
import torch

from lightning_curvature.parallel import mean_of_scalars

# Words by which torch says that something cannot be differentiated twice.
_LACKING = ("derivative", "differentia", "double backward", "inplace operation", "not implemented")


@dataclass(frozen=True)
class Failure:
    """What ended the products of an operator.

    Attributes:
        cause: the error of this rank, or that another one failed.
        lacking: whether some rank's error may be a lack of second derivatives.
        only_here: whether this rank failed while others did not.
    """

    cause: Exception
    lacking: bool
    only_here: bool


def failure_of(trainer: pl.Trainer, own: Exception | None, error: Exception) -> Failure:
    """Bring together what the ranks know of products that ended on all of them, one collective.

    Args:
        trainer: its ranks.
        own: what failed on this rank of several, and was sent to the others as NaN.
        error: what was raised.
    """
    cause = (own or error).with_traceback(None)  # which holds graphs
    lacks = isinstance(cause, NotImplementedError) or any(word in str(cause).lower() for word in _LACKING)
    flags = {"lacks": torch.tensor(float(lacks)), "failed": torch.tensor(float(own is not None))}
    shares = mean_of_scalars(trainer, flags, trainer.strategy.root_device)
    if own is None and shares["failed"] > 0.0:
        cause = RuntimeError("a product failed on another rank, which tells more")
    return Failure(cause, shares["lacks"] > 0.0, own is not None and shares["failed"] < 1.0)
