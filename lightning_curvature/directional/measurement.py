"""One directional measurement: evaluations on every rank, two exchanges of numbers, estimates, the next ε."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_curvature.directional import evaluations, oscillation
from lightning_curvature.directional.estimates import checked_by_slope, estimate, estimate_again, loss_descent
from lightning_curvature.directional.evaluations import Values
from lightning_curvature.directional.line_search import CriticalStep, critical_step
from lightning_curvature.directional.options import EXACT, KEYS, NEED_OUTPUTS, OSCILLATION, DirectionalOptions
from lightning_curvature.directional.oscillation import AlongOscillation
from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.reading import Reading
from lightning_curvature.directional.result import DirectionalResult
from lightning_curvature.directional.rounding import Numbers, first_epsilon
from lightning_curvature.distributed.together import attempted, elsewhere, is_mistake, means_together
from lightning_curvature.functional import choose_epsilon
from lightning_curvature.reporting.loggers import warn

# Numbers that the ranks exchange before evaluations along the step.
_START = ("loss", "descent", "squared_norm", "squared_size", "modelled", "headed", "waiting", "unread", "hidden")


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
        self._reading, self._changed = Reading(self._options), False

    @property
    def estimators(self) -> Sequence[str]:
        """Those that the module allows."""
        return self._reading.estimators

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
        names = _START + (oscillation.START if OSCILLATION in self.estimators else ())
        start = attempted(lambda: means_together(trainer, prepare, names, "preparing the measurement"), failed)
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
        if any(0.0 < start[name] < 1.0 for name in ("modelled", "headed", "waiting")):
            self.begin()  # and look again at the next step
            failed(RuntimeError("the outputs, or the likelihood of the loss, are known on some of the ranks only"))
            return self._lost(reasons[0], norm=norm, lr=lr)
        if start["unread"]:
            self._reading.leave_unread("that of another rank cannot be read; see its log")
        if start["waiting"]:
            self._reading.take_head_together(trainer, window)
        # Not before all ranks have a model: the distance is remembered, and must be the same on all of them.
        epsilon = self._choose_epsilon(norm, start)
        flips = self._oscillation(window, start)
        evaluated = attempted(lambda: self._evaluate(trainer, window, epsilon, start, flips), failed)
        if evaluated is None:
            lost = self._lost(reasons[0], norm=norm, lr=lr, epsilon=epsilon)
            return lost if flips is None else lost.with_oscillation(flips.result)
        values, critical, exact_failures = evaluated
        result = DirectionalResult(self.estimators, critical=critical, norm=norm, lr=lr, epsilon=epsilon)
        for name, error in exact_failures.items():
            result = result.with_reason([name], str(error))
            values = {key: value for key, value in values.items() if not key.startswith(name)}
            failed(error)
        if window.modules is not None and "hvp_descent" in values:
            result = replace(result, terms=evaluations.table(values, window.modules))
        if flips is not None:
            result = result.with_oscillation(flips.concluded(values))
        result = self._conclude(result, start | values)
        return self.measure(trainer, window, failure, fail) if self._reading.look_again() else result

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
        if self._reading.rounding is not None or bool(loss.isfinite()):
            self._reading.read(window, self._learned)
        update = window.update
        values = {"loss": loss, "descent": update.descent, "squared_norm": update.squared_norm}
        # ‖θ‖ sets the first distance; afterwards nobody asks.
        size = {"squared_size": update.squared_size()} if math.isnan(self._distance) else {}
        reading = self._reading
        flags = {"modelled": reading.have_outputs, "headed": reading.headed, "waiting": reading.waiting}
        flags |= {"unread": bool(reading.unread), "hidden": window.hidden}
        size |= oscillation.numbers(window) if OSCILLATION in self.estimators else {}
        return values | size | {name: torch.tensor(float(flag)) for name, flag in flags.items()}

    def _choose_epsilon(self, norm: float, start: Numbers) -> float:
        """Return ε of a step of length ``norm``, the same on every rank."""
        if self._options.epsilon != "auto":
            return float(self._options.epsilon)
        rounding, symmetric = self._reading.rounding, "finite_difference" in self.estimators
        assert rounding is not None
        if math.isnan(self._distance):
            self._distance = norm * first_epsilon(start, rounding.worst, symmetric)
        return self._distance / norm

    def _oscillation(self, window: Window, start: Numbers) -> AlongOscillation | None:
        if OSCILLATION not in self.estimators:
            return None
        assert self._reading.rounding is not None
        return AlongOscillation(start, window.unknown, self.estimators, self._reading.rounding)

    def _evaluate(
        self, trainer: pl.Trainer, window: Window, epsilon: float, start: Numbers, flips: AlongOscillation | None
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

        attempted(window.confirm, failures.append)
        window.find_hidden(start["hidden"] > 0.0, anywhere)
        forwards = attempted(lambda: evaluations.forwards(window, epsilon, self.estimators), failures.append) or {}
        if flips is not None:
            forwards |= attempted(lambda: flips.evaluated(window), failures.append) or {}

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
        reading = self._reading
        names = [*flags, *evaluations.names(self.estimators, reading.have_outputs, reading.headed, window.modules)]
        names += flips.names(reading.have_outputs, reading.headed) if flips is not None else []
        names += ["lost", "crossed"] if kinks.wanted is not None else []
        values = exchange(with_exact, tuple(names)) if names else {}
        kinks.repeated |= values.get("lost", 0.0) > 0.0  # from now on, on all ranks alike
        for name in (name for name in values if name.endswith("positions")):
            values[name] *= trainer.world_size
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
        rounding, epsilon = self._reading.rounding, result.epsilon
        assert rounding is not None
        if reason := self._reading.unread:
            result = result.with_reason([name for name in NEED_OUTPUTS if name in self.estimators], reason)
        of_step = [name for name in self.estimators if name != OSCILLATION]
        wanted = [name for name in of_step if KEYS[name] not in result.reasons]
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
        estimates, self._reading.doubtful = checked_by_slope(estimates, values, epsilon, descent, rounding)
        mismatch = self._reading.mismatch
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
            return result.with_reason(of_step, "the step goes uphill: gᵀd ≤ 0")
        if result.critical is not None and math.isnan(result.critical.factor):
            result = result.with_reason(["critical"], "critical_max_forwards came before the search had a bracket")
        hidden = [name for name, one in estimates.items() if math.isnan(one.quadratic)]
        return result.with_reason(
            hidden, "its error is above 100 %: rounding, truncation or kinks hide it, or the loss is another"
        )
