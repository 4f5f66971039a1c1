"""The update that an optimizer would make with another gradient, without making it."""

import contextlib
import copy
import functools
import importlib
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_curvature.distributed.shards import local
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.replay.isolation import muted
from lightning_curvature.replay.module_state import ModuleState, RandomState

# The hooks on the steps of all optimizers are in these dictionaries of torch's. The names are private: where they are
# others, those hooks hear of trial steps.
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class TrialSteps:
    r"""Steps of an optimizer from its present state with gradients of one's choice, as if they had not been made.

    .. math:: d(g) = \theta - \theta'(g) = \eta\,\Delta\theta, \qquad
        \theta'(g) \text{ what the optimizer's own step makes of } \theta \text{ with the gradient } g .

    The step is really made, clipping, momentum, preconditioner, weight decay and all, by a copy of the optimizer with
    copies of its parameters and state. The optimizer itself, its parameters and their gradients are only read; even the
    parameters' version counters stay, so that autograd graphs kept for them remain good. A copy lives as long as one
    call: memory for the parameters and the optimizer's state once more, and for one gradient. Parameters that get no
    gradient are not copied where the step is one of torch's, which leave them alone. Of sharded parameters (FSDP2) each
    rank copies its shards; all ranks ask for the same update together, since clipping and steps may communicate.

    Gradients are clipped first, as Trainer's ``gradient_clip_val`` and ``gradient_clip_algorithm`` say, by its own
    precision plugin. A module that overrides ``configure_gradient_clipping`` is asked to do it: it is given the copy,
    finds the trial gradients in ``p.grad`` too, logs nothing, and its state is put back. Under manual optimization
    Lightning does not clip, and nothing is clipped here.

    What hangs on the step without being the optimizer is left out, since it may count or write: the module's
    ``optimizer_step`` and ``on_before_optimizer_step``, torch's step hooks, what somebody has put on the instance as
    its ``step`` (learning-rate schedulers do), and the gradient scaler. An optimizer that draws random numbers draws
    in every trial those that its next step would draw.

    Args:
        trainer: says how gradients are clipped.
        optimizer: the bare torch optimizer, ``trainer.optimizers[i]``.
        parameters: those of its parameters that have a gradient in a trial; any order.

    Raises:
        MisconfigurationException: as :meth:`check` does; for parameters that are not the optimizer's.

    Example:
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=0.5)
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
        >>> trials = TrialSteps(trainer, optimizer, [weight])
        >>> trials.update_for(torch.tensor([0.0, 4.0])), weight.tolist(), dict(optimizer.state)
        (tensor([0.0000, 0.2500]), [1.0, 2.0], {})
    """

    def __init__(self, trainer: pl.Trainer, optimizer: Any, parameters: Sequence[Tensor]) -> None:
        self.check(optimizer)
        self._trainer, self._optimizer, self._parameters = trainer, optimizer, list(parameters)
        self._held = _held_parameters(optimizer)
        held, name = {id(p) for p in self._held}, type(optimizer).__name__
        if strange := [p for p in self._parameters if id(p) not in held]:
            raise MisconfigurationException(
                f"parameters must be among those of the optimizer, got {len(strange)} that {name} does not hold: give "
                "those of its param_groups."
            )
        self._space = VectorSpace([local(p) for p in self._parameters])

    @staticmethod
    def check(optimizer: Any) -> None:
        """Raise unless a copy of the optimizer could make its steps.

        Raises:
            MisconfigurationException: where ``step`` needs an argument, as L-BFGS its closure, and where a copy would
                still hold the parameters themselves: in the closure of a function, or by their ``id``.
        """
        name = type(optimizer).__name__
        arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
        needed = [a.name for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        if needed:
            raise MisconfigurationException(
                f"optimizer must step on gradients alone for trial updates, got {name}, whose step needs "
                f"{' and '.join(needed)}: train with another optimizer, or leave 'lambda_gen' out."
            )
        targets = {id(optimizer), *map(id, _held_parameters(optimizer))}
        if tied := [key for key, value in _own_attributes(optimizer).items() if _is_tied(value, targets, set())]:
            raise MisconfigurationException(
                f"optimizer must be one that can be copied for trial updates, got {name}, whose {' and '.join(tied)} "
                "would still refer to the parameters themselves: keep what belongs to a parameter in "
                "optimizer.state[parameter], or leave 'lambda_gen' out."
            )

    @torch.no_grad()
    def update_for(self, gradient: Tensor) -> Tensor:
        """Return the update that the optimizer would make with a gradient.

        Args:
            gradient: flat, (n,), in the order of ``parameters``, of which it has this rank's parts; unclipped,
                unscaled; left as it is.

        Returns:
            d = θ − θ', flat, (n,), in the order of ``parameters``; fresh memory.

        Raises:
            MisconfigurationException: if the optimizer cannot be copied, or its copy fails (an optimizer that asserts
                a closure, or takes none but sparse gradients).
        """
        try:
            moved = self._step(gradient)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise MisconfigurationException(
                "optimizer must be one that can be copied and whose copy steps on dense gradients alone, got "
                f"{type(self._optimizer).__name__} ({type(error).__name__}: {error}): train with another optimizer, or "
                "leave 'lambda_gen' out."
            ) from error
        before = self._space.pack([local(p) for p in self._parameters])
        return self._space.add_(before, [local(p) for p in moved], -1.0)

    def _step(self, gradient: Tensor) -> list[Tensor]:
        """The parameters after a step of a copy, which is gone when this returns."""
        with contextlib.ExitStack() as stack:
            for device in {p.device for p in self._held}:
                stack.callback(RandomState(device).restore)
            stack.enter_context(_no_global_hooks())
            copied, moved = self._copy()
            for p, part in zip(moved, self._space.views(gradient), strict=True):
                # Of the strides that autograd gives it, on which kernels and the order of their sums depend.
                p.grad = torch.empty_like(p)
                local(p.grad).copy_(part)
            self._clip(copied, moved)
            with torch.enable_grad():  # as in training: steps that need it off turn it off
                copied.step()
        for p in moved:
            p.grad = None
        return moved

    def _copy(self) -> tuple[Any, list[Tensor]]:
        """A copy of the optimizer, and those of ``parameters``."""
        # What the optimizer knows of the run is not copied with it.
        memo: dict[int, Any] = {id(self._trainer): self._trainer}
        stepped = {id(p) for p in self._parameters}
        for p in self._held:
            shared = id(p) not in stepped and _is_step_of_torch(self._optimizer)
            data = p.detach() if shared else copy.deepcopy(p.detach(), memo)  # with what shares memory with it
            stand_in = nn.Parameter(data, p.requires_grad) if isinstance(p, nn.Parameter) else data
            memo[id(p)] = stand_in.requires_grad_(p.requires_grad)
            vars(stand_in).update(copy.deepcopy(vars(p), memo))
        return _copied(self._optimizer, memo), [memo[id(p)] for p in self._parameters]

    def _clip(self, copied: Any, moved: Sequence[Tensor]) -> None:
        """Clip the gradients of the copy."""
        module, trainer = self._trainer.lightning_module, self._trainer
        if module is not None and not module.automatic_optimization:
            return
        if is_overridden("configure_gradient_clipping", module, pl.LightningModule):
            with self._module_sees_gradients_of(moved):
                module.configure_gradient_clipping(copied, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType(trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM)
        trainer.precision_plugin.clip_gradients(copied, trainer.gradient_clip_val or 0.0, algorithm)

    @contextlib.contextmanager
    def _module_sees_gradients_of(self, moved: Sequence[Tensor]) -> Generator[None, None, None]:
        """Let the module's parameters have the gradients of their copies; what it sets instead becomes the copies'."""
        module = self._trainer.lightning_module
        before = [(p, p.grad) for p in {id(p): p for p in (*module.parameters(), *self._held)}.values()]
        # Gently: graphs that have saved some of it must remain good.
        restore = functools.partial(ModuleState(module).restore, gently=True)
        try:
            for p, _ in before:
                p.grad = None
            for p, stand_in in zip(self._parameters, moved, strict=True):
                p.grad = stand_in.grad
            given = [p.grad for p in self._parameters]
            with muted(module, self._trainer.global_step):
                yield
            for p, stand_in, gradient in zip(self._parameters, moved, given, strict=True):
                if p.grad is not gradient:
                    stand_in.grad = p.grad
        finally:
            restore()
            for p, gradient in before:
                p.grad = gradient


def _held_parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_step_of_torch(optimizer: Any) -> bool:
    """Whether the step is that of a class in ``torch.optim``: they all pass over parameters without gradients."""
    return inspect.unwrap(type(optimizer).step).__module__.startswith("torch.optim.")


def _own_attributes(optimizer: Any) -> dict[str, Any]:
    """The attributes of an optimizer, without what others have put there: hooks, and a ``step`` in place of its own."""
    return {key: value for key, value in vars(optimizer).items() if key != "step" and not _names_hooks(key)}


def _names_hooks(key: str) -> bool:
    return key.startswith("_optimizer_") and key.endswith("_hooks")


def _is_optimizer(value: Any) -> bool:
    return hasattr(value, "param_groups") and hasattr(value, "step")


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    """A copy with all attributes; torch's own way of copying drops those that its classes do not have."""
    made = memo[id(optimizer)] = object.__new__(type(optimizer))
    for inner in vars(optimizer).values():
        # That of a wrapper around optimizers, as Lookahead; a scheduler may be attached to them.
        for one in inner if isinstance(inner, (list, tuple)) else (inner,):
            if _is_optimizer(one) and id(one) not in memo:
                _copied(one, memo)
    hooks: dict[str, Any] = {key: OrderedDict() for key in vars(optimizer) if _names_hooks(key)}
    vars(made).update(hooks | copy.deepcopy(_own_attributes(optimizer), memo))
    return made


def _is_tied(value: Any, targets: set[int], seen: set[tuple[int, bool]], shared: bool = False) -> bool:
    """Whether a deep copy of a value would hold one of the targets, given by ``id``, and not its copy.

    A copy shares functions, with what is in their closures, and what weak references point to.
    """
    if isinstance(value, int):
        return value in targets
    if id(value) in targets:
        return shared
    shared = shared or isinstance(value, (types.FunctionType, weakref.ref))
    if (id(value), shared) in seen:
        return False
    seen.add((id(value), shared))
    return any(_is_tied(part, targets, seen, shared) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, types.FunctionType):
        filled = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        return [*(cell.cell_contents for cell in filled), *(value.__defaults__ or ())]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    return _own_attributes(value).values() if _is_optimizer(value) else ()


@contextlib.contextmanager
def _no_global_hooks() -> Generator[None, None, None]:
    """Take off the hooks on the steps of all optimizers inside the block."""
    home = importlib.import_module("torch.optim.optimizer")  # torch deletes its name from torch.optim
    tables: list[dict[int, Callable[..., Any]]] = [getattr(home, key, {}) for key in _GLOBAL_HOOKS]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update(hooks)
