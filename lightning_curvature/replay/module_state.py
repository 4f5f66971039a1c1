"""State that a training step reads and writes: random generators, buffers, attributes; saved and put back."""

import argparse
import contextlib
import copy
import functools
import io
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.distributed.shards import local


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


FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, nn.Parameter)

# What torch and Lightning keep on a module for themselves: structure and links, not state of the computation.
_STRUCTURE = {"_trainer", "_fabric", "prepare_data_per_node"}
_STRUCTURE |= {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}  # hooks among them
# Objects of these are not opened. The standard library's belong to other threads (queues, log handlers) or have no
# state of a computation; its two bags of attributes are the exception.
_FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "numpy"}
_FOREIGN |= sys.stdlib_module_names
_BAGS = (types.SimpleNamespace, argparse.Namespace)
# Plain objects inside a module (an average meter, a replay buffer) are followed this deep.
_DEPTH = 2
# A longer list or dict is a record that steps add to, not a set of running averages (one for each parameter of a
# large model is several hundred): its elements are not copied.
_RECORD_LENGTH = 1000


class ModuleState:
    """Buffers, attributes, modes and ``requires_grad`` flags of a module and all its submodules.

    That covers BatchNorm statistics, torchmetrics held by the module (their states are plain attributes), lists a
    step appends to, counters, running averages, generators, train and eval modes. Everything is put back *into the
    objects that were there*, so that references held elsewhere stay good. Not covered is what lives outside the
    module: a global, a file, a hook's own variables.

    Args:
        module: the module.
        parameters: parameters whose values are saved too. The trained ones are not among them: they are θ.

    Attributes:
        unrepeatable: names of attributes whose position cannot be saved: iterators and open files.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
        self.unrepeatable: list[str] = []
        self._restorers: list[Callable[[], object]] = []
        self._gently = False
        self._seen: set[int] = set()
        # Attributes that share memory with a parameter follow the parameter.
        self._parameter_memory = {_memory(p) for p in module.parameters()}
        self._restorers += [functools.partial(_set_requires_grad, p, p.requires_grad) for p in module.parameters()]
        for parameter in parameters:
            self._save_content(parameter)
        for submodule in module.modules():
            self._save_module(submodule)

    def restore(self, gently: bool = False) -> None:
        """Put all of it back, in the order in which it was found.

        Args:
            gently: leave tensors alone that still hold what they held, at the price of a comparison: writing would tell
                autograd that graphs which saved them are void.
        """
        self._gently = gently
        with torch.no_grad():
            for restorer in self._restorers:
                restorer()

    def _first_time(self, value: object) -> bool:
        if id(value) in self._seen:
            return False
        self._seen.add(id(value))
        return True

    def _save_module(self, module: nn.Module) -> None:
        if self._first_time(module):
            self._save_namespace(module._buffers, depth=0)
            self._save_namespace(module.__dict__, depth=0)

    def _save_namespace(self, namespace: dict[str, Any], depth: int) -> None:
        saved = {name: value for name, value in namespace.items() if _is_state(name, value)}

        def restore() -> None:
            for name in [n for n, value in namespace.items() if n not in saved and _is_state(n, value)]:
                del namespace[name]
            if [name for name in namespace if name in saved] != list(saved):
                # One was deleted: the order of buffers is that of state_dict.
                for name in saved:
                    namespace.pop(name, None)
            namespace.update(saved)

        self._restorers.append(restore)
        for name, value in saved.items():
            if isinstance(value, (Iterator, io.IOBase)):
                self.unrepeatable.append(name)
            self._save_value(value, depth)

    def _save_value(self, value: Any, depth: int) -> None:
        if isinstance(value, _ATOMS) or not self._first_time(value):
            return
        if isinstance(value, Tensor):
            self._save_tensor(value)
        elif isinstance(value, nn.Module):
            self._seen.discard(id(value))
            for submodule in value.modules():
                self._save_module(submodule)
        elif isinstance(value, (list, deque)):
            self._save_container(value, list(value), value.extend, depth)
        elif isinstance(value, dict):
            self._save_container(value, dict(value), value.update, depth)
        elif isinstance(value, set):
            self._save_container(value, set(value), value.update, depth)
        elif isinstance(value, tuple):
            self._save_elements(value, depth)
        elif (state := generator_state(value)) is not None:
            self._restorers.append(state)
        elif type(value).__module__ == "numpy" and hasattr(value, "flags"):
            if value.flags.writeable:
                self._restorers.append(functools.partial(value.__setitem__, ..., value.copy()))
        elif depth < _DEPTH and _is_plain_object(value):
            self._save_namespace(value.__dict__, depth + 1)

    def _save_container(self, value: Any, content: Any, refill: Callable[[Any], object], depth: int) -> None:
        def restore() -> None:
            value.clear()
            refill(content)

        self._restorers.append(restore)
        self._save_elements(content.values() if isinstance(content, dict) else content, depth)

    def _save_elements(self, elements: Any, depth: int) -> None:
        if len(elements) <= _RECORD_LENGTH and depth <= _DEPTH:
            for element in elements:
                self._save_value(element, depth + 1)

    def _save_tensor(self, value: Tensor) -> None:
        trained = value.requires_grad and value.is_leaf
        if not (trained or value.is_inference() or _memory(value) in self._parameter_memory):
            self._save_content(value)

    def _save_content(self, value: Tensor) -> None:
        target = _without_overlap(value.detach())
        content = target.clone()

        def restore() -> None:
            # The tensor is asked for its memory again: ``value.data = …`` may have given it another.
            part = _without_overlap(value.detach())
            # Sparse tensors cannot be compared.
            gently = self._gently and part.layout == torch.strided
            if not (gently and torch.equal(local(part), local(content))):
                part.copy_(content)

        self._restorers.append(restore)


def _set_requires_grad(parameter: Tensor, flag: bool) -> None:
    if parameter.requires_grad != flag:  # inside ``torch.vmap`` even the same again is an error
        parameter.requires_grad_(flag)


def _is_state(name: str, value: Any) -> bool:
    return name not in _STRUCTURE and not name.endswith("_hooks") and not isinstance(value, FUNCTIONS)


def _memory(tensor: Tensor) -> int:
    part = local(tensor)
    return part.untyped_storage().data_ptr() if part.layout == torch.strided else id(tensor)


def _without_overlap(tensor: Tensor) -> Tensor:
    """Return the part of a tensor whose elements have memory of their own: an expanded one cannot be written."""
    if tensor.layout == torch.strided and tensor.numel() > 0:
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and stride == 0:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def generator_state(value: Any) -> Callable[[], object] | None:
    """Return what sets a random-number generator back, or None where ``value`` is none."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if type(value).__module__.startswith("numpy.random"):
        if hasattr(value, "bit_generator"):
            return functools.partial(setattr, value.bit_generator, "state", copy.deepcopy(value.bit_generator.state))
        if hasattr(value, "set_state"):
            return functools.partial(value.set_state, value.get_state())
    return None


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType, *FUNCTIONS)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, _BAGS) or type(value).__module__.partition(".")[0] not in _FOREIGN


