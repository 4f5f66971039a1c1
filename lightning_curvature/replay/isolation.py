"""Leave no trace of a repeated step: put back state, gradients and learning rates, and log nothing."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from torch import Tensor, nn

from lightning_curvature.operators.differentiation import patched, put_back_at_exit
from lightning_curvature.replay.memory import addresses
from lightning_curvature.replay.objects import entries, put_back
from lightning_curvature.replay.randomness import RandomState
from lightning_curvature.replay.snapshot import Snapshot


def silent(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, ``log_dict``, ``print`` and ``save_checkpoint`` while a step is repeated."""


class Shelter:
    """Saves an optimizer or scheduler when a repeated step first reaches for it, and puts it back afterwards.

    Its state is as large as the parameters, and most steps leave it alone. The parameters themselves are not saved.
    """

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}

    def save(self, real: Any) -> None:
        """Save an object, the first time."""
        if id(real) not in self._snapshots:
            parameters = [p for group in getattr(real, "param_groups", ()) for p in group["params"]]
            self._snapshots[id(real)] = Snapshot([real], passed=parameters)

    def restore(self) -> None:
        """Put all of them back, once: before patches come off, which are part of what is put back."""
        # The last first: Lightning's wrapper and the optimizer within reach the same state, which the step may have
        # written between the two.
        put_back([snapshot.restore for snapshot in reversed(self._snapshots.values())])
        self._snapshots.clear()


class _Inert:
    """An optimizer or scheduler that may be read, and written until the step ends, but does nothing."""

    def __init__(self, real: Any, on_step: Callable[[], None] | None, shelter: Shelter) -> None:
        self.__dict__.update(_real=real, _on_step=on_step, _shelter=shelter)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        self._shelter.save(self._real)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._shelter.save(self._real)
        setattr(self._real, name, value)

    @property
    def optimizer(self) -> "_Inert":
        """The optimizer inside Lightning's wrapper, as inert as the wrapper."""
        return _Inert(self._real.optimizer, self._on_step, self._shelter)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> None:
        # A scheduler may be given an epoch or a metric here.
        if callable(closure):
            closure()
        if self._on_step is not None:
            self._on_step()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass

    @contextlib.contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        yield


def inert(real: Any, on_step: Callable[[], None] | None, shelter: Shelter) -> Any:
    """Return stand-ins for an optimizer, a scheduler or a list of them; ``on_step`` is called in place of a step."""
    if isinstance(real, list):
        return [inert(one, on_step, shelter) for one in real]
    real = vars(real)["_real"] if type(real) is _Inert else real
    return None if real is None else _Inert(real, on_step, shelter)


class ReplayTrainer:
    """The Trainer with the optimizer-step count of the recorded step, and with loggers that write nothing.

    All else is the real Trainer's. A step that reads ``self.global_step`` (an annealed loss term) thus computes the
    same loss when it is repeated later. Attributes that a step sets here are dropped, metrics that it writes go to
    copies, and a checkpoint of perturbed parameters is never written.
    """

    def __init__(self, trainer: pl.Trainer, global_step: int, shelter: Shelter) -> None:
        self._real = trainer
        self.global_step = global_step
        self.loggers = [DummyLogger() for _ in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None
        self.save_checkpoint = silent
        self.optimizers = inert(list(trainer.optimizers), None, shelter)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return dict(value) if name in ("callback_metrics", "logged_metrics", "progress_bar_metrics") else value


@contextlib.contextmanager
def muted(module: pl.LightningModule, global_step: int, shelter: Shelter | None = None) -> Generator[None, None, None]:
    """Let a step of ``module`` log nowhere inside the block, and read ``global_step`` as its step count."""
    shelter = shelter or Shelter()
    stand_in = ReplayTrainer(module.trainer, global_step, shelter)
    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, shelter.restore)
        for submodule in module.modules():
            if isinstance(submodule, pl.LightningModule):
                stack.enter_context(patched(submodule, _trainer=stand_in, log=silent, log_dict=silent, print=silent))
        yield


