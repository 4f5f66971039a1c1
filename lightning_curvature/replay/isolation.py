"""What a repeated forward must not leave behind: changed state, gradients, learning rates, log entries."""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import _DataHookSelector
from torch import Tensor, nn

from lightning_curvature.replay.module_state import FUNCTIONS, ModuleState, RandomState


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, ``log_dict``, ``print`` and ``save_checkpoint`` while a step is repeated."""


class _Inert:
    """An optimizer or scheduler that may be read but does nothing."""

    def __init__(self, real: Any, on_step: Callable[[], None] | None) -> None:
        self._real = real
        self._on_step = on_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def optimizer(self) -> "_Inert":
        """What Lightning's wrapper hands out: the optimizer itself, as inert as the wrapper."""
        return _Inert(self._real.optimizer, self._on_step)

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> None:
        # By position or by name; a scheduler may be given an epoch or a metric here.
        if callable(closure):
            closure()
        if self._on_step is not None:
            self._on_step()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        pass

    @contextlib.contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        yield


def inert(real: Any, on_step: Callable[[], None] | None) -> Any:
    """An optimizer or scheduler, or a list of them, of which nothing is stepped; ``on_step`` hears of the attempts."""
    if isinstance(real, list):
        return [_Inert(one, on_step) for one in real]
    return None if real is None else _Inert(real, on_step)


