"""The monitor of curvature along the true update."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.directional.measurement import DirectionalMeasurement
from lightning_curvature.directional.options import EXACT, KEYS, OSCILLATION, DirectionalOptions, Estimator
from lightning_curvature.directional.problem import Window
from lightning_curvature.directional.result import DirectionalResult
from lightning_curvature.directional.update_monitor import UpdateMonitor
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.distributed.together import attempted
from lightning_curvature.monitors.checks import check_real
from lightning_curvature.monitors.options import OnError
from lightning_curvature.optimizers.oscillation import Trail
from lightning_curvature.replay.objective import ObjectiveFunction


class DirectionalCurvatureMonitor(UpdateMonitor):
    r"""Log the curvature of the loss along the steps that the optimizer really takes.

    With d = θ_t − θ_{t+1} = ηΔθ read from the parameters themselves, and g, H of the training loss at θ_t on the data
    that made the step, the directional curvature

    .. math:: \lambda = \frac{\Delta\theta^\top H\, \Delta\theta}{g^\top \Delta\theta}

    reaches 2/η where the step stops descending to second order, for any optimizer. Keys, each written as
    ``<prefix>/<key>``:

    * ``lambda_dir`` ("hvp"), ``lambda_fd`` ("finite_difference"), ``lambda_kl`` ("kl"), ``lambda_gn``
      ("gauss_newton"), ``critical_sharpness`` ("critical"), in units of 1/η, each with ``<key>_error``, its estimated
      relative error. A value is NaN where rounding hides it, and where gᵀd ≤ 0; there ``<key>_numerator`` is ΔθᵀHΔθ.
    * ``two_over_lr`` (2/η), ``headroom`` ((2/η)/λ of the best estimator at hand; at 1 this step stops descending),
      ``descent`` (gᵀΔθ), ``update_norm`` (‖Δθ‖), ``epsilon``.
    * ``lambda_osc`` ("oscillation") = sᵀHs/sᵀPs with its ``_error``, s_t = d_t − 2d_{t−1} + d_{t−2} and P the
      optimizer's diagonal preconditioner: for full batches, where the path flips its sign at each step, a lower bound
      of λ_max(P^{-1/2}HP^{-1/2}). ``oscillation_edge`` is the threshold of that, ``oscillation_ratio`` their ratio, 1
      at the edge of stability; ``oscillation_cosine`` between s_t and s_{t−1} in P, ``oscillation_growth``
      ‖s_t‖_P/‖s_{t−1}‖_P. λ_osc is NaN unless the cosine is below −0.9, and where P is not known.

    With ``by_module`` and "hvp", at no pass more: ``<prefix>_by_module/lambda_dir/<module>``, the terms
    ΔθᵢᵀΣⱼHᵢⱼΔθⱼ/gᵀΔθ of its parameters, which add up to λ_dir, each with half of the cross terms between its module
    and others (so that it may be negative), and ``descent``, gᵢᵀΔθᵢ; also in ``result.modules``.

    Extra forwards on a measured step: kl 1, finite_difference 2, both 2 (KL is then taken from the symmetric pair,
    O(ε²)), gauss_newton one forward-mode pass, hvp a forward and two backwards, critical 3 to 8, oscillation 2 where
    the path flips (with hvp a forward and two backwards), else none. One more where the step's own loss is computed
    otherwise than theirs: with ``objective=``, ``probe_precision="32-true"``, or a module
    compiled as a whole; and one on the first measured step of a fit, which checks that the step can be repeated (see
    docs/effect.md). For a loss of no known likelihood two more once a fit, which find its outputs. One more for kinks
    that the graph of the step does not show (see docs/directional.md). None on other steps.

    Choice of ε (``epsilon="auto"``): a measured step shows the rounding part of its errors (a/ε²) and their truncation
    part (bε², one-sided bε), without an evaluation more. The next ε makes the sum least, between a tenth and four times
    the last; it is kept as a distance ε‖d‖, so that a suddenly longer step is not evaluated further out, and the
    distance is part of the checkpoint. docs/directional.md has the details.

    Args:
        estimators: which of "kl", "finite_difference", "hvp", "gauss_newton", "critical", "oscillation". Those that
            need outputs are left out, with one warning, where the step has none; it raises if there are no others.
        every_n_train_steps: measure optimizer steps 0, n, 2n, …
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        epsilon: how far along the step to evaluate, in steps (1 reaches θ_{t+1}), or "auto".
        likelihood: "auto" (the one that reproduces the loss; for any other loss its second derivative by the outputs,
            through its head), or "categorical", "gaussian" or "bernoulli" by name.
        outputs: name of the submodule that makes the outputs; default: what training_step returns under "outputs",
            else what the module's own forward returned; through the head, also those of the last modules before it.
        objective: callable (module, batch) → loss, or → {"loss", "outputs", "mask"}, in place of training_step. It
            must be the loss whose gradient makes the step.
        optimizer_index: which optimizer to follow where there are several.
        kinks: "frozen" keeps each kinked operation (relu, max pooling, clamp, sort, …) on the side that it has at θ_t,
            so that differences measure H and G at θ_t; "crossed" is the plain difference, which counts the kinks.
        probe_precision: "32-true" evaluates without autocast.
        critical_max_forwards: cap on the forwards of one line search.
        by_module: also give the terms of ``lambda_dir`` by module ("hvp" alone has them): True for each module that
            holds parameters, a number for the modules at this depth (1 at the top), or names.
        prefix: prefix of the keys.
        progress_bar: show the curvatures and the headroom on the progress bar.
        on_error: "warn" logs NaN and warns when an evaluation fails; "raise" raises.

    Attributes:
        result: result of the last measurement, or None.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit, for what the module or strategy cannot give.

    Source: Directional curvature (2026), eqs. 1-8; Kalra et al. 2026 for "critical"; see docs/references.md.
    """

    options: DirectionalOptions
    result: DirectionalResult | None
    state_types: ClassVar[Mapping[str, type]] = {"distance": float, "rounding": tuple, "critical_start": float}

    def __init__(
        self,
        *,
        estimators: Sequence[Estimator] = DirectionalOptions.estimators,
        every_n_train_steps: int = DirectionalOptions.every_n_train_steps,
        max_overhead: float | None = DirectionalOptions.max_overhead,
        epsilon: float | Literal["auto"] = DirectionalOptions.epsilon,
        likelihood: Literal["auto", "categorical", "gaussian", "bernoulli"] = DirectionalOptions.likelihood,
        outputs: str | None = DirectionalOptions.outputs,
        objective: ObjectiveFunction | None = DirectionalOptions.objective,
        optimizer_index: int = DirectionalOptions.optimizer_index,
        kinks: Literal["frozen", "crossed"] = DirectionalOptions.kinks,
        probe_precision: Literal["32-true"] | None = DirectionalOptions.probe_precision,
        critical_max_forwards: int = DirectionalOptions.critical_max_forwards,
        by_module: bool | int | Sequence[str] = DirectionalOptions.by_module,
        prefix: str = DirectionalOptions.prefix,
        progress_bar: bool = DirectionalOptions.progress_bar,
        on_error: OnError = DirectionalOptions.on_error,
    ) -> None:
        super().__init__(DirectionalOptions.of(locals()))

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._measurement = DirectionalMeasurement(self.options)

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about ε and the line search."""
        return super().state_dict() | self._measurement.state_dict()

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        """Take up ε and the line search where a checkpoint left them."""
        super()._take_up(state_dict)
        self._measurement.load_state_dict(state_dict)

    def edges(self, trainer: pl.Trainer) -> dict[str, str | None]:
        """Return 2/η as the edge of each λ, and of λ_osc its own."""
        edges = {name: "oscillation_edge" if name == OSCILLATION else "two_over_lr" for name in self.options.estimators}
        return {KEYS[name]: edge for name, edge in edges.items()}

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Chart every λ with its edge."""
        curvatures = [KEYS[name] for name in self.options.estimators if name != OSCILLATION]
        charts = {"λ and 2/η": [*curvatures, "two_over_lr"]} if curvatures else {}
        if OSCILLATION in self.options.estimators:
            charts["λ_osc and its threshold"] = ["lambda_osc", "oscillation_edge"]
        return charts

    def charted_by_module(self) -> Sequence[str]:
        """Chart the terms of λ_dir."""
        return [KEYS["hvp"]] if "hvp" in self.options.estimators else []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check strategy and precision against the estimators."""
        super().on_fit_start(trainer, pl_module)
        self._measurement.begin()
        if self._objective is not None and {"kl", "finite_difference", OSCILLATION} & set(self.options.estimators):
            self._objective.kinks.wanted = self.options.kinks
        if OSCILLATION in self.options.estimators:
            self._trail = Trail(self.options.every_n_train_steps, len(trainer.optimizers))
        check_real(type(self).__name__, self._parameters(trainer))
        derivatives = [name for name in self.options.estimators if name in EXACT]
        parameters = list(pl_module.parameters())
        if derivatives and is_sharded(parameters):
            raise MisconfigurationException(
                f"estimators must be forward-only where parameters are sharded, got {derivatives}: use 'kl', "
                "'finite_difference' or 'critical'."
            )
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
        if half and self.options.probe_precision == "32-true":
            raise MisconfigurationException(
                "probe_precision='32-true' needs float32 parameters, got half-precision ones: train with a '-mixed' "
                "precision, or leave it out."
            )

    def check_at_a_point(self) -> None:
        """Raise for an oscillation, which is one of several steps."""
        if OSCILLATION in self.options.estimators:
            raise MisconfigurationException(
                "estimators must not hold 'oscillation' for evaluate(), which makes one step: leave it out, or give "
                "the monitor to a Trainer as a callback."
            )

    def measure(self, trainer: pl.Trainer, window: Window | None, failure: Exception | None) -> None:
        """Measure one step."""
        self.result = None
        measured = attempted(lambda: self._measurement.measure(trainer, window, failure, self._fail), self._fail)
        self.result = measured or DirectionalResult(self._measurement.estimators)

    def numbers(self) -> list[float]:
        """Return the curvatures of the step."""
        result = self.result or DirectionalResult(())
        wanted = {*map(KEYS.get, result.estimators), "oscillation_cosine"}  # there is not always an oscillation
        return [value for key, value in result.values().items() if key in wanted]

    def report(self, trainer: pl.Trainer) -> None:
        """Write the values of the step."""
        if self.result is None:
            return
        shown = [*(KEYS[name] for name in self.result.estimators), "headroom"] if self.options.progress_bar else []
        self._write(trainer, self.result.values(), shown)
        self._write_modules(trainer, self.result.modules)
