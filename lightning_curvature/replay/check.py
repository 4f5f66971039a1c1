"""Why a step cannot be measured, as the first measurement of a fit finds out: one sentence each."""

from collections.abc import Sequence

import torch

# Relative difference of two evaluations of one loss: roundings of the forward's type, and in half precision at most.
_ROUNDINGS, _ALLOWED = 64.0, 0.05
_END = "Nothing is measured any more."


def other_loss(expected: float, found: float, dtype: torch.dtype, written: Sequence[str]) -> Exception | None:
    """Return what is wrong where a step and its repetition have losses that differ by more than rounding, or None.

    Args:
        expected: the loss that the step had.
        found: the loss of its repetition.
        dtype: coarsest type of the forward.
        written: names of the trained parameters that the step writes.
    """
    allowed = min(_ROUNDINGS * torch.finfo(dtype).eps, _ALLOWED) * abs(expected)
    if not abs(found - expected) > allowed:  # a loss that is NaN is another matter
        return None
    remedy = (
        f"it writes to the trained parameters {list(written[:3])}; do that in on_train_batch_end"
        if written
        else "keep counters and random generators on the module, where they can be put back"
    )
    return ValueError(
        f"training_step must give the same loss when it is repeated, got {expected:.9g} and {found:.9g}: {remedy}, or "
        f"give objective=. {_END}"
    )


def asks_for_gradients(error: BaseException) -> bool:
    """Return whether a step failed because it differentiates something that has no graph."""
    return isinstance(error, RuntimeError) and "does not require grad" in str(error)


def moved_before() -> Exception:
    """Return what is wrong where parameters were moved between the start of a batch and its step."""
    return ValueError(
        "parameters must be those of the start of a batch when its training_step is called, got others: leave them to "
        "the step, where an optimizer moves them before its closure (SAM?), or put the callback that moves them before "
        f"the monitor. {_END}"
    )


def left_behind(changed: Sequence[str]) -> Exception:
    """Return what is wrong where objects are not as they were before the measurement."""
    return RuntimeError(
        f"training_step must not change what cannot be put back, got {', '.join(changed[:3])}: keep it outside of the "
        f"module, or give objective=. {_END}"
    )
