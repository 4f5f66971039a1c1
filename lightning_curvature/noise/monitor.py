"""The monitor of SGD's gradient noise against the curvature of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.data.probe_set import ProbeSet, step_size
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.samples import Alone, BlockSamples
from lightning_curvature.monitors.base import OnError
from lightning_curvature.monitors.checks import check_count, check_names
from lightning_curvature.monitors.occasional import OccasionalMonitor
from lightning_curvature.noise.linear_layer import SeveralUsesError
from lightning_curvature.noise.measurement import measure_noise
from lightning_curvature.noise.problem import KEYS, QUANTITIES, NoiseOptions, NoiseProblem, Pairing, Quantity
from lightning_curvature.noise.result import NoiseCurvature, report_noise
from lightning_curvature.noise.routes import (
    batch_size_of,
    check_block,
    linear_layer,
    named_parameters,
    why_not_kronecker,
)
from lightning_curvature.noise.sums import NOT_A_MEAN, inputs_and_labels
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import inform, warn
from lightning_curvature.reporting.progress import Progress

# What a rank can do; all do what the least of them can.
_GENERAL, _KRONECKER, _PAIRED = 1.0, 2.0, 3.0
# Share of the samples without a partner that is worth a word: a few are left over in the last batch of most data.
_UNPAIRED = 0.05
# Share of the eigenvalues that are alike from which on it is worth a word.
_DEGENERATE = 0.2


class NoiseCovarianceMonitor(OccasionalMonitor[NoiseCurvature]):
    r"""Measure how the noise of SGD's gradient relates to the curvature of the loss, on one block of parameters.

    .. math:: C = \frac1b \left( E_i[g_i g_i^\top] - g g^\top \right), \qquad H = E_i[h_i]

    over single training samples, by one parameter of D entries; the two are compared in the eigenvectors v_i of the 𝒩
    largest eigenvalues of H. Quantities and their keys, each written as ``<prefix>/<key>``:

    * "noise_gamma": ``noise_gamma``, γ of :math:`C_{ii} \propto H_{ii}^\gamma`, fitted to positive entries above the
      rounding of H, with ``noise_gamma_stderr``. Theory has 1 ≤ γ ≤ 2 near a minimum.
    * "noise_gamma_awd": ``noise_gamma_awd`` (and ``_stderr``), the same for what activity–weight duality puts in the
      place of C, :math:`E_p[h_p^2]` up to a factor.
    * "noise_commutativity": ``noise_commutativity`` = ‖CH − HC‖_F / (‖C‖_F ‖H‖_F); ``noise_commutativity_relative`` =
      ‖CH − HC‖_F / ‖CH‖_F, beside ``noise_commutativity_random``, what this would be for a C with random eigenvectors
      (up to √2, exact). The first is small for matrices that have little to do with each other as well.
    * "noise_alignment": ``noise_alignment``, the share of the energy of C that is on its diagonal.
    * "noise_spearman": ``noise_spearman``, rank correlation of C_ii and H_ii.
    * "noise_coupling": ``noise_coupling`` = mean of |C_ij| / √|C_ii C_jj|, i ≠ j; ``noise_coupling_random``, the same
      with random eigenvectors; ``noise_coupling_z``, its distance from theory for such ones in standard errors.
    * "noise_awd_chain": ``noise_gamma_awd_raw``, ``_hh``, ``_hh_sd``, ``_hh_sd_wd`` and ``_hh_sd_wd_li``: γ of P2's
      approximations of C one after the other, from pairs of mini-batches (linear layers with class labels only).

    TensorBoard gets pictures: ``noise_scatter``, C_ii against H_ii with the fit, and ``noise_matrices``, C in the
    eigenbasis and the coupling beside that of random eigenvectors. ``result`` holds everything as a
    :class:`~lightning_curvature.noise.result.NoiseCurvature`.

    Two routes lead to C and H; the first measurement says which one it takes. *Kronecker*: the weight of a linear layer
    that is used once for each sample, of which no per-sample Hessian is formed; costs, for each micro-batch, two
    forwards (one of single samples, to see that their mean is the loss of the batch), and a backward of what comes
    after the layer for each of its outputs. *General*: any other parameter, or a loss that is no such mean; costs a
    gradient of each sample, D products with each micro-batch, and 𝒩 products with each sample for ``noise_gamma_awd``.
    Both need D × D matrices in memory, ten of them (0.5 GB for D = 2500), and one eigenvalue problem of that size.

    Args:
        parameter: name of the block, as ``named_parameters()`` has it; ``_orig_mod`` of compiled parts may be left out.
        quantities: which of the above.
        top: 𝒩; None for 40 % of D, as P2 takes.
        batch_size: b; default: samples of an optimizer step.
        haar_draws: random rotations for ``noise_coupling_random``.
        pictures: draw them, about a second each time; for TensorBoard.
        pairing: callable batch → (inputs, labels) for "noise_awd_chain"; default: the batch is such a pair.
        at_end: measure when fit ends.
        at_steps: measure before these optimizer steps.
        every_n_train_steps: measure before steps 0, n, 2n, …; None for not.
        probe_samples: the most samples; None for all training data.
        probe_dataloader: where to take them from; default: the Trainer's train dataloader.
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
        MisconfigurationException: at the start of fit, for what the module, the data or the strategy cannot give.

    Source: P2, eqs. 2, 6, 7, 15, 18 and 46.
    """

    _batch_norm_note = "a sample alone has no statistics of a batch, and most layers refuse it"

    def __init__(
        self,
        *,
        parameter: str,
        quantities: Sequence[Quantity] = QUANTITIES[:-1],
        top: int | None = None,
        batch_size: int | None = None,
        haar_draws: int = 4,
        pictures: bool = True,
        pairing: Pairing | None = None,
        at_end: bool = True,
        at_steps: Sequence[int] = (),
        every_n_train_steps: int | None = None,
        probe_samples: int | None = 4096,
        probe_dataloader: Any = None,
        micro_batch_size: int | None = None,
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
            probe_samples=probe_samples,
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
        if not isinstance(parameter, str) or not parameter:
            raise ValueError(
                f"parameter must be a name out of named_parameters(), got {parameter!r}: give one such as 'fc2.weight'."
            )
        parameter = parameter.replace("_orig_mod.", "")
        check_names("quantities", quantities, QUANTITIES)
        check_count("top", top, 3, "None takes 40 % of the directions", optional=True)
        check_count("batch_size", batch_size, 1, "None takes the samples of an optimizer step", optional=True)
        check_count("haar_draws", haar_draws, 1, "4 are enough where there are some hundred directions")
        if pairing is not None and not callable(pairing):
            raise ValueError(
                f"pairing must be a callable, got a {type(pairing).__name__}: give one that returns inputs and "
                "labels of a batch."
            )
        self.parameter, self.batch_size, self.pictures = parameter, batch_size, pictures
        self.pairing = pairing
        self.options = NoiseOptions(tuple(dict.fromkeys(quantities)), top, haar_draws)
        self._told: set[str] = set()
        self._why_general = ""

    def charts(self) -> dict[str, list[str]]:
        """TensorBoard charts: exponents together, and what chance would give beside what is measured."""
        keys = [key for q in self.options.quantities for key in KEYS[q] if not key.endswith("_stderr")]
        charts = {
            "noise exponent γ": [key for key in keys if key.startswith("noise_gamma")],
            "noise commutativity and chance": [k for k in keys if k.startswith("noise_commutativity_")],
            "noise coupling and chance": [k for k in keys if k.startswith("noise_coupling") and not k.endswith("_z")],
        }
        return {
            f"{self.prefix}: {title}": [f"{self.prefix}/{key}" for key in names]
            for title, names in charts.items()
            if names
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the block is there, and that its matrices fit into memory."""
        super().on_fit_start(trainer, pl_module)
        self._told.clear()

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where the module has no such parameter, or one that is too large."""
        check_block(
            named_parameters(module),
            self.parameter,
            top=self.options.top,
            pairs="noise_awd_chain" in self.options.quantities,
            processes=trainer.num_devices,
        )

    def _read_from(self, trainer: pl.Trainer, loader: Any, batch: Any, errors: list[Exception]) -> tuple[ProbeSet, int]:
        """Read the samples, and return them with the size of a batch of their loader."""
        probe_set, own = super()._read_from(trainer, loader, batch, errors), batch_size_of(trainer, loader)
        return probe_set, own or probe_set.batches[0].size

    def _cut(self, trainer: pl.Trainer, loader: Any) -> int | None:
        own = batch_size_of(trainer, loader)
        # Halves of a micro-batch are the mini-batches that are paired.
        pairs = "noise_awd_chain" in self.options.quantities
        return self.micro_batch_size or (2 * own if pairs and own is not None else None)

    def prepare(
        self, trainer: pl.Trainer, loss: ProbeLoss, probe_set: tuple[ProbeSet, int]
    ) -> tuple[tuple[NoiseProblem, Progress], float]:
        """Return what is measured with what shows that it is, and whether this rank can take the Kronecker route."""
        samples, own = probe_set
        # As it is now: the number of accumulated batches may follow a schedule.
        step = step_size(trainer) or own * trainer.accumulate_grad_batches * trainer.world_size
        module = trainer.lightning_module
        progress = Progress(trainer, "noise covariance", unit="batches")
        name, block = named_parameters(module)[self.parameter]
        first = BlockSamples(loss, samples.batches[0])
        layer, at_once, ranks = linear_layer(module, name), False, trainer.world_size
        if ranks > 1:
            with torch.no_grad(), Alone():
                first.whole()
        at_once = first.can_be_stacked(block)
        reason = "it is no weight of a torch.nn.Linear"
        if layer is not None:
            reason = why_not_kronecker(layer, first, at_once, trainer.num_devices)
        pairing, unpaired = None, ""
        if "noise_awd_chain" in self.options.quantities:
            pairing = self.pairing or inputs_and_labels
            try:
                pairing(first.batch)
            except MisconfigurationException as error:
                unpaired = str(error)
        problem = NoiseProblem(
            trainer=trainer,
            loss=loss,
            probe_set=samples,
            name=self.parameter,
            parameter=block,
            layer=layer,
            at_once=at_once,
            batch_size=self.batch_size or step,
            # The same rotations each time, so that what they give changes with C alone.
            seed=self.seed,
            on_batch=progress.tick,
            pairing=pairing,
            unpaired=unpaired,
        )
        self._why_general = reason
        return (problem, progress), _GENERAL if reason else _KRONECKER if unpaired else _PAIRED

    def measured(self, trainer: pl.Trainer, prepared: tuple[NoiseProblem, Progress], least: float) -> NoiseCurvature:
        """Measure at the parameters as they are."""
        problem, progress = prepared
        if least < _KRONECKER:
            problem = replace(problem, layer=None)
        elif least < _PAIRED:
            unpaired = problem.unpaired or "batches of another rank cannot be paired."
            problem = replace(problem, pairing=None, unpaired=unpaired)
        self._tell(problem)
        self._warn_of_cuts(problem)
        try:
            try:
                result = measure_noise(self.options, problem)
            except SeveralUsesError as error:  # which a later batch has shown
                self._why_general, problem = str(error), replace(problem, layer=None)
                self._tell(problem)
                result = measure_noise(self.options, problem)
        finally:
            progress.close()
        for reason in dict.fromkeys(result.reasons.values()):
            keys = [key for key, own in result.reasons.items() if own == reason and key not in self._told]
            self._told.update(keys)
            if keys:
                warn(f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} NaN: {reason}")
        if result.degenerate > _DEGENERATE:
            self._warn_once(
                "degenerate",
                "eigenvalues of the Hessian must differ for its eigenvectors to be known, got "
                f"{result.degenerate:.0%} of those of {self.parameter!r} equal to the one before, as of the last layer "
                "under a squared error: all but the commutativity depends on which ones a solver gives. Choose another "
                "parameter.",
            )
        if problem.layer is None and self._why_general == NOT_A_MEAN:
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
        return result

    def _warn_of_cuts(self, problem: NoiseProblem) -> None:
        spread, chain = problem.probe_set.spread, "noise_awd_chain" in self.options.quantities
        if spread is not None and chain and problem.layer is not None:
            self._warn_once(
                "cuts",
                f"micro-batches must be at least as many as ranks for 'noise_awd_chain', got {spread} for "
                f"{problem.trainer.world_size}, which share them, so that samples are paired within parts: lower "
                "micro_batch_size.",
            )

    def _tell(self, problem: NoiseProblem) -> None:
        about = "general" if problem.layer is None else "kronecker"
        if about in self._told:
            return
        self._told.add(about)
        name = f"noise covariance of {self.parameter!r}"
        if problem.layer is not None:
            inform(f"{name}: Kronecker route, no Hessian of a single sample is formed.")
        else:
            turn = "at once" if problem.at_once else "one by one, which is slow: torch.vmap cannot follow the step"
            why = self._why_general or "it cannot take the Kronecker route on another rank"
            inform(f"{name}: general route, samples {turn}; {why}.")

    def _warn_once(self, about: str, message: str) -> None:
        """Warn the first time in a fit: a message with a number in it would be a new one each time."""
        if about not in self._told:
            self._told.add(about)
            warn(message)

    def report_result(self, trainer: pl.Trainer, result: NoiseCurvature) -> None:
        """Write numbers and pictures."""
        self._write(trainer, result.values(self.options.quantities))
        if self.pictures:
            report_noise(trainer, self.prefix, result)

    def report_nothing(self, trainer: pl.Trainer) -> None:
        """Write NaN for all values."""
        self._write(trainer, {key: math.nan for q in self.options.quantities for key in KEYS[q]})
