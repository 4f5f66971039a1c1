"""Recording a call of ``training_step``: its result, the losses it passes to ``manual_backward``, and the wrapper."""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.operators.micro_batches import Evaluation
from lightning_curvature.replay.isolation import inert, patched

OUTPUTS_REMEDY = (
    "return them from training_step as {'loss': …, 'outputs': …}, compute them by calling self(…) exactly once, or "
    "name the submodule that makes them, outputs='head'"
)


def read_result(result: Any, seen: list[Any], objective: bool = False) -> Evaluation:
    """Read what a step, or the user's objective, returned; only the latter's "mask" means weights of positions."""
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor):
        got = f"a dict of {list(result)}" if isinstance(result, dict) and loss is None else type(loss).__name__
        raise ValueError(
            f"the step must return a loss tensor or a dict with 'loss', got {got}: return the loss, or give objective=."
        )
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example with .mean().")
    mask = result.get("mask") if objective and isinstance(result, dict) else None
    return Evaluation(loss.reshape(()), find_outputs(result, seen), mask)


def find_outputs(result: Any, seen: list[Any]) -> Tensor | None:
    """Outputs from the returned dict, else from the one forward that was seen (of a tuple the first)."""
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


class BackwardLog:
    """Losses handed to ``manual_backward``, in segments that end with an optimizer step."""

    def __init__(self) -> None:
        self.segments: list[list[Tensor]] = [[]]

    def add(self, loss: Tensor) -> None:
        """Append a loss to the segment under way."""
        self.segments[-1].append(loss)

    def close(self) -> None:
        """Note that the optimizer stepped."""
        self.segments.append([])

    def loss(self, segment: int) -> Tensor:
        """Sum of the losses of one segment, the function whose gradient that step used.

        Raises:
            ValueError: if the segment holds none.
        """
        losses = self.segments[segment] if segment < len(self.segments) else []
        if not losses:
            raise ValueError(
                "training_step must hand its loss to self.manual_backward before the optimizer steps, got no such "
                "call: use self.manual_backward(loss), or give objective=."
            )
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextlib.contextmanager
def recording_backward(module: pl.LightningModule, log: BackwardLog) -> Generator[None, None, None]:
    """Note the losses of a step that runs for real."""
    original = module.manual_backward

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        log.add(loss.detach())
        original(loss, *args, **kwargs)

    with patched(module, manual_backward=manual_backward):
        yield


@contextlib.contextmanager
def inert_optimization(module: pl.LightningModule, log: BackwardLog) -> Generator[None, None, None]:
    """Let a step run without backward, without optimizer or scheduler steps; note its losses with their graphs."""
    optimizers, schedulers = module.optimizers, module.lr_schedulers

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        log.add(loss)

    with patched(
        module,
        manual_backward=manual_backward,
        optimizers=lambda *args, **kwargs: inert(optimizers(*args, **kwargs), log.close),
        lr_schedulers=lambda *args, **kwargs: inert(schedulers(*args, **kwargs), None),
        clip_gradients=_nothing,
        toggle_optimizer=_nothing,
        untoggle_optimizer=_nothing,
    ):
        yield


class _SharedWrapper:
    """The one wrapper of a module's ``training_step`` through which all monitors record it.

    Wrappers around wrappers would come off in the wrong order (monitors end a batch in the order in which they began
    it) and pile up; and Lightning, which reads the step's arguments through one wrapper only, would hand ``batch_idx``
    to a step that takes none.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.step: Callable[..., Any] = module.training_step
        self.recorders: list[Callable[..., Any]] = []
        self._patch = contextlib.ExitStack()

        @functools.wraps(self.step)
        def recorded_step(*args: Any, **kwargs: Any) -> Any:
            # Off before the step begins: who copies or pickles the module from here on finds it as it was.
            self.take_off()
            step = self.step
            for recorder in self.recorders:
                step = functools.partial(recorder, step)
            return step(*args, **kwargs)

        self._patch.enter_context(patched(module, training_step=recorded_step))

    def take_off(self) -> None:
        """Put back what was there."""
        self._patch.close()


_wrappers: dict[int, _SharedWrapper] = {}  # by id of the module; an entry lives as long as a recording


@contextlib.contextmanager
def recorded_through(
    module: pl.LightningModule, recorder: Callable[..., Any]
) -> Generator[Callable[..., Any], None, None]:
    """Send calls of ``training_step`` through ``recorder(step, *args)`` inside the block, which receives the step."""
    wrapper = _wrappers.get(id(module)) or _wrappers.setdefault(id(module), _SharedWrapper(module))
    wrapper.recorders.append(recorder)
    try:
        yield wrapper.step
    finally:
        wrapper.recorders.remove(recorder)
        if not wrapper.recorders:
            _wrappers.pop(id(module)).take_off()
