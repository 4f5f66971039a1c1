"""How much memory there is, and how much a graph holds."""

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

# What is taken to be free where the system does not say.
_UNKNOWN = 2**30


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: its own, or the machine's, as far as a container may use it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return _UNKNOWN
    return min(_machine_memory(), _container_memory())


def _machine_memory() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def _container_memory() -> int:
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        # "max" where there is no limit.
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return limit - int((group / "memory.current").read_text(encoding="ascii"))
    return 2**63


class SavedBytes:
    """Bytes of the distinct tensors that autograd saved inside a block, without those of given tensors."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in but}
        self.count = 0

    def _saved(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.count += storage.nbytes()
        # Not the tensor itself: a node that saves its own output would hold itself, for good.
        return tensor.detach()

    @contextlib.contextmanager
    def counting(self) -> Generator[None, None, None]:
        """Count inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            yield
