"""The monitor of mini-batch sharpness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl

from lightning_curvature.batch_sharpness.measurement import SharpnessMeasurement
from lightning_curvature.batch_sharpness.options import (
    OF_UPDATES,
    PLATEAUS,
    SETTLING,
    BatchesAtOnce,
    BatchSharpnessOptions,
    FullHessian,
    Quantity,
)
from lightning_curvature.batch_sharpness.problem import SharpnessProblem, check_population, check_sharded
from lightning_curvature.batch_sharpness.result import BatchSharpnessResult, report_eigenvalues
from lightning_curvature.data.population import Population, read_population
from lightning_curvature.data.probe_set import step_size
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.options import OnError
from lightning_curvature.monitors.probe_set import ProbeSetMonitor
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.monitors.step_calls import StepCalls
from lightning_curvature.operators import Curvature, operator_type
from lightning_curvature.operators.sharding import WHERE_SHARDED
from lightning_curvature.optimizers.plateaus import momentum_plateaus, plateau_note
from lightning_curvature.optimizers.stability import stability_rule
from lightning_curvature.optimizers.trial_steps import TrialSteps
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import inform, warn
from lightning_curvature.reporting.progress import Progress

_CHART = "mini-batch sharpness and 2/η"


class BatchSharpnessMonitor(ProbeSetMonitor[SharpnessProblem, BatchSharpnessResult]):
    r"""Log how curved the loss of mini-batches is along their own gradients, and related quantities.

    g_B, H_B are gradient and Hessian of the loss of a mini-batch B, g and H those of the whole probe set, E_B the mean
    over mini-batches drawn from it as training draws them. Quantities and their keys, written as ``<prefix>/<key>``:

    * "batch_sharpness": :math:`E_B[g_B^\top H_B g_B / \lVert g_B\rVert^2]`. SGD hovers where it is 2/η: the edge of
      stochastic stability.
    * "step_sharpness": :math:`g_B^\top H_B g_B / \lVert g_B\rVert^2` of the batch of the coming step, with all its
      micro-batches and ranks. One product.
    * "modified_batch_sharpness": :math:`E_B[g_B^\top H_B g_B] / E_B\lVert g_B\rVert^2`; settles above 2/η.
    * "update_sharpness": :math:`E_B[\Delta\theta_B^\top H_B \Delta\theta_B / \lVert\Delta\theta_B\rVert^2] /
      E_B[g_B^\top \Delta\theta_B / \lVert\Delta\theta_B\rVert^2]`, Δθ_B the update over η that the optimizer would
      make from its present state with g_B; batch sharpness for plain SGD. Above 2/η the steps no longer lower the loss
      of their own batches, in the mean per squared length and to second order. No mean of ratios: momentum makes
      g_BᵀΔθ_B zero or negative for some batches, and such a mean has no value.
    * "ias", interaction-aware sharpness: :math:`E_B[g_B^\top H g_B] / E_B\lVert g_B\rVert^2`; stays below 2/η.
    * "gni", gradient–noise interaction: :math:`E_B[g_B^\top H g_B] / \lVert g\rVert^2`; 2/η whenever the loss
      oscillates.
    * "lambda_gen": :math:`\operatorname{tr}(H\,E[\Delta\theta_B\Delta\theta_B^\top]) / (g^\top E[\Delta\theta_B])`,
      with the same Δθ_B; GNI for plain SGD.
    * "lambda_max_b": :math:`E_B[\lambda_{\max}(H_B)]`; between 2/η and 4/η. With deciles and median over mini-batches,
      ``lambda_max_b_q10``, ``_q50`` and ``_q90``, and a histogram on TensorBoard, ``lambda_max_b_distribution``.

    Each comes with ``<key>_stderr``, the standard error of the value over the draws, and ``<key>_batches``, the number
    of batches it took. Beside them stand ``two_over_lr`` (2/η); beside batch or step sharpness under SGD with momentum
    ``plateau_small_batch`` and ``plateau_large_batch``, where it settles instead (see
    :func:`~lightning_curvature.functional.sharpness_plateaus`); ``zero_gradient_batches``, the number of drawn batches
    without a gradient, which batch sharpness leaves out; and ``lambda_max_b_unconverged``, the number of drawn batches
    whose eigenvalue did not converge to ``tolerance`` and counts too small. One line of the log says if
    2/η is not the plateau of the optimizer.

    With ``by_module``, at no product more: ``<prefix>_by_module/batch_sharpness/<module>`` with its ``_stderr``, the
    terms :math:`E_B[g_{B,i}^\top (H_B g_B)_i / \lVert g_B\rVert^2]` of its parameters, which add up to batch sharpness,
    and may be negative by their cross terms; also in ``result.modules``.

    The monitor draws batches in pairs (B, B') until the standard error of each value falls below ``relative_error`` of
    it. The batches of a pair are independent, so that :math:`g_B^\top H_{B'} g_B` is :math:`g_B^\top H g_B` in the
    mean, without a product with the full Hessian.

    Cost of a measured step, for each batch: its gradient with the graph, and one Hessian–vector product of that batch
    each for batch sharpness (with the modified one), for update sharpness, for IAS (with GNI), and for λ_gen; about
    eight for λ_max^b. Update sharpness and λ_gen also take a step of the optimizer, which is undone, GNI and λ_gen one
    more forward+backward of the whole probe set. Other steps cost nothing.

    BatchNorm in training mode is that of each mini-batch, or of its micro-batches where it is cut. Dropout has one mask
    a micro-batch; in "step_sharpness" the mask of the step. All ranks measure parameters that FSDP2 shards together,
    with products by differences of gradients: two forward+backwards each.

    Args:
        quantities: which of the above.
        every_n_train_steps: measure before optimizer steps 0, n, 2n, …
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        num_batches: most batches of a measurement, over all ranks; pairs round an odd number up.
        min_batches: fewest batches with a gradient; standard errors of fewer are not reliable.
        average_over: also log means over so many last measurements, ``<key>_average`` with its ``_stderr``, and draw no
            more in each than they need to be known to ``relative_error``.
        relative_error: relative standard error at which drawing for a quantity ends.
        batch_size: samples of a drawn batch; default: those of one optimizer step, over ranks and accumulation (with a
            ``probe_dataloader``, too).
        curvature: "hessian", or "gauss_newton" for the Gauss–Newton matrix in place of each H.
        full_hessian: "pairs", as above, or "exact": a product with the whole probe set for each batch and each of (IAS
            with GNI) and λ_gen. It costs more by the size of the set, and each draw says more: worth it on small sets,
            and where curvature is unevenly spread over samples (nearly fitted data).
        batches_at_once: how many mini-batches to differentiate at once, by ``torch.vmap``; 1 for one after the other;
            "auto" takes 16 of small models (100,000 parameters), whose mini-batches take longer to launch than to
            compute. Where ``vmap`` cannot follow the training step (dropout, ``loss.item()``, BatchNorm's running
            statistics), for "lambda_max_b" and for exact products it is always one after the other.
        probe_samples: most samples of the probe set; None for all training data.
        probe_dataloader: where to take them from; default: the Trainer's train dataloader.
        micro_batch_size: samples differentiated at once; default: the loader's batch size.
        tolerance: relative error of each λ_max^b.
        outputs: see :class:`DirectionalCurvatureMonitor`; only the Gauss–Newton matrix needs outputs.
        objective: callable (module, batch) → loss, or → {"loss", "outputs"}, in place of training_step.
        optimizer_index: which optimizer to follow where there are several.
        probe_mode: "train" leaves the module in its modes, "eval" switches it for the measurement.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        by_module: also give the terms of batch sharpness by module: True for each module that holds parameters, a
            number for the modules at this depth (1 at the top), or names.
        seed: of the choice of samples, of the draws and of dropout masks.
        prefix: prefix of the keys.
        progress_bar: show the values on the progress bar.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit or of the first measurement, for what the module, the data or the
            strategy cannot give.

    Source: Edge of stochastic stability (2025), definitions 2 and 3, eqs. 3 and 4, appendices M and P; Lee and Jang
    2023 (IAS); Andreyev et al. 2026 (momentum); see docs/references.md.
    """

    options: BatchSharpnessOptions
    of_optimizer = OF_UPDATES
    state_types: ClassVar[Mapping[str, type]] = {"probe_set": list, "means": dict}
    state_optional = frozenset({"probe_set", "means"})
    _batch_norm_note = "a mini-batch is normalized by its own statistics, or each of its micro-batches where it is cut"

    def __init__(
        self,
        *,
        quantities: Sequence[Quantity] = BatchSharpnessOptions.quantities,
        every_n_train_steps: int = BatchSharpnessOptions.every_n_train_steps,
        max_overhead: float | None = BatchSharpnessOptions.max_overhead,
        num_batches: int = BatchSharpnessOptions.num_batches,
        min_batches: int = BatchSharpnessOptions.min_batches,
        average_over: int = BatchSharpnessOptions.average_over,
        relative_error: float = BatchSharpnessOptions.relative_error,
        batch_size: int | None = BatchSharpnessOptions.batch_size,
        curvature: Curvature = BatchSharpnessOptions.curvature,
        full_hessian: FullHessian = BatchSharpnessOptions.full_hessian,
        batches_at_once: BatchesAtOnce = BatchSharpnessOptions.batches_at_once,
        probe_samples: int | None = BatchSharpnessOptions.probe_samples,
        probe_dataloader: Any = BatchSharpnessOptions.probe_dataloader,
        micro_batch_size: int | None = BatchSharpnessOptions.micro_batch_size,
        tolerance: float = BatchSharpnessOptions.tolerance,
        outputs: str | None = BatchSharpnessOptions.outputs,
        objective: ObjectiveFunction | None = BatchSharpnessOptions.objective,
        optimizer_index: int = BatchSharpnessOptions.optimizer_index,
        probe_mode: Literal["train", "eval"] = BatchSharpnessOptions.probe_mode,
        probe_precision: Literal["32-true"] | None = BatchSharpnessOptions.probe_precision,
        by_module: bool | int | Sequence[str] = BatchSharpnessOptions.by_module,
        seed: int = BatchSharpnessOptions.seed,
        prefix: str = BatchSharpnessOptions.prefix,
        progress_bar: bool = BatchSharpnessOptions.progress_bar,
        on_error: OnError = BatchSharpnessOptions.on_error,
    ) -> None:
        super().__init__(BatchSharpnessOptions.of(locals()))

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._measurement = SharpnessMeasurement(self.options)

    def state_dict(self) -> dict[str, Any]:
        """Return what running means are made of, beside what every monitor keeps."""
        means = self._measurement.means.state_dict()
        return super().state_dict() | ({"means": means} if self.options.average_over > 1 else {})

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        super()._take_up(state_dict)
        self._measurement.means.load_state_dict(state_dict.get("means", {}))

    def _begin(self) -> None:
        super()._begin()
        self._sharded = False
        self._calls = StepCalls()
        self._step_size: tuple[int | None, int] | None = None

    def edges(self, trainer: pl.Trainer) -> dict[str, str | None]:
        """Return 2/η, which under momentum and adaptive optimizers is the edge along their own updates alone."""
        index, optimizers = self.options.optimizer_index, trainer.optimizers
        plain = index < len(optimizers) and plateau_note(optimizers[index]) is None
        of_edge = [q for q in self.options.quantities if plain or q in OF_UPDATES]
        return dict.fromkeys(self.options.with_means(of_edge), "two_over_lr")

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Return one chart: all sharpnesses with 2/η, and the plateaus of an optimizer that has others."""
        return {_CHART: [*self.options.with_means(self.options.quantities), "two_over_lr", *self._plateaus(trainer)]}

    def _plateaus(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return where batch sharpness settles under momentum, by key, if it is measured and has such plateaus."""
        index = self.options.optimizer_index
        if not set(SETTLING) & set(self.options.quantities) or index >= len(trainer.optimizers):
            return {}
        return dict(zip(PLATEAUS, momentum_plateaus(trainer.optimizers[index]) or (), strict=False))

    def charted_by_module(self) -> Sequence[str]:
        """Chart the terms of batch sharpness."""
        return ["batch_sharpness"]

    def write_pictures(self, trainer: pl.Trainer, result: BatchSharpnessResult) -> None:
        """Write the values by module, and the eigenvalues of mini-batches as a histogram."""
        self._write_modules(trainer, result.modules)
        if result.eigenvalues:
            report_eigenvalues(trainer, f"{self.options.prefix}/lambda_max_b_distribution", result.eigenvalues)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check parameters, strategy and optimizer against the quantities."""
        super().on_fit_start(trainer, pl_module)
        self.check_module(trainer, pl_module)
        note = plateau_note(trainer.optimizers[self.options.optimizer_index])
        if note is not None and set(SETTLING) & set(self.options.quantities):
            inform(note)

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise for quantities that parameters or optimizer cannot give."""
        options, self._sharded = self.options, is_sharded(self._parameters(trainer))
        if self._sharded:
            check_sharded(options)
            warn(WHERE_SHARDED)
        if set(OF_UPDATES) & set(options.quantities):
            TrialSteps.check(trainer.optimizers[options.optimizer_index])

    def _complete(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """Keep the batches of the coming step, where they are asked for, until the last of them."""
        size = (step_size(trainer), trainer.accumulate_grad_batches)
        if size != self._step_size:
            # Steps of another size from here on: mini-batches are drawn anew, of that size.
            self._step_size, self._has_read = size, False
        return not self.options.of_step or self._calls.add(trainer, batch, batch_idx)

    def _read(self, trainer: pl.Trainer, batch: Any, failure: Exception | None) -> Population | None:
        options = self.options
        if not options.drawn:
            return None
        self._measurement.pairs_at_once = None
        population = read_population(
            trainer,
            options.probe_dataloader,
            samples=options.probe_samples,
            batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            seed=options.seed,
            failure=failure,
            bookmark=self._bookmark,
        )
        check_population(population, options, trainer.world_size, self._sharded)
        return population

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: Population | None) -> Prepared[SharpnessProblem]:
        """Return the population, the micro-batches of the coming step, the parameters and what makes their updates."""
        optimizer, parameters = trainer.optimizers[self.options.optimizer_index], self._parameters(trainer)
        calls, by_updates = self._calls.take(), set(OF_UPDATES) & set(self.options.quantities)
        progress = Progress(trainer, "mini-batch sharpness")
        problem = SharpnessProblem(
            trainer=trainer,
            curvature=operator_type(self.options.curvature),
            loss=loss,
            parameters=parameters,
            sharded=self._sharded,
            lr=stability_rule(optimizer).lr,
            population=data,
            step=loss.parts_of_step(calls, trainer.world_size),
            trials=TrialSteps(trainer, optimizer, parameters) if by_updates else None,
            key=trainer.global_step,
            on_product=progress.tick,
            modules=self._modules(trainer),
        )
        return Prepared(problem, progress)

    def measure(self, trainer: pl.Trainer, prepared: Prepared[SharpnessProblem]) -> BatchSharpnessResult:
        """Measure at the parameters as they are."""
        return self._measurement.measure(prepared.problem, self._fail)

    def shown(self) -> Sequence[str]:
        """Return the keys that the progress bar shows."""
        return self.options.quantities if self.options.progress_bar else ()

    def beside(self, trainer: pl.Trainer, values: Mapping[str, float]) -> dict[str, float]:
        """Return 2/η, with η as it is now, and the plateaus of momentum."""
        lr = stability_rule(trainer.optimizers[self.options.optimizer_index]).lr
        return {"two_over_lr": 2.0 / lr if lr else math.inf} | self._plateaus(trainer)

    def _let_go(self) -> None:
        super()._let_go()
        self._calls.forget()
