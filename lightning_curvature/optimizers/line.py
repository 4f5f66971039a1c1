"""A straight line through θ_t along which a loss is evaluated; the parameters come back where they were."""

import contextlib
import functools
from collections.abc import Generator

import torch
from torch import Tensor

from lightning_curvature.arguments import Rule, checked
from lightning_curvature.distributed.shards import local
from lightning_curvature.operators.differentiation import put_back_at_exit

# Parameters of fewer numbers are joined: a call for each would take longer than its work.
SMALL = 2**12


class Line:
    r"""The line :math:`\theta_t - \epsilon v`, from its start θ_t to its end θ_t − v.

    Args:
        parameters: those that move; of sharded ones (DTensor) the local shards.
        start: copies of θ_t.
        end: copies of θ_t − v.
        home: copies of the values to which the parameters come back: maybe ``end`` itself.
    """

    def __init__(self, parameters: list[Tensor], start: list[Tensor], end: list[Tensor], home: list[Tensor]) -> None:
        self.parameters, self._start, self._end, self._home = parameters, start, end, home

    @checked(position=Rule("1.0 is the end of the step"))
    @contextlib.contextmanager
    def at(self, position: float) -> Generator[None, None, None]:
        """Set the parameters to θ_t − ``position``·v inside the block (1 is the end, −1 its mirror image).

        They come back as copies of their home, bit for bit, also after an error.
        """
        with self._moved() as targets:
            with torch.no_grad():
                _interpolate(targets, self._start, self._end, position)
            yield

    @contextlib.contextmanager
    def direction(self) -> Generator[list[Tensor], None, None]:
        """Set the parameters to θ_t inside the block, which receives v in the memory of a copy, once only.

        A line whose end is no home keeps its start, which others may share; else it keeps its end.
        """
        with self._moved() as targets:
            start, end = self._start, self._end
            with torch.no_grad():
                torch._foreach_copy_(targets, start)
                if end is self._home:
                    self._start, v = [], start
                    torch._foreach_sub_(v, end)
                else:
                    self._end, v = [], end
                    torch._foreach_neg_(v)
                    torch._foreach_add_(v, start)
            yield v

    @contextlib.contextmanager
    def _moved(self) -> Generator[list[Tensor], None, None]:
        targets = [local(p).detach() for p in self.parameters]
        with contextlib.ExitStack() as stack:
            put_back_at_exit(stack, functools.partial(self._put_back, targets))
            yield targets

    @torch.no_grad()
    def _put_back(self, targets: list[Tensor]) -> None:
        torch._foreach_copy_(targets, self._home)


def _interpolate(targets: list[Tensor], start: list[Tensor], end: list[Tensor], position: float) -> None:
    """Set tensors between two others in place, with no third copy; large ones on a CPU in one pass over its memory."""
    rows: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
    for row in zip(targets, start, end, strict=True):
        rows[row[0].is_cpu and row[0].numel() >= SMALL].append(row)
    for target, first, last in rows[True]:
        torch.lerp(first, last, position, out=target)
    if rows[False]:
        others, starts, ends = zip(*rows[False], strict=True)
        torch._foreach_copy_(others, starts)
        torch._foreach_lerp_(others, ends, position)
