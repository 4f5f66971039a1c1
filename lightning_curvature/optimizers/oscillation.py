"""The part of an optimizer's path that flips its sign at each step, and the steps before that show it."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curvature.distributed.shards import local
from lightning_curvature.functional import oscillation
from lightning_curvature.optimizers.line import Line
from lightning_curvature.optimizers.stability import preconditioner, stability_rule
from lightning_curvature.optimizers.update import ParameterUpdate

# Steps before one of which s_t and s_{t−1} are known.
STEPS = 3

# One number each, whose mean over all ranks is the value of the job: s_tᵀPs_t, s_{t−1}ᵀPs_{t−1}, s_tᵀPs_{t−1}, ‖s_t‖²,
# gᵀs_t and ‖θ_t‖².
MOMENTS = ("square", "square_before", "product", "length", "slope", "size")


class Trail:
    """Copies of the parameters before the optimizer steps that precede a measured one, one set a step.

    Args:
        every: steps from one measured step to the next.
        stride: most by which ``global_step`` grows from one step of the optimizer to the next: other optimizers count.
    """

    def __init__(self, every: int, stride: int = 1) -> None:
        self._every, self._reach, self._last = every, STEPS * stride, -1
        self._kept: list[dict[int, Tensor]] = []  # of the last steps, by id of the parameter, the newest first
        self._before: list[dict[int, Tensor]] = []

    @torch.no_grad()
    def pass_by(self, global_step: int, parameters: Callable[[], Iterable[Tensor]], more: bool = False) -> None:
        """Note a step about to be made; copy this rank's part of the parameters where the next measured one needs it.

        LBFGS comes several times a step: only the first counts. ``parameters`` is called where they
        are copied alone. ``more``: the step may be measured, or one after it.
        """
        if global_step == self._last:
            return
        self._last, self._before = global_step, self._kept
        if more or self._every - global_step % self._every <= self._reach:
            now = {id(p): local(p).detach().clone() for p in parameters()}
            self._kept = [now, *self._kept[: STEPS - 1]]
        else:
            self._kept = []

    def before(self, parameters: Sequence[Tensor]) -> list[list[Tensor]] | None:
        """Return θ_{t−1}, θ_{t−2} and θ_{t−3} of the step, once; None where one of them was not kept."""
        kept, self._before = self._before, []
        known = len(kept) == STEPS and all(id(p) in copies for copies in kept for p in parameters)
        return [[copies[id(p)] for p in parameters] for copies in kept] if known else None


class Stepping:
    """An optimizer with its settings as of now: schedulers change them before a step is measured.

    Its state stays that of the optimizer: after the step, that which the step used.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._bare: Any = object.__new__(type(optimizer))
        vars(self._bare).update(vars(optimizer))
        self._bare.param_groups = [
            {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
            for group in optimizer.param_groups
        ]

    def edge(self) -> float:
        """Return the threshold on λ_max(P^{-1/2} H P^{-1/2})."""
        return stability_rule(self._bare).preconditioned

    def diagonals(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return P of each parameter, this rank's shards; ValueError for an optimizer that is not known."""
        return preconditioner(self._bare, parameters)


@dataclass(frozen=True)
class Oscillation:
    """s_t = d_t − 2d_{t−1} + d_{t−2} of one optimizer step.

    Attributes:
        line: from θ_t to θ_t − s_t.
        moments: the MOMENTS, float64 scalars, and "edge", the optimizer's threshold.
    """

    line: Line
    moments: dict[str, Tensor]


@torch.no_grad()
def oscillation_of(update: ParameterUpdate, before: Sequence[Sequence[Tensor]], stepping: Stepping) -> Oscillation:
    """Return the oscillation of a step, after it and before ``update.complete()``.

    Three copies of the parameters are alive beside those of the update, the last of which becomes the end of the line,
    and the diagonal P.

    Args:
        update: the step.
        before: θ_{t−1}, θ_{t−2} and θ_{t−3}.
        stepping: its optimizer.

    Raises:
        ValueError: where the optimizer's preconditioner is not known.
    """
    diagonals = stepping.diagonals(update.parameters)
    terms, ends = [], []
    for (g, start, end, shards), *earlier, diagonal in zip(update.rows(), *before, diagonals, strict=True):
        wide = torch.promote_types(start.dtype, torch.float32)
        path = [t.to(wide) for t in (end, start, *earlier)]
        d = [after - before for before, after in itertools.pairwise(path)]
        s, last = oscillation(*d[:3]), oscillation(*d[1:])
        # Coordinates that never move have an infinite P, and no part in this.
        weighted = torch.where(diagonal.isinf(), 0.0, s * diagonal)
        weighted_last = torch.where(diagonal.isinf(), 0.0, last * diagonal)
        pairs = ((weighted, s), (weighted_last, last), (weighted, last), (s, s), (g.to(wide), s), (path[1], path[1]))
        terms.append(shards * torch.stack([(a * b).sum(dtype=torch.float64) for a, b in pairs]))
        ends.append(torch.sub(start, s, out=earlier[-1]) if wide == start.dtype else (path[1] - s).to(start.dtype))
    home = terms[0].device
    sums = dict(zip(MOMENTS, torch.stack([t.to(home) for t in terms]).sum(0), strict=True))
    sums["slope"] = sums["slope"] * update.gradient_scale
    return Oscillation(update.line_to(ends), sums | {"edge": sums["square"].new_tensor(stepping.edge())})
