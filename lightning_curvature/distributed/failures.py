"""How bad an error is, and what the ranks on which it did not happen are told."""

from collections.abc import Callable
from typing import TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

Value = TypeVar("Value")

# Words by which torch says that something cannot be differentiated twice.
_LACKING = ("derivative", "differentia", "double backward", "inplace operation", "not implemented")


def is_mistake(error: Exception) -> bool:
    """Whether an error is the user's mistake, which ends the run on all ranks; training survives any other."""
    return isinstance(error, MisconfigurationException)


def lacks_derivatives(error: Exception) -> bool:
    """Whether an error may say that second derivatives are missing."""
    return isinstance(error, NotImplementedError) or any(word in str(error).lower() for word in _LACKING)


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
