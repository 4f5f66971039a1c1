"""One directional measurement: evaluations on every rank, two exchanges of numbers, estimates, the next ε."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.directional import evaluations, head
from lightning_curvature.directional.estimates import checked_by_slope, estimate, estimate_again, loss_descent
from lightning_curvature.directional.evaluations import Values
from lightning_curvature.directional.likelihood import OutputModel, confirm, identify
from lightning_curvature.directional.line_search import CriticalStep, critical_step
from lightning_curvature.directional.options import EXACT, KEYS, NEED_OUTPUTS, DirectionalOptions
from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.result import DirectionalResult
from lightning_curvature.directional.rounding import Floor, Numbers, Rounding, first_epsilon, forward_roundoff
from lightning_curvature.distributed.together import attempted, elsewhere, is_mistake, means_together
from lightning_curvature.functional import choose_epsilon
from lightning_curvature.replay.recording import OUTPUTS_REMEDY
from lightning_curvature.reporting.loggers import warn

# Numbers that the ranks exchange before evaluations along the step.
_START = ("loss", "descent", "squared_norm", "squared_size", "modelled", "headed", "hidden")


class DirectionalMeasurement:
    """Measures steps one after the other, and learns from each at which ε to evaluate the next.

    After the first measured step, ``estimators`` are those that the module allows.
    """

    def __init__(self, options: DirectionalOptions) -> None:
        self._options = options
        # "auto" keeps the distance ε‖d‖ rather than ε: a step may be ten times as long as the one measured before.
        self._distance = math.nan
        self._learned: tuple[Any, ...] = ()
        self._critical_start = 1.0
        self.begin()

    def begin(self) -> None:
        """Forget the module: a new fit may bring another. What was learned about ε stays."""
        self.estimators: Sequence[str] = self._options.estimators
        self._model: OutputModel | None = None
        self._headed = self._doubtful = self._settled = self._changed = False
        self._unread = ""
        self._rounding: Rounding | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about ε and the line search."""
        return {"distance": self._distance, "rounding": self._learned, "critical_start": self._critical_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up ε and the line search where a checkpoint left them."""
        self._distance, self._learned = state_dict["distance"], state_dict["rounding"]
        self._critical_start = state_dict["critical_start"]

    def measure(
        self, trainer: pl.Trainer, window: Window | None, failure: Exception | None, fail: Callable[[Exception], None]
    ) -> DirectionalResult:
        """Measure one step.

        Every rank calls it, also one that has nothing to measure, and takes part in all collectives: two, and one for
        each evaluation of the line search. ``window`` is None, with the reason in ``failure``, where the step could not
        be recorded. ``fail`` is called on every rank with the error that ended the measurement, or with that of its
        exact products; it returns where training goes on.
        """
        reasons: list[str] = []

        def failed(error: Exception) -> None:
            reasons.append(str(error))
            fail(error)

        prepare = functools.partial(self._prepare, window, failure)
        start = attempted(lambda: means_together(trainer, prepare, _START, "preparing the measurement"), failed)
        if start is None or window is None:
            if window is not None:
                window.forget()
            return self._lost(reasons[0])
        norm, lr = math.sqrt(max(start["squared_norm"], 0.0)), window.update.lr
        reason = None
        if not (math.isfinite(start["loss"]) and math.isfinite(start["descent"])):
            reason = f"the loss or its gradient is not finite ({start['loss']}, gᵀd = {start['descent']})"
        elif norm == 0.0:
            reason = "the step did not move the parameters (a skipped fp16 step, or a learning rate of 0)"
        if reason is not None:
            warn(f"{reason}: logging NaN.")
            return self._lost(reason, norm=norm, lr=lr)
        if 0.0 < start["modelled"] < 1.0 or 0.0 < start["headed"] < 1.0:
            self.begin()  # and look again at the next step
            failed(RuntimeError("the outputs, or the likelihood of the loss, are known on some of the ranks only"))
            return self._lost(reasons[0], norm=norm, lr=lr)
        # Not before all ranks have a model: the distance is remembered, and must be the same on all of them.
        epsilon = self._choose_epsilon(norm, start)
        evaluated = attempted(lambda: self._evaluate(trainer, window, epsilon, start), failed)
        if evaluated is None:
            return self._lost(reasons[0], norm=norm, lr=lr, epsilon=epsilon)
        values, critical, exact_failures = evaluated
        result = DirectionalResult(self.estimators, critical=critical, norm=norm, lr=lr, epsilon=epsilon)
        for name, error in exact_failures.items():
            result = result.with_reason([name], str(error))
            values = {key: value for key, value in values.items() if not key.startswith(name)}
            failed(error)
        return self._conclude(result, start | values)

    def _lost(self, reason: str, **known: float) -> DirectionalResult:
        return DirectionalResult(self.estimators, **known).with_reason(self.estimators, reason)  # type: ignore[arg-type]

    def _prepare(self, window: Window | None, failure: Exception | None) -> Values:
        """Return what this rank knows before evaluations: base loss and update."""
        if failure is not None:
            raise failure
        assert window is not None
        other_precision = self._options.probe_precision is not None
        window.take_base(repeat=other_precision or window.objective.function is not None or window.objective.compiled)
        loss = window.total(e.loss for e in window.base)
        # A loss that is lost does not tell what it belongs to: the next one will.
        if self._rounding is not None or bool(loss.isfinite()):
            self._find_model(window)
        update = window.update
        values = {"loss": loss, "descent": update.descent, "squared_norm": update.squared_norm}
        # ‖θ‖ sets the first distance; afterwards nobody asks.
        size = {"squared_size": update.squared_size()} if math.isnan(self._distance) else {}
        flags = {"modelled": self._model is not None or self._headed, "headed": self._headed}
        flags["hidden"] = window.hidden
        return values | size | {name: torch.tensor(float(flag)) for name, flag in flags.items()}

    def _find_model(self, window: Window) -> None:
        """On the first measured step find likelihood, target and estimators; later check that they still hold."""
        record, base, likelihood = window.records[0], window.base[0], self._options.likelihood
        needing = [name for name in self.estimators if name in NEED_OUTPUTS]
        first = self._rounding is None
        if first:
            # The finite difference can do without outputs, but knows its own error better with them.
            if base.outputs is not None and {*NEED_OUTPUTS, "finite_difference"} & set(self.estimators):
                self._model = identify(base.outputs, record.batch, base.loss, likelihood, base.mask)
            dtype = record.forward_dtype if self._options.probe_precision is None else torch.float32
            roundoff = forward_roundoff(window.objective.module, window.objective.device, dtype)
            floors = Floor(*self._learned[:2]), Floor(*self._learned[2:4])
            eps = torch.finfo(record.loss_dtype or base.loss.dtype).eps
            self._rounding = Rounding(dtype, roundoff, eps / 2.0, *floors, list(*self._learned[4:]))
            if self._rounding.half and "kl" in self.estimators and "finite_difference" not in self.estimators:
                warn(
                    "in half precision rounding hides 'kl' by itself: add 'finite_difference', which makes it "
                    "symmetric, or give probe_precision='32-true'."
                )
        elif self._model is not None and base.outputs is not None:
            self._model = confirm(self._model, base.outputs, record.batch, base.loss, likelihood, base.mask)
        likely = self._model is not None and self._model.reproduced and (self._settled or not self._doubtful)
        read = self._model is not None and (likely or likelihood != "auto") and not self._headed
        if needing and not read and not self._unread:
            self._take_head(window, needing, first)
        window.model = None if self._headed else self._model
        if needing and self._model is not None and not self._model.reproduced and likelihood != "auto":
            warn(
                f"the loss is not the mean {self._model.likelihood} negative log-likelihood of the outputs (label "
                f"smoothing, weights, an ignored class or a penalty?): {needing} leave out what differs. Where that "
                "matters, leave likelihood= out."
            )

    def _take_head(self, window: Window, needing: list[str], first: bool) -> None:
        """Cut off the head of a loss of no likelihood; where that is not to be had, its estimators have no values."""
        try:
            window.take_head()
            if not self._headed:
                head.check(window)
            self._headed = True
        except (ValueError, RuntimeError, TypeError) as error:
            window.headed = self._headed = False
            if self._model is not None and self._model.reproduced:
                self._settled = True  # its values have their doubt in their error
                return
            if self._model is None:
                if not first:
                    raise
                self._go_without_outputs(needing, window.base[0].outputs is not None, error)
                return
            self._unread = f"the loss is no likelihood that the batch suggests, and no function of outputs: {error}"
            warn(f"{needing} must belong to the loss that is trained: {self._unread}. Logging NaN.")

    def _go_without_outputs(self, needing: list[str], have_outputs: bool, error: Exception) -> None:
        """Go on without the estimators that need the outputs; raise where there are no others."""
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

    def _choose_epsilon(self, norm: float, start: Numbers) -> float:
        """Return ε of a step of length ``norm``, the same on every rank."""
        if self._options.epsilon != "auto":
            return float(self._options.epsilon)
        assert self._rounding is not None
        if math.isnan(self._distance):
            self._distance = norm * first_epsilon(start, self._rounding.worst, "finite_difference" in self.estimators)
        return self._distance / norm

    def _evaluate(
        self, trainer: pl.Trainer, window: Window, epsilon: float, start: Numbers
    ) -> tuple[Numbers, CriticalStep | None, dict[str, Exception]]:
        """Return the numbers of the job, the line search's outcome, and the failures of exact products by estimator.

        Raise on every rank where an evaluation along the step failed on one.
        """
        # Of this rank; the other ranks learn of them in the next exchange.
        failures: list[Exception] = []
        exact_failures: dict[str, Exception] = {}
        wanted, kinks = [name for name in EXACT if name in self.estimators], window.objective.kinks

        def anywhere(flag: bool) -> bool:
            found = {"flag": torch.tensor(float(flag))}
            return means_together(trainer, lambda: found, ("flag",), "looking for kinks")["flag"] > 0.0

        window.find_hidden(start["hidden"] > 0.0, anywhere)
        forwards = attempted(lambda: evaluations.forwards(window, epsilon, self.estimators), failures.append) or {}

        def exchange(make: Callable[[], Values], names: tuple[str, ...]) -> Numbers:
            def made() -> Values:
                if failures:
                    raise failures.pop()
                values = make()
                window.check()
                return values

            return means_together(trainer, made, names, "an evaluation along the step")

        def loss_at(factor: float) -> float:
            return exchange(lambda: {"loss": window.loss_at(factor)}, ("loss",))["loss"]

        def with_exact() -> Values:
            # Not every module has the derivatives: the failure is sent as a number, beside the values of the forwards.
            values, errors = evaluations.exact(window, wanted)
            exact_failures.update(errors)
            flags = {"lost": kinks.lost, "crossed": window.crossed}
            flags |= {f"{name}_failed": name in errors for name in wanted}
            flags |= {f"{name}_mistaken": is_mistake(errors[name]) if name in errors else False for name in wanted}
            return forwards | values | {name: torch.tensor(float(flag)) for name, flag in flags.items()}

        critical = self._search(loss_at, start["loss"]) if "critical" in self.estimators else None
        flags = [f"{name}_{flag}" for name in wanted for flag in ("failed", "mistaken")]
        have_outputs = self._model is not None or self._headed
        names = [*flags, *evaluations.names(self.estimators, have_outputs, self._headed)]
        names += ["lost", "crossed"] if kinks.wanted is not None else []
        values = exchange(with_exact, tuple(names)) if names else {}
        kinks.repeated |= values.get("lost", 0.0) > 0.0  # from now on, on all ranks alike
        if "positions" in values:
            values["positions"] *= trainer.world_size
        for name in wanted:
            if values[f"{name}_failed"] and name not in exact_failures:
                mistake = values[f"{name}_mistaken"] > 0.0
                exact_failures[name] = elsewhere("an exact product", mistake)
        return values, critical, exact_failures

    def _search(self, loss_at: Callable[[float], float], base_loss: float) -> CriticalStep:
        """Return the critical step, which starts the next search."""
        limit = self._options.critical_max_forwards
        step = critical_step(loss_at, base_loss, self._critical_start, limit)
        if math.isfinite(step.factor):
            self._critical_start = step.factor
        if step.capped:
            warn(f"the search for the critical step stopped at critical_max_forwards={limit}.")
        return step

    def _conclude(self, result: DirectionalResult, values: Numbers) -> DirectionalResult:
        """Add estimates of the numbers of the job to a result, and choose the next ε."""
        rounding, epsilon = self._rounding, result.epsilon
        assert rounding is not None
        if self._unread:
            result = result.with_reason([name for name in NEED_OUTPUTS if name in self.estimators], self._unread)
        wanted = [name for name in self.estimators if KEYS[name] not in result.reasons]
        estimates = estimate(wanted, values, epsilon, epsilon * result.norm, rounding)
        descent, trusted, same = loss_descent(values, epsilon, rounding, estimates.get("finite_difference"))
        if not trusted:
            if not self._changed:
                said = f"{values['descent']:.3g} where the loss has {descent:.3g}"
                warn(f"the gradient after backward is not that of the loss, got gᵀd = {said}: that is taken.")
            self._changed = True
            estimates = estimate_again(wanted, values | {"descent": descent, "slope_taken": 1.0}, epsilon, rounding)
        models = [one.model for one in estimates.values() if one.model is not None]
        self._distance = result.norm * choose_epsilon(epsilon, models)
        self._learned = (*astuple(rounding.growth), *astuple(rounding.offset), rounding.bends)
        estimates, self._doubtful = checked_by_slope(estimates, values, epsilon, descent, rounding)
        mismatch = self._model.mismatch if self._model is not None and not self._headed else 0.0
        off = {name: mismatch if name in NEED_OUTPUTS else 0.0 for name in estimates}
        # With an ε of the user's the value is what was asked for.
        largest = 1.0 if self._options.epsilon == "auto" else math.inf
        estimates = {name: one.judged(off[name], largest) for name, one in estimates.items()}
        if not same:
            estimates.pop("finite_difference", None)
            reason = "the loss at other parameters is another function than the one that is trained: a part of it that "
            result = result.with_reason(["finite_difference"], f"{reason}has no gradient depends on them too")
        result = replace(result, estimates=estimates, descent=descent)
        if descent <= 0.0:
            return result.with_reason(self.estimators, "the step goes uphill: gᵀd ≤ 0")
        if result.critical is not None and math.isnan(result.critical.factor):
            result = result.with_reason(["critical"], "critical_max_forwards came before the search had a bracket")
        hidden = [name for name, one in estimates.items() if math.isnan(one.quadratic)]
        return result.with_reason(
            hidden, "its error is above 100 %: rounding, truncation or kinks hide it, or the loss is another"
        )
