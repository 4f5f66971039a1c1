"""Record a call of ``training_step``: its result, the losses that it passes to ``manual_backward``, and the wrapper."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_curvature.distributed.together import attempted
from lightning_curvature.functional.products import graph_nodes
from lightning_curvature.operators.differentiation import patched, put_back_at_exit
from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.operators.sides import Side
from lightning_curvature.replay.frozen import KinkedStep
from lightning_curvature.replay.isolation import Shelter, inert, silent
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import Snapshot

OUTPUTS_REMEDY = (
    "return them from training_step as {'loss': …, 'outputs': …}, compute them by calling self(…) exactly once, or "
    "name the submodule that makes them, outputs='head'"
)


class NoLossError(ValueError):
    """A step returned None, for a batch that it passes over."""


def read_result(result: Any, seen: list[Any], objective: bool = False) -> Evaluation:
    """Return loss and outputs of a step or of the user's objective; only the latter's "mask" means weights.

    Raises:
        NoLossError: if the step returned None.
        ValueError: if the loss is not a tensor with one element.
    """
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        got = f"a dict of {list(result)}" if isinstance(result, dict) and loss is None else type(loss).__name__
        raise (NoLossError if result is None else ValueError)(
            f"the step must return a loss tensor or a dict with 'loss', got {got}: return the loss, or give objective=."
        )
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean().")
    mask = result.get("mask") if objective and isinstance(result, dict) else None
    return Evaluation(loss.reshape(()), find_outputs(result, seen), mask)


def find_outputs(result: Any, seen: list[Any]) -> Tensor | None:
    """Return the outputs in the returned dict, else those of the one forward seen (the first of a tuple)."""
    if isinstance(result, dict):
        for key in ("outputs", "logits"):
            if isinstance(result.get(key), Tensor):
                return result[key]
    if len(seen) != 1:
        return None
    output = seen[0]
    if isinstance(output, dict):
        output = output.get("logits", output.get("outputs"))
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


@contextlib.contextmanager
def watching_outputs(module: nn.Module) -> Generator[list[Any], None, None]:
    """Collect what the forward of a module returns inside the block."""
    seen, forward = list[Any](), module.forward

    # Not a hook: compiled code ignores those added later. Without the attributes of a compiled function, by which
    # torch would take this one for it, and pass it over.
    @functools.wraps(forward, updated=())
    def noted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output)
        return output

    with patched(module, forward=noted):
        yield seen


class BackwardLog:
    """Losses handed to ``manual_backward``, in segments that end with an optimizer step."""

    def __init__(self) -> None:
        self.segments: list[list[Tensor]] = [[]]
        self.sides: list[Side] | None = None  # of the one loss, where there is one

    def add(self, loss: Tensor) -> None:
        """Append a loss to the last segment."""
        self.segments[-1].append(loss)

    def close(self) -> None:
        """Begin a new segment, after a step of the optimizer."""
        self.segments.append([])

    def loss(self, segment: int) -> Tensor:
        """Return the sum of the losses of one segment, the function whose gradient that step used.

        Raises:
            ValueError: if the segment holds none.
        """
        losses = self.segments[segment] if segment < len(self.segments) else []
        if not losses:
            raise ValueError(
                "training_step must hand its loss to self.manual_backward before the optimizer steps, got no such "
                "call: use self.manual_backward(loss), or give objective=."
            )
        return functools.reduce(lambda total, loss: total + loss, losses)


@dataclass(eq=False)
class RecordedBatch:
    """Inputs and states of one call of ``training_step``, and its result."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    randomness: RandomState
    state: Snapshot
    global_step: int
    forward_dtype: torch.dtype
    marks: dict[int, tuple[int, ...]] = field(default_factory=dict)
    base: Evaluation | None = None
    sides: list[Side] | None = None
    backward: BackwardLog = field(default_factory=BackwardLog)
    loss_dtype: torch.dtype | None = None

    def learn(self, losses: list[Tensor], kinks: KinkedStep, outputs: Tensor | None = None) -> list[Side] | None:
        """Note in which types a step has computed, also inside, and return the sides of its kinks; by its graph."""
        # A loss may be computed in a coarser type than the outputs, whose rounding is then not that of the network.
        roots = losses if outputs is None or outputs.grad_fn is None else [outputs]
        inside = [one.dtype for node in graph_nodes(roots) for one in getattr(node, "_input_metadata", ())]
        self.forward_dtype = coarsest([self.forward_dtype, *(t for t in set(inside) if t.is_floating_point)])
        self.loss_dtype = coarsest([_computed(loss) for loss in losses])
        return kinks.read(losses)

    @property
    def batch(self) -> Any:
        """The batch as training_step received it."""
        return first_of(self.args, self.kwargs)

    def loss(self, automatic: bool, segment: int) -> Tensor:
        """Return the loss of the step itself; in manual optimization that of one segment."""
        if automatic:
            assert self.base is not None
            return self.base.loss
        loss = self.backward.loss(segment)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the batch out of the arguments of a step."""
    return args[0] if args else next(iter(kwargs.values()))


def forward_dtype(module: nn.Module, device: torch.device) -> torch.dtype:
    """Return the coarsest type in which the forward pass computes."""
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    return coarsest(types or {torch.float32})


def coarsest(types: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating-point type with the largest rounding unit."""
    return max(types, key=lambda t: torch.finfo(t).eps)


