"""How the loss of a fit is read: as a likelihood of outputs, or by its head; and which estimators that leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.directional import head
from lightning_curvature.directional.likelihood import OutputModel, confirm, identify
from lightning_curvature.directional.options import NEED_OUTPUTS, DirectionalOptions
from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.rounding import Floor, Rounding, forward_roundoff
from lightning_curvature.distributed.together import is_mistake, together
from lightning_curvature.replay.recording import OUTPUTS_REMEDY
from lightning_curvature.reporting.loggers import warn


class Reading:
    """The loss of a fit, as far as it is known.

    Attributes:
        estimators: those that the module allows.
        model: how the loss depends on the outputs; None where that is not known, or not wanted.
        headed: whether that is told by the head of the loss.
        doubtful: whether the last measurement gave reason to doubt the model.
        waiting: whether the head is to be cut off by all ranks together, where they gather parameters.
        unread: why there is neither; empty otherwise.
        rounding: of its forwards; None before the first measurement.
    """

    def __init__(self, options: DirectionalOptions) -> None:
        self._options = options
        self.estimators: Sequence[str] = options.estimators
        self.model: OutputModel | None = None
        self.headed = self.doubtful = self.waiting = self._looked = self._settled = self._first = False
        self.unread = ""
        self.rounding: Rounding | None = None

    @property
    def have_outputs(self) -> bool:
        """Whether it is known how the loss depends on outputs."""
        return self.model is not None or self.headed

    @property
    def mismatch(self) -> float:
        """Relative error of values that the model does not account for."""
        return self.model.mismatch if self.model is not None and not self.headed else 0.0

    def read(self, window: Window, learned: Sequence[Any]) -> None:
        """On the first measured step find likelihood, target and estimators; later check that they still hold.

        ``learned``: floors and bends of earlier fits.
        """
        record, base, likelihood = window.records[0], window.base[0], self._options.likelihood
        needing = [name for name in self.estimators if name in NEED_OUTPUTS]
        first = self.rounding is None
        if first:
            # The finite difference can do without outputs, but knows its own error better with them.
            if base.outputs is not None and {*NEED_OUTPUTS, "finite_difference", "oscillation"} & set(self.estimators):
                self.model = identify(base.outputs, record.batch, base.loss, likelihood, base.mask)
            dtype = record.forward_dtype if self._options.probe_precision is None else torch.float32
            roundoff = forward_roundoff(window.objective.module, window.objective.device, dtype)
            floors = Floor(*learned[:2]), Floor(*learned[2:4])
            eps = torch.finfo(record.loss_dtype or base.loss.dtype).eps
            self.rounding = Rounding(dtype, roundoff, eps / 2.0, *floors, list(*learned[4:]))
            if self.rounding.half and "kl" in self.estimators and "finite_difference" not in self.estimators:
                remedy = "add 'finite_difference', which makes it symmetric, or give probe_precision='32-true'"
                warn(f"in half precision rounding hides 'kl' by itself: {remedy}.")
        elif self.model is not None and base.outputs is not None:
            self.model = confirm(self.model, base.outputs, record.batch, base.loss, likelihood, base.mask)
        likely = self.model is not None and self.model.reproduced and (self._settled or not self.doubtful)
        named = self.model is not None and not self.model.reproduced and likelihood != "auto"
        read = (likely or named) and not self.headed
        if needing and not read and not self.unread:
            if window.together and window.objective.cut is None:
                self.waiting, self._first = True, first or self._first
            else:
                self._take_head(window, lambda: head.take(window), first)
        window.model = None if self.headed else self.model
        if needing and named:
            but = f"{needing} leave out what differs. Where that matters, leave likelihood= out."
            why = "(label smoothing, weights, an ignored class or a penalty?)"
            warn(f"the loss is not the mean {likelihood} negative log-likelihood of the outputs {why}: {but}")

    def look_again(self) -> bool:
        """Whether to measure the same step once more, now by the head: at the first doubt of a fit, on all ranks."""
        again = self.doubtful and not self.headed and not self._looked
        self._looked |= again
        return again

    def take_head_together(self, trainer: pl.Trainer, window: Window) -> None:
        """Cut off the head of the loss on all ranks, or on none: its forwards gather parameters; one collective."""

        def make() -> dict[str, Tensor]:
            head.take(window)
            return {}

        def take() -> None:
            try:
                together(trainer, make, {}, "cutting off the head of the loss")
            except Exception as error:
                window.objective.cut = None
                # Of a kind that all ranks take alike.
                raise error if is_mistake(error) else RuntimeError(str(error)) from None

        first, self._first, self.waiting = self._first, False, False
        self._take_head(window, take, first)
        window.model = None if self.headed else self.model

    def _take_head(self, window: Window, take: Callable[[], None], first: bool) -> None:
        """Cut off the head of a loss of no likelihood; where that is not to be had, its estimators have no values."""
        try:
            take()
            self.headed = True
        except (ValueError, RuntimeError, TypeError) as error:
            window.headed = self.headed = False
            if self.model is not None and self.model.reproduced:
                self._settled = True  # its values have their doubt in their error
                return
            if self.model is None:
                if not first:
                    raise
                self._go_without_outputs(window.base[0].outputs is not None, error)
                return
            self.leave_unread(f"the loss is no likelihood that the batch suggests, and no function of outputs: {error}")

    def leave_unread(self, reason: str) -> None:
        """From now on have no values of the estimators that need the outputs, on all ranks."""
        if not self.unread:
            self.unread, needing = reason, [name for name in self.estimators if name in NEED_OUTPUTS]
            warn(f"{needing} must belong to the loss that is trained: {reason}. Logging NaN.")

    def _go_without_outputs(self, have_outputs: bool, error: Exception) -> None:
        """Go on without the estimators that need the outputs; raise where there are no others."""
        needing = [name for name in self.estimators if name in NEED_OUTPUTS]
        reason = (
            f"{needing} need the likelihood of the loss, which likelihood='auto' could not read off the batch: name "
            f"it, likelihood='categorical', 'gaussian' or 'bernoulli' ({error})"
            if have_outputs
            else f"{needing} need the outputs of the model, got none: {OUTPUTS_REMEDY}"
        )
        rest = [name for name in self.estimators if name not in needing]
        if not rest:
            raise MisconfigurationException(f"{reason}.")
        warn(f"{reason}. Going on with {', '.join(map(repr, rest))} alone.")
        self.estimators = rest
