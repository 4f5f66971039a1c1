"""Pairs of mini-batches, and their moments of each quantity."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_curvature.batch_sharpness.options import (
    CROSS_PRODUCT,
    CROSSED,
    OF_UPDATES,
    OWN_PRODUCT,
    PAIR,
    BatchSharpnessOptions,
    Quantity,
)
from lightning_curvature.batch_sharpness.problem import SharpnessProblem
from lightning_curvature.distributed.together import together
from lightning_curvature.functional import add_to_moments
from lightning_curvature.linalg import NonFiniteProductError
from lightning_curvature.operators.mini_batch import MiniBatch
from lightning_curvature.replay.recording import NoLossError

# Two flat vectors, one of each mini-batch of a pair, and by quantity the denominator of the sum of their curvatures
# under the Hessian of all samples.
Cross = tuple[tuple[Tensor, Tensor], dict[Quantity, float]]


@dataclass
class PairMoments:
    """Moments of one pair.

    Attributes:
        moments: by quantity, (6,); a quantity without a draw has none.
        by_module: sums over its mini-batches of the terms of batch sharpness by module, and of their squares,
            (2, modules).
        zero_gradients: number of its mini-batches without a gradient.
        unconverged: number of its mini-batches whose eigenvalue did not converge.
        skipped: whether the step passed over one of its mini-batches, so that it says nothing.
        crosses: vectors that are still to be multiplied by the Hessian of the whole probe set.
    """

    moments: dict[Quantity, Tensor] = field(default_factory=dict)
    by_module: Tensor = field(default_factory=lambda: torch.zeros(2, 1, dtype=torch.float64))
    zero_gradients: int = 0
    unconverged: int = 0
    skipped: bool = False
    crosses: Sequence[Cross] = ()

    def add(self, quantity: Quantity, numerator: float, denominator: float = 1.0) -> None:
        """Add a draw of a quantity."""
        before = self.moments.get(quantity, torch.zeros(6, dtype=torch.float64))
        self.moments[quantity] = add_to_moments(before, numerator, denominator)

    def add_own(self, curvature: float, square: float, terms: Tensor) -> None:
        """Add the curvature of a mini-batch along its gradient, and its terms by module.

        One without a gradient says nothing of it.
        """
        if square:
            shares = terms.cpu() / square
            self.by_module = self.by_module + torch.stack([shares, shares.square()])
            self.add("batch_sharpness", curvature / square)
            self.add("modified_batch_sharpness", curvature, square)

    def add_update(self, curvature: float, descent: float, square: float) -> None:
        """Add the curvature of a mini-batch along its update ηΔθ, ‖ηΔθ‖² = ``square``; ``descent`` is η g·(ηΔθ)."""
        if square:
            self.add("update_sharpness", curvature / square, descent / square)

    def add_crossed(self, cross: Cross, curvature: float) -> None:
        """Add the sum of the curvatures along both vectors."""
        for quantity, denominator in cross[1].items():
            self.add(quantity, curvature, denominator)


class Pairs:
    """Measures pairs, one mini-batch after the other; ``full``: ∇L of the whole probe set where a quantity needs it."""

    def __init__(self, options: BatchSharpnessOptions, problem: SharpnessProblem, full: Tensor | None) -> None:
        self.options, self.problem, self._full = options, problem, full
        self._eigenvectors: list[Tensor] = []

    def observe(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Draw the pairs of these numbers and measure the wanted quantities."""
        return [self._observed(number, wanted) for number in numbers]

    def _observed(self, number: int, wanted: Collection[Quantity]) -> PairMoments:
        batches, error = list[MiniBatch](), None
        try:
            pair = self._observe(number, wanted, batches)
        except NoLossError:
            return PairMoments(skipped=True)
        except NonFiniteProductError as caught:
            pair, error = PairMoments(), caught
        lost = error is not None or not all(bool(row.isfinite().all()) for row in pair.moments.values())
        if lost and self.problem.sharded and self._is_skipped(batches):
            return PairMoments(skipped=True)
        if error is not None:
            raise error
        return pair

    def _is_skipped(self, batches: Sequence[MiniBatch]) -> bool:
        """Return whether ranks that measure a pair together pass over it on one of them; one collective.

        Raises:
            Exception: if one of them failed.
        """
        error = next((batch.operator.error for batch in batches if batch.operator.error is not None), None)
        skipped = {"skipped": torch.tensor([float(isinstance(error, NoLossError))], dtype=torch.float64)}

        def make() -> dict[str, Tensor]:
            if error is not None and not skipped["skipped"]:
                raise error
            return skipped

        return bool(together(self.problem.trainer, make, skipped, "a mini-batch")["skipped"])

    def _observe(self, number: int, wanted: Collection[Quantity], batches: list[MiniBatch]) -> PairMoments:
        pair = PairMoments()
        crossed, updates = bool(set(CROSSED) & set(wanted)), list[Tensor]()
        with contextlib.ExitStack() as stack:
            for operator in self.problem.pair(number):
                batch = stack.enter_context(contextlib.closing(MiniBatch(operator)))
                batches.append(batch)
                if set(OWN_PRODUCT) & set(wanted):
                    pair.add_own(batch.self_curvature, batch.squared_norm, self.problem.by_module(batch.self_terms))
                    self.problem.on_product()
                if set(OF_UPDATES) & set(wanted):
                    updates.append(self.update_for(batch.gradient))
                if "update_sharpness" in wanted:
                    space, update = self.problem.space, updates[-1]
                    descent, square = space.dot(batch.gradient, update), float(space.squared_norm(update))
                    pair.add_update(batch.curvature_along(update), self.problem.lr * float(descent), square)
                    self.problem.on_product()
                if "lambda_max_b" in wanted:
                    value, search = batch.largest_eigenvalue(self.options.tolerance, self._eigenvectors)
                    self.problem.on_product()
                    if search is not None:
                        self._eigenvectors = search.vectors
                        pair.unconverged += not all(search.converged)
                    pair.add("lambda_max_b", value)
                pair.zero_gradients += batch.squared_norm == 0.0
                if self.options.exact or not crossed:
                    batch.close()  # one graph at a time is enough
            if crossed:
                first, second = batches
                squares = (first.squared_norm, second.squared_norm)
                pair.crosses = self._crosses(wanted, (first.gradient, second.gradient), squares, updates)
            if not self.options.exact:
                for cross in pair.crosses:
                    one, other = cross[0]
                    pair.add_crossed(cross, second.curvature_along(one) + first.curvature_along(other))
                    self.problem.on_product()
        return pair

    def update_for(self, gradient: Tensor) -> Tensor:
        """Return ηΔθ, the update that the optimizer would make with a gradient."""
        assert self.problem.trials is not None
        return self.problem.trials.update_for(gradient)

    def _crosses(
        self,
        wanted: Collection[Quantity],
        gradients: tuple[Tensor, Tensor],
        squares: Sequence[float],
        updates: Sequence[Tensor],
    ) -> list[Cross]:
        """Return the vectors of a pair to multiply by the Hessian of all samples."""
        crosses = list[Cross]()
        if set(CROSS_PRODUCT) & set(wanted):
            denominators: dict[Quantity, float] = {"ias": sum(squares)} if any(squares) else {}
            if self._full is not None:
                denominators["gni"] = PAIR * self._full_square
            crosses.append((gradients, denominators))
        if "lambda_gen" in wanted:
            assert self._full is not None
            # η times the update over η, twice in the numerator and once in the descent.
            one, other = updates
            descent = self.problem.space.dot(self._full, one) + self.problem.space.dot(self._full, other)
            crosses.append(((one, other), {"lambda_gen": self.problem.lr * descent}))
        return crosses

    @cached_property
    def _full_square(self) -> float:
        assert self._full is not None
        return float(self.problem.space.squared_norm(self._full))
