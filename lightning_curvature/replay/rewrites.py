"""The trained parameters that a training step writes, and the large tensors that it leaves alone."""

import contextlib
import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.distributed.shards import is_sharded, local
from lightning_curvature.replay.memory import addresses, checksums
from lightning_curvature.replay.snapshot import Snapshot

# Bytes. Smaller tensors are copied at each measurement, larger ones until it is known that the step leaves them alone.
_LARGE = 2**16


class Rewrites:
    """Knows which trained parameters a step writes, and which large tensors of other kinds it leaves alone.

    A step that is repeated must find the parameters where the measurement has put them, and leave them there. Those
    that it writes (``Embedding(max_norm=…)``, prototypes that are normalized) are replaced by copies for each
    repetition. All other tensors are saved with the module's state; of a frozen backbone that would be a copy at each
    measurement, so that it is spared once the first repetition has left it alone, and watched by its sum.

    Attributes:
        checked: whether the step was repeated once, so that both are known.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._trainer = module, module.trainer  # a repeated step meets a stand-in for the Trainer
        self._begin()

    def _begin(self) -> None:
        self._structure = self._read_structure()
        self._written: dict[int, str] = {}  # names by id
        self._places: list[tuple[dict[str, Any], str]] = []
        self._unwritten: list[weakref.ref[Tensor]] = []
        self._base: dict[int, int] | None = None
        self._start: dict[int, tuple[int, ...]] = {}
        self.checked = False

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that optimizers move, as they are now: θ."""
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def follow(self) -> bool:
        """Forget all where the module has other parts than before, and return whether it has."""
        if changed := self._read_structure() != self._structure:
            self._begin()
        return changed

    def _read_structure(self) -> list[int]:
        modules = list(self._module.modules())
        return [*map(id, modules), *(id(p) for module in modules for p in module._parameters.values())]

    def spared(self) -> list[Tensor]:
        """Return the large tensors that the step leaves alone."""
        return [tensor for one in self._unwritten if (tensor := one()) is not None]

    @torch.no_grad()
    def position(self) -> dict[int, tuple[int, ...]]:
        """Return numbers, by ``id``, which change where a trained parameter is written, also past autograd.

        Until the first repetition these are sums of words, later norms, which are made at once.
        """
        trained = self.trained
        if not self.checked:
            return dict(zip(map(id, trained), checksums(trained), strict=True))
        shards = [local(p) for p in trained]
        norms = torch._foreach_norm(shards)
        lengths = torch.stack([norm.to(shards[0].device) for norm in norms]) if shards else torch.empty(0)
        bits = lengths.double().view(torch.int64).tolist()  # NaN is not equal to itself
        pairs = zip(trained, shards, bits, strict=True)
        return {id(p): (p._version, shard.data_ptr(), length) for p, shard, length in pairs}

    def mark_start(self, automatic: bool) -> None:
        """Note where the trained parameters stand when a batch begins; in manual optimization the step moves them."""
        self._start = self.position() if automatic else {}

    def moved(self, marks: Mapping[int, tuple[int, ...]]) -> bool:
        """Whether one of them stands elsewhere by later marks, of those that the module still has and trains."""
        return any(marks.get(key, mark) != mark for key, mark in self._start.items())

    def marks(self, automatic: bool) -> dict[int, tuple[int, ...]]:
        """Return the same numbers of spared tensors, and of trained parameters unless the step itself moves them."""
        spared = self.spared()
        marks: dict[int, tuple[int, ...]] = dict(zip(map(id, spared), checksums(spared), strict=True))
        return marks | (self.position() if automatic else {})

    def note(self, before: Mapping[int, tuple[int, ...]], after: Mapping[int, tuple[int, ...]]) -> list[str]:
        """Learn from marks around a step what it writes; return the names of those that should have been saved."""
        changed = {key for key in before if before[key] != after.get(key)}
        self._add([p for p in self.trained if id(p) in changed])
        lost = [tensor for tensor in self.spared() if id(tensor) in changed]
        if not lost:
            return []
        self._unwritten = [one for one in self._unwritten if all(one() is not tensor for tensor in lost)]
        named = (*self._module.named_parameters(), *self._module.named_buffers())
        names = {id(tensor): name for name, tensor in named}
        return [names.get(id(tensor), "an attribute") for tensor in lost]

    def _add(self, written: list[Tensor]) -> None:
        if not written:
            return
        names = {id(p): name for name, p in self._module.named_parameters()}
        if sharded := [names.get(id(p)) for p in written if is_sharded([p])]:
            raise ValueError(
                f"training_step must leave sharded parameters alone, got {sharded[:3]}, which it writes: train with "
                "strategy='ddp', or write to them in on_train_batch_end."
            )
        self._written |= {id(p): names.get(id(p), "of the optimizer") for p in written}
        tables = [module._parameters for module in self._module.modules()]
        self._places = [(table, name) for table in tables for name, p in table.items() if id(p) in self._written]

    def written(self) -> list[str]:
        """Return the names of the trained parameters that the step writes."""
        return list(self._written.values())

    def hold(self) -> None:
        """Let the step write to the parameters as they are now; elsewhere the loss is another one then."""
        self._base = {id(p): p._version for p in self.trained}

    @contextlib.contextmanager
    def rehearsing(self, covered: Iterable[Tensor], snapshot: Snapshot) -> Generator[None, None, None]:
        """Learn what a repetition inside the block writes, and put trained parameters back after it.

        Args:
            covered: trained parameters whose content the caller puts back.
            snapshot: what was saved before it.
        """
        # Ranks whose forwards communicate make the same number of them, also where one fails.
        trained, known = self.trained, {id(p) for p in covered}
        self.checked = is_sharded(trained)
        kept = [(p, p.data, None if id(p) in known else local(p).detach().clone()) for p in trained]
        before = checksums(trained)
        try:
            yield
        finally:
            written = [one for one, old, new in zip(kept, before, checksums(trained), strict=True) if old != new]
            for p, data, content in written:
                if addresses([p]) != addresses([data]):
                    p.data = data
                if content is not None:
                    local(p).detach().copy_(content)
            if self._base is not None:
                self.hold()
        self._add([p for p, _, _ in written])
        own = addresses(self.trained)
        large = [
            t
            for t in snapshot.tensors.unchanged()
            if t.numel() * t.element_size() >= _LARGE and not addresses([t]) & own
        ]
        self._unwritten, self.checked = [weakref.ref(t) for t in large], True

    @contextlib.contextmanager
    def replaced(self) -> Generator[None, None, None]:
        """Let the module compute with copies of the trained parameters that it writes, inside the block.

        Derivatives by a copy are those by what it was copied from, which may itself stand in for the parameter.

        Raises:
            ValueError: if it writes other values to parameters that a measurement has moved.
        """
        with contextlib.ExitStack() as stack:
            copies: dict[int, tuple[Tensor, Tensor]] = {}  # a tied parameter stands in several places
            for table, name in self._places:
                tensor = table[name]
                stack.callback(table.__setitem__, name, tensor)
                if id(tensor) not in copies:
                    graph = torch.is_grad_enabled()
                    copies[id(tensor)] = tensor, tensor.clone() if graph else _leaf(tensor)
                    copies[id(tensor)][1].__dict__ = vars(tensor)
                table[name] = copies[id(tensor)][1]
            yield
            self._check_moves({key: pair for key, pair in copies.items() if key in self._written})

    def _check_moves(self, copies: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        at_base = self._base or {}
        away = {key: pair for key, pair in copies.items() if at_base.get(key) != pair[0]._version}
        moved = [self._written[key] for key, (p, copy) in away.items() if not torch.equal(p.detach(), copy.detach())]
        if moved:
            raise ValueError(
                "training_step must leave trained parameters where a measurement has moved them, got other values of "
                f"{moved[:3]}: use estimators and products that do not move them ('hvp', 'exact'), or write to them in "
                "on_train_batch_end."
            )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
