"""One measurement along a step: probes on every rank, one exchange of numbers, estimates, the next ε."""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.directional import probes
from lightning_curvature.directional.estimates import Estimate, estimate, loss_descent, next_epsilon
from lightning_curvature.directional.likelihood import OutputModel, confirm, identify
from lightning_curvature.directional.line_search import CriticalStep, critical_step
from lightning_curvature.directional.probes import Window
from lightning_curvature.directional.rounding import Rounding, coarse_products, first_epsilon
from lightning_curvature.distributed.failures import FAILED, MISTAKEN, elsewhere, severity
from lightning_curvature.distributed.reduce import mean_of_scalars
from lightning_curvature.replay.recording import OUTPUTS_REMEDY
from lightning_curvature.reporting.loggers import warn

# Estimators that cannot do without outputs, and with the one that knows its error better with them.
_NEEDS_OUTPUTS = ("kl", "gauss_newton")
_USES_OUTPUTS = (*_NEEDS_OUTPUTS, "finite_difference")
_EXACT = {"hvp": "hvp", "gauss_newton": "gn"}  # estimator → prefix of its values

# What the ranks agree on before the probes.
_START = ("loss", "descent", "squared_norm", "squared_size", "failed", "mistaken", "modelled")

Fail = Callable[[Exception], None]


