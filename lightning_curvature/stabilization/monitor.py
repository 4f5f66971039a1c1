"""The monitor of stabilization: how much one more sample changes the loss around a point."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.data.ordered import OrderedSamples, read_ordered_samples
from lightning_curvature.data.position import Bookmark
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import SampleLosses
from lightning_curvature.monitors.occasional import OccasionalMonitor
from lightning_curvature.monitors.options import OnError
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.operators.graphs import products_at_once
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import warn
from lightning_curvature.reporting.progress import Progress
from lightning_curvature.stabilization.measurement import measure_stabilization
from lightning_curvature.stabilization.options import Directions, Estimator, Law, Quantity, StabilizationOptions
from lightning_curvature.stabilization.problem import StabilizationProblem, check_directions
from lightning_curvature.stabilization.result import SampleGrowth, report_table

# Samples evaluated at once where micro_batch_size is None.
_MICRO_BATCH = 16


class StabilizationMonitor(OccasionalMonitor[StabilizationProblem, SampleGrowth]):
    r"""Measure how much one more sample changes the loss around the parameters, for several numbers of samples.

    L_k is the mean loss of the first k of a fixed order of training samples, w the parameters as they are. Quantities:

    * "delta_1": :math:`|L_{k+1}(w) - L_k(w)|`.
    * "delta_2": :math:`E[(L_{k+1} - L_k)^2]` over :math:`w + \varepsilon,\ \varepsilon \sim N(0, \sigma^2 I_N)`.
    * "delta_2_subspace": the same over :math:`w + Uz,\ z \sim N(0, \sigma^2 I_D)`, U the D eigenvectors of ∇²L_k(w)
      with the largest eigenvalues (or other directions: ``law``).

    Estimators: "gaussian_moment" evaluates a quadratic model of the increment in closed form, "quadratic" by Monte
    Carlo, "direct" perturbs the parameters and evaluates the losses. The monitor compares the model with the true
    increment on some draws, and warns where the model is not within ``model_tolerance`` at a σ.

    A sample is what the training step gives a loss for when it is alone in its batch: an example, or a sequence. Each
    of ``candidates`` samples after the first k stands for the next one: a criterion is a mean with a standard error.

    The monitor writes ``<prefix>/<quantity>`` and ``<quantity>_stderr`` (over samples and draws) for the largest k and
    D and the first σ and estimator; ``validated_sigma``, the largest σ up to which the model holds in the subspace, and
    ``validated_sigma_full_space``. TensorBoard gets all values against k in place of the step,
    ``<prefix>_by_samples/…``, and a picture; the logger's folder gets the whole table,
    ``…-stabilization-step=….csv``, and the picture as PNG. ``result`` holds them as a
    :class:`~lightning_curvature.stabilization.result.SampleGrowth`.

    Cost, for each k: an eigensolver's products with the first k samples (3 to 15 for each of the D directions, most
    where k or D is small), D products with each candidate; "direct" S forwards of k + candidates samples for each D and
    σ. In the full space, for all k at once: ``trace_vectors`` and ``validation_draws`` products with all samples, S for
    "quadratic", S forwards of them for each σ for "direct". The search keeps 3 D + 16 vectors of N numbers in memory.

    Args:
        sample_sizes: k, or several.
        subspace_dim: D, or several; the search for eigenvectors finds the largest.
        sigma: σ, or several, in units of the parameters.
        quantities: which of the above.
        estimators: which of the above.
        candidates: number of samples that stand for the next one.
        draws: S, Monte-Carlo draws.
        trace_vectors: random vectors for the traces that "gaussian_moment" needs in the full space.
        validation_draws: draws on which the model is compared, in the subspace only without "direct"; 0 for none.
        model_tolerance: relative error (root mean square) up to which the model counts as valid.
        order: p of :math:`E|L_{k+1} - L_k|^p`; the closed form exists for 2 alone.
        law: "top" and "bottom" eigenvectors, "random" directions, "gradients" of the D samples with the longest ones.
        directions: callable module → (D, N) vectors to span the subspace, orthonormalized in order; replaces ``law``.
        at_end: measure when fit ends.
        at_steps: measure before these optimizer steps.
        every_n_train_steps: measure before steps 0, n, 2n, …; None for not.
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        probe_dataloader: where to take the samples from; default: the Trainer's train dataloader.
        micro_batch_size: samples evaluated at once.
        tolerance: relative residual of eigenvectors.
        max_products: products after which a search for eigenvectors ends; default: 20 for each, and 20 more.
        objective: callable (module, batch of one sample) → loss, in place of training_step.
        optimizer_index: whose parameters are perturbed, where there are several optimizers.
        probe_mode: "eval" switches the module for the measurement, "train" leaves it in its modes.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        seed: of the order of samples, perturbations and random vectors.
        prefix: prefix of the keys.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit or first measurement, for what module, data or strategy lack.

    Source: Curvature-aligned probing (2026), eqs. 1–4 and 11–15; see docs/references.md.
    """

    options: StabilizationOptions
    capacities = ("vectors_at_once",)
    _batch_norm_note = "a sample alone has no statistics of a batch, and most layers refuse it"

    def __init__(
        self,
        *,
        sample_sizes: Sequence[int] = StabilizationOptions.sample_sizes,
        subspace_dim: int | Sequence[int] = StabilizationOptions.subspace_dim,
        sigma: float | Sequence[float] = StabilizationOptions.sigma,
        quantities: Sequence[Quantity] = StabilizationOptions.quantities,
        estimators: Sequence[Estimator] = StabilizationOptions.estimators,
        candidates: int = StabilizationOptions.candidates,
        draws: int = StabilizationOptions.draws,
        trace_vectors: int = StabilizationOptions.trace_vectors,
        validation_draws: int = StabilizationOptions.validation_draws,
        model_tolerance: float = StabilizationOptions.model_tolerance,
        order: float = StabilizationOptions.order,
        law: Law = StabilizationOptions.law,
        directions: Directions | None = StabilizationOptions.directions,
        at_end: bool = StabilizationOptions.at_end,
        at_steps: Sequence[int] = StabilizationOptions.at_steps,
        every_n_train_steps: int | None = StabilizationOptions.every_n_train_steps,
        max_overhead: float | None = StabilizationOptions.max_overhead,
        probe_dataloader: Any = StabilizationOptions.probe_dataloader,
        micro_batch_size: int | None = StabilizationOptions.micro_batch_size,
        tolerance: float = StabilizationOptions.tolerance,
        max_products: int | None = StabilizationOptions.max_products,
        objective: ObjectiveFunction | None = StabilizationOptions.objective,
        optimizer_index: int = StabilizationOptions.optimizer_index,
        probe_mode: Literal["train", "eval"] = StabilizationOptions.probe_mode,
        probe_precision: Literal["32-true"] | None = StabilizationOptions.probe_precision,
        seed: int = StabilizationOptions.seed,
        prefix: str = StabilizationOptions.prefix,
        on_error: OnError = StabilizationOptions.on_error,
    ) -> None:
        super().__init__(StabilizationOptions.of(locals()))

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where there are too few parameters."""
        size, largest = sum(p.numel() for p in self._parameters(trainer)), self.options.subspace_dims[0]
        if "delta_2_subspace" in self.options.quantities and largest >= size:
            raise MisconfigurationException(
                f"subspace_dim must be below the number of parameters, got {largest} of {size}: ask for fewer."
            )

    def _read_from(
        self,
        trainer: pl.Trainer,
        loader: Any,
        batch: Any,
        failure: Exception | None,
        bookmark: Bookmark | None = None,
    ) -> OrderedSamples:
        count, seed = self.options.sample_sizes[-1] + self.options.candidates, self.options.seed
        return read_ordered_samples(trainer, loader, samples=count, seed=seed, failure=failure, bookmark=bookmark)

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: OrderedSamples) -> Prepared[StabilizationProblem]:
        """Return losses of single samples and parameters, and how many vectors this rank can multiply at once."""
        options, parameters = self.options, self._parameters(trainer)
        losses = SampleLosses(loss, data, options.micro_batch_size or _MICRO_BATCH)
        if trainer.world_size > 1:
            losses.check_local()
        directions, shape = None, (options.subspace_dims[0], sum(p.numel() for p in parameters))
        if options.directions is not None:
            directions = check_directions(options.directions(trainer.lightning_module), shape)
        at_once = products_at_once(VectorSpace(parameters), trainer.num_devices)
        progress = Progress(trainer, "stabilization")
        problem = StabilizationProblem(
            options, trainer, losses, parameters, directions, on_product=progress.tick, vectors_at_once=at_once
        )
        return Prepared(problem, progress, {"vectors_at_once": at_once})

    def measure(self, trainer: pl.Trainer, prepared: Prepared[StabilizationProblem]) -> SampleGrowth:
        """Measure at the parameters as they are, and warn of values that cannot be trusted."""
        at_once = int(prepared.capacities["vectors_at_once"])
        result = measure_stabilization(replace(prepared.problem, vectors_at_once=at_once))
        for where, in_subspace in (("subspace", True), ("full space", False)):
            errors, valid = result.model_errors(in_subspace), result.validated(in_subspace)
            beyond = [sigma for sigma in self.options.sigmas if sigma in errors and not sigma <= valid]
            if beyond and self.options.uses_model:
                warn(
                    f"sigma must be small enough for a quadratic model of the loss in the {where}, got {beyond[0]:g}, "
                    f"where it is off by up to {errors[beyond[0]]:.0%}: trust 'direct' alone there, or a smaller sigma."
                )
        if not any(row.value for row in result.rows):
            warn(
                "one more sample changes nothing: all have the same loss. A loss that couples the samples of a batch "
                "(contrastive, batch statistics) has none of single ones: give objective=."
            )
        if not all(row.converged for row in result.rows):
            warn(
                f"eigenvectors did not converge within max_products={self.options.product_limit} products: rows of the "
                "table say where. Raise max_products or tolerance, or lower subspace_dim."
            )
        return result

    def write_pictures(self, trainer: pl.Trainer, result: SampleGrowth) -> None:
        """Write curves, table and picture."""
        report_table(trainer, self.options.prefix, result)
