"""Eigenpairs of an operator that changes slowly, search after search."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_curvature.arguments import MANY, checked, whole
from lightning_curvature.linalg.eigenpairs import Eigenpairs, eigenpairs
from lightning_curvature.linalg.krylov import MatVec
from lightning_curvature.linalg.space import VectorSpace

# A value that has come back by more than this share since the last search is looked for again, the other way.
_FALL = 0.1
RECHECK = whole(1, "1 searches from random vectors each time", MANY)


class EigenTracker:
    """Makes :func:`eigenpairs` again and again, of an operator that changes slowly.

    A search goes on from the pairs of the one before it, and may end after one product. Nothing excludes that another
    eigenvalue has overtaken since: every ``recheck_every``-th search begins anew, with random vectors. A search that
    finds a largest eigenvalue lower than before by more than 10 %, or a smallest one higher, is repeated the other way,
    and the outer values count.

    Args:
        recheck_every: searches from one with random vectors to the next.

    Example:
        >>> diagonal = torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64)
        >>> space, tracker = VectorSpace([diagonal]), EigenTracker()
        >>> [tracker.search(lambda v: c * diagonal * v, space, largest=1).matvecs for c in (1.0, 1.1)]
        [4, 1]
    """

    @checked(recheck_every=RECHECK)
    def __init__(self, recheck_every: int = 10) -> None:
        self._every = recheck_every
        self._before: Eigenpairs | None = None
        self._age = 0

    def search(
        self,
        matvec: MatVec,
        space: VectorSpace,
        *,
        max_matvecs: int = 200,
        generator: torch.Generator | None = None,
        **asked: Any,
    ) -> Eigenpairs:
        """Return the pairs as :func:`eigenpairs` does; other arguments are handed on to it, the same each time."""
        before = self._before
        if before is not None and all(len(vector) == space.size for vector in before.vectors):
            before = replace(before, vectors=[v.to(space.device, space.dtype) for v in before.vectors])
        else:
            before = None
        follows = before is not None and self._age < self._every

        def once(on: bool, most: int) -> Eigenpairs:
            start = before if on else None
            return eigenpairs(matvec, space, max_matvecs=most, generator=generator, before=start, **asked)

        found = once(follows, max_matvecs)
        left = max_matvecs - found.matvecs
        if before is not None and left > len(found.values) and _inside(found, before, _FALL, **asked):
            other = once(not follows, left)
            anew, made = other if follows else found, found.matvecs + other.matvecs
            best = other if _inside(found, other, 0.0, **asked) else found
            # What the one from random vectors excludes holds whichever is taken.
            upper, lower = max(anew.upper, float(best.values.max())), min(anew.lower, float(best.values.min()))
            found, follows = replace(best, upper=upper, lower=lower, matvecs=made), False
        self._age = self._age + 1 if follows else 1
        # Between searches the device keeps nothing.
        self._before = replace(found, vectors=[v.to("cpu") for v in found.vectors])
        return found

    def doubt(self) -> None:
        """Let the next search begin anew: there is a sign of an eigenvalue that was overtaken unseen."""
        self._age = self._every

    def state_dict(self) -> dict[str, Any]:
        """Return the last pairs, and how many searches have followed each other."""
        return {} if self._before is None else {"pairs": dict(vars(self._before)), "age": self._age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._before, self._age = (Eigenpairs(**state["pairs"]), state["age"]) if state else (None, 0)


def _inside(found: Eigenpairs, other: Eigenpairs, share: float, *, smallest: int = 0, **_: Any) -> bool:
    """Return whether a value is further inside than the other by more than errors and a share of it explain."""
    outwards = torch.ones(len(found.values), dtype=torch.float64)
    if smallest:
        outwards[-smallest:] = -1.0
    allowed = found.errors + other.errors + share * other.values.abs()
    return bool((outwards * (other.values - found.values) > allowed).any())
