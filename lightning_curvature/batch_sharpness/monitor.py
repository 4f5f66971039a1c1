"""The monitor of mini-batch sharpness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.batch_sharpness.at_once import BatchesAtOnce
from lightning_curvature.batch_sharpness.measurement import FullHessian, SharpnessMeasurement
from lightning_curvature.batch_sharpness.problem import (
    CROSSED,
    FULL_GRADIENT,
    PAIR,
    QUANTITIES,
    Quantity,
    SharpnessProblem,
)
from lightning_curvature.batch_sharpness.sharded import ShardedProblem
from lightning_curvature.data.population import Population, read_population
from lightning_curvature.data.probe_set import step_size
from lightning_curvature.distributed.failures import noted
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.losses.fixed import ProbeLoss, StepCall
from lightning_curvature.monitors.base import OnError
from lightning_curvature.monitors.checks import check_count, check_fraction, check_names
from lightning_curvature.monitors.probe_set import ProbeSetMonitor
from lightning_curvature.operators import Curvature, operator_type
from lightning_curvature.operators.differences import WHERE_SHARDED
from lightning_curvature.optimizers.stability import stability_rule
from lightning_curvature.optimizers.trial_steps import TrialSteps
from lightning_curvature.replay.batches import copied
from lightning_curvature.replay.module_state import RandomState
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import warn
from lightning_curvature.reporting.progress import Progress


class BatchSharpnessMonitor(ProbeSetMonitor):
    r"""Log how curved the loss of mini-batches is along their own gradients, and its kin.

    g_B, H_B are gradient and Hessian of the loss of a mini-batch B, g and H those of the whole probe set, E_B the mean
    over mini-batches drawn from it as training draws them. Quantities and their keys, written as ``<prefix>/<key>``:

    * "batch_sharpness": :math:`E_B[g_B^\top H_B g_B / \lVert g_B\rVert^2]`. SGD hovers where it is 2/η: the edge of
      stochastic stability.
    * "step_sharpness": :math:`g_B^\top H_B g_B / \lVert g_B\rVert^2` of the batch of the coming step, all of its
      micro-batches and ranks together. One product.
    * "modified_batch_sharpness": :math:`E_B[g_B^\top H_B g_B] / E_B\lVert g_B\rVert^2`; settles above 2/η.
    * "ias", interaction-aware sharpness: :math:`E_B[g_B^\top H g_B] / E_B\lVert g_B\rVert^2`; stays below 2/η.
    * "gni", gradient–noise interaction: :math:`E_B[g_B^\top H g_B] / \lVert g\rVert^2`; 2/η whenever the loss
      oscillates.
    * "lambda_gen": :math:`\operatorname{tr}(H\,E[\Delta\theta_B\Delta\theta_B^\top]) / (g^\top E[\Delta\theta_B])`,
      Δθ_B the update over η that the optimizer would make from its present state with g_B; GNI for plain SGD.
    * "lambda_max_b": :math:`E_B[\lambda_{\max}(H_B)]`; between 2/η and 4/η.

    Each comes with ``<key>_stderr``, the standard error of the value over the draws, and ``<key>_batches``, how many
    batches it took; beside them ``two_over_lr`` (2/η), ``zero_gradient_batches``, drawn batches without a gradient,
    which batch sharpness leaves out, and ``lambda_max_b_unconverged``, drawn batches whose eigenvalue was not found to
    ``tolerance`` and counts too small.

    Batches are drawn until the standard error of each value falls below ``relative_error`` of it, in pairs (B, B'). Two
    batches of a pair are independent, so that :math:`g_B^\top H_{B'} g_B` is :math:`g_B^\top H g_B` in the mean: the
    full Hessian is never multiplied with.

    Cost of a measured step, a batch: its gradient with the graph, and one Hessian–vector product of that batch each for
    batch sharpness (with the modified one), for IAS (with GNI), and for λ_gen; about eight for λ_max^b. GNI and λ_gen
    take one forward+backward of the whole probe set more. Other steps cost nothing.

    BatchNorm in training mode is that of each mini-batch, or of its micro-batches where it is cut. Dropout has one mask
    a micro-batch; in "step_sharpness" that which the step will use. Parameters that FSDP2 shards are measured by all
    ranks together, products by differences of gradients: two forward+backwards each.

    Args:
        quantities: which of the above.
        every_n_train_steps: measure before optimizer steps 0, n, 2n, …
        num_batches: the most batches of a measurement, over all ranks; drawn in pairs, so that an odd number is rounded
            up.
        min_batches: the fewest that have a gradient; standard errors of fewer are not to be trusted.
        relative_error: relative standard error at which a quantity is known well enough.
        batch_size: samples of a drawn batch; default: those of one optimizer step, over ranks and accumulation (with a
            ``probe_dataloader``, too).
        curvature: "hessian", or "gauss_newton" for the Gauss–Newton matrix in place of each H.
        full_hessian: "pairs", as above, or "exact": a product with the whole probe set for each batch and each of (IAS
            with GNI) and λ_gen. Dearer by the size of the set, and each draw says more: worth it on small sets, and
            where curvature is unevenly spread over samples (nearly fitted data).
        batches_at_once: how many mini-batches are differentiated at once, by ``torch.vmap``; 1 for one after the other;
            "auto" takes 16 of small models (100,000 parameters), whose mini-batches take longer to launch than to
            compute. Where ``vmap`` cannot follow the training step (dropout, ``loss.item()``, BatchNorm's running
            statistics), for "lambda_max_b" and for exact products it is always one after the other.
        probe_samples: the most samples of the probe set; None for all training data.
        probe_dataloader: where to take them from; default: the Trainer's train dataloader.
        micro_batch_size: samples differentiated at once; default: the loader's batch size.
        tolerance: relative residual of λ_max^b.
        outputs: see :class:`DirectionalCurvatureMonitor`; only the Gauss–Newton matrix needs outputs.
        objective: callable (module, batch) → loss, or → {"loss", "outputs"}, in place of training_step.
        optimizer_index: which optimizer to follow where there are several.
        probe_mode: "train" leaves the module in its modes, "eval" switches it for the measurement.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        seed: of the choice of samples, of the draws and of dropout masks.
        prefix: prefix of the keys.
        progress_bar: show the values on the progress bar.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit or of the first measurement, for what the module, the data or the
            strategy cannot give.

    Source: P4 (edge of stochastic stability), definitions 2 and 3, eqs. 3 and 4, appendices M and P; Lee and Jang 2023
    (IAS).
    """

    _batch_norm_note = "a mini-batch is normalized by its own statistics, or each of its micro-batches where it is cut"

    def __init__(
        self,
        *,
        quantities: Sequence[Quantity] = ("batch_sharpness",),
        every_n_train_steps: int = 100,
        num_batches: int = 256,
        min_batches: int = 16,
        relative_error: float = 0.05,
        batch_size: int | None = None,
        curvature: Curvature = "hessian",
        full_hessian: FullHessian = "pairs",
        batches_at_once: BatchesAtOnce = "auto",
        probe_samples: int | None = 8192,
        probe_dataloader: Any = None,
        micro_batch_size: int | None = None,
        tolerance: float = 1e-2,
        outputs: str | None = None,
        objective: ObjectiveFunction | None = None,
        optimizer_index: int = 0,
        probe_mode: Literal["train", "eval"] = "train",
        probe_precision: Literal["32-true"] | None = "32-true",
        seed: int = 0,
        prefix: str = "curvature",
        progress_bar: bool = False,
        on_error: OnError = "warn",
    ) -> None:
        self.full_hessian = full_hessian
        super().__init__(
            every_n_train_steps=every_n_train_steps,
            probe_samples=probe_samples,
            probe_dataloader=probe_dataloader,
            micro_batch_size=micro_batch_size,
            probe_mode=probe_mode,
            probe_precision=probe_precision,
            seed=seed,
            objective=objective,
            outputs=outputs,
            optimizer_index=optimizer_index,
            prefix=prefix,
            on_error=on_error,
        )
        check_names("quantities", quantities, QUANTITIES)
        # The standard error needs two of the pairs in which batches are drawn.
        check_count("min_batches", min_batches, 2 * PAIR, "16 make a standard error that can be trusted")
        check_count("num_batches", num_batches, min_batches, "it is the most, min_batches the fewest")
        check_count("batch_size", batch_size, 1, "None takes the data of one optimizer step", optional=True)
        if batches_at_once != "auto":
            check_count("batches_at_once", batches_at_once, 1, "'auto' finds what pays")
        check_fraction("relative_error", relative_error, "0.05 gives values to 5 %")
        check_fraction("tolerance", tolerance, "1e-2 gives eigenvalues to three digits or so")
        self._operator = operator_type(curvature)
        if full_hessian not in ("pairs", "exact"):
            raise ValueError(
                f"full_hessian must be 'pairs' or 'exact', got {full_hessian!r}: 'pairs' is the one for "
                "large probe sets."
            )
        self.quantities: tuple[Quantity, ...] = tuple(dict.fromkeys(quantities))
        self.batch_size = batch_size
        self.curvature, self.batches_at_once = curvature, batches_at_once
        self._sharded = False
        self.progress_bar = progress_bar
        self._measurement = SharpnessMeasurement(
            self.quantities,
            num_batches=num_batches,
            min_batches=min_batches,
            relative_error=relative_error,
            tolerance=tolerance,
            full_hessian=full_hessian,
            batches_at_once=batches_at_once,
        )
        self._calls: list[StepCall] = []
        self._errors: list[Exception] = []
        self._calls_step = -1
        self._step_size: tuple[int | None, int] | None = None

    def charts(self) -> dict[str, list[str]]:
        """TensorBoard charts: all sharpnesses with the edge."""
        names = [*self.quantities, "two_over_lr"]
        return {f"{self.prefix}: mini-batch sharpness and 2/η": [f"{self.prefix}/{name}" for name in names]}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check parameters, strategy and optimizer against the quantities."""
        super().on_fit_start(trainer, pl_module)
        self._sharded = is_sharded(self._parameters(trainer))
        if self._sharded:
            ShardedProblem.check(self.curvature, self.batches_at_once)
        if "lambda_gen" in self.quantities:
            TrialSteps.check(trainer.optimizers[self.optimizer_index])
        if self._sharded:
            warn(WHERE_SHARDED)

    def _complete(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """Keep the batches of the coming step, where they are asked for, until the last of them."""
        size = (step_size(trainer), trainer.accumulate_grad_batches)
        if size != self._step_size:
            # Steps of another size from here on: mini-batches are drawn anew, of that size.
            self._step_size, self._has_read = size, False
        if "step_sharpness" not in self.quantities:
            return True
        if self._calls_step != trainer.global_step:
            self._calls, self._errors, self._calls_step = [], [], trainer.global_step
        with noted(self._errors):
            # A copy, as a step may write into its batch.
            self._calls.append(StepCall(copied(batch), batch_idx, RandomState(trainer.strategy.root_device)))
        return ends_step(trainer, batch_idx)

    def _read(self, trainer: pl.Trainer, batch: Any, errors: list[Exception]) -> Population | None:
        if not self._measurement.drawn:
            return None
        self._measurement.at_once.forget()
        population = read_population(
            trainer,
            self.probe_dataloader,
            samples=self.probe_samples,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            errors=errors,
        )
        if self._sharded:
            ShardedProblem.check_population(population, trainer.world_size)
        # A pair has the Hessian of the samples as they are drawn, which is that of the loss that training descends.
        whole = CROSSED if self.full_hessian == "exact" else FULL_GRADIENT
        unequal = [q for q in self.quantities if q in whole and population.weighted]
        if unequal:
            raise MisconfigurationException(
                f"quantities must not hold {unequal[0]!r} where samples are drawn by unequal weights, got a "
                "WeightedRandomSampler, whose mean loss is not that of the probe set: leave it out, or give "
                "probe_dataloader= one that draws all alike."
            )
        return population

    def prepare(
        self, trainer: pl.Trainer, loss: ProbeLoss, population: Population | None
    ) -> tuple[tuple[SharpnessProblem, Progress], float]:
        """Return what is measured, and what shows that it is."""
        optimizer = trainer.optimizers[self.optimizer_index]
        parameters = self._parameters(trainer)
        calls, self._calls = self._calls, []
        if self._errors:
            raise self._errors.pop()
        progress = Progress(trainer, "mini-batch sharpness")
        problem = (ShardedProblem if self._sharded else SharpnessProblem)(
            trainer=trainer,
            curvature=self._operator,
            loss=loss,
            parameters=parameters,
            lr=stability_rule(optimizer).lr,
            population=population,
            step=loss.parts_of_step(calls, trainer.world_size),
            trials=TrialSteps(trainer, optimizer, parameters) if "lambda_gen" in self.quantities else None,
            key=trainer.global_step,
            on_product=progress.tick,
        )
        return (problem, progress), 0.0

    def measure(self, trainer: pl.Trainer, prepared: tuple[SharpnessProblem, Progress], least: float) -> None:
        """Measure at the parameters as they are and write what it gave."""
        problem, progress = prepared
        try:
            values = self._measurement.measure(problem, self._fail)
        finally:
            progress.close()
        if not self._has_measured:
            progress.tell()
        self._report(trainer, values)

    def report_nothing(self, trainer: pl.Trainer) -> None:
        """Write NaN for all values."""
        self._report(trainer, dict.fromkeys(self._measurement.keys(), math.nan))

    def _report(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        lr = stability_rule(trainer.optimizers[self.optimizer_index]).lr
        values = values | {"two_over_lr": 2.0 / lr if lr else math.inf}
        self._write(trainer, values, self.quantities if self.progress_bar else ())

    def _let_go(self) -> None:
        super()._let_go()
        self._calls, self._errors = [], []


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a batch that is about to be trained on is the last of its optimizer step."""
    last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