@dataclass
class Result:
    """What one step gave.

    Attributes:
        estimates: by estimator; empty where nothing could be measured.
        critical: outcome of the line search, or None.
        descent: gᵀd, NaN where unknown.
        norm: ‖d‖.
        lr: η of the step.
        epsilon: ε of the probes, in steps.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict)
    critical: CriticalStep | None = None
    descent: float = math.nan
    norm: float = math.nan
    lr: float = math.nan
    epsilon: float = math.nan


class _SearchEndedError(Exception):
    """A rank failed during the line search."""


class DirectionalMeasurement:
    """Measures steps one after the other, and learns from each where to probe the next.

    Args:
        estimators: names.
        epsilon: ε in steps, or "auto".
        likelihood: "auto" or a likelihood.
        other_precision: whether the probes run in float32 whatever the step ran in.
        critical_max_forwards: cap of the line search.
        default: whether "kl" may be left out where it cannot be had.

    Attributes:
        active: the estimators that can be had; known after the first measured step.
    """

    def __init__(
        self,
        estimators: Sequence[str],
        epsilon: float | str,
        likelihood: str,
        other_precision: bool,
        critical_max_forwards: int,
        default: bool,
    ) -> None:
        self.estimators = tuple(estimators)
        self.epsilon = epsilon
        self.likelihood = likelihood
        self.other_precision = other_precision
        self.critical_max_forwards = critical_max_forwards
        self.default = default
        # "auto" keeps the distance ε‖d‖ rather than ε: a step may be ten times as long as the one measured before.
        self._distance = math.nan
        self._learned: tuple[Any, ...] = ()
        self._critical_start = 1.0
        self.begin()

    def begin(self) -> None:
        """Forget the module: a new fit may bring another. What was learned about ε stays."""
        self.active = self.estimators
        self._model: OutputModel | None = None
        self._rounding: Rounding | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about ε and the line search."""
        return {"distance": self._distance, "rounding": self._learned, "critical_start": self._critical_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up ε and the line search where a checkpoint left them."""
        self._distance = state_dict["distance"]
        self._learned = state_dict["rounding"]
        self._critical_start = state_dict["critical_start"]

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None, fail: Fail) -> Result:
        """Measure one step.

        Every rank comes here, also one that has nothing to measure, and takes part in all that is communicated: two
        collectives, and one for each forward of the line search.

        Args:
            trainer: the Trainer.
            window: the step, or None where it could not be recorded.
            failure: why not.
            fail: called on every rank with the error that ended the measurement, once all ranks know that there is
                one, so that none waits for a rank that has left; returns where training is to go on.
        """
        device = trainer.strategy.root_device
        errors: list[Exception] = []
        start = mean_of_scalars(trainer, self._start(window, failure, errors.append), device)
        if start["failed"] > 0.0 or window is None:
            _hand_over(errors, fail, start["mistaken"])
            return Result()  # means over the ranks that did not fail are not numbers of the job
        norm = math.sqrt(max(start["squared_norm"], 0.0))
        result = Result(norm=norm, lr=window.update.lr)
        if not (math.isfinite(start["loss"]) and math.isfinite(start["descent"])):
            warn(f"the loss or its gradient is not finite ({start['loss']}, gᵀd = {start['descent']}): logging NaN.")
            return result
        if norm == 0.0:
            warn("the step did not move the parameters (a skipped fp16 step, or a learning rate of 0): logging NaN.")
            return result
        if 0.0 < start["modelled"] < 1.0:
            self.begin()  # and look again at the next step
            fail(RuntimeError("the outputs, or the likelihood of the loss, were found on some of the ranks only"))
            return result
        # Not before all ranks have a model: the distance is remembered, and must be the same on all of them.
        result.epsilon = self._choose_epsilon(norm, start)
        local, result.critical = self._probe(trainer, window, result.epsilon, start["loss"], errors.append)
        local["mistaken"] = _mistaken(errors)
        # A rank that failed must still send as many numbers as the others: all names are known beforehand.
        missing = torch.full((), torch.nan)
        names = _value_names(self.active, self._model is not None)
        values = start | mean_of_scalars(trainer, {n: local.get(n, missing) for n in names}, device)
        if values["failed"] > 0.0:
            _hand_over(errors, fail, values["mistaken"])
            return replace(result, critical=None)
        wanted = set(self.active)
        if values["exact_failed"] > 0.0:
            _hand_over(errors, fail, values["mistaken"])
            wanted -= set(_EXACT)
            values = {n: v for n, v in values.items() if not n.startswith(tuple(_EXACT.values()))}
        values["positions"] = values.get("positions", math.nan) * trainer.world_size
        self._conclude(wanted, values, result)
        return result

    def _start(self, window: Window | None, failure: Exception | None, fail: Fail) -> dict[str, Tensor]:
        """Base loss and update of this rank."""
        try:
            if failure is not None:
                raise failure
            assert window is not None
            repeat = window.objective.function is not None or self.other_precision or window.objective.compiled
            probes.take_base(window, repeat)
            loss = window.base_loss()
            # A loss that is lost does not tell what it belongs to: the next one will.
            if self._rounding is not None or bool(loss.isfinite()):
                self._find_model(window)
            return {
                "loss": loss,
                "descent": window.update.descent,
                "squared_norm": window.update.squared_norm,
                # ‖θ‖ sets the first distance; afterwards nobody asks.
                "squared_size": window.update.squared_size() if math.isnan(self._distance) else torch.zeros(()),
                "failed": torch.zeros(()),
                "mistaken": torch.zeros(()),
                "modelled": torch.tensor(float(self._model is not None)),
            }
        except Exception as error:
            fail(error)
            return dict.fromkeys(_START, torch.zeros(())) | {"failed": torch.ones(()), "mistaken": _mistaken([error])}

    def _find_model(self, window: Window) -> None:
        """On the first measured step: which likelihood, which target, which estimators; later: whether that holds."""
        record, base = window.records[0], window.base[0]
        if self._rounding is not None:
            if self._model is not None and base.outputs is not None:
                self._model = confirm(self._model, base.outputs, record.batch, base.loss, self.likelihood, base.mask)
        else:
            # The finite difference can do without outputs, but knows its own error better with them.
            if base.outputs is not None and set(_USES_OUTPUTS) & set(self.estimators):
                self._model = identify(base.outputs, record.batch, base.loss, self.likelihood, base.mask)
            wanted = [name for name in self.estimators if name in _NEEDS_OUTPUTS]
            if wanted and self._model is None:
                self._go_without_outputs(wanted, found=base.outputs is not None)
            dtype = torch.float32 if self.other_precision else record.forward_dtype
            coarse = coarse_products(window.objective.module, window.objective.device, dtype)
            self._rounding = Rounding(dtype, base.loss.dtype, coarse, *self._learned)
            if self._rounding.half and "kl" in self.active and "finite_difference" not in self.active:
                warn(
                    "'kl' by itself cannot be told from rounding in half precision: add 'finite_difference', which "
                    "makes it symmetric, or give probe_precision='32-true'."
                )
        window.model = self._model
        wanted = [name for name in self.active if name in _NEEDS_OUTPUTS]
        if wanted and self._model is not None and not self._model.reproduced:
            warn(
                f"the loss is not the mean {self._model.likelihood} negative log-likelihood of the outputs (label "
                f"smoothing, weights, an ignored class or a penalty?): {wanted} leave out what differs. Where that "
                "matters, give objective= with 'outputs' and 'mask'."
            )

    def _go_without_outputs(self, wanted: Sequence[str], found: bool) -> None:
        reason = (
            f"{wanted} need the likelihood of the loss, which likelihood='auto' could not read off the batch: name it, "
            "likelihood='categorical', 'gaussian' or 'bernoulli'"
            if found
            else f"{wanted} need the outputs of the model, got none: {OUTPUTS_REMEDY}"
        )
        if not self.default:
            raise MisconfigurationException(f"{reason}.")
        warn(f"{reason}. Going on with 'finite_difference' alone.")
        self.active = ("finite_difference",)

    def _choose_epsilon(self, norm: float, start: dict[str, float]) -> float:
        """ε of a step of length ``norm``, the same on every rank."""
        if self.epsilon != "auto":
            return float(self.epsilon)
        assert self._rounding is not None
        if math.isnan(self._distance):
            size, dtype = math.sqrt(max(start["squared_size"], 0.0)), self._rounding.dtype
            symmetric = "finite_difference" in self.active
            self._distance = norm * first_epsilon(start["loss"], start["descent"], norm, size, dtype, symmetric)
        return self._distance / norm

    def _probe(
        self, trainer: pl.Trainer, window: Window, epsilon: float, base_loss: float, fail: Fail
    ) -> tuple[dict[str, Tensor], CriticalStep | None]:
        """Numbers of this rank; an error leaves "failed", one in the exact products "exact_failed"."""
        failed = exact_failed = False
        device = trainer.strategy.root_device

        def attempt(probe: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            nonlocal failed
            try:
                return {} if failed else probe()
            except Exception as error:
                failed = True
                fail(error)
                return {}

        def loss_at(factor: float) -> float:
            # The search decides on the loss of the whole job. A rank that failed still communicates, and all end it.
            local = attempt(lambda: {"loss": window.loss_at(factor)}) or {"loss": torch.zeros(())}
            total = mean_of_scalars(trainer, local | {"failed": torch.tensor(float(failed))}, device)
            if total["failed"] > 0.0:
                raise _SearchEndedError
            return total["loss"]

        values, critical = attempt(lambda: self._forwards(window, epsilon)), None
        if "critical" in self.active:
            with contextlib.suppress(_SearchEndedError):
                critical = self._search(loss_at, base_loss)
        if not failed and not set(_EXACT).isdisjoint(self.active):
            values |= attempt(lambda: probes.exact(window, "hvp" in self.active, "gauss_newton" in self.active))
            # Not every module has these derivatives: what the forwards gave stays.
            failed, exact_failed = failed and set(_EXACT).issuperset(self.active), failed
        return values | {
            "failed": torch.tensor(float(failed)),
            "exact_failed": torch.tensor(float(exact_failed)),
        }, critical

    def _forwards(self, window: Window, epsilon: float) -> dict[str, Tensor]:
        """Run the estimators with an ε: one pass for KL alone, two with the finite difference."""
        values: dict[str, Tensor] = {}
        if "finite_difference" in self.active:
            values |= probes.symmetric_pair(window, epsilon, self._model is not None)
        elif "kl" in self.active:
            values |= probes.one_sided(window, epsilon)
        return values | (probes.rounding_statistics(window) if self._model is not None else {})

    def _search(self, loss_at: Callable[[float], float], base_loss: float) -> CriticalStep:
        found = critical_step(loss_at, base_loss, self._critical_start, self.critical_max_forwards)
        if math.isfinite(found.factor):
            self._critical_start = found.factor
        if found.capped:
            warn(f"the search for the critical step stopped at critical_max_forwards={self.critical_max_forwards}.")
        return found

    def _judged(self, name: str, one: Estimate) -> Estimate:
        """Add what the outputs do not explain of the loss, and drop a value of which not even the size is known."""
        assert self._model is not None
        error = one.error + (self._model.mismatch if name in _NEEDS_OUTPUTS else 0.0)
        # With an ε of the user's the value is what was asked for.
        lost = self.epsilon == "auto" and one.model is not None and not one.model.total() <= 1.0
        return Estimate(math.nan if lost else one.quadratic, error, one.model)

    def _conclude(self, wanted: Collection[str], values: dict[str, float], result: Result) -> None:
        """Turn the numbers of the job into estimates, and choose the next ε."""
        assert self._rounding is not None
        epsilon, distance = result.epsilon, result.epsilon * result.norm
        result.estimates = estimate(wanted, values, epsilon, distance, self._rounding)
        result.descent, trusted = loss_descent(values, epsilon, self._rounding, result.estimates)
        if not trusted:
            warn("the gradient after backward is not that of the loss: gᵀd is taken from the loss at θ ± εd.")
        self._distance = result.norm * next_epsilon(epsilon, list(result.estimates.values()))
        if self._model is not None:
            result.estimates = {name: self._judged(name, one) for name, one in result.estimates.items()}
        rounding = self._rounding
        self._learned = (rounding.growth, rounding.history, rounding.offset, rounding.slopes)


def _mistaken(errors: Sequence[Exception]) -> Tensor:
    """1 where an error is a mistake that ends the run, which it must do on all ranks."""
    return torch.tensor(float(any(severity(error) == MISTAKEN for error in errors)))


def _hand_over(errors: list[Exception], fail: Fail, mistaken: float) -> None:
    """Call ``fail`` with the first error of this rank, if it has one, and let go of them all.

    An error holds the frames it came through, and they hold the update: a list that kept it would keep two copies of
    the parameters until the collector comes by.
    """
    try:
        fail(errors[0] if errors else elsewhere("a probe", MISTAKEN if mistaken > 0.0 else FAILED))
    finally:
        errors.clear()


def _value_names(active: Collection[str], outputs: bool) -> list[str]:
    """Names of all numbers that one measurement brings together, the same on every rank."""
    names = ["failed", "exact_failed", "mistaken"]
    if "finite_difference" in active:
        names += ["loss_plus", "loss_minus"] + (list(probes.PAIR_NAMES) if outputs else [])
    elif "kl" in active:
        names += ["loss_minus", "twice_divergence", "departure"]
    if outputs:
        names += ["noise_gain", "spread_gain", "loss_noise_gain", "positions"]
    return names + [
        f"{short}_{part}" for n, short in _EXACT.items() if n in active for part in ("descent", "quadratic")
    ]