@contextlib.contextmanager
def attached(
    trainer: pl.Trainer, module: pl.LightningModule, optimizers: Sequence[Any], schedulers: Sequence[Any] = ()
) -> Generator[None, None, None]:
    """Let a Trainer that does not run hold a module inside the block, on the Trainer's device.

    ``optimizers`` hold the parameters that may be moved, and their state moves along; all other parameters are put back
    in each repetition. ``schedulers`` are their ``LRSchedulerConfig``.
    """
    strategy, connector = trainer.strategy, trainer._data_connector
    places: list[tuple[Any, str]] = [(m, "_trainer") for m in module.modules() if isinstance(m, pl.LightningModule)]
    places += [(strategy, "_lightning_module"), (strategy, "model"), (trainer, "optimizers")]
    places += [(connector, "_datahook_selector"), (strategy, "lr_scheduler_configs")]
    with contextlib.ExitStack() as stack:
        for owner, name in places:
            stack.callback(setattr, owner, name, getattr(owner, name))
        stack.callback(module.to, module.device)
        for state in (state for one in optimizers for state in one.state.values() if isinstance(state, dict)):
            stack.callback(state.update, dict(state))
        connector._datahook_selector = _DataHookSelector(module, None)  # the hooks of the module move a batch
        strategy.connect(module)
        strategy.setup_environment()
        module.trainer = trainer
        module.to(strategy.root_device)
        _optimizers_to_device(optimizers, strategy.root_device)
        trainer.optimizers, strategy.lr_scheduler_configs = list(optimizers), list(schedulers)
        yield


def own_buffers(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let the module compute with copies of its buffers in the block: BatchNorm writes to those its graph has saved."""
    return _replaced([m._buffers for m in module.modules()], {id(b): b.clone() for b in module.buffers()})


def parameters_replaced(module: nn.Module, values: Mapping[int, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Let the module compute with other tensors, by ``id`` of the parameter that they replace, inside the block.

    Unlike ``torch.func.functional_call`` it puts parameters back right in a submodule that has two names.
    """
    return _replaced([m._parameters for m in module.modules()], values)


@contextlib.contextmanager
def _replaced(tables: Iterable[dict[str, Any]], values: Mapping[int, Tensor]) -> Generator[None, None, None]:
    with contextlib.ExitStack() as stack:
        for table in tables:
            before = {name: tensor for name, tensor in table.items() if id(tensor) in values}
            if not before:
                continue
            stack.callback(table.update, before)
            table.update({name: values[id(tensor)] for name, tensor in before.items()})
            for tensor in before.values():  # a step may mark its parameters
                values[id(tensor)].__dict__ = vars(tensor)
        yield


@contextlib.contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Generator[None, None, None]:
    """Take the gradients off parameters inside the block: a step that writes to ``p.grad`` or zeroes it meets none."""
    before = [(p, p.grad) for p in parameters]

    def put_back_all() -> None:
        for p, gradient in before:
            p.grad = gradient

    with contextlib.ExitStack() as stack:
        put_back_at_exit(stack, put_back_all)
        for p, _ in before:
            p.grad = None
        yield


@contextlib.contextmanager
def without_hooks(
    tables: Iterable[dict[int, Any] | None], which: Callable[[Any], bool] = lambda hook: True
) -> Generator[None, None, None]:
    """Take hooks out of their tables inside the block: they serve the run, and may count its steps."""
    with contextlib.ExitStack() as stack:
        for table in tables:
            if table:
                put_back_at_exit(stack, entries(table))
                for key in [key for key, hook in table.items() if which(hook)]:
                    del table[key]
        yield


def gradient_hooks(parameters: Iterable[Tensor]) -> list[dict[int, Any] | None]:
    """Return the tables of hooks on the gradients of parameters."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return [getattr(p, name, None) for p in parameters for name in names]


def _watches(hook: Any) -> bool:
    """Return whether a forward hook is one of W&B's ``watch``, which counts forwards and logs parameters."""
    return str(getattr(hook, "__module__", "")).startswith("wandb.")


@contextlib.contextmanager
def untouched(
    module: nn.Module, device: torch.device, spared: Iterable[Tensor] = (), optimizers: Iterable[Any] = ()
) -> Generator[Snapshot, None, None]:
    """Put everything back as it is now, also after an error; inside the block parameters have no gradients.

    Args:
        module: everything within its reach (see :class:`~.replay.snapshot.Snapshot`).
        device: its random state.
        spared: tensors whose values come back otherwise, or are not written; they are not copied.
        optimizers: their learning rates and all other options in ``param_groups``.
    """
    with contextlib.ExitStack() as stack:  # each restorer is called, also where another fails
        put_back_at_exit(stack, RandomState(device).restore)
        snapshot = Snapshot([module, *(optimizer.param_groups for optimizer in optimizers)], addresses(spared))
        put_back_at_exit(stack, snapshot.restore)
        parameters = list(module.parameters())
        stack.enter_context(without_gradients(parameters))
        stack.enter_context(without_hooks(gradient_hooks(parameters)))
        stack.enter_context(without_hooks([m._forward_hooks for m in module.modules()], _watches))
        yield snapshot