_CONVERSIONS = ("ToCopy", "View", "Alias", "Reshape", "Squeeze")


def _computed(loss: Tensor) -> torch.dtype:
    """Return the type in which a loss was computed, before it was converted."""
    node, dtype = loss.grad_fn, loss.dtype
    while node is not None and node.name().startswith(_CONVERSIONS):
        node = node.next_functions[0][0]
        dtype = coarsest([dtype, *(one.dtype for one in getattr(node, "_input_metadata", ()))])
    return dtype


@contextlib.contextmanager
def recording_backward(
    module: pl.LightningModule, record: RecordedBatch, kinks: KinkedStep
) -> Generator[None, None, None]:
    """Log the losses of a real step, and what is read of their graph."""
    original, log = module.manual_backward, record.backward

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        log.sides = None if any(log.segments) else record.learn([loss], kinks)
        log.add(loss.detach())
        original(loss, *args, **kwargs)

    with patched(module, manual_backward=manual_backward):
        yield


@contextlib.contextmanager
def inert_optimization(module: pl.LightningModule, log: BackwardLog, shelter: Shelter) -> Generator[None, None, None]:
    """Let a step run without backward, without optimizer or scheduler steps; log its losses with their graphs."""
    optimizers, schedulers = module.optimizers, module.lr_schedulers
    with patched(
        module,
        manual_backward=lambda loss, *args, **kwargs: log.add(loss),
        optimizers=lambda *args, **kwargs: inert(optimizers(*args, **kwargs), log.close, shelter),
        lr_schedulers=lambda *args, **kwargs: inert(schedulers(*args, **kwargs), None, shelter),
        clip_gradients=silent,
        toggle_optimizer=silent,
        untoggle_optimizer=silent,
    ):
        yield


# A module's own step, the recorders of its calls, and the patch that holds the wrapper.
_Wrapped = tuple[Callable[..., Any], list[Callable[..., Any]], contextlib.ExitStack]
_recorded: dict[int, _Wrapped] = {}  # by id of the module; an entry lives as long as a recording


@contextlib.contextmanager
def recorded_through(
    module: pl.LightningModule, recorder: Callable[..., Any]
) -> Generator[Callable[..., Any], None, None]:
    """Send calls of ``training_step`` through ``recorder(step, *args)`` inside the block, which receives the step.

    All monitors share one wrapper of the step. Wrappers around wrappers would come off in the wrong order, since
    monitors end a batch in the order in which they began it; and Lightning, which reads the step's arguments through
    one wrapper only, would hand ``batch_idx`` to a step that takes none.
    """
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, functools.partial(_leave, module, recorder))
        if id(module) not in _recorded:
            wrapped = _recorded[id(module)] = module.training_step, [], contextlib.ExitStack()
            wrapped[2].enter_context(patched(module, training_step=_RecordedStep(wrapped)))
        step, recorders, _ = _recorded[id(module)]
        recorders.append(recorder)
        yield step


def _leave(module: pl.LightningModule, recorder: Callable[..., Any]) -> None:
    """Take a recorder off, and with the last one the wrapper."""
    if id(module) in _recorded:
        _, recorders, patch = _recorded[id(module)]
        recorders[:] = [one for one in recorders if one is not recorder]
        if not recorders:
            patch.close()
            del _recorded[id(module)]


class _RecordedStep:
    """The wrapper. A copy of the module, made by a hook before the step begins, has its own step in this place."""

    def __init__(self, wrapped: _Wrapped) -> None:
        self._step, self._recorders, self._patch = wrapped
        functools.update_wrapper(self, self._step, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Off before the step begins: a step that copies or pickles the module meets it without the wrapper.
        attempted(self._patch.close, lambda error: None)
        call = self._step
        for recorder in self._recorders:
            call = functools.partial(recorder, call)
        return call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._step,)


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step
