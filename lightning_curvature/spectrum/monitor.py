"""The monitor of the Hessian's spectrum."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_curvature.data.probe_set import ProbeSet
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.modules import matching
from lightning_curvature.monitors.options import OnError
from lightning_curvature.monitors.probe_set import ProbeSetMonitor
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.operators.sharding import WHERE_SHARDED
from lightning_curvature.optimizers.stability import stability_rule
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import check_tensorboard, warn
from lightning_curvature.reporting.progress import Progress
from lightning_curvature.spectrum.measurement import SpectrumMeasurement
from lightning_curvature.spectrum.options import EXACT_ONLY, Products, Quantity, SpectrumOptions, largest_name
from lightning_curvature.spectrum.problem import SpectrumProblem, basis_length
from lightning_curvature.spectrum.result import Spectrum, report_density


class HessianSpectrumMonitor(ProbeSetMonitor[SpectrumProblem, Spectrum]):
    r"""Log eigenvalues, trace and density of the loss's Hessian, and where the optimizer would turn unstable.

    H is the Hessian of the training loss at θ_t on a fixed probe set of training samples, with respect to the
    parameters that the optimizer moves. Quantities and their keys, each written as ``<prefix>/<key>``:

    * "lambda_max": ``lambda_max``, and with ``k`` > 1 ``lambda_2`` … ``lambda_k``: the algebraically largest
      eigenvalues. No eigenvalue is above ``lambda_max_upper``, with 95 % probability. ``lambda_max_threshold`` is
      where the optimizer turns unstable on a quadratic: GD 2/η, heavy ball (2+2β)/η, Nesterov (2+2β)/((1+2β)η), minus
      weight decay; 2/η, with one note, for optimizers that are not known; none for adaptive ones.
    * "lambda_min": ``lambda_min``, the smallest, which is negative except near a minimum.
    * "preconditioned_lambda_max": λ_max(P^{-1/2} H P^{-1/2}), P from the optimizer's own state (Adam's √v̂ + ε), with
      ``preconditioned_lambda_max_threshold``: Adam (2+2β₁)/((1−β₁)η), with bias correction and decoupled decay,
      RMSprop (2+2μ)/η. NaN before the first step.
    * with either of both: ``stability_headroom``, threshold over λ_max, of the second where both are measured: by what
      factor η could grow before full-batch training turns unstable, at the curvature as it is. 1 is the edge.
    * "gauss_newton_lambda_max": λ_max of the Gauss–Newton matrix G = E[Jᵀ∇²_zℓ J]; needs the outputs z.
    * "second_moment_contraction": ``second_moment_contraction`` = λ_max(E_B[(I−ηH_B)²]), stable up to 1, and
      ``second_moment_excess`` = λ_max(−2ηH + η²E_B[H_B²]), stable up to 0. Mini-batches B are as large as the data of
      one optimizer step, cut from the probe set; SGD without momentum is meant.
    * "hessian_trace": ``hessian_trace`` with ``hessian_trace_stderr``.
    * "spectral_density": histogram and picture on TensorBoard.

    With ``by_module`` each module has its share in what was measured, at no product more, as
    ``<prefix>_by_module/<key>/<module>`` and in ``result.modules``: ``<eigenvalue>_share``, the sum of v_i² over its
    parameters in the unit eigenvector v (in the coordinates of the operator; all add up to 1), and ``hessian_trace``
    with its ``_stderr``, the trace of its diagonal block. λ_max of a diagonal block itself, which is no larger than
    that of H, is measured by ``parameters``.

    Each eigenvalue λ comes with ``<key>_error``, its relative error by which the search ended; and with
    ``<key>_converged``, 0 where ``max_products`` ended it before that was small, or before a larger eigenvalue could be
    excluded.

    Cost of a measured step: one gradient of the probe set with its graph, then about two forward+backwards of it for
    each product where the graphs fit into memory, three elsewhere. λ_max takes about nine products the first time: the
    search goes on until an eigenvalue that is larger by 10 % is excluded with 95 % probability. Later it goes on from
    the last eigenvector, with one to five products; every ``recheck_every`` measurements, where the value has fallen by
    more than 10 %, and where the density has one beyond it, the search is made anew, should another have overtaken.
    ``lambda_max_upper`` is NaN where it was not. Other steps cost nothing.

    BatchNorm in training mode couples the samples of a batch: then H is that of the mean over micro-batches of losses
    normalized by their own statistics, and depends on ``micro_batch_size``; ``probe_mode="eval"`` takes the running
    statistics as constants. Dropout in training mode has one fixed mask a micro-batch.

    Args:
        quantities: which of the above.
        k: how many of the largest eigenvalues.
        every_n_train_steps: measure before optimizer steps 0, n, 2n, …
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        probe_samples: the most samples of the probe set; None for all training data.
        probe_dataloader: where to take them from; default: the Trainer's train dataloader.
        micro_batch_size: samples differentiated at once; default: the loader's batch size.
        tolerance: relative error at which an eigenvalue counts as found.
        recheck_every: a search goes on from the last eigenvectors, but each so many begins with random ones.
        max_products: most products for one eigenvalue problem or one trace.
        trace_error: relative standard error of the trace.
        density_starts: random starts of the density.
        density_steps: products for each of them: how fine it is.
        products: "exact" by double backward, "difference" of two gradients, or "auto": exact where parameters are whole
            and the model can be differentiated twice. The change is told once.
        keep_graph: keep gradient graphs from product to product: True, False, or "auto": those that fit into half
            of the free memory; a line of the log says once if some do not.
        parameters: measure the diagonal block of the parameters whose names match one of these patterns ("encoder.*"),
            by products restricted to it; thresholds stay those of the optimizer. None: all that the optimizer moves.
        by_module: also give values by module: True for each module that holds parameters, a number for the modules at
            this depth (1 at the top), or names.
        save_eigenvectors: keep the eigenvectors in checkpoints, so that a resumed run goes on from them.
        outputs: see :class:`DirectionalCurvatureMonitor`; only the Gauss–Newton matrix needs outputs.
        objective: callable (module, batch) → loss, or → {"loss", "outputs"}, in place of training_step.
        optimizer_index: which optimizer to follow where there are several.
        probe_mode: "train" leaves the module in its modes, "eval" switches it for the measurement.
        probe_precision: "32-true" runs without autocast; None in the run's precision, whose rounding raises the errors.
        seed: of the choice of samples, of dropout masks and of random vectors.
        prefix: prefix of the keys.
        progress_bar: show the eigenvalues on the progress bar.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit, for what the module or strategy cannot give.

    Source: Cohen et al. 2021, 2022 (thresholds, preconditioning); Wu et al. 2018 and Edge of stochastic stability
    (2025), eqs. 37 and 39 (contraction).
    """

    options: SpectrumOptions
    capacities = ("basis",)
    of_optimizer = ("preconditioned_lambda_max", "second_moment_contraction")
    state_types: ClassVar[Mapping[str, type]] = {"probe_set": list, "eigenpairs": dict}
    state_optional = ProbeSetMonitor.state_optional | {"eigenpairs"}

    def __init__(
        self,
        *,
        quantities: Sequence[Quantity] = SpectrumOptions.quantities,
        k: int = SpectrumOptions.k,
        every_n_train_steps: int = SpectrumOptions.every_n_train_steps,
        max_overhead: float | None = SpectrumOptions.max_overhead,
        probe_samples: int | None = SpectrumOptions.probe_samples,
        probe_dataloader: Any = SpectrumOptions.probe_dataloader,
        micro_batch_size: int | None = SpectrumOptions.micro_batch_size,
        tolerance: float = SpectrumOptions.tolerance,
        recheck_every: int = SpectrumOptions.recheck_every,
        max_products: int = SpectrumOptions.max_products,
        trace_error: float = SpectrumOptions.trace_error,
        density_starts: int = SpectrumOptions.density_starts,
        density_steps: int = SpectrumOptions.density_steps,
        products: Products = SpectrumOptions.products,
        keep_graph: bool | Literal["auto"] = SpectrumOptions.keep_graph,
        parameters: str | Sequence[str] | None = SpectrumOptions.parameters,
        by_module: bool | int | Sequence[str] = SpectrumOptions.by_module,
        save_eigenvectors: bool = SpectrumOptions.save_eigenvectors,
        outputs: str | None = SpectrumOptions.outputs,
        objective: ObjectiveFunction | None = SpectrumOptions.objective,
        optimizer_index: int = SpectrumOptions.optimizer_index,
        probe_mode: Literal["train", "eval"] = SpectrumOptions.probe_mode,
        probe_precision: Literal["32-true"] | None = SpectrumOptions.probe_precision,
        seed: int = SpectrumOptions.seed,
        prefix: str = SpectrumOptions.prefix,
        progress_bar: bool = SpectrumOptions.progress_bar,
        on_error: OnError = SpectrumOptions.on_error,
    ) -> None:
        super().__init__(SpectrumOptions.of(locals()))

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._sharded = False
        self._measurement = SpectrumMeasurement(self.options, self._warn_once)

    def _told_apart_by(self) -> dict[str, Any]:
        return super()._told_apart_by() | {"quantities": self.options.quantities}

    def state_dict(self) -> dict[str, Any]:
        """Return also the last eigenpairs, where checkpoints are to keep them and this rank holds them whole."""
        kept = self.options.save_eigenvectors and not self._sharded
        pairs = {kind: tracker.state_dict() for kind, tracker in self._measurement.trackers.items()}
        return super().state_dict() | ({"eigenpairs": pairs} if kept else {})

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        """Take up the probe set, and the eigenpairs where a checkpoint left them."""
        super()._take_up(state_dict)
        self._measurement.take_up(state_dict.get("eigenpairs", {}))

    def edges(self, trainer: pl.Trainer) -> dict[str, str | None]:
        """Return the threshold of λ_max, and of the preconditioned one; adaptive optimizers have none on λ_max(H)."""
        return {
            q: f"{q}_threshold" for q in ("lambda_max", "preconditioned_lambda_max") if q in self.options.quantities
        }

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Chart each eigenvalue with its threshold."""
        # TensorBoard leaves out a key that is never written.
        largest = [largest_name(i) for i in range(1, self.options.k + 1)]
        charts = {"λ_max and its threshold": ("lambda_max", largest)}
        charts["preconditioned λ_max"] = ("preconditioned_lambda_max", ["preconditioned_lambda_max"])
        asked = self.options.quantities
        return {title: [*keys, f"{name}_threshold"] for title, (name, keys) in charts.items() if name in asked}

    def charted_by_module(self) -> Sequence[str]:
        """Chart the shares of the modules in each eigenvector."""
        return self.options.shares

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check parameters, strategy and optimizer against the quantities."""
        super().on_fit_start(trainer, pl_module)
        self.check_module(trainer, pl_module)
        if "spectral_density" in self.options.quantities:
            check_tensorboard(trainer, "spectral_density")

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise for quantities that parameters, strategy or optimizer cannot give."""
        parameters, optimizer = self._parameters(trainer), trainer.optimizers[self.options.optimizer_index]
        asked, k, products = self.options.quantities, self.options.k, self.options.products
        self._sharded = is_sharded(parameters)
        self._measurement.begin(self._sharded)
        exact = [q for kind, quantities in self.options.operators.items() if kind in EXACT_ONLY for q in quantities]
        if exact and (self._sharded or products == "difference"):
            raise MisconfigurationException(
                f"quantities must not need exact products where parameters are sharded or products='difference', got "
                f"{exact}: leave them out."
            )
        if self._sharded and products == "exact":
            raise MisconfigurationException(
                "products must be 'auto' or 'difference' where parameters are sharded, got 'exact': second derivatives "
                "do not reach through their gathering."
            )
        count = math.inf if self._is_lazy else sum(p.numel() for p in parameters)
        if k * ("lambda_max" in asked) + ("lambda_min" in asked) >= count:
            raise MisconfigurationException(
                f"k must be below the number of parameters, got {k} for {count}: ask for fewer."
            )
        if "preconditioned_lambda_max" in asked and math.isnan(stability_rule(optimizer).preconditioned):
            raise MisconfigurationException(
                "quantities must not hold 'preconditioned_lambda_max' where the preconditioner is not known, "
                f"got {type(optimizer).__name__}: leave it out."
            )
        if self._sharded and products == "auto":
            warn(WHERE_SHARDED)

    def _parameters(self, trainer: pl.Trainer) -> list[Tensor]:
        """Return those parameters that the optimizer moves and ``parameters`` names."""
        moved, patterns = super()._parameters(trainer), self.options.parameters
        return moved if patterns is None else matching(trainer.lightning_module, moved, patterns)

    @property
    def _by_step(self) -> bool:
        return "second_moment_contraction" in self.options.quantities

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: ProbeSet) -> Prepared[SpectrumProblem]:
        """Return micro-batches, parameters and thresholds, and how long a basis this rank can hold."""
        optimizer, parameters = trainer.optimizers[self.options.optimizer_index], self._parameters(trainer)
        progress = Progress(trainer, "Hessian spectrum")
        problem = SpectrumProblem(
            trainer=trainer,
            micro_batches=loss.parts(data),
            parameters=parameters,
            gathers=loss.gathers if self._sharded else None,
            optimizer=optimizer,
            groups=data.groups(),
            spread=data.spread,
            # Other random vectors at every step, and the same ones in a resumed run.
            seed=self.options.seed + trainer.global_step,
            modules=self._modules(trainer),
            on_product=progress.tick,
        )
        return Prepared(problem, progress, {"basis": basis_length(parameters, trainer)})

    def measure(self, trainer: pl.Trainer, prepared: Prepared[SpectrumProblem]) -> Spectrum:
        """Measure the spectrum at the parameters as they are."""
        return self._measurement.measure(prepared.problem, int(prepared.capacities["basis"]), self._fail)

    def shown(self) -> list[str]:
        """Return the keys that the progress bar shows."""
        shown = [key for key in self.keys() if key.endswith(("lambda_max", "lambda_min"))]
        return shown if self.options.progress_bar else []

    def beside(self, trainer: pl.Trainer, values: Mapping[str, float]) -> dict[str, float]:
        """Return the thresholds of the optimizer as it is now, and how far the larger eigenvalue is below its own."""
        rule = stability_rule(trainer.optimizers[self.options.optimizer_index])
        if rule.note is not None:
            warn(rule.note)
        thresholds = {"lambda_max": rule.hessian, "preconditioned_lambda_max": rule.preconditioned}
        wanted = self.options.quantities
        edges = {q: edge for q, edge in thresholds.items() if q in wanted and not math.isnan(edge)}
        found = {f"{q}_threshold": edge for q, edge in edges.items()}
        for q, edge in edges.items():  # the last is that of P^{-1/2}HP^{-1/2}, which holds for all groups
            found["stability_headroom"] = _room(edge, values[q])
        return found

    def write_pictures(self, trainer: pl.Trainer, result: Spectrum) -> None:
        """Write the density as a histogram and a picture, and the values by module."""
        if result.density is not None:
            report_density(trainer, f"{self.options.prefix}/spectral_density", result.density)
        self._write_modules(trainer, result.modules)


def _room(edge: float, eigenvalue: float) -> float:
    """Return threshold over eigenvalue; infinite where nothing curves up."""
    return edge / eigenvalue if eigenvalue > 0.0 else math.nan if math.isnan(eigenvalue) else math.inf
