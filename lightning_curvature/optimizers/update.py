"""The true update of an optimizer step: d = θ_t − θ_{t+1}, its learning rate, its dot product with the gradient."""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from lightning_curvature.arguments import Rule, checked, positive
from lightning_curvature.distributed.shards import local, shard_count
from lightning_curvature.optimizers.line import SMALL, Line

# Numbers in a piece of a parameter: it fits a CPU's cache, is worth an accelerator's launch, and bounds temporaries.
_PIECE, _ACCELERATOR_PIECE = 2**16, 2**24


@runtime_checkable
class HasParameterGroups(Protocol):
    """Anything with the ``param_groups`` of a torch optimizer."""

    param_groups: list[dict[str, Any]]


class ParameterUpdate(Line):
    r"""One optimizer step, seen from outside.

    Create it after ``backward`` and before ``step``; call :meth:`complete` after ``step``. It then knows
    :math:`d = \theta_t - \theta_{t+1}` whatever the optimizer did (momentum, preconditioning, weight decay,
    clipping), and can set the parameters anywhere along it.

    At most two parameter-sized copies are alive: θ_t beside g until :meth:`complete`, then θ_t beside θ_{t+1}, which
    takes over the memory of g. Only parameters with a gradient take part; of sharded ones (DTensor) the local shards.

    Args:
        optimizer: the optimizer about to step; its ``param_groups`` are read now, so that η is the one of this step.
        gradient_scale: factor that turns the gradients into g (loss scaling, accumulation).
        gradients: gradients kept earlier, before clipping or other changes, by ``id`` of the parameter; the update
            overwrites them. Default: copies of ``p.grad``.

    Attributes:
        parameters: the parameters that take part.
        gradient_scale: as given.
        lr: η of the step: the learning rate of the first group that has a non-zero one and parameters that take part.
        uniform_lr: whether all groups that take part share that η. Where not, trust the unit-free s = λη.

    Raises:
        ValueError: if no parameter has a gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> (weight**2).sum().backward()
        >>> update = ParameterUpdate(optimizer)
        >>> _ = optimizer.step()
        >>> update.complete()
        >>> round(update.descent.item(), 4)  # gᵀd = η‖g‖² = 0.1 · (4 + 16)
        2.0
        >>> with update.at(1.0):  # θ_t − 1·d = θ_{t+1}
        ...     print(weight.tolist())
        [0.800000011920929, 1.600000023841858]
    """

    @checked(
        optimizer=Rule("give the one that is about to step"), gradient_scale=positive("1.0 takes gradients as they are")
    )
    def __init__(
        self,
        optimizer: HasParameterGroups,
        gradient_scale: float = 1.0,
        gradients: Mapping[int, Tensor] | None = None,
    ) -> None:
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in optimizer.param_groups]
        self.parameters: list[Tensor] = [p for _, active in groups for p in active]
        if not self.parameters:
            raise ValueError(
                "optimizer must hold parameters with gradients, got none: call backward() before creating the update."
            )
        rates = [rate for group, active in groups if active and (rate := float(group.get("lr") or 0.0))]
        self.lr, self.uniform_lr = rates[0] if rates else 0.0, len(set(rates)) <= 1
        self.gradient_scale, kept = gradient_scale, gradients or {}
        with torch.no_grad():
            self._start = [local(p).detach().clone() for p in self.parameters]
            self._gradients: list[Tensor] | None = [
                kept[id(p)] if id(p) in kept else dense_copy(p.grad) for p in self.parameters
            ]
        self._end = self._home = []  # filled by :meth:`complete`; other lines come back there too
        self._moments: Tensor | None = None

    @torch.no_grad()
    def complete(self) -> None:
        """Take θ_{t+1} from the parameters as they are now."""
        rows = self.rows()
        self._moments = _moments(rows)
        self._end[:] = [
            g if g.dtype == after.dtype and g.shape == after.shape else torch.empty_like(after)
            for g, _, after, _ in rows
        ]
        self._gradients = None
        torch._foreach_copy_(self._end, [after for _, _, after, _ in rows])

    def rows(self) -> list["Row"]:
        """Return g, θ_t, θ_{t+1} and the number of shards of each parameter: after ``step``, before ``complete``."""
        if self._gradients is None:
            raise RuntimeError("complete() must be called once, got a second call: create one update for each step.")
        now = [local(p).detach() for p in self.parameters]
        return list(zip(self._gradients, self._start, now, map(shard_count, self.parameters), strict=True))

    def line_to(self, ends: list[Tensor]) -> Line:
        """Return the line from θ_t to other ends; the parameters come back to θ_{t+1}, as after :meth:`at`."""
        return Line(self.parameters, self._start, ends, self._home)

    @property
    def descent(self) -> Tensor:
        """gᵀd, float64 scalar whose mean over all ranks is the value of the job."""
        return self._completed()[0] * self.gradient_scale

    @property
    def squared_norm(self) -> Tensor:
        """‖d‖², float64 scalar whose mean over all ranks is the value of the job."""
        return self._completed()[1]

    def squared_size(self) -> Tensor:
        """‖θ_t‖², float64 scalar whose mean over all ranks is the value of the job; one pass over the parameters."""
        pairs = zip(self.parameters, torch._foreach_norm(self._start), strict=True)
        return torch.stack([norm.double() ** 2 * shard_count(p) for p, norm in pairs]).sum()

    def _completed(self) -> Tensor:
        if self._moments is None:
            raise RuntimeError("the update is not complete: call complete() after optimizer.step().")
        return self._moments

    @contextlib.contextmanager
    def _moved(self) -> Generator[list[Tensor], None, None]:
        self._completed()
        with super()._moved() as targets:
            yield targets


