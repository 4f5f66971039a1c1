"""A LightningModule's training step as a function of its parameters: recorded once, repeated many times."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_curvature.distributed.gathers import Gathers
from lightning_curvature.distributed.together import attempted
from lightning_curvature.operators.differentiation import put_back_at_exit
from lightning_curvature.operators.fallback import SecondDerivatives
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.operators.sides import eager
from lightning_curvature.replay.batches import copied
from lightning_curvature.replay.calls import Call, recording_calls
from lightning_curvature.replay.check import asks_for_gradients, left_behind, moved_before, other_loss
from lightning_curvature.replay.frozen import KinkedStep
from lightning_curvature.replay.head import Cut
from lightning_curvature.replay.isolation import Shelter, muted, own_buffers, untouched
from lightning_curvature.replay.memory import addresses
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.recording import (
    BackwardLog,
    RecordedBatch,
    find_outputs,
    first_of,
    forward_dtype,
    inert_optimization,
    read_result,
    recorded_through,
    recording_backward,
    watching_outputs,
)
from lightning_curvature.replay.rewrites import Rewrites
from lightning_curvature.replay.snapshot import Snapshot
from lightning_curvature.replay.witness import Witness

_Context = contextlib.AbstractContextManager[Any]
ObjectiveFunction = Callable[[pl.LightningModule, Any], Tensor | dict[str, Any]]


class StepObjective:
    """Record calls of ``training_step`` and repeat them.

    A repetition starts from the random state and the module state of the recorded call, runs under the Trainer's
    precision and writes no logs; the caller puts states back (see :func:`~.replay.isolation.untouched`).

    Args:
        device: the device it trains on.
        outputs: name of the submodule whose output counts as the outputs; default: the module's own forward.
        function: replaces ``training_step`` in repetitions; called as ``function(module, batch)``.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        device: torch.device,
        outputs: str | None = None,
        function: ObjectiveFunction | None = None,
    ) -> None:
        if outputs is not None and outputs not in dict(module.named_modules()):
            raise ValueError(
                f"outputs must name a submodule of {type(module).__name__}, got {outputs!r}: "
                f"choose one of {[name for name, _ in module.named_modules() if name][:10]}."
            )
        self.module, self.device, self.function, self.outputs_name = module, device, function, outputs
        self.cut: Cut | None = None  # where the loss is cut off, if it is
        self.kinks, self.second, self.gathers = KinkedStep(), SecondDerivatives(), Gathers(module)
        self._step: Callable[..., Any] = module.training_step
        # ``torch.compile(module)`` compiles the step too, not only forward.
        self.compiled = getattr(module, "_compiler_ctx", None) is not None
        self.records: list[RecordedBatch] = []
        self.rewrites = Rewrites(module)
        self.refusal: Exception | None = None
        self.differentiates = False  # whether the step itself needs gradients
        self._snapshot: Snapshot | None = None
        self._covered: Sequence[Tensor] = ()

    @contextlib.contextmanager
    def recording(self, on_error: Callable[[Exception], None]) -> Generator[None, None, None]:
        """Record the first call of ``training_step`` inside the block.

        LBFGS calls a step several times a batch; only the first is at θ_t. Failures to record go to ``on_error`` alone.
        """
        self._follow(stops=False)
        self.rewrites.mark_start(self.module.automatic_optimization)
        called, stack, seen, calls = False, contextlib.ExitStack(), list[Any](), list[Call]()

        def begin(*args: Any, **kwargs: Any) -> RecordedBatch | None:
            nonlocal called, seen, calls
            if called:
                return None
            called, record = True, self._begin(args, kwargs)
            if self.rewrites.moved(record.marks):
                self.refusal = moved_before()
                raise self.refusal
            # A step compiled as a whole is one graph; watching its outputs would compile another.
            if not (self.compiled or self.function is not None):
                seen = stack.enter_context(watching_outputs(self._watched))
                calls = stack.enter_context(self._recording_calls())
            if not self.module.automatic_optimization:
                stack.enter_context(recording_backward(self.module, record, self.kinks))
            self.records.append(record)
            return record

        def record_call(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            record = attempted(lambda: begin(*args, **kwargs), on_error)
            if self.function is None:
                attempted(lambda: stack.enter_context(self.gathers.watching()), on_error)
            try:
                result = step(*args, **kwargs)
            finally:
                attempted(stack.close, on_error)
            if record is not None:
                attempted(lambda: self._finish(record, result, seen, calls), on_error)
            return result

        with recorded_through(self.module, record_call) as self._step:
            yield

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedBatch:
        self._follow()
        kept_args, kept_kwargs = copied((args, kwargs))
        record = self._record(kept_args, kept_kwargs, RandomState(self.device), self.state(self.rewrites.spared()))
        record.marks = self.rewrites.marks(self.module.automatic_optimization)
        return record

    def _follow(self, stops: bool = True) -> None:
        """Take up a module that has changed its parts, or stop at one that cannot be measured."""
        if self.rewrites.follow():
            self.refusal, self.second, self.gathers = None, SecondDerivatives(), Gathers(self.module)
            self.kinks.begin()
        if stops and self.refusal is not None:
            raise self.refusal

    def state(self, spared: Iterable[Tensor] = ()) -> Snapshot:
        """Return the state, as it is, from which a step can be repeated at any parameters; ``spared`` is not copied."""
        return Snapshot([self.module], addresses((*self.rewrites.trained, *spared)), whole=False)

    @contextlib.contextmanager
    def untouched(self, covered: Sequence[Tensor] = (), spared: Sequence[Tensor] = ()) -> Generator[None, None, None]:
        """Let steps be repeated inside the block, and put everything back (see :func:`~.replay.isolation.untouched`).

        In the first block of a fit, or of a changed module, a second look at everything says whether all came back.

        Args:
            covered: trained parameters that the caller puts back.
            spared: tensors that the step leaves alone.

        Raises:
            Exception: why the step cannot be measured, as an earlier block found out.
            RuntimeError: if something did not come back; it says what.
        """
        self._follow()
        self._covered = covered
        witness = None if self.rewrites.checked else Witness([self.module])
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_snapshot", None)
            if witness is not None:
                stack.push(functools.partial(self._compare, witness))
            optimizers = self.module.trainer.optimizers
            self._snapshot = stack.enter_context(untouched(self.module, self.device, (*covered, *spared), optimizers))
            yield

    def _compare(self, witness: Witness, kind: type[BaseException] | None, *error: object) -> None:
        # An interrupt must not be replaced by another error.
        if (kind is None or issubclass(kind, Exception)) and (changed := witness.differences()):
            self.refusal = left_behind(changed)
            raise self.refusal

    def prepare(self, batch: Any, batch_idx: int, randomness: RandomState, state: Snapshot) -> RecordedBatch:
        """Return the record of a step that did not run, to be evaluated from the given states.

        Raises:
            ValueError: if the module holds iterators or open files, which cannot be put back.
        """
        # Lightning decides in this way whether a step is given the index.
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        return self._record((batch, batch_idx) if takes_index else (batch,), {}, randomness, state)

    def _record(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], randomness: RandomState, state: Snapshot
    ) -> RecordedBatch:
        if state.unrepeatable and self.function is None:
            raise ValueError(
                f"training_step must not depend on what cannot be put back, got {state.unrepeatable} on the module, "
                "iterators or open files: keep them elsewhere, or give objective=."
            )
        step, dtype = self.module.trainer.global_step, forward_dtype(self.module, self.device)
        return RecordedBatch(args, kwargs, randomness, state, step, dtype)

    def _finish(self, record: RecordedBatch, result: Any, seen: list[Any], calls: list[Call]) -> None:
        lost = self.rewrites.note(record.marks, self.rewrites.marks(self.module.automatic_optimization))
        if self.function is not None:
            return
        if lost:
            raise ValueError(
                f"training_step wrote to tensors that it left alone before, got {lost[:3]}: this step cannot be "
                "repeated, later ones can."
            )
        if self.module.automatic_optimization and result is None:
            self.records.remove(record)
            return
        if self.module.automatic_optimization:
            base = read_result(result, seen)
            if not base.loss.requires_grad:
                got = "got a constant: leave no_grad and detach out of it."
                raise ValueError(f"training_step must return a loss that requires grad, {got}")
            record.sides = record.learn([base.loss], self.kinks, base.outputs)
        else:
            base = Evaluation(torch.full((), torch.nan, device=self.device), find_outputs(result, seen))
            record.sides = record.backward.sides
        # The graph must not outlive the step.
        record.base = replace(base, calls=calls).detached()

    def evaluate(
        self, record: RecordedBatch, segment: int = 0, within: _Context | None = None, mode: _Context | None = None
    ) -> Evaluation:
        """Repeat a recorded step at the present parameters, under ``torch.no_grad`` unless gradients are enabled.

        A step that turns out to differentiate for itself has its gradients, and the result comes without its graph.
        ``within`` is entered around the step itself, when all states are those of the recorded call, and ``mode`` too.
        """
        if self.refusal is not None:
            raise self.refusal
        graphless = not torch.is_grad_enabled()
        try:
            with torch.set_grad_enabled(self.differentiates or not graphless):
                result = self.gathers.whole("forward", lambda: self._evaluate(record, segment, within, mode))
            return result.detached() if graphless else result
        except BaseException as error:
            record.state.restore()  # whoever goes on must not meet half a step
            if self.differentiates or not graphless or within is not None or not asks_for_gradients(error):
                raise
        self.differentiates = True
        return self.evaluate(record, segment, mode=mode)

    def _evaluate(
        self, record: RecordedBatch, segment: int, within: _Context | None, mode: _Context | None
    ) -> Evaluation:
        with_graph = torch.is_grad_enabled()
        record.state.restore()
        record.randomness.restore()
        args, kwargs = copied((record.args, record.kwargs))  # a step may write into its batch
        shelter = Shelter()
        with muted(self.module, record.global_step, shelter), contextlib.ExitStack() as stack:
            stack.enter_context(self.rewrites.replaced())
            if with_graph:
                stack.enter_context(own_buffers(self.module))
            calls = stack.enter_context(self._recording_calls() if within is None else within)
            stack.enter_context(eager(mode))
            if self.function is not None:
                result = read_result(self.function(self.module, first_of(args, kwargs)), [], objective=True)
                return replace(result, calls=calls or [])
            seen = stack.enter_context(watching_outputs(self._watched))
            log = BackwardLog()
            # Also in automatic optimization: a step may use its optimizer or step a scheduler.
            stack.enter_context(inert_optimization(self.module, log, shelter))
            put_back_at_exit(stack, shelter.restore)
            result = self._step(*args, **kwargs)
            if self.module.automatic_optimization:
                return replace(read_result(result, seen), calls=calls or [])
            return Evaluation(log.loss(segment), find_outputs(result, seen), calls=calls or [])

    def rehearse(self, record: RecordedBatch, segment: int = 0, mode: _Context | None = None) -> Tensor | None:
        """Repeat a step once, without gradients, and return its loss; None where that was done before.

        To be called inside :meth:`untouched`, at the parameters at which the step is repeated next.
        """
        if self.rewrites.checked or self._snapshot is None:
            return None
        with torch.no_grad(), self.rewrites.rehearsing(self._covered, self._snapshot):
            return self.evaluate(record, segment, mode=mode).loss

    def confirm(self, expected: Tensor | None, loss: Tensor) -> None:
        """Compare the loss of a step with that of a repetition; where they differ, nothing is measured any more.

        Raises:
            ValueError: if they differ by more than rounding explains.
        """
        if expected is None:
            return
        dtype = forward_dtype(self.module, self.device)
        if (refusal := other_loss(float(expected), float(loss.detach()), dtype, self.rewrites.written())) is not None:
            self.refusal = refusal
            raise refusal

    @property
    def _watched(self) -> nn.Module:
        return self.module.get_submodule(self.outputs_name or "")

    def _recording_calls(self) -> contextlib.AbstractContextManager[list[Call]]:
        names = () if self.cut is None else self.cut.made | self.cut.passed
        return recording_calls(self.module, names, self.device)
