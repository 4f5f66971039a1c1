"""What a repeated forward must not leave behind: random states, module state, log entries."""

import contextlib
import copy
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_curvature.parallel import local


class RandomState:
    """State of every random-number generator that a training step may draw from.

    Python's, numpy's (where it is imported), torch's on the CPU and on the module's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._torch = torch.get_rng_state()
        self._device = device
        self._accelerator = None if device.type == "cpu" else _device_module(device).get_rng_state(*_index(device))

    def restore(self) -> None:
        """Set all of them back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            _device_module(self._device).set_rng_state(self._accelerator, *_index(self._device))


def _device_module(device: torch.device) -> Any:
    return getattr(torch, device.type)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    # torch.mps has one device and takes no argument.
    return () if device.type == "mps" else (device,)


_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)

# What torch and Lightning keep on a module for themselves: structure and links, not state of the computation.
_STRUCTURE = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "training", "prepare_data_per_node"}
_FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "builtins", "numpy"}
# Plain objects inside a module (an average meter, a replay buffer) are followed this deep.
_DEPTH = 2


class ModuleState:
    """Buffers and plain attributes of a module and all its submodules.

    That covers BatchNorm statistics, torchmetrics held by the module (their states are plain attributes), lists a
    step appends to, counters, running sums, generators. Everything is put back *into the objects that were there*, so
    that references held elsewhere stay good.
    """

    def __init__(self, module: nn.Module) -> None:
        self._restorers: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        # Attributes that share memory with a parameter follow the parameter.
        self._parameter_memory = {_memory(p) for p in module.parameters()}
        for submodule in module.modules():
            self._save_module(submodule)

    def restore(self) -> None:
        """Put all of it back, in the order in which it was found."""
        with torch.no_grad():
            for restorer in self._restorers:
                restorer()

    def _first_time(self, value: object) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        return True

    def _save_module(self, module: nn.Module) -> None:
        if not self._first_time(module):
            return
        self._save_namespace(module._buffers, depth=0)
        self._save_namespace(module.__dict__, depth=0)

    def _save_namespace(self, namespace: dict[str, Any], depth: int) -> None:
        saved = {name: value for name, value in namespace.items() if _is_state(name, value)}

        def restore() -> None:
            for name in [n for n, value in namespace.items() if n not in saved and _is_state(n, value)]:
                del namespace[name]
            namespace.update(saved)

        self._restorers.append(restore)
        for value in saved.values():
            self._save_value(value, depth)

    def _save_value(self, value: Any, depth: int) -> None:
        if isinstance(value, (bool, int, float, str, bytes, type(None), nn.Parameter)) or not self._first_time(value):
            return
        if isinstance(value, Tensor):
            self._save_tensor(value)
        elif isinstance(value, nn.Module):
            self._seen.discard(id(value))
            for submodule in value.modules():
                self._save_module(submodule)
        elif isinstance(value, (list, deque)):
            self._save_sequence(value, depth)
        elif isinstance(value, dict):
            self._save_mapping(value, depth)
        elif isinstance(value, set):
            self._save_set(value)
        elif isinstance(value, torch.Generator):
            self._restorers.append(functools.partial(value.set_state, value.get_state()))
        elif hasattr(value, "bit_generator"):
            state = copy.deepcopy(value.bit_generator.state)
            self._restorers.append(lambda: setattr(value.bit_generator, "state", state))
        elif isinstance(value, random.Random):
            self._restorers.append(functools.partial(value.setstate, value.getstate()))
        elif type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "__setitem__"):
            array = value.copy()
            self._restorers.append(lambda: value.__setitem__(..., array))
        elif depth < _DEPTH and _is_plain_object(value):
            self._save_namespace(value.__dict__, depth + 1)

    def _save_tensor(self, value: Tensor) -> None:
        if value.is_inference() or _memory(value) in self._parameter_memory:
            return
        content = value.detach().clone()
        self._restorers.append(lambda: value.detach().copy_(content))

    def _save_sequence(self, value: Any, depth: int) -> None:
        elements = list(value)

        def restore() -> None:
            value.clear()
            value.extend(elements)

        self._restorers.append(restore)
        for element in elements:
            # A long list of tensors is a record that steps append to: its elements are not copied.
            if isinstance(element, nn.Module):
                self._save_value(element, depth + 1)

    def _save_mapping(self, value: dict[Any, Any], depth: int) -> None:
        entries = dict(value)

        def restore() -> None:
            value.clear()
            value.update(entries)

        self._restorers.append(restore)
        if depth < _DEPTH:
            for entry in entries.values():
                self._save_value(entry, depth + 1)

    def _save_set(self, value: set[Any]) -> None:
        elements = set(value)

        def restore() -> None:
            value.clear()
            value.update(elements)

        self._restorers.append(restore)


def _is_state(name: str, value: Any) -> bool:
    return name not in _STRUCTURE and not name.endswith("_hooks") and not isinstance(value, _FUNCTIONS)


def _memory(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType, *_FUNCTIONS)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _FOREIGN


class ReplayTrainer:
    """The Trainer as the step saw it: its optimizer-step count then, and loggers that write nothing.

    Everything else is the real Trainer's. A step that reads ``self.global_step`` (an annealed loss term) thus
    computes the same loss when it is repeated after the count has moved on; what a step sets here is dropped.
    """

    def __init__(self, trainer: pl.Trainer, global_step: int) -> None:
        self._real = trainer
        self.global_step = global_step
        self.loggers = [DummyLogger() for _ in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _silent(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log``, ``log_dict`` and ``print`` while a step is repeated."""


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
        for name in attributes:
            namespace.pop(name, None)
        namespace.update(before)


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
def untouched(module: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Put module state and random states back as they are now, also after an error."""
    randomness, state = RandomState(device), ModuleState(module)
    try:
        yield
    finally:
        state.restore()
        randomness.restore()