def dense_copy(gradient: Tensor | None) -> Tensor:
    """Return a copy of this rank's shard of a gradient, dense where it was sparse."""
    assert gradient is not None  # only parameters with a gradient take part
    shard = local(gradient).detach()
    return shard.to_dense() if shard.is_sparse else shard.clone()


# Of one parameter on this rank: g, θ_t, θ_{t+1}, and into how many parts it is cut.
Row = tuple[Tensor, Tensor, Tensor, int]


def _moments(rows: Iterable[Row]) -> Tensor:
    """Return Σ g d and Σ d²: dot products of pieces in float32 or wider, their sum in float64."""
    dots, counts = list[Tensor](), list[int]()
    for g, d, count in _pieces(rows):
        d = d.to(torch.promote_types(d.dtype, torch.float32))
        dots += [torch.dot(g.to(d.dtype), d), torch.dot(d, d)]
        counts.append(count)
    # One device for all: a model may be laid out over several.
    device = dots[0].device
    sums = torch.stack([dot.to(device) for dot in dots]).double().view(-1, 2)
    return torch.tensor(counts, dtype=torch.float64, device=device) @ sums


def _pieces(rows: Iterable[Row]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield g and d, flat, in pieces: of large parameters, or of many small ones of a kind, these in float64."""
    small: dict[Any, list[tuple[Tensor, ...]]] = {}
    for *row, count in rows:
        device = row[0].device
        if row[0].numel() < SMALL:
            small.setdefault((count, device, *(t.dtype for t in row)), []).append(tuple(row))
            continue
        size = _PIECE if device.type == "cpu" else _ACCELERATOR_PIECE
        for g, before, after in zip(*(t.reshape(-1).split(size) for t in row), strict=True):
            yield g, before - after, count
    for (count, *_), kind in small.items():
        for start in range(0, len(kind), _PIECE // SMALL):
            many = zip(*kind[start : start + _PIECE // SMALL], strict=True)
            g, before, after = map(_flatten_dense_tensors, many)
            yield g.double(), (before - after).double(), count