class Bystanders:
    """Parameters that no optimizer moves but a step may write: a momentum encoder, a target network.

    Which of them a step writes shows only when it has run. Until it was repeated once, every parameter that could be
    a copy of a trained one (it has the shape of one) is saved with the module's state; from then on those that were
    written: a frozen backbone costs nothing.

    Args:
        module: the module.
        optimizers: its optimizers.

    Attributes:
        saved: the parameters to save.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Any]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        trained = {id(p): p.shape for group in groups for p in group["params"] if p.requires_grad}
        shapes = set(trained.values())
        self._named = {name: p for name, p in module.named_parameters() if id(p) not in trained}
        self.saved: list[Tensor] = [p for p in self._named.values() if p.shape in shapes]
        self._written: set[int] = set()
        self._first: list[Tensor] | None = None
        self._repeated = self._settled = False

    def save_all(self) -> None:
        """Save every one of them until it is settled which are written: a step may be repeated that never ran."""
        if not self._settled:
            self.saved = list(self._named.values())

    def versions(self) -> dict[str, tuple[int, int]]:
        """Return what changes when one of them is written: its version, its memory."""
        return {name: (p._version, _memory(p)) for name, p in self._named.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Note the values before the first step to be repeated."""
        if not self._settled and self._first is None:
            self._first = [local(p).detach().clone() for p in self.saved]

    def written_since(self, versions: dict[str, tuple[int, int]]) -> list[str]:
        """Names of those that were written since and were not saved; from now on they are."""
        now, known = self.versions(), {id(p) for p in self.saved}
        changed = [name for name in self._named if now[name] != versions[name]]
        self._written |= {id(self._named[name]) for name in changed}
        unsaved = [name for name in changed if id(self._named[name]) not in known]
        self.saved += [self._named[name] for name in unsaved]
        return unsaved

    @contextlib.contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Notice which ones a step inside the block writes, until that is settled."""
        versions = {} if self._settled else self.versions()
        yield
        self._repeated = True
        if not self._settled:
            self.written_since(versions)
            # ``p.data.mul_(…)`` is a write that no version tells of.
            pairs = zip(self.saved, self._first or (), strict=False)
            self._written |= {id(p) for p, first in pairs if not torch.equal(local(p), first)}

    def settle(self) -> None:
        """Once a step was repeated to its end: save no others than those that were written."""
        if self._repeated and not self._settled:
            self.saved = [p for p in self.saved if id(p) in self._written]
            self._first, self._settled = None, True
