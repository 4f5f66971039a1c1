"""The monitor of stability in the mean square."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_curvature.data.copies import mixed
from lightning_curvature.distributed.shards import is_sharded
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.monitors.options import OnError
from lightning_curvature.monitors.probe_set import ProbeSetMonitor
from lightning_curvature.monitors.protocol import Prepared
from lightning_curvature.monitors.step_calls import StepCalls
from lightning_curvature.operators.sharding import WHERE_SHARDED
from lightning_curvature.optimizers.mean_square import MeanSquareRule
from lightning_curvature.replay.objective import ObjectiveFunction
from lightning_curvature.reporting.loggers import warn
from lightning_curvature.reporting.progress import Progress
from lightning_curvature.stability.average import MovingAverage
from lightning_curvature.stability.measurement import measured
from lightning_curvature.stability.options import StabilityOptions
from lightning_curvature.stability.problem import StabilityProblem, halves_of, share_left
from lightning_curvature.stability.result import StabilityResult, Terms


class StabilityMonitor(ProbeSetMonitor[StabilityProblem, StabilityResult]):
    r"""Log how near training with mini-batches is to instability in the mean square, with momentum or without.

    With x = θ_t minus its moving average, m = H_B x the product with the Hessian of the step's own batch, and V the
    variance of m over mini-batches, from the products of the batch's two halves,

    .. math:: I = \frac{\sum_t \left[ c\,(\lVert m\rVert^2 - V) + e\,V \right]}{\sum_t x^\top m}, \qquad
        c = \frac{\eta}{2(1+\beta)}, \quad e = \frac{\eta}{2(1-\beta)}

    over the last measured steps; norms with P⁻¹ for adaptive optimizers, and c = 1/T with T the threshold of the full
    batch. For a quadratic with random curvature (λ, σ² over batches) along one direction it is
    :math:`\eta[\lambda/(2(1+\beta)) + (\sigma^2/\lambda)/(2(1-\beta))]`, 1 at the edge of stability in the mean square.
    Where the batch is the whole data it is a share of the full-batch threshold. Keys, each written as
    ``<prefix>/<key>``:

    * ``stability_index`` and ``stability_index_stderr``, the jackknife's standard error over measured steps.
    * ``stability_index_drift`` and ``stability_index_noise``, its two terms (with Nesterov momentum they do not add up
      to it), and ``stability_index_steps``, the measured steps that it is made of. It is NaN below 8 of them,
      and while the average is being formed.

    Known are ``torch.optim``'s SGD with momentum of either kind, Adam and AdamW, Adamax, RMSprop and Adagrad; with any
    other the values are NaN. Weight decay is left out. V is reduced by 1 − b/N where b of
    N samples come each once an epoch; from b/N = ½ on it is biased, since batches of an epoch make up for each other.

    Cost: on each step one pass over the parameters, and one more copy of them, for the average; on a measured step one
    product with the Hessian of the step's batch (a forward and two backwards, by halves). Three forwards once a fit,
    which show whether the loss of a batch is the mean or the sum of its halves'; none where a step has several batches
    (accumulation, ranks), whose halves are whole batches.

    Args:
        every_n_train_steps: measure before optimizer steps 0, n, 2n, … once the average has been formed.
        max_overhead: largest share that measurements may add to the time of the run: by it the interval becomes a
            multiple of every_n_train_steps, and says so; None keeps the interval.
        window: measured steps that make an index.
        decay: β of the average of the parameters.
        outputs: see :class:`DirectionalCurvatureMonitor`; not used but by ``objective``.
        objective: callable (module, batch) → loss, in place of training_step.
        optimizer_index: which optimizer to follow where there are several.
        probe_mode: "train" leaves the module in its modes, "eval" switches it for the measurement.
        probe_precision: "32-true" runs without autocast; None in the precision of the run.
        seed: of dropout masks of the second half of a batch.
        prefix: prefix of the keys.
        progress_bar: show the index on the progress bar.
        on_error: "warn" logs NaN and warns when a measurement fails; "raise" raises.

    Attributes:
        result: the index after the last measured step, or None.

    Raises:
        ValueError: for an argument outside its rule.
        MisconfigurationException: at the start of fit, for what the module or the strategy cannot give.

    Source: the formula is this project's; its ends are the full-batch threshold (Cohen et al. 2021) and the plateaus of
    batch sharpness under momentum (Andreyev et al. 2026); see docs/edge.md.
    """

    options: StabilityOptions
    state_types: ClassVar[Mapping[str, type]] = {"steps": list}
    state_optional = frozenset[str]()
    _batch_norm_note = "each half of a batch is normalized by its own statistics"

    def __init__(
        self,
        *,
        every_n_train_steps: int = StabilityOptions.every_n_train_steps,
        max_overhead: float | None = StabilityOptions.max_overhead,
        window: int = StabilityOptions.window,
        decay: float = StabilityOptions.decay,
        outputs: str | None = StabilityOptions.outputs,
        objective: ObjectiveFunction | None = StabilityOptions.objective,
        optimizer_index: int = StabilityOptions.optimizer_index,
        probe_mode: Literal["train", "eval"] = StabilityOptions.probe_mode,
        probe_precision: Literal["32-true"] | None = StabilityOptions.probe_precision,
        seed: int = StabilityOptions.seed,
        prefix: str = StabilityOptions.prefix,
        progress_bar: bool = StabilityOptions.progress_bar,
        on_error: OnError = StabilityOptions.on_error,
    ) -> None:
        super().__init__(StabilityOptions.of(locals()))

    def _begin(self) -> None:
        super()._begin()
        self._calls, self._average = StepCalls(), MovingAverage(self.options.decay)
        self._averaged_step, self._sharded = -1, False
        self._factor: float | None = None

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._steps: list[Terms] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the terms of the measured steps; the average is formed anew."""
        return super().state_dict() | {"steps": [[one.drift, one.noise, one.variance, one.form] for one in self._steps]}

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        super()._take_up(state_dict)
        self._steps = [Terms(*one) for one in state_dict["steps"]]

    def edges(self, trainer: pl.Trainer) -> dict[str, str | None]:
        """Return the index, whose edge is 1."""
        return {"stability_index": None}

    def charted(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Chart the index and its parts."""
        return {"stability index": ["stability_index", "stability_index_drift", "stability_index_noise"]}

    def shown(self) -> Sequence[str]:
        """Return the keys that the progress bar shows."""
        return ["stability_index"] if self.options.progress_bar else ()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether parameters are sharded."""
        super().on_fit_start(trainer, pl_module)
        self._sharded = is_sharded(self._parameters(trainer))
        if self._sharded:
            warn(WHERE_SHARDED)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take θ_t up into the average, once a step: LBFGS comes here several times."""
        followed = self._objective is not None and optimizer is trainer.optimizers[self.options.optimizer_index]
        if followed and self._averaged_step != trainer.global_step:
            self._averaged_step = trainer.global_step
            if self._average.add(self._parameters(trainer)):
                self._steps = []  # of another module

    def _complete(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        return self._calls.add(trainer, batch, batch_idx)

    def _measure_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if self._average.is_ready(self._parameters(trainer)):
            super()._measure_now(trainer, pl_module, batch)
            return
        # On all ranks alike.
        self._measured_step, self.result = trainer.global_step, StabilityResult(self._steps, ready=False)
        self._tally.fail(ValueError(self.result.unready))
        self._tally.measured(())
        self._report(trainer, self.result)

    def _read(self, trainer: pl.Trainer, batch: Any, failure: Exception | None) -> None:
        """Read nothing: the data are those of the step."""

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: Any) -> Prepared[StabilityProblem]:
        """Return the halves of the step's data, the displacement and the optimizer's rule."""
        optimizer, parameters = trainer.optimizers[self.options.optimizer_index], self._parameters(trainer)
        calls, step = self._calls.take(), trainer.global_step
        world, rank = trainer.world_size, trainer.global_rank
        kept = share_left(trainer, len(calls))
        if 0.0 < kept <= 0.5:
            warn("a step takes half of the samples of an epoch or more: the noise in the stability index is biased.")
        problem = StabilityProblem(
            trainer=trainer,
            loss=loss,
            parameters=parameters,
            halves=halves_of(loss, calls, world, rank, self._sharded, mixed(self.options.seed, step, rank)),
            displacement=self._average.displacement(parameters),
            rule=MeanSquareRule.of(optimizer, parameters),
            kept=kept,
            sharded=self._sharded,
        )
        return Prepared(problem, Progress(trainer, "stability index"))

    def measure(self, trainer: pl.Trainer, prepared: Prepared[StabilityProblem]) -> StabilityResult:
        """Measure one step, and return the index of the last ones."""
        terms, self._factor = measured(prepared.problem, self._factor)
        self._steps = [*self._steps, terms][-self.options.window :]
        return StabilityResult(tuple(self._steps), prepared.problem.rule.nesterov)

    def check_at_a_point(self) -> NoReturn:
        """Raise: the index has no value at one point."""
        raise MisconfigurationException(
            "StabilityMonitor needs the steps of a fit, whose average it follows, got a module at one point: give it "
            "to a Trainer as a callback, or evaluate BatchSharpnessMonitor or HessianSpectrumMonitor."
        )

    def _let_go(self) -> None:
        super()._let_go()
        self._calls.forget()
        self._average = MovingAverage(self.options.decay)
