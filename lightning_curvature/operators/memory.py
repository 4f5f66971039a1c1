"""Free memory, and the memory that a graph holds."""

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_curvature.linalg import VectorSpace

# Assumed free memory where the system does not report it.
_UNKNOWN = 2**30
_NO_LIMIT = 2**63


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that one of the processes of a machine can still allocate on its device.

    Accelerators belong to one process each; the memory of the CPU is that within the limits of a container.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return _UNKNOWN
    return min(_machine_memory(), container_memory(Path("/"))) // processes


def vectors_that_fit(space: VectorSpace, share: float, processes: int) -> float:
    """Return how many vectors of a space fit into a share of the free memory."""
    row = space.size * torch.finfo(space.dtype).bits // 8
    return share * available_memory(space.device, processes) / max(row, 1)


def _machine_memory() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _UNKNOWN


def container_memory(root: Path) -> int:
    """Return the bytes left under the limits of this process's control groups; ``root`` is that of the file system."""
    left = [_NO_LIMIT]
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                base, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            # The limits of the parents hold too. Inside a container the group's own path may be missing.
            group = base / path.lstrip("/")
            left += [_left(folder, limit, used) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min(left)


def _left(folder: Path, limit: str, used: str) -> int:
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        allowed = int((folder / limit).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        # Cached files count as used, and can be dropped.
        cached = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return allowed - int((folder / used).read_text(encoding="ascii")) + cached
    return _NO_LIMIT


class SavedBytes:
    """Counts the bytes of the distinct tensors that autograd saves, except ``excluded`` ones, in ``count``."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self.count = 0

    def add(self, tree: object) -> None:
        """Count the tensors in nested containers too."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._saved(leaf)

    def _saved(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.count += storage.nbytes()
        # A node that saves its own output would keep itself alive for good.
        return tensor.detach()

    @contextlib.contextmanager
    def counting(self) -> Generator[None, None, None]:
        """Count inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            yield
