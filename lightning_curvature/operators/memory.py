"""How much memory there is, and how much a graph holds."""

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace

# What is taken to be free where the system does not say.
_UNKNOWN = 2**30
_NO_LIMIT = 2**63


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that can still be allocated on a device: its own, or the machine's, as far as a container may use it.

    Args:
        device: the device.
        processes: how many share the machine's memory; accelerators belong to one process each.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return _UNKNOWN
    return min(_machine_memory(), container_memory(Path("/"))) // processes


def vectors_that_fit(space: VectorSpace, share: float, processes: int) -> float:
    """How many vectors of a space a share of the memory that is free holds."""
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
    """Bytes left under the limits of the control groups that this process is in; no limit counts as all there is.

    Args:
        root: where the file systems of the machine hang: ``/``.
    """
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
            # A group is also under the limits of those it lies in. Inside a container its path may not be there.
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == base or base in folder.parents:
                    left.append(_left(folder, limit, used))
    return min(left)


def _left(folder: Path, limit: str, used: str) -> int:
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        allowed = int((folder / limit).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        # Files that were read and can be dropped: they count as used and are not.
        cached = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return allowed - int((folder / used).read_text(encoding="ascii")) + cached
    return _NO_LIMIT


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
