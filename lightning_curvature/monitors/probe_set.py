"""The base of the monitors that measure on a fixed probe set, before an optimizer step is made."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.data.first import first_batch
from lightning_curvature.data.position import Bookmark
from lightning_curvature.data.probe_set import ProbeSet, read_probe_set, step_size
from lightning_curvature.data.reading import sample_count
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.losses.skipped import may_skip, without_skipped
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.by_hand import Optimizers
from lightning_curvature.monitors.checks import check_real
from lightning_curvature.monitors.options import ProbeSetOptions
from lightning_curvature.monitors.protocol import Prepared, Problem, Result, prepare_together
from lightning_curvature.replay.objective import StepObjective
from lightning_curvature.reporting.loggers import warn

ResultT = TypeVar("ResultT", bound=Result)


class ProbeSetMonitor(Monitor, Generic[Problem, ResultT]):
    """Base of the monitors that measure on a fixed probe set.

    They measure at θ_t, in ``on_train_batch_start`` of the first batch of optimizer step t, with the learning rate and
    the optimizer's state as the step will find them; their values stand in the logs beside those of the same step. The
    probe set is read once, at the first measured step of a fit.

    Attributes:
        capacities: names of the capacities that :meth:`prepare` returns.
        of_optimizer: quantities that need to know the optimizer.
        result: result of the last measurement, or None.
    """

    options: ProbeSetOptions
    result: ResultT | None
    capacities: ClassVar[tuple[str, ...]] = ()
    of_optimizer: ClassVar[tuple[str, ...]] = ()
    state_types: ClassVar[Mapping[str, type]] = {"probe_set": list}
    state_optional = frozenset({"probe_set"})  # most loaders choose no samples themselves
    _batch_norm_note = "H is that of the mean of micro-batches' losses, each normalized by its own statistics"

    def _begin(self) -> None:
        super()._begin()
        self._data: Any = None
        self._has_read = self._has_measured = self._may_skip = False
        self._measured_step = -1

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._bookmark = Bookmark()

    def state_dict(self) -> dict[str, Any]:
        """Return where the loaders stood when the probe set was read, where they choose its samples themselves."""
        positions = self._bookmark.positions
        return super().state_dict() | ({} if positions is None else {"probe_set": positions})

    def _take_up(self, state_dict: dict[str, Any]) -> None:
        super()._take_up(state_dict)
        self._bookmark = Bookmark(state_dict.get("probe_set"))

    def prepare(self, trainer: pl.Trainer, loss: ProbeLoss, data: Any) -> Prepared[Problem]:
        """Return the inputs of a measurement; may fail on one rank alone, and must not communicate."""
        raise NotImplementedError

    def measure(self, trainer: pl.Trainer, prepared: Prepared[Problem]) -> ResultT:
        """Measure at the parameters as they are, with the capacities of all ranks. Called on every rank, or on none."""
        raise NotImplementedError

    def keys(self) -> list[str]:
        """Return the keys of all values, the same for every measurement."""
        return self.options.keys()

    def shown(self) -> Iterable[str]:
        """Return the keys that the progress bar shows."""
        return ()

    def check_module(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise where the module cannot give what is measured; in a fit and by hand."""

    def write_pictures(self, trainer: pl.Trainer, result: ResultT) -> None:
        """Write pictures and tables of a result."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check optimizers and parameters, lay out TensorBoard and forget the fit before."""
        super().on_fit_start(trainer, pl_module)
        self._may_skip = self.options.objective is None and may_skip(pl_module)
        self._check_parameters(self._parameters(trainer))
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pl_module.modules())
        if batch_norm and self.options.probe_mode == "train":
            warn(
                f"BatchNorm in training mode couples samples: {self._batch_norm_note}. probe_mode='eval' takes the "
                "running statistics instead."
            )

    def _check_optimizers(self, optimizers: Optimizers) -> None:
        optimizers.check(getattr(self.options, "quantities", ()), self.of_optimizer)

    def _by_hand(self, trainer: pl.Trainer, module: pl.LightningModule, dataloader: Any) -> ResultT:
        self._check_parameters(self._parameters(trainer))
        self.check_module(trainer, module)
        self._may_skip = self.options.objective is None and may_skip(module)
        objective = StepObjective(module, trainer.strategy.root_device, self.options.outputs, self.options.objective)
        with contextlib.ExitStack() as stack:
            needs_batch = self._by_step or self.options.of_step
            batch = stack.enter_context(first_batch(trainer, dataloader)) if needs_batch else None
            if self.options.of_step:
                self._complete(trainer, batch, 0)
            read = functools.partial(self._read_once, trainer, batch)
            return self._measure(trainer, objective, read, report=lambda prepared, result: None)

    def _check_parameters(self, parameters: Sequence[Tensor]) -> None:
        """Raise where the parameters cannot be moved."""
        check_real(type(self).__name__, parameters)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure where an optimizer step that is due begins."""
        step = trainer.global_step
        if not self._due(trainer) or step == self._measured_step or self._objective is None:
            return
        if self._complete(trainer, batch, batch_idx):
            self._measure_now(trainer, pl_module, batch)

    def _measure_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Measure at the parameters as they are; ``batch`` is that of the coming step, None after the last."""
        assert self._objective is not None
        self._price.begin(self._objective.device)
        self._measured_step = trainer.global_step
        reported = False

        def report(prepared: Prepared[Problem], result: ResultT) -> None:
            nonlocal reported
            if not self._has_measured:
                prepared.progress.tell()
            reported = True
            self._report(trainer, result)

        try:
            read = functools.partial(self._read_once, trainer, batch)
            result = self._measure(trainer, self._objective, read, report)
            self._has_measured = True
            self._tally.measured(result.values().values())
        except Exception as error:
            if isinstance(error, MisconfigurationException) and (self._has_measured or batch is None):
                # A module that could be measured before is no reason to end a run; nothing is, after it.
                error = RuntimeError(str(error))
            self._fail(error)
            self._tally.measured(())
            if not reported:
                self._report(trainer, None)

    def _measure(
        self,
        trainer: pl.Trainer,
        objective: StepObjective,
        read: Callable[[Exception | None], Any],
        report: Callable[[Prepared[Problem], ResultT], None],
    ) -> ResultT:
        """Read the data (``read`` shares this rank's failure with all), measure, put everything back, and report."""
        with contextlib.ExitStack() as stack:
            # An error on one rank alone is kept until the others learn of it, which wait at the next collective.
            failure: Exception | None = None
            try:
                stack.enter_context(objective.untouched())
            except Exception as error:
                failure = error.with_traceback(None)
            data = read(failure)

            def make_loss() -> ProbeLoss:
                if failure is not None:
                    raise failure
                return ProbeLoss(trainer, objective, self._precision(trainer), self.options.probe_mode)

            def prepare() -> Prepared[Problem]:
                return self.prepare(trainer, make_loss(), data)

            if self._may_skip:
                data, self._may_skip = self._with_loss(trainer, make_loss, data), False
                self._data = data if self._has_read else None
            prepared = prepare_together(trainer, prepare, self.capacities)
            try:
                self.result = self.measure(trainer, prepared)
            finally:
                prepared.progress.close()
        # Not before: what is within the module's reach is put back, and a logger may be.
        report(prepared, self.result)
        return self.result

    def _report(self, trainer: pl.Trainer, result: ResultT | None) -> None:
        """Write a result; NaN for all its keys where there is none."""
        values = dict.fromkeys(self.keys(), math.nan) if result is None else result.values()
        self._write(trainer, values | self.beside(trainer, values), self.shown())
        if result is not None:
            self.write_pictures(trainer, result)

    def _read(self, trainer: pl.Trainer, batch: Any, failure: Exception | None) -> Any:
        """Read the data of all measurements of a fit; a rank that failed takes part, so that the others learn of it."""
        return self._read_from(trainer, self.options.probe_dataloader, batch, failure, self._bookmark)

    def _read_once(self, trainer: pl.Trainer, batch: Any, failure: Exception | None) -> Any:
        if not self._has_read:
            self._data, self._has_read = self._read(trainer, batch, failure), True
        return self._data

    def _read_from(
        self,
        trainer: pl.Trainer,
        loader: Any,
        batch: Any,
        failure: Exception | None,
        bookmark: Bookmark | None = None,
    ) -> Any:
        """Read from a loader; from the Trainer's where it is None."""
        size, group = self._cut(trainer, loader), 1
        if self._by_step and failure is None:
            try:
                size, group = self._step_groups(trainer, batch)
            except Exception as error:
                failure = error.with_traceback(None)
        return read_probe_set(
            trainer,
            loader,
            samples=self.options.probe_samples,
            batch_size=size,
            group_size=group,
            seed=self.options.seed,
            failure=failure,
            bookmark=bookmark,
        )

    def _with_loss(self, trainer: pl.Trainer, make_loss: Callable[[], ProbeLoss], data: Any) -> Any:
        """Return the data without batches that the step passes over."""
        return without_skipped(trainer, make_loss, data) if isinstance(data, ProbeSet) else data

    def _cut(self, trainer: pl.Trainer, loader: Any) -> int | None:
        """Return the size of a micro-batch; None for that of the loader."""
        return self.options.micro_batch_size

    def _step_groups(self, trainer: pl.Trainer, batch: Any) -> tuple[int | None, int]:
        """Return the size of a micro-batch, and how many make up an optimizer step, with all its batches and ranks."""
        given = self.options.probe_dataloader
        loader = trainer.train_dataloader if given is None else given
        batches = trainer.accumulate_grad_batches * trainer.world_size
        step = step_size(trainer) or sample_count(batch) * batches
        cut = self.options.micro_batch_size or getattr(loader, "batch_size", None)
        if cut is None:
            return None, batches
        # The largest size up to the requested one that divides a step's data.
        size = max(n for n in range(1, min(cut, step) + 1) if step % n == 0)
        return size, step // size

    def _complete(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> bool:
        """Whether all is there that the measurement of the coming step needs; called for each of its batches."""
        return True

    @property
    def _by_step(self) -> bool:
        """Whether the batches of the probe set are to make up those of optimizer steps."""
        return False

    def _let_go(self) -> None:
        super()._let_go()
        self._data, self._has_read = None, False
