"""Save the state that a training step reads and writes, and put it back: random generators, buffers, attributes."""

import contextlib
import functools
import io
import random
import sys
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.distributed.shards import local
from lightning_curvature.replay import objects


class RandomState:
    """State of all random generators of a step: Python's, numpy's if imported, torch's on the CPU and on the device."""

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._torch = torch.get_rng_state()
        self._accelerator: Any = None if device.type == "cpu" else getattr(torch, device.type)
        # torch.mps has one device and takes no argument.
        self._index = () if device.type == "mps" else (device,)
        self._on_device = self._accelerator and self._accelerator.get_rng_state(*self._index)

    def restore(self) -> None:
        """Set all of them back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            self._accelerator.set_rng_state(self._on_device, *self._index)


# Structure and links that torch and Lightning keep on a module, not state of the computation.
_STRUCTURE = {"_trainer", "_fabric", "prepare_data_per_node"}
_STRUCTURE |= {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}  # hooks among them
# Plain objects inside a module (an average meter, a replay buffer) are followed this deep, containers one level deeper.
_DEPTH = 2
# A longer list or dict is a record that steps add to, not running averages (several hundred): elements are not copied.
_RECORD_LENGTH = 1000


class ModuleState:
    """Buffers, attributes, modes and ``requires_grad`` flags of a module and all its submodules.

    That covers BatchNorm statistics, torchmetrics held by the module (their states are plain attributes), lists a
    step appends to, counters, running averages, generators, train and eval modes. Everything is put back *into the
    same objects*, so that references held elsewhere stay good. State outside the module is not covered: a global, a
    file, the variables of a hook.

    Args:
        parameters: parameters whose values are saved too. The trained ones are not among them: they are θ.

    Attributes:
        unrepeatable: names of attributes whose position cannot be saved: iterators and open files.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor] = ()) -> None:
        self.unrepeatable: list[str] = []
        self._restorers: list[objects.Restore] = []
        self._gently = False
        # Attributes that share memory with a parameter follow the parameter.
        self._parameter_memory = {_memory(p) for p in module.parameters()}
        self._restorers += [functools.partial(_set_requires_grad, p, p.requires_grad) for p in module.parameters()]
        for parameter in parameters:
            self._save_content(parameter)
        self._modules, self._seen = [*module.modules()], dict[int, Any]()
        while self._modules:
            modules, self._modules = self._modules, []
            objects.walk(modules, self._visit, self._seen)
        self._seen.clear()

    def restore(self, gently: bool = False) -> None:
        """Put all back; ``gently`` compares, and leaves unchanged tensors alone: graphs that saved them stay valid."""
        self._gently = gently
        with torch.no_grad():
            objects.put_back(self._restorers)

    def _visit(self, value: Any, level: int) -> Iterable[Any]:
        """Save an object and return those inside it; attributes of modules are on level 1."""
        if isinstance(value, (nn.Parameter, weakref.ref, *objects.FUNCTIONS)):
            return ()
        if isinstance(value, Tensor):
            trained = value.requires_grad and value.is_leaf
            if not (trained or value.is_inference() or _memory(value) in self._parameter_memory):
                self._save_content(value)
        elif isinstance(value, nn.Module) and level > 0:
            # Another walk starts from it, in which its attributes are on level 1 again.
            del self._seen[id(value)]
            self._modules += value.modules()
        elif isinstance(value, nn.Module):
            self._restorers.append(objects.entries(value._buffers))
            return [*value._buffers.values(), *self._save_attributes(value)]
        elif isinstance(value, (*objects.CONTAINERS, tuple)):
            self._restorers += objects.contents(value)
            return objects.parts(value) if len(value) <= _RECORD_LENGTH and level <= _DEPTH + 1 else ()
        elif (restore := objects.generator_state(value) or objects.array_state(value)) is not None:
            self._restorers.append(restore)
        elif level <= _DEPTH and objects.opens(value, objects.STANDARD | objects.FRAMEWORKS):
            return self._save_attributes(value)
        return ()

    def _save_attributes(self, value: Any) -> list[Any]:
        saved = {name: one for name, one in objects.attributes(value).items() if _is_state(name, one)}
        self._restorers += objects.contents(value, _is_state)
        self.unrepeatable += [name for name, one in saved.items() if isinstance(one, (Iterator, io.IOBase))]
        return [*saved.values()]

    def _save_content(self, value: Tensor) -> None:
        content = _without_overlap(value.detach()).clone()

        def restore() -> None:
            # Looked up again: ``value.data = …`` may have given the tensor other memory.
            target = _without_overlap(value.detach())
            # Sparse tensors cannot be compared.
            gently = self._gently and target.layout == torch.strided
            if not (gently and torch.equal(local(target), local(content))):
                target.copy_(content)

        self._restorers.append(restore)


def _set_requires_grad(parameter: Tensor, flag: bool) -> None:
    if parameter.requires_grad != flag:  # inside ``torch.vmap`` setting it is an error even where it changes nothing
        parameter.requires_grad_(flag)


def _is_state(name: str, value: Any) -> bool:
    return name not in _STRUCTURE and not name.endswith("_hooks") and not isinstance(value, objects.FUNCTIONS)


def _memory(tensor: Tensor) -> int:
    shard = local(tensor)
    return shard.untyped_storage().data_ptr() if shard.layout == torch.strided else id(tensor)


def _without_overlap(tensor: Tensor) -> Tensor:
    """Return a view without the repeated elements of an expanded tensor, which cannot be written."""
    if tensor.layout == torch.strided and tensor.numel() > 0:
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if size > 1 and stride == 0:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor


class Bystanders:
    """Parameters that no optimizer moves but a step may write: a momentum encoder, a target network.

    Which of them a step writes shows only when it has run. Until a step was repeated once, every parameter that could
    be a copy of a trained one (it has the shape of one) is saved with the module's state; from then on those that were
    written, so that a frozen backbone costs nothing. ``saved`` are the parameters to save.
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
        """Save every one of them until it is settled which are written, for a step that is repeated without a run."""
        if not self._settled:
            self.saved = list(self._named.values())

    def versions(self) -> dict[str, tuple[int, int]]:
        """Return version and memory of each of them, one of which changes when it is written."""
        return {name: (p._version, _memory(p)) for name, p in self._named.items()}

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the values before the first step to be repeated."""
        if not self._settled and self._first is None:
            self._first = [local(p).detach().clone() for p in self.saved]

    def written_since(self, versions: dict[str, tuple[int, int]]) -> list[str]:
        """Return the names of those that were written since and not saved; from now on they are saved."""
        now, known = self.versions(), {id(p) for p in self.saved}
        changed = [name for name in self._named if now[name] != versions[name]]
        self._written |= {id(self._named[name]) for name in changed}
        unsaved = [name for name in changed if id(self._named[name]) not in known]
        self.saved += [self._named[name] for name in unsaved]
        return unsaved

    @contextlib.contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Note which ones a step inside the block writes, until that is settled."""
        versions = {} if self._settled else self.versions()
        yield
        self._repeated = True
        if not self._settled:
            self.written_since(versions)
            # ``p.data.mul_(…)`` leaves the version as it is.
            pairs = zip(self.saved, self._first or (), strict=False)
            self._written |= {id(p) for p, first in pairs if not torch.equal(local(p), first)}

    def settle(self) -> None:
        """Save only those that were written, once a step was repeated to its end."""
        if self._repeated and not self._settled:
            self.saved = [p for p in self.saved if id(p) in self._written]
            self._first, self._settled = None, True
