"""The monitor of curvature along the true update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.directional.estimates import Estimate
from lightning_curvature.directional.measurement import DirectionalMeasurement, Result
from lightning_curvature.directional.probes import Window
from lightning_curvature.directional.update_monitor import UpdateMonitor
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.functional import LIKELIHOODS
from lightning_curvature.metrics import CriticalSharpness, DirectionalCurvature
from lightning_curvature.monitors.base import OnError
from lightning_curvature.monitors.checks import check_names
from lightning_curvature.replay.objective import ObjectiveFunction

Estimator = Literal["kl", "finite_difference", "hvp", "gauss_newton", "critical"]

KEYS: dict[str, str] = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
# Which estimator the headroom is taken from: those of the loss's own Hessian first, if they know their value this well.
_HEADROOM_ORDER = ("hvp", "finite_difference", "gauss_newton", "kl", "critical")
_HEADROOM_ERROR = 0.3
_DEFAULT: tuple[Estimator, ...] = ("kl", "finite_difference")


class DirectionalCurvatureMonitor(UpdateMonitor):
    r"""Log the curvature of the loss along the steps that the optimizer really takes.

    With d = θ_t − θ_{t+1} = ηΔθ read from the parameters themselves, and g, H of the training loss at θ_t on the data
    that made the step, the directional curvature

    .. math:: \lambda = \frac{\Delta\theta^\top H\, \Delta\theta}{g^\top \Delta\theta}

    reaches 2/η where the step stops descending to second order, for any optimizer. Keys, each written as
    ``<prefix>/<key>``:

    * ``lambda_dir`` ("hvp"), ``lambda_fd`` ("finite_difference"), ``lambda_kl`` ("kl"), ``lambda_gn``
      ("gauss_newton"), ``critical_sharpness`` ("critical"), in units of 1/η, each with ``<key>_error``, its estimated
      relative error. A value that cannot be told from rounding is NaN, and so is any where gᵀd ≤ 0; there
      ``<key>_numerator`` (ΔθᵀHΔθ) is logged beside it.
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
    that makes the sum least, between a tenth and four times the last; it is kept as a distance ε‖d‖, so that a
    suddenly longer step is not probed further out. No forward is spent on it. The first is chosen from the sizes
    of loss, gᵀd, step and parameters; the distance is part of the checkpoint.

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
            prefix=prefix,
            probe_precision=probe_precision,
            on_error=on_error,
        )
        _check_arguments(estimators, epsilon, likelihood, critical_max_forwards)
        self.estimators: tuple[Estimator, ...] = tuple(dict.fromkeys(estimators))
        self.epsilon = epsilon
        self.likelihood = likelihood
        self.critical_max_forwards = critical_max_forwards
        self.progress_bar = progress_bar
        self.metrics: dict[str, DirectionalCurvature] = {
            name: CriticalSharpness(sync_on_compute=False)
            if name == "critical"
            else DirectionalCurvature(sync_on_compute=False)
            for name in self.estimators
        }
        self._measurement = DirectionalMeasurement(
            self.estimators,
            epsilon,
            likelihood,
            other_precision=probe_precision is not None,
            critical_max_forwards=critical_max_forwards,
            default=set(estimators) == set(_DEFAULT),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about ε and the line search."""
        return self._measurement.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up ε and the line search where a checkpoint left them."""
        self._measurement.load_state_dict(state_dict)

    def charts(self) -> dict[str, list[str]]:
        """TensorBoard charts: every λ with the edge, and the headroom."""
        curvatures = [f"{self.prefix}/{KEYS[name]}" for name in self.estimators]
        return {
            f"{self.prefix}: λ and 2/η": [*curvatures, f"{self.prefix}/two_over_lr"],
            f"{self.prefix}: headroom": [f"{self.prefix}/headroom"],
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check strategy and precision against the estimators."""
        super().on_fit_start(trainer, pl_module)
        self._measurement.begin()
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

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        """Measure one step and write what it gave."""
        result = self._measurement.measure(trainer, window, failure, self._fail)
        lr = result.lr
        logged = self._curvatures(result, lr)
        logged |= {
            "two_over_lr": 2.0 / lr if lr else math.inf,
            "descent": result.descent / lr if lr else math.nan,
            "update_norm": result.norm / lr if lr else math.nan,
        }
        active = self._measurement.active
        if {"kl", "finite_difference"} & set(active):
            logged["epsilon"] = result.epsilon
        shown = [*(KEYS[name] for name in active), "headroom"] if self.progress_bar else []
        self._write(trainer, logged, shown)

    def _curvatures(self, result: Result, lr: float) -> dict[str, float]:
        """Return λ and its error for each estimator, and the headroom of the first that has a value."""
        logged: dict[str, float] = {}
        headroom = math.nan
        for name in sorted(self._measurement.active, key=_HEADROOM_ORDER.index):
            metric, key = self.metrics[name], KEYS[name]
            metric.reset()
            if name == "critical":
                found = result.critical if result.critical is not None and result.descent > 0.0 else None
                metric.update(found.factor if found else math.nan, lr)
                error = found.half_width if found else math.nan
            else:
                one = result.estimates.get(name, Estimate(math.nan, math.nan))
                metric.update(one.quadratic, result.descent, lr)
                error = one.error
                if result.descent <= 0.0:
                    logged[f"{key}_numerator"] = one.quadratic / lr**2 if lr else math.nan
            logged |= {key: float(metric.compute()), f"{key}_error": error}
            if error <= _HEADROOM_ERROR and math.isnan(headroom):
                headroom = float(metric.headroom())
        return logged | {"headroom": headroom}


def _check_arguments(
    estimators: Sequence[str],
    epsilon: float | str,
    likelihood: str,
    critical_max_forwards: int,
) -> None:
    check_names("estimators", estimators, tuple(KEYS))
    if epsilon != "auto" and (not isinstance(epsilon, (int, float)) or not 0.0 < epsilon < math.inf):
        raise ValueError(
            f"epsilon must be positive and finite, or 'auto', got {epsilon!r}: 1.0 probes as far as the step went."
        )
    if likelihood not in ("auto", *LIKELIHOODS):
        raise ValueError(
            f"likelihood must be 'auto' or one of {LIKELIHOODS}, got {likelihood!r}: name the one that is trained."
        )
    if critical_max_forwards < 3:
        raise ValueError(
            f"critical_max_forwards must be at least 3, got {critical_max_forwards}: a bracket alone takes two."
        )
