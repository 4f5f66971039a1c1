"""The monitor of SGD's gradient noise against the curvature of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_curvature.data.probe_set import ProbeSet, step_size
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import BlockSamples, ForbidCollectives
from lightning_curvature.monitors.occasional import OccasionalMonitor
from lightning_curvature.monitors.options import OnError
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.noise import routes
from lightning_curvature.noise.measurement import measure_noise
from lightning_curvature.noise.options import NoiseOptions, Pairing, Quantity
from lightning_curvature.noise.problem import NoiseProblem
from lightning_curvature.noise.result import NoiseCurvature, report_noise
from lightning_curvature.noise.sums import NOT_A_MEAN, sum_device
from lightning_curvature.operators import NotSeparableError
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import inform, warn
from lightning_curvature.reporting.progress import Progress

# The monitor warns above these shares: samples without a partner (a last batch leaves a few), repeated eigenvalues.
_UNPAIRED, _DEGENERATE = 0.05, 0.2


class NoiseCovarianceMonitor(OccasionalMonitor[NoiseProblem, NoiseCurvature]):
    r"""Measure how the noise of SGD's gradient relates to the curvature of the loss, on one block of parameters.

    .. math:: C = \frac1b \left( E_i[g_i g_i^\top] - g g^\top \right), \qquad H = E_i[h_i]

    over single training samples, by one parameter of D entries; the two are compared in the eigenvectors v_i of the 𝒩
    largest eigenvalues of H. Quantities and their keys, each written as ``<prefix>/<key>``:

    * "noise_gamma": ``noise_gamma``, γ of :math:`C_{ii} \propto H_{ii}^\gamma`, fitted to positive entries above the
      rounding of H, with ``noise_gamma_stderr``. Theory has 1 ≤ γ ≤ 2 near a minimum.
    * "noise_gamma_awd": ``noise_gamma_awd`` (and ``_stderr``), γ of :math:`E_i[h_i^2]`, which activity–weight duality
      puts in the place of C, up to a factor.
    * "noise_commutativity": ``noise_commutativity`` = ‖CH − HC‖_F / (‖C‖_F ‖H‖_F), which is small for unrelated
      matrices as well; ``noise_commutativity_relative`` = ‖CH − HC‖_F / ‖CH‖_F, beside ``noise_commutativity_random``,
      its exact value for a C with random eigenvectors (up to √2).
    * "noise_alignment": ``noise_alignment``, the share of the energy of C that is on its diagonal.
    * "noise_spearman": ``noise_spearman``, rank correlation of C_ii and H_ii.
    * "noise_coupling": ``noise_coupling`` = mean of ``|C_ij| / √|C_ii C_jj|``, i ≠ j; ``noise_coupling_random``, that
      of random eigenvectors; ``noise_coupling_z``, its distance from theory for random ones in standard errors.
    * "noise_awd_chain": ``noise_gamma_awd_raw``, ``_hh``, ``_hh_sd``, ``_hh_sd_wd`` and ``_hh_sd_wd_li``: γ of the
      source's successive approximations of C, from pairs of mini-batches (linear layers with class labels only).

    TensorBoard shows ``noise_scatter``, C_ii against H_ii with the fit, and ``noise_matrices``, C in the eigenbasis and
    its coupling beside that of random eigenvectors. ``result`` is a :class:`~lightning_curvature.NoiseCurvature`.

    Two routes lead to C and H; the first measurement says which one it takes. *Kronecker*: the weight of a linear layer
    that is used once for each sample. No Hessian of a sample is formed; a micro-batch costs two forwards (one of single
    samples, whose mean must be the loss of the batch), and for each output of the layer a backward through what follows
    it. *General*: any other parameter, or a loss that is no such mean; costs a gradient of each sample, D products with
    each micro-batch, and for "noise_gamma_awd" 𝒩 products with each sample. Both need ten D × D matrices in memory
    (0.5 GB for D = 2500) and one eigenvalue problem of that size.

    Args:
        parameter: name of the block, as ``named_parameters()`` has it; ``_orig_mod`` of compiled modules is optional,
            and so is what pruning and parametrizations add: the optimizer then moves an original in its place.
        quantities: which of the above.
        top: 𝒩; None for 40 % of D, as in the source.
        batch_size: b; default: samples of an optimizer step.
        haar_draws: random rotations for ``noise_coupling_random``.
        pictures: draw them for TensorBoard, about a second each time.
        pairing: callable batch → (inputs, labels) for "noise_awd_chain"; default: the batch is such a pair.
        at_end: measure when fit ends.
        at_steps: measure before these optimizer steps.
        every_n_train_steps: measure before steps 0, n, 2n, …; default: not.
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        probe_samples: the most samples; None for all training data.
        probe_dataloader: source of the samples; default: the Trainer's train dataloader.
        micro_batch_size: samples differentiated at once; default: the loader's batch size, with "noise_awd_chain" twice
            that: its halves are the mini-batches that are paired.
        objective: callable (module, batch) → mean loss, in place of training_step.
        optimizer_index: which optimizer to follow where there are several.
        probe_mode: "eval" switches the module for the measurement, "train" leaves it in its modes.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        seed: of the choice of samples and of random rotations.
        prefix: prefix of the keys.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit, for a module, data or a strategy that cannot be measured.

    Source: Zhang, Yang and Tu (2026), eqs. 2, 6, 7, 15, 18 and 46; see docs/references.md.
    """

    options: NoiseOptions
    capacities = ("kronecker", "paired")
    _batch_norm_note = "a sample alone has no statistics of a batch, and most layers refuse it"

    def __init__(
        self,
        *,
        parameter: str,
        quantities: Sequence[Quantity] = NoiseOptions.quantities,
        top: int | None = NoiseOptions.top,
        batch_size: int | None = NoiseOptions.batch_size,
        haar_draws: int = NoiseOptions.haar_draws,
        pictures: bool = NoiseOptions.pictures,
        pairing: Pairing | None = NoiseOptions.pairing,
        at_end: bool = NoiseOptions.at_end,
        at_steps: Sequence[int] = NoiseOptions.at_steps,
        every_n_train_steps: int | None = NoiseOptions.every_n_train_steps,
        max_overhead: float | None = NoiseOptions.max_overhead,
        probe_samples: int | None = NoiseOptions.probe_samples,
        probe_dataloader: Any = NoiseOptions.probe_dataloader,
        micro_batch_size: int | None = NoiseOptions.micro_batch_size,
        objective: ObjectiveFunction | None = NoiseOptions.objective,
        optimizer_index: int = NoiseOptions.optimizer_index,
        probe_mode: Literal["train", "eval"] = NoiseOptions.probe_mode,
        probe_precision: Literal["32-true"] | None = NoiseOptions.probe_precision,
        seed: int = NoiseOptions.seed,
        prefix: str = NoiseOptions.prefix,
        on_error: OnError = NoiseOptions.on_error,
    ) -> None:
        super().__init__(NoiseOptions.of(locals()))

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Return charts of all exponents, and of numbers beside those of chance."""
        keys = [key for key in self.keys() if not key.endswith("_stderr")]
        return {
            "noise exponent γ": [key for key in keys if key.startswith("noise_gamma")],
            "noise commutativity and chance": [k for k in keys if k.startswith("noise_commutativity_")],
            "noise coupling and chance": [k for k in keys if k.startswith("noise_coupling") and not k.endswith("_z")],
        }

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where the module has no such parameter, or one that is too large."""
        routes.check_block(self.options, routes.named_parameters(module), trainer.num_devices)

    def _read_from(self, trainer: pl.Trainer, loader: Any, *rest: Any) -> Any:
        """Read the samples, and return them with the size of a batch of their loader."""
        samples = super()._read_from(trainer, loader, *rest)
        return samples, routes.batch_size_of(trainer, loader) or samples.batches[0].size

    def _cut(self, trainer: pl.Trainer, loader: Any) -> int | None:
        size = routes.batch_size_of(trainer, loader)
        # Halves of a micro-batch are the mini-batches that are paired.
        return self.options.micro_batch_size or (2 * size if self.options.pairs and size is not None else None)

    def _with_loss(self, trainer: pl.Trainer, make_loss: Callable[[], ProbeLoss], data: Any) -> Any:
        return super()._with_loss(trainer, make_loss, data[0]), data[1]

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: tuple[ProbeSet, int]) -> Prepared[NoiseProblem]:
        """Return the block, its samples, and whether this rank can take the Kronecker route and pair samples."""
        (samples, size), module, options = data, trainer.lightning_module, self.options
        progress = Progress(trainer, "noise covariance", unit="batches")
        name, parameter = routes.find_block(options.parameter, routes.named_parameters(module))
        first = BlockSamples(loss, samples.batches[0])
        if trainer.world_size > 1:
            with torch.no_grad(), ForbidCollectives():
                first.whole()
        layer, batched = routes.linear_layer(module, name), first.losses_can_be_batched()
        why_general = routes.why_not_kronecker(layer, first, batched, trainer.num_devices)
        pairing, why_unpaired = routes.pairing_of(options, first.batch)
        # As it is now: the number of accumulated batches may follow a schedule.
        step = step_size(trainer) or size * trainer.accumulate_grad_batches * trainer.world_size
        problem = NoiseProblem(
            trainer=trainer,
            loss=loss,
            probe_set=samples,
            parameter=parameter,
            device=sum_device(parameter),
            batch_size=options.batch_size or step,
            batched=batched,
            on_batch=progress.tick,
            layer=layer,
            why_general=why_general,
            pairing=pairing,
            why_unpaired=why_unpaired,
        )
        return Prepared(problem, progress, {"kronecker": not why_general, "paired": not why_unpaired})

    def measure(self, trainer: pl.Trainer, prepared: Prepared[NoiseProblem]) -> NoiseCurvature:
        """Measure at the parameters as they are."""
        problem = prepared.problem.as_all_ranks_can(prepared.capacities)
        self._inform_of_route(problem)
        try:
            result = measure_noise(self.options, problem)
        except NotSeparableError as error:  # which a later batch has shown
            problem = problem.general(str(error))
            self._inform_of_route(problem)
            result = measure_noise(self.options, problem)
        self._warn_of_reasons(result)
        self._warn_of_limits(problem, result)
        return result

    def _inform_of_route(self, problem: NoiseProblem) -> None:
        """Say once in a fit which route it takes."""
        if problem.route in self._warned:
            return
        self._warned.add(problem.route)
        route = "Kronecker route, no Hessian of a single sample is formed"
        if problem.layer is None:
            turn = "at once" if problem.batched else "one by one, which is slow: torch.vmap cannot follow the step"
            route = f"general route, samples {turn}; {problem.why_general}"
        inform(f"noise covariance of {self.options.parameter!r}: {route}.")

    def _warn_of_reasons(self, result: NoiseCurvature) -> None:
        """Warn once in a fit of each number that is NaN."""
        reasons = {key: reason for key, reason in result.reasons.items() if key not in self._warned}
        self._warned.update(reasons)
        for reason in dict.fromkeys(reasons.values()):
            keys = [key for key in reasons if reasons[key] == reason]
            warn(f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} NaN: {reason}")

    def _warn_of_limits(self, problem: NoiseProblem, result: NoiseCurvature) -> None:
        """Warn once in a fit of each circumstance in which the numbers mean less."""
        spread = problem.probe_set.spread
        if spread is not None and self.options.pairs and problem.layer is not None:
            self._warn_once(
                "cuts",
                f"micro-batches must be at least as many as ranks for 'noise_awd_chain', got {spread} for "
                f"{problem.trainer.world_size}, which share them, so that samples are paired within parts: lower "
                "micro_batch_size.",
            )
        if result.degenerate > _DEGENERATE:
            self._warn_once(
                "degenerate",
                "eigenvalues of the Hessian must differ for its eigenvectors to be known, got "
                f"{result.degenerate:.0%} of those of {self.options.parameter!r} equal to the one before, as of the "
                "last layer under a squared error: all but the commutativity depends on which ones a solver gives. "
                "Choose another parameter.",
            )
        if problem.why_general == NOT_A_MEAN:
            self._warn_once(
                "mean",
                "the loss of a batch is not the mean of those of its samples, as with class weights or means over "
                "tokens: C and H are of samples one by one, all alike, and not of the loss that is trained. Give "
                "objective= the loss that is meant.",
            )
        if result.unpaired > _UNPAIRED:
            self._warn_once(
                "unpaired",
                f"samples must have a partner of their class in the other half of their batch, got "
                f"{result.unpaired:.1%} without, which 'noise_awd_chain' leaves out: raise micro_batch_size.",
            )

    def write_pictures(self, trainer: pl.Trainer, result: NoiseCurvature) -> None:
        """Write the pictures."""
        if self.options.pictures:
            report_noise(trainer, self.options.prefix, result)
