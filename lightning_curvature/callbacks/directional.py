"""The monitor of curvature along the true update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature import probes
from lightning_curvature.callbacks.update_monitor import OnError, UpdateMonitor
from lightning_curvature.estimates import (
    Estimate,
    Rounding,
    estimate,
    loss_descent,
    next_epsilon,
)
from lightning_curvature.functional import LIKELIHOODS
from lightning_curvature.metrics import CriticalSharpness, DirectionalCurvature
from lightning_curvature.objective import OUTPUTS_REMEDY, ObjectiveFunction
from lightning_curvature.parallel import is_sharded
from lightning_curvature.probes import Window
from lightning_curvature.reporting import report, warn
from lightning_curvature.targets import OutputModel, identify

Estimator = Literal["kl", "finite_difference", "hvp", "gauss_newton", "critical"]

KEYS: dict[str, str] = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
# Which estimator the headroom is taken from: those of the loss's own Hessian first.
_HEADROOM_ORDER = ("hvp", "finite_difference", "gauss_newton", "kl", "critical")
_NEEDS_OUTPUTS = ("kl", "gauss_newton")
_DEFAULT: tuple[Estimator, ...] = ("kl", "finite_difference")

# First ε, in steps: the step itself. It is within a factor of ten of the best one for float32 and float64 on every
# network tried; lower precisions get there in two or three measured steps.
_FIRST_EPSILON = 1.0
# What the ranks agree on before the probes.
_START = ("loss", "descent", "squared_norm", "failed")


class DirectionalCurvatureMonitor(UpdateMonitor):
    r"""Log the curvature of the loss along the steps that the optimizer really takes.

    With d = θ_t − θ_{t+1} = ηΔθ read from the parameters themselves, and g, H of the training loss at θ_t on the data
    that made the step, the directional curvature

    .. math:: \lambda = \frac{\Delta\theta^\top H\, \Delta\theta}{g^\top \Delta\theta}

    reaches 2/η where the step stops descending to second order, for any optimizer. Keys, each written as
    ``<prefix>/<key>``:

    * ``lambda_dir`` ("hvp"), ``lambda_fd`` ("finite_difference"), ``lambda_kl`` ("kl"), ``lambda_gn``
      ("gauss_newton"), ``critical_sharpness`` ("critical"), in units of 1/η, each with ``<key>_error``, its estimated
      relative error. A value that cannot be told from rounding is NaN, and so is any where gᵀd ≤ 0.
    * ``two_over_lr`` (the edge), ``headroom`` ((2/η)/λ of the best estimator at hand; 1 is the edge), ``descent``
      (gᵀΔθ), ``update_norm`` (‖Δθ‖), ``epsilon``.

    Extra forwards on a measured step: kl 1, finite_difference 2, both 2 (KL is then taken from the symmetric pair,
    O(ε²)), gauss_newton one forward-mode pass, hvp a forward and two backwards, critical 3 to 8. One more where the
    step's own loss is not of the probes' kind: with ``objective=``, ``probe_precision="32-true"``, or a module
    compiled as a whole. None on other steps.

    Choice of ε (``epsilon="auto"``): after each measured step the rounding part of the error (a/ε²) and its
    truncation part (bε², one-sided bε) are known from the numbers at hand: rounding from the type of the forward
    pass and the size of outputs and loss, checked against the even part of the outputs' change; truncation from that
    same even part, or without outputs from the difference between the pair's slope and gᵀd. The next ε is the one
    that makes the sum least, at most ten times away. No forward is spent on it. ε starts at 1 and is part of the
    checkpoint.

    Args:
        estimators: which of "kl", "finite_difference", "hvp", "gauss_newton", "critical". From the default pair "kl"
            is left out, with one warning, where no outputs can be found; asked for otherwise it is an error.
        every_n_train_steps: measure optimizer steps 0, n, 2n, …
        epsilon: probe distance in steps (1 reaches θ_{t+1}), or "auto".
        likelihood: "auto" (integer targets: categorical; float targets whose squared error or binary cross-entropy
            reproduces the loss: gaussian, bernoulli), or one of the three by name.
        outputs: name of the submodule that makes the outputs; default: what training_step returns under "outputs",
            else what the module's own forward returned.
        objective: callable (module, batch) → loss, or → {"loss", "outputs", "mask"}, in place of training_step. It
            must be the loss whose gradient makes the step.
        optimizer_index: which optimizer to follow where there are several.
        probe_precision: "32-true" runs the probe forwards without autocast.
        critical_max_forwards: cap on the forwards of one line search.
        prefix: prefix of the keys.
        progress_bar: show the curvatures and the headroom on the progress bar.
        on_error: "warn" logs NaN and warns when a probe fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit, for what the module or strategy cannot give.

    Source: P0 (directional curvature), eqs. 1-8; Kalra et al. 2026 for "critical".
    """

    def __init__(
        self,
        *,
        estimators: Sequence[Estimator] = _DEFAULT,
        every_n_train_steps: int = 10,
        epsilon: float | Literal["auto"] = "auto",
        likelihood: Literal["auto", "categorical", "gaussian", "bernoulli"] = "auto",
        outputs: str | None = None,
        objective: ObjectiveFunction | None = None,
        optimizer_index: int = 0,
        probe_precision: Literal["32-true"] | None = None,
        critical_max_forwards: int = 20,
        prefix: str = "curvature",
        progress_bar: bool = False,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            objective=objective,
            outputs=outputs,
            optimizer_index=optimizer_index,
            on_error=on_error,
        )
        _check_arguments(estimators, epsilon, likelihood, probe_precision, critical_max_forwards, prefix)
        self.estimators: tuple[Estimator, ...] = tuple(dict.fromkeys(estimators))
        self.epsilon = epsilon
        self.likelihood = likelihood
        self.probe_precision = probe_precision
        self.critical_max_forwards = critical_max_forwards
        self.prefix = prefix
        self.progress_bar = progress_bar
        self.metrics: dict[str, DirectionalCurvature] = {
            name: CriticalSharpness(sync_on_compute=False)
            if name == "critical"
            else DirectionalCurvature(sync_on_compute=False)
            for name in self.estimators
        }
        self._epsilon = _FIRST_EPSILON if epsilon == "auto" else float(epsilon)
        self._critical_start = 1.0
        self._rounding: Rounding | None = None
        self._model: OutputModel | None = None
        self._active: tuple[Estimator, ...] = self.estimators

    @property
    def state_key(self) -> str:
        """Distinct for monitors with distinct prefixes."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about ε and the line search."""
        return {"epsilon": self._epsilon, "critical_start": self._critical_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up ε and the line search where a checkpoint left them."""
        self._critical_start = state_dict["critical_start"]
        if self.epsilon == "auto":
            self._epsilon = state_dict["epsilon"]

    def charts(self) -> dict[str, list[str]]:
        """TensorBoard charts: every λ with the edge, and the headroom."""
        curvatures = [f"{self.prefix}/{KEYS[name]}" for name in self.estimators]
        return {
            f"{self.prefix}: λ and 2/η": [*curvatures, f"{self.prefix}/two_over_lr"],
            f"{self.prefix}: headroom": [f"{self.prefix}/headroom"],
        }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that no other monitor writes the same keys."""
        super().setup(trainer, pl_module, stage)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is not self and isinstance(other, DirectionalCurvatureMonitor) and other.prefix == self.prefix:
                raise MisconfigurationException(
                    f"prefix must differ between monitors, got {self.prefix!r} twice: give one of them another prefix."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check strategy and precision against the estimators."""
        super().on_fit_start(trainer, pl_module)
        self._active, self._model, self._rounding = self.estimators, None, None
        derivatives = [name for name in self.estimators if name in ("hvp", "gauss_newton")]
        parameters = list(pl_module.parameters())
        if derivatives and is_sharded(parameters):
            raise MisconfigurationException(
                f"estimators must be forward-only where parameters are sharded, got {derivatives}: use 'kl', "
                "'finite_difference' or 'critical'."
            )
        if self.probe_precision == "32-true" and any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
            raise MisconfigurationException(
                "probe_precision='32-true' needs float32 parameters, got half-precision ones: train with a '-mixed' "
                "precision, or leave it out."
            )

    def _precision(self, trainer: pl.Trainer) -> Any:
        if self.probe_precision is None:
            return super()._precision(trainer)
        return lambda: torch.autocast(trainer.strategy.root_device.type, enabled=False)

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        """Probe one step, bring the ranks' numbers together, report."""
        assert self._objective is not None
        device = self._objective.device
        start = self._prepare(trainer, window, failure)
        finite = math.isfinite(start["loss"]) and math.isfinite(start["descent"]) and start["failed"] == 0.0
        moved = start["squared_norm"] > 0.0
        if finite and not moved:
            warn("the step did not move the parameters (a skipped fp16 step, or a learning rate of 0): logging NaN.")
        elif start["failed"] == 0.0 and not finite:
            warn(f"the loss or its gradient is not finite ({start['loss']}, gᵀd = {start['descent']}): logging NaN.")
        values, critical = start, None
        if finite and moved and window is not None:
            local: dict[str, torch.Tensor] = {"failed": torch.zeros(())}
            try:
                local |= self._probe(window)
                # The line search decides on the loss of the whole job, so it communicates at each of its forwards.
                if "critical" in self._active:
                    critical = self._search(trainer, window, start["loss"], device)
                if {"hvp", "gauss_newton"} & set(self._active):
                    local |= probes.exact(window, "hvp" in self._active, "gauss_newton" in self._active)
            except Exception as error:
                self._fail(error)
                local = {"failed": torch.ones(())}
            values = self._gather(trainer, local, start, device)
        self._report(trainer, window, values, critical)

    def _prepare(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> dict[str, float]:
        """Base loss and update of the job; every rank comes here, so that all agree on going on."""
        assert self._objective is not None
        nothing = torch.zeros((), dtype=torch.float64)
        local = {"loss": nothing, "descent": nothing, "squared_norm": nothing, "failed": torch.ones(())}
        try:
            if failure is not None:
                raise failure
            assert window is not None
            repeat = (
                self._objective.function is not None or self.probe_precision is not None or self._objective.compiled
            )
            probes.take_base(window, repeat)
            self._find_model(window)
            local = {
                "loss": window.base_loss(),
                "descent": window.update.descent,
                "squared_norm": window.update.squared_norm,
                "failed": torch.zeros(()),
            }
        except MisconfigurationException:
            raise
        except Exception as error:
            self._fail(error)
        return self._mean(trainer, local, self._objective.device)

    def _find_model(self, window: Window) -> None:
        """On the first measured step: which likelihood, which target; which estimators can be had."""
        if self._rounding is None:
            record, base = window.records[0], window.base[0]
            dtype = torch.float32 if self.probe_precision is not None else record.forward_dtype
            wanted = [name for name in self.estimators if name in _NEEDS_OUTPUTS]
            if wanted and base.outputs is not None:
                known_loss = window.objective.module.automatic_optimization or window.objective.function is not None
                loss = base.loss if known_loss else None
                self._model = identify(base.outputs, record.batch, loss, self.likelihood)
            if wanted and self._model is None:
                self._go_without_outputs(wanted, found=base.outputs is not None)
            self._rounding = Rounding(dtype, base.loss.dtype, _coarse_products(window, dtype))
        window.model = self._model

    def _go_without_outputs(self, wanted: Sequence[str], found: bool) -> None:
        reason = (
            f"{wanted} need the likelihood of the loss, which likelihood='auto' could not read off the batch: name it, "
            "likelihood='categorical', 'gaussian' or 'bernoulli'"
            if found
            else f"{wanted} need the outputs of the model, got none: {OUTPUTS_REMEDY}"
        )
        if set(self.estimators) != set(_DEFAULT):
            raise MisconfigurationException(f"{reason}.")
        warn(f"{reason}. Going on with 'finite_difference' alone.")
        self._active = ("finite_difference",)

    def _probe(self, window: Window) -> dict[str, torch.Tensor]:
        """Run the forward-only estimators: one pass for KL alone, two with the finite difference."""
        outputs = self._model is not None and "kl" in self._active
        values: dict[str, torch.Tensor] = {}
        if "finite_difference" in self._active:
            values |= probes.symmetric_pair(window, self._epsilon, outputs)
        elif "kl" in self._active:
            values |= probes.one_sided(window, self._epsilon)
        if outputs:
            values |= probes.rounding_statistics(window)
        return values

    def _search(self, trainer: pl.Trainer, window: Window, base: float, device: torch.device) -> probes.CriticalStep:
        def loss_at(factor: float) -> float:
            return self._mean(trainer, {"loss": window.loss_at(factor)}, device)["loss"]

        found = probes.critical_step(loss_at, base, self._critical_start, self.critical_max_forwards)
        if math.isfinite(found.factor):
            self._critical_start = found.factor
        if found.capped:
            warn(f"the search for the critical step stopped at critical_max_forwards={self.critical_max_forwards}.")
        return found

    def _gather(
        self, trainer: pl.Trainer, local: dict[str, torch.Tensor], start: dict[str, float], device: torch.device
    ) -> dict[str, float]:
        """Mean over the ranks of all numbers of a measurement."""
        # A rank that failed must still send as many numbers as the others: all names are known beforehand.
        names = _value_names(self._active, self._model is not None)
        missing = torch.full((), torch.nan)
        return start | self._mean(trainer, {name: local.get(name, missing) for name in names}, device)

    def _report(
        self, trainer: pl.Trainer, window: Window | None, values: dict[str, float], critical: probes.CriticalStep | None
    ) -> None:
        """Turn the numbers of the job into curvatures, choose the next ε, write."""
        lr = window.update.lr if window is not None else math.nan
        epsilon, estimates, descent = self._epsilon, dict[str, Estimate](), math.nan
        if values["failed"] == 0.0 and self._rounding is not None and len(values) > len(_START):
            values["positions"] = values.get("positions", math.nan) * trainer.world_size
            gaussian = self._model is not None and self._model.likelihood == "gaussian"
            estimates = estimate(values, epsilon, self._rounding, gaussian)
            descent, trusted = loss_descent(values, epsilon, self._rounding, estimates)
            if not trusted:
                warn("the gradient after backward is not that of the loss: gᵀd is taken from the loss at θ ± εd.")
            if self.epsilon == "auto":
                self._epsilon = next_epsilon(epsilon, list(estimates.values()))
        logged = self._curvatures(estimates, critical, descent, lr)
        norm = math.sqrt(max(values["squared_norm"], 0.0))
        logged |= {
            "two_over_lr": 2.0 / lr if lr else math.inf,
            "descent": descent / lr if lr else math.nan,
            "update_norm": norm / lr if lr else math.nan,
        }
        if {"kl", "finite_difference"} & set(self._active):
            logged["epsilon"] = epsilon
        shown = [*(KEYS[name] for name in self._active), "headroom"] if self.progress_bar else []
        report(
            trainer,
            {f"{self.prefix}/{key}": value for key, value in logged.items()},
            [f"{self.prefix}/{key}" for key in shown],
        )

    def _curvatures(
        self, estimates: dict[str, Estimate], critical: probes.CriticalStep | None, descent: float, lr: float
    ) -> dict[str, float]:
        """Return λ and its error for each estimator, and the headroom of the first that has a value."""
        logged: dict[str, float] = {}
        headroom = math.nan
        for name in sorted(self._active, key=_HEADROOM_ORDER.index):
            metric, key = self.metrics[name], KEYS[name]
            metric.reset()
            if name == "critical":
                found = critical if critical is not None and descent > 0.0 else None
                metric.update(found.factor if found else math.nan, lr)
                error = found.half_width if found else math.nan
            else:
                result = estimates.get(name, Estimate(math.nan, math.nan))
                metric.update(result.quadratic, descent, lr)
                error = result.error
            logged |= {key: float(metric.compute()), f"{key}_error": error}
            if math.isnan(headroom):
                headroom = float(metric.headroom())
        return logged | {"headroom": headroom}


def _value_names(active: Sequence[str], outputs: bool) -> list[str]:
    """Names of all numbers that one measurement brings together, the same on every rank."""
    names = ["failed"]
    if "finite_difference" in active:
        names += ["loss_plus", "loss_minus"] + (["signal", "defect"] if "kl" in active and outputs else [])
    elif "kl" in active:
        names += ["loss_minus", "twice_divergence", "departure"]
    if "kl" in active and outputs:
        names += ["noise_gain", "loss_noise_gain", "positions"]
    for name, short in (("hvp", "hvp"), ("gauss_newton", "gn")):
        if name in active:
            names += [f"{short}_descent", f"{short}_quadratic"]
    return names


def _coarse_products(window: Window, dtype: torch.dtype) -> bool:
    """Whether float32 products run in TF32 on this device."""
    if window.objective.device.type != "cuda" or dtype != torch.float32:
        return False
    convolutions = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in window.objective.module.modules())
    return torch.backends.cuda.matmul.allow_tf32 or (convolutions and torch.backends.cudnn.allow_tf32)


def _check_arguments(
    estimators: Sequence[str],
    epsilon: float | str,
    likelihood: str,
    probe_precision: str | None,
    critical_max_forwards: int,
    prefix: str,
) -> None:
    if isinstance(estimators, str) or not estimators:
        raise ValueError(
            f"estimators must be a non-empty sequence of names, got {estimators!r}: choose from {tuple(KEYS)}."
        )
    unknown = [name for name in estimators if name not in KEYS]
    if unknown:
        raise ValueError(f"estimators must be names from {tuple(KEYS)}, got {unknown[0]!r}: correct or remove it.")
    if epsilon != "auto" and (isinstance(epsilon, str) or not 0.0 < epsilon < math.inf):
        raise ValueError(
            f"epsilon must be positive and finite, or 'auto', got {epsilon!r}: 1.0 probes as far as the step went."
        )
    if likelihood not in ("auto", *LIKELIHOODS):
        raise ValueError(
            f"likelihood must be 'auto' or one of {LIKELIHOODS}, got {likelihood!r}: name the one that is trained."
        )
    if probe_precision not in (None, "32-true"):
        raise ValueError(
            f"probe_precision must be '32-true' or None, got {probe_precision!r}: None probes in the run's precision."
        )
    if critical_max_forwards < 3:
        raise ValueError(
            f"critical_max_forwards must be at least 3, got {critical_max_forwards}: a bracket alone takes two."
        )
    if not prefix or prefix != prefix.strip("/"):
        raise ValueError(f"prefix must be a name without slashes at its ends, got {prefix!r}: use 'curvature'.")
