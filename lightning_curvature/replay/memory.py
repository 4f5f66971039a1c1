"""Save tensors, their memory and their shape, compare them with what they have become, and put them back."""

import functools
from collections.abc import Container, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_curvature.distributed.shards import local
from lightning_curvature.replay.objects import Restore


def storages(value: Tensor) -> list[torch.UntypedStorage]:
    """Return the pieces of memory that a tensor looks at; none of a wrapper, whose tensors are its attributes."""
    return [plain.untyped_storage() for plain in _plain(value)]


def _plain(value: Tensor) -> list[Tensor]:
    if isinstance(value, UninitializedTensorMixin) or is_traceable_wrapper_subclass(value):
        return []
    if value.layout == torch.strided:
        return [value]
    if value.layout == torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return []


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the memory of tensors; of sharded ones, of this rank's shards."""
    return {storage.data_ptr() for tensor in tensors for storage in storages(local(tensor)) if storage.nbytes()}


class Memory:
    """The bytes of one storage, to be compared with what they have become and put back."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage, self._bytes = storage, _bytes_of(storage)
        self._kept = self._bytes.clone()

    def restore(self) -> bool:
        """Put the bytes back and return whether they had changed; the version counters of tensors stay."""
        if not self.differs():
            return False
        if self._storage.nbytes() != self._kept.nbytes:
            self._storage.resize_(self._kept.nbytes)
        _bytes_of(self._storage).copy_(self._kept)
        return True

    def differs(self) -> bool:
        """Return whether the bytes are others now."""
        same = self._storage.nbytes() == self._kept.nbytes and self._storage.data_ptr() == self._bytes.data_ptr()
        return not (same and torch.equal(self._bytes, self._kept))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    # Writing through a tensor of its own leaves the version counters of the others alone. Words compare faster.
    dtype = torch.int64 if storage.nbytes() % 8 == 0 else torch.uint8
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def sums(value: Tensor) -> list[int]:
    """Return the sum of the words of each piece of a tensor's memory."""
    return [int(_bytes_of(storage).sum(dtype=torch.int64)) for storage in storages(local(value)) if storage.nbytes()]


def checksums(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """Return numbers for each tensor one of which changes when it is written: version, addresses, :func:`sums`."""
    return [(0 if t.is_inference() else t._version, *sorted(addresses([t])), *sums(t)) for t in tensors]


class Tensors:
    """Saves tensors one after the other; memory that several share is copied once.

    Args:
        spared: addresses of memory that is not copied: it comes back by itself, or is not written.
        exactly: version counters, gradients and ``requires_grad`` come back too, so that graphs that have saved a
            tensor stay valid. Else a version counter moves where a tensor is written: a graph notices.
    """

    def __init__(self, spared: Container[int], exactly: bool) -> None:
        self._spared, self._exactly = spared, exactly
        self._memories: dict[tuple[int, int], Memory] = {}
        self._saved: list[_Saved] = []

    def unchanged(self) -> list[Tensor]:
        """Return the tensors that were copied and have still the same content."""
        return [one.value for one in self._saved if one.memories and not any(m.differs() for m in one.memories)]

    def save(self, value: Tensor) -> None:
        """Save a tensor."""
        if isinstance(value, UninitializedTensorMixin):
            return
        memories, exactly, pieces = [], self._exactly, storages(value)
        for storage in pieces:
            place = storage.data_ptr(), storage.nbytes()
            if storage.nbytes() and place[0] not in self._spared:
                if place not in self._memories:
                    self._memories[place] = Memory(storage)
                memories.append(self._memories[place])
        moves = not (exactly or memories or not pieces)  # a measurement moves it
        gradient = value.grad if exactly and value.is_leaf else None
        counted, view = exactly and not value.is_inference(), None if moves else value.data
        count = _unsafe_preserve_version_counter(value).__exit__ if counted else None
        self._saved.append(_Saved(value, view, tuple(memories), value.is_leaf, value.requires_grad, gradient, count))

    def restorers(self) -> list[Restore]:
        """Return functions that put the tensors back, to be called in their order."""
        return [
            *(functools.partial(_restore, one, self._exactly) for one in self._saved if one.view is not None),
            *(functools.partial(_restore_leaf, one, self._exactly) for one in self._saved if one.is_leaf),
            *(one.count_back for one in self._saved if one.count_back is not None),
        ]


class _Saved(NamedTuple):
    """A tensor as it was; ``view`` is None where it stands elsewhere, ``count_back`` sets its version counter back."""

    value: Tensor
    view: Tensor | None
    memories: tuple[Memory, ...]
    is_leaf: bool
    requires_grad: bool
    gradient: Tensor | None
    count_back: Restore | None


def _restore(saved: _Saved, exactly: bool) -> None:
    value, view, changed = saved.value, saved.view, False
    assert view is not None
    if not is_traceable_wrapper_subclass(value) and (value.layout != torch.strided or _place(value) != _place(view)):
        value.data, changed = view, True
    for memory in saved.memories:
        changed |= memory.restore()
    if changed and not exactly and not value.is_inference() and value.layout == torch.strided:
        value.detach().as_strided((0,), (1,)).zero_()


def _restore_leaf(saved: _Saved, exactly: bool) -> None:
    value = saved.value
    if not value.is_leaf:
        value.detach_()
    if value.requires_grad != saved.requires_grad:  # in ``torch.vmap`` setting it is an error even without a change
        value.requires_grad_(saved.requires_grad)
    if exactly and value.grad is not saved.gradient:
        value.grad = saved.gradient


def _place(value: Tensor) -> tuple[object, ...]:
    storage = value.untyped_storage()
    return storage.data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype
