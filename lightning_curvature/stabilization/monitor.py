"""The monitor of how the loss around a point settles as samples are added."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.data.ordered import OrderedSamples, read_ordered_samples
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import SampleLosses
from lightning_curvature.monitors.base import OnError
from lightning_curvature.monitors.occasional import OccasionalMonitor
from lightning_curvature.operators.graphs import products_at_once
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import warn
from lightning_curvature.reporting.progress import Progress
from lightning_curvature.stabilization.checks import check_directions, growth_options
from lightning_curvature.stabilization.measurement import measure_growth
from lightning_curvature.stabilization.options import (
    QUANTITIES,
    Estimator,
    GrowthProblem,
    Law,
    Quantity,
)
from lightning_curvature.stabilization.result import SampleGrowth, report_growth

Directions = Callable[[pl.LightningModule], Tensor]

# Samples evaluated at once where nothing else is said.
_MICRO_BATCH = 16


class StabilizationMonitor(OccasionalMonitor[SampleGrowth]):
    r"""Measure how much one more sample changes the loss around the parameters, for several numbers of samples.

    L_k is the mean loss of the first k of a fixed order of training samples, w the parameters as they are. Quantities:

    * "delta_1": :math:`|L_{k+1}(w) - L_k(w)|`.
    * "delta_2": :math:`E[(L_{k+1} - L_k)^2]` over :math:`w + \varepsilon,\ \varepsilon \sim N(0, \sigma^2 I_N)`.
    * "delta_2_subspace": the same over :math:`w + Uz,\ z \sim N(0, \sigma^2 I_D)`, U the D eigenvectors of ∇²L_k(w)
      with the largest eigenvalues (or other directions: ``law``).

    Estimators: "gaussian_moment" evaluates a quadratic model of the increment in closed form, "quadratic" by Monte
    Carlo, "direct" perturbs the parameters and evaluates the losses. The model is compared with
    the true increment on some probes, and where it is not within ``model_tolerance`` at a σ, a warning says so.

    A sample is what the training step gives a loss for when it is alone in its batch: an example, or a sequence. Each
    of ``candidates`` samples that follow the first k stands for the next one, so that every criterion is a mean with
    its standard error.

    Written are, for the largest k, the largest D and the first σ and estimator, ``<prefix>/<quantity>`` and
    ``<quantity>_stderr``, over samples and draws together; ``validated_sigma``, of the subspace, and
    ``validated_sigma_full_space``; to TensorBoard all values against k in place of the step,
    ``<prefix>_by_samples/…``, and a picture; into the logger's folder the whole table, ``…-stabilization-step=….csv``,
    and the picture as PNG. ``result`` holds them as a :class:`~lightning_curvature.stabilization.result.SampleGrowth`.

    Cost, for each k: an eigensolver's products with the first k samples (3 to 15 for each of the D directions, most
    where k or D is small), D products with each candidate; "direct" S forwards of k + candidates samples for each D and
    σ. In the full space, for all k together: ``trace_vectors`` and ``validation_draws`` products with all samples, S
    for "quadratic", S forwards of all samples for each σ for "direct". The basis stays in memory: three times D + 16
    vectors of N numbers during the search.

    Args:
        sample_sizes: k, each a sample size.
        subspace_dim: D, or several, of which the largest is searched for.
        sigma: σ, or several, in units of the parameters.
        quantities: which of the above.
        estimators: which of the above.
        candidates: how many samples stand for the next one.
        draws: S, Monte-Carlo draws.
        trace_vectors: random vectors for the traces that "gaussian_moment" needs in the full space.
        validation_draws: probes on which the model is compared, in the subspace where "direct" is not asked for; 0 for
            none.
        model_tolerance: relative error (root mean square) up to which the model counts as valid.
        order: p of :math:`E|L_{k+1} - L_k|^p`; the closed form knows 2 alone.
        law: "top" and "bottom" eigenvectors, "random" directions, "gradients" of the D samples with the longest ones.
        directions: callable module → (D, N) vectors to span the subspace, in place of ``law``; their rows are made
            orthonormal one after the other.
        at_end: measure when fit ends.
        at_steps: measure before these optimizer steps.
        every_n_train_steps: measure before steps 0, n, 2n, …; None for not.
        probe_dataloader: where to take the samples from; default: the Trainer's train dataloader.
        micro_batch_size: samples evaluated at once.
        tolerance: relative residual of eigenvectors.
        max_products: products after which a search for eigenvectors ends; default: 20 for each, and 20 more.
        objective: callable (module, batch of one sample) → loss, in place of training_step.
        optimizer_index: whose parameters are moved, where there are several optimizers.
        probe_mode: "eval" switches the module for the measurement, "train" leaves it in its modes.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        seed: of the order of samples, probes and random vectors.
        prefix: prefix of the keys.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit or of the first measurement, for what the module, the data or the
            strategy cannot give.

    Source: P1 (curvature-aligned probing), eqs. 1–4 and 11–15.
    """

    _batch_norm_note = "a sample alone has no statistics of a batch, and most layers refuse it"

    def __init__(
        self,
        *,
        sample_sizes: Sequence[int] = (4, 8, 16, 32, 64),
        subspace_dim: int | Sequence[int] = 8,
        sigma: float | Sequence[float] = 1e-3,
        quantities: Sequence[Quantity] = QUANTITIES,
        estimators: Sequence[Estimator] = ("gaussian_moment",),
        candidates: int = 8,
        draws: int = 64,
        trace_vectors: int = 16,
        validation_draws: int = 8,
        model_tolerance: float = 0.1,
        order: float = 2.0,
        law: Law = "top",
        directions: Directions | None = None,
        at_end: bool = True,
        at_steps: Sequence[int] = (),
        every_n_train_steps: int | None = None,
        probe_dataloader: Any = None,
        micro_batch_size: int | None = None,
        tolerance: float = 1e-3,
        max_products: int | None = None,
        objective: ObjectiveFunction | None = None,
        optimizer_index: int = 0,
        probe_mode: Literal["train", "eval"] = "eval",
        probe_precision: Literal["32-true"] | None = "32-true",
        seed: int = 0,
        prefix: str = "curvature",
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            at_end=at_end,
            at_steps=at_steps,
            every_n_train_steps=every_n_train_steps,
            probe_samples=None,
            probe_dataloader=probe_dataloader,
            micro_batch_size=micro_batch_size,
            probe_mode=probe_mode,
            probe_precision=probe_precision,
            seed=seed,
            objective=objective,
            outputs=None,
            optimizer_index=optimizer_index,
            prefix=prefix,
            on_error=on_error,
        )
        self.options = growth_options(
            quantities=quantities,
            sample_sizes=sample_sizes,
            candidates=candidates,
            subspace_dim=subspace_dim,
            sigma=sigma,
            estimators=estimators,
            draws=draws,
            trace_vectors=trace_vectors,
            validation_draws=validation_draws,
            order=order,
            law=law if directions is None else "top",
            tolerance=tolerance,
            max_products=max_products,
            model_tolerance=model_tolerance,
        )
        if directions is not None and not callable(directions):
            raise ValueError(
                f"directions must be a callable, got a {type(directions).__name__}: give one that returns (D, N) "
                "vectors for a module."
            )
        self.directions = directions

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where there are too few parameters."""
        size, largest = sum(p.numel() for p in self._parameters(trainer)), self.options.subspace_dims[0]
        if "delta_2_subspace" in self.options.quantities and largest >= size:
            raise MisconfigurationException(
                f"subspace_dim must be below the number of parameters, got {largest} of {size}: ask for fewer."
            )

    def _read_from(self, trainer: pl.Trainer, loader: Any, batch: Any, errors: list[Exception]) -> OrderedSamples:
        count = self.options.sample_sizes[-1] + self.options.candidates
        return read_ordered_samples(trainer, loader, samples=count, seed=self.seed, errors=errors)

    def prepare(
        self, trainer: pl.Trainer, loss: ProbeLoss, probe_set: OrderedSamples
    ) -> tuple[tuple[GrowthProblem, Progress], float]:
        """Return what is measured with what shows that it is, and how many vectors are multiplied at once."""
        progress = Progress(trainer, "sample growth")
        parameters = self._parameters(trainer)
        losses = SampleLosses(loss, probe_set, self.micro_batch_size or _MICRO_BATCH)
        if trainer.world_size > 1:
            losses.check_local()
        directions, shape = None, (self.options.subspace_dims[0], sum(p.numel() for p in parameters))
        if self.directions is not None:
            directions = check_directions(self.directions(trainer.lightning_module), shape)
        problem = GrowthProblem(
            trainer=trainer,
            losses=losses,
            parameters=parameters,
            directions=directions,
            seed=self.seed,
            on_product=progress.tick,
        )
        return (problem, progress), float(products_at_once(VectorSpace(parameters), trainer.num_devices))

    def measured(self, trainer: pl.Trainer, prepared: tuple[GrowthProblem, Progress], least: float) -> SampleGrowth:
        """Measure at the parameters as they are."""
        problem, progress = prepared
        try:
            result = measure_growth(self.options, problem, int(least))
        finally:
            progress.close()
        self._warn_of(result)
        return result

    def report_result(self, trainer: pl.Trainer, result: SampleGrowth) -> None:
        """Write headlines, curves, table and picture."""
        valid = {key: getattr(result, key) for key in self._validity_keys()}
        self._write(trainer, result.headline() | valid)
        report_growth(trainer, self.prefix, result)

    def _validity_keys(self) -> list[str]:
        """Keys of where the model holds: of the subspace, and of the full space."""
        options, keys = self.options, list[str]()
        if "delta_2_subspace" in options.quantities and ("direct" in options.estimators or options.validation_draws):
            keys.append("validated_sigma")
        if "delta_2" in options.quantities and set(options.estimators) - {"direct"} and options.validation_draws:
            keys.append("validated_sigma_full_space")
        return keys

    def _warn_of(self, result: SampleGrowth) -> None:
        """Say what in a measurement cannot be trusted."""
        for where, in_subspace in (("subspace", True), ("full space", False)):
            errors, valid = result.model_errors(in_subspace), result.validated(in_subspace)
            beyond = [sigma for sigma in self.options.sigmas if sigma in errors and not sigma <= valid]
            if beyond and set(self.options.estimators) - {"direct"}:
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
                f"eigenvectors had not converged after max_products={self.options.max_products} products: rows of the "
                "table say where. Raise max_products or tolerance, or lower subspace_dim."
            )

    def report_nothing(self, trainer: pl.Trainer) -> None:
        """Write NaN for all values."""
        names = [self.options.name(quantity) for quantity in self.options.quantities]
        keys = [*names, *(f"{name}_stderr" for name in names), *self._validity_keys()]
        self._write(trainer, dict.fromkeys(keys, math.nan))