class ReplayTrainer:
    """The Trainer as the step saw it: its optimizer-step count then, and loggers that write nothing.

    Everything else is the real Trainer's. A step that reads ``self.global_step`` (an annealed loss term) thus
    computes the same loss when it is repeated after the count has moved on; what a step sets here is dropped, what it
    writes to the metrics goes to copies, and a checkpoint of perturbed parameters is never written.
    """

    def __init__(self, trainer: pl.Trainer, global_step: int) -> None:
        self._real = trainer
        self.global_step = global_step
        self.loggers = [DummyLogger() for _ in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None
        self.save_checkpoint = _silent
        self.optimizers = inert(list(trainer.optimizers), None)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return dict(value) if name in ("callback_metrics", "logged_metrics", "progress_bar_metrics") else value


@contextlib.contextmanager
def patched(target: object, **attributes: Any) -> Iterator[None]:
    """Set attributes on an instance and put its namespace back afterwards, also after an error."""
    namespace = target.__dict__
    before = {name: namespace[name] for name in attributes if name in namespace}
    try:
        for name, value in attributes.items():
            namespace[name] = value
        yield
    finally:
        for name, value in attributes.items():
            # What someone else has put there since stays.
            if namespace.get(name) is value:
                if name in before:
                    namespace[name] = before[name]
                else:
                    del namespace[name]


@contextlib.contextmanager
def muted(module: pl.LightningModule, global_step: int) -> Generator[None, None, None]:
    """Let a step of ``module`` log nowhere, as of optimizer step ``global_step``."""
    stand_in = ReplayTrainer(module.trainer, global_step)
    with contextlib.ExitStack() as stack:
        for submodule in module.modules():
            if isinstance(submodule, pl.LightningModule):
                stack.enter_context(patched(submodule, _trainer=stand_in, log=_silent, log_dict=_silent, print=_silent))
        yield


@contextlib.contextmanager
def attached(
    trainer: pl.Trainer, module: pl.LightningModule, parameters: Sequence[Tensor]
) -> Generator[None, None, None]:
    """Let a Trainer that does not run hold a module inside the block, on its device; before and after as it was.

    Args:
        trainer: the Trainer.
        module: the module.
        parameters: those that may be moved, as if an optimizer held them; all others are put back in each repetition.
    """
    device, strategy = module.device, trainer.strategy
    before = [(m, m._trainer) for m in module.modules() if isinstance(m, pl.LightningModule)]
    held = strategy._lightning_module, strategy.model, trainer.optimizers
    connector = trainer._data_connector
    selector = connector._datahook_selector
    try:
        # Which hooks move a batch: those of the module.
        connector._datahook_selector = _DataHookSelector(module, None)
        strategy.connect(module)
        strategy.setup_environment()
        module.trainer = trainer
        module.to(strategy.root_device)
        trainer.optimizers = [torch.optim.SGD(parameters, lr=0.0)]
        yield
    finally:
        module.to(device)
        for submodule, own in before:
            submodule._trainer = own
        strategy._lightning_module, strategy.model, trainer.optimizers = held
        connector._datahook_selector = selector


@contextlib.contextmanager
def own_buffers(module: nn.Module) -> Generator[None, None, None]:
    """Let the module compute with copies of its buffers inside the block: a graph made there outlives what they become.

    BatchNorm writes into its running statistics, which its graph has saved.
    """
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for submodule in module.modules():
            buffers = submodule._buffers
            before = {name: b for name, b in buffers.items() if b is not None}
            buffers.update({name: copies.setdefault(id(b), b.clone()) for name, b in before.items()})
            stack.callback(buffers.update, before)
        yield


@contextlib.contextmanager
def parameters_replaced(module: nn.Module, values: Mapping[int, Tensor]) -> Generator[None, None, None]:
    """Let the module compute with other tensors in place of its parameters inside the block.

    Each place is set and put back once. ``torch.func.functional_call`` visits a submodule that has two names twice, and
    puts back what it has put there itself.

    Args:
        module: the module.
        values: tensors by the ``id`` of the parameter that they stand for, wherever it stands.
    """
    with contextlib.ExitStack() as stack:
        for submodule in module.modules():
            places = submodule._parameters
            before = {name: p for name, p in places.items() if id(p) in values}
            stack.callback(places.update, before)
            places.update({name: values[id(p)] for name, p in before.items()})  # type: ignore[misc]
        yield


class _Gradients:
    """Gradients taken off their parameters: a step that writes to ``p.grad`` or zeroes it finds none."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._gradients = [(p, p.grad) for p in parameters]
        for p, _ in self._gradients:
            p.grad = None

    def restore(self) -> None:
        for p, gradient in self._gradients:
            p.grad = gradient


class _ParameterHooks:
    """Hooks on the gradients of parameters: they are for the gradients of the run, and may keep count of them."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
        for hooks, _ in self._hooks:
            hooks.clear()

    def restore(self) -> None:
        for hooks, before in self._hooks:
            hooks.update(before)


class _WatchingHooks:
    """Forward hooks of W&B's ``watch``: they are for the forwards of the run, keep count of them and log parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks = [(m._forward_hooks, dict(m._forward_hooks)) for m in module.modules() if m._forward_hooks]
        for hooks, before in self._hooks:
            for number, hook in before.items():
                if str(getattr(hook, "__module__", "")).startswith("wandb."):
                    del hooks[number]

    def restore(self) -> None:
        for hooks, before in self._hooks:
            # In the order in which they were.
            hooks.clear()
            hooks.update(before)


class _Options:
    """Learning rates and all else that ``param_groups`` hold beside the parameters."""

    def __init__(self, optimizers: Iterable[Any]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._options = [
            (group, {name: copy.deepcopy(v) for name, v in group.items() if name != "params"}) for group in groups
        ]

    def restore(self) -> None:
        for group, options in self._options:
            for name in [name for name in group if name != "params" and name not in options]:
                del group[name]
            for name, value in options.items():
                if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                    group[name].copy_(value)  # a learning rate on the device is held by others too
                else:
                    group[name] = value


class _Methods:
    """Functions that instances of modules hold in place of their class's: a step may set some."""

    def __init__(self, module: nn.Module) -> None:
        self._namespaces = [(vars(m), self._functions(vars(m))) for m in module.modules()]

    @staticmethod
    def _functions(namespace: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in namespace.items() if isinstance(value, FUNCTIONS)}

    def restore(self) -> None:
        for namespace, functions in self._namespaces:
            for name in self._functions(namespace).keys() - functions:
                del namespace[name]
            namespace.update(functions)


@contextlib.contextmanager
def untouched(
    module: nn.Module, device: torch.device, parameters: Iterable[Tensor] = (), optimizers: Iterable[Any] = ()
) -> Generator[None, None, None]:
    """Put everything back as it is now, also after an error; inside the block parameters have no gradients.

    Args:
        module: its state, modes and gradients.
        device: its random state.
        parameters: parameters whose values are put back too (see :class:`~.replay.module_state.Bystanders`).
        optimizers: their learning rates.
    """
    with contextlib.ExitStack() as stack:
        # Each is called, also where another fails.
        stack.callback(RandomState(device).restore)
        stack.callback(ModuleState(module, parameters).restore)
        stack.callback(_Methods(module).restore)
        stack.callback(_Options(optimizers).restore)
        stack.callback(_Gradients(module.parameters()).restore)
        stack.callback(_ParameterHooks(module.parameters()).restore)
        stack.callback(_WatchingHooks(module).restore)
        yield
