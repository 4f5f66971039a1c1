"""A LightningModule's training step as a function of its parameters: recorded once, repeated many times."""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_curvature.operators.differentiation import patched
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.replay.batches import copied
from lightning_curvature.replay.isolation import muted, own_buffers
from lightning_curvature.replay.module_state import Bystanders, ModuleState, RandomState
from lightning_curvature.replay.recording import (
    BackwardLog,
    find_outputs,
    inert_optimization,
    read_result,
    recorded_through,
    recording_backward,
)

ObjectiveFunction = Callable[[pl.LightningModule, Any], "Tensor | dict[str, Any]"]


@dataclass(eq=False)
class RecordedBatch:
    """Inputs and states of one call of ``training_step``, and its result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    randomness: RandomState
    state: ModuleState
    global_step: int
    forward_dtype: torch.dtype
    bystanders: dict[str, tuple[int, int]] = field(default_factory=dict)
    base: Evaluation | None = None
    backward: BackwardLog = field(default_factory=BackwardLog)

    @property
    def batch(self) -> Any:
        """The batch as training_step received it."""
        return _batch(self.args, self.kwargs)


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
        self.module, self.device, self.function = module, device, function
        self._outputs_name = outputs
        self._step: Callable[..., Any] = module.training_step
        # ``torch.compile(module)`` compiles the step too, not only forward.
        self.compiled = getattr(module, "_compiler_ctx", None) is not None
        self.records: list[RecordedBatch] = []
        self.bystanders = Bystanders(module, module.trainer.optimizers)

    @contextlib.contextmanager
    def recording(self, on_error: Callable[[Exception], None]) -> Generator[None, None, None]:
        """Record the first call of ``training_step`` inside the block.

        LBFGS calls a step several times a batch; only the first is at θ_t. A failure to record goes to ``on_error``
        and never into the step.
        """
        called = False

        def record_call(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal called
            record = None if called else _attempt(on_error, lambda: self._begin(args, kwargs))
            called = True
            if record is None:
                return step(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                # A step compiled as a whole is one graph; watching its outputs would compile another.
                unwatched = self.compiled or self.function is not None
                seen = [] if unwatched else stack.enter_context(self._watching_outputs())
                if not self.module.automatic_optimization:
                    stack.enter_context(recording_backward(self.module, record.backward))
                self.records.append(record)
                result = step(*args, **kwargs)
            _attempt(on_error, lambda: self._finish(record, result, seen))
            return result

        with recorded_through(self.module, record_call) as self._step:
            yield

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedBatch:
        kept_args, kept_kwargs = copied((args, kwargs))
        state = ModuleState(self.module, self.bystanders.saved)
        record = self._record(kept_args, kept_kwargs, RandomState(self.device), state)
        self.bystanders.begin()
        record.bystanders = self.bystanders.versions()
        return record

    def prepare(self, batch: Any, batch_idx: int, randomness: RandomState, state: ModuleState) -> RecordedBatch:
        """Return the record of a step that did not run, to be evaluated from the given states.

        Raises:
            ValueError: if the module holds iterators or open files, which cannot be put back.
        """
        # Lightning decides in this way whether a step is given the index.
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        return self._record((batch, batch_idx) if takes_index else (batch,), {}, randomness, state)

    def _record(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], randomness: RandomState, state: ModuleState
    ) -> RecordedBatch:
        if state.unrepeatable and self.function is None:
            raise ValueError(
                f"training_step must not depend on what cannot be put back, got {state.unrepeatable} on the module, "
                "iterators or open files: keep them elsewhere, or give objective=."
            )
        dtype = _forward_dtype(self.module, self.device)
        return RecordedBatch(args, kwargs, randomness, state, self.module.trainer.global_step, dtype)

    def _finish(self, record: RecordedBatch, result: Any, seen: list[Any]) -> None:
        written = self.bystanders.written_since(record.bystanders)
        if self.function is not None:
            return
        if written:
            raise ValueError(
                f"training_step wrote to parameters that no optimizer holds and that it left alone before, got "
                f"{written[:3]}: this step cannot be repeated, later ones can."
            )
        if self.module.automatic_optimization:
            if result is None:
                self.records.remove(record)
                return
            base = read_result(result, seen)
            if not base.loss.requires_grad:
                raise ValueError(
                    "training_step must return a loss that requires grad, got a constant: leave no_grad and detach "
                    "out of it."
                )
        else:
            base = Evaluation(torch.full((), torch.nan, device=self.device), find_outputs(result, seen))
        # The graph must not outlive the step.
        record.base = Evaluation(base.loss.detach(), None if base.outputs is None else base.outputs.detach())

    def base_loss(self, record: RecordedBatch, segment: int) -> Tensor:
        """Return the loss of the step itself; in manual optimization that of one segment."""
        if self.module.automatic_optimization:
            assert record.base is not None
            return record.base.loss
        loss = record.backward.loss(segment)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def evaluate(self, record: RecordedBatch, segment: int = 0) -> Evaluation:
        """Repeat a recorded step at the present parameters, under ``torch.no_grad`` unless gradients are enabled.

        Raises:
            ValueError: if the loss is not a scalar.
        """
        with_graph = torch.is_grad_enabled()
        record.state.restore(gently=with_graph)
        record.randomness.restore()
        args, kwargs = copied((record.args, record.kwargs))  # a step may write into its batch
        with muted(self.module, record.global_step), self.bystanders.watching(), contextlib.ExitStack() as stack:
            if with_graph:
                stack.enter_context(own_buffers(self.module))
            if self.function is not None:
                return read_result(self.function(self.module, _batch(args, kwargs)), [], objective=True)
            seen = stack.enter_context(self._watching_outputs())
            log = BackwardLog()
            # Also in automatic optimization: a step may use its optimizer or step a scheduler.
            stack.enter_context(inert_optimization(self.module, log))
            result = self._step(*args, **kwargs)
            if self.module.automatic_optimization:
                return read_result(result, seen)
            return Evaluation(log.loss(segment), find_outputs(result, seen))

    @contextlib.contextmanager
    def _watching_outputs(self) -> Generator[list[Any], None, None]:
        """Collect what the module's forward, or the named submodule, returns inside the block."""
        seen: list[Any] = []
        watched = self.module.get_submodule(self._outputs_name or "")
        forward = watched.forward

        # Not a hook: compiled code ignores those added later. Without the attributes of a compiled function, by which
        # torch would take this one for it, and pass it over.
        @functools.wraps(forward, updated=())
        def noted(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            seen.append(output)
            return output

        with patched(watched, forward=noted):
            yield seen


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _attempt(on_error: Callable[[Exception], None], action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        on_error(error)
        return None


def _forward_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """Return the coarsest type in which the forward pass computes."""
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    return max(types or {torch.float32}, key=lambda t: torch.finfo(t).eps)
