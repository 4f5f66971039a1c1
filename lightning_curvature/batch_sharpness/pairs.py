"""What pairs of mini-batches give to each quantity: one mini-batch after the other, or many at once."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_curvature.batch_sharpness.problem import (
    CROSS_PRODUCT,
    CROSSED,
    OWN_PRODUCT,
    PAIR,
    DrawOptions,
    Quantity,
    SharpnessProblem,
)
from lightning_curvature.functional import add_to_moments
from lightning_curvature.losses.stacked import copies_of
from lightning_curvature.operators.mini_batch import MiniBatch, MiniBatches


@dataclass(frozen=True)
class Cross:
    """Two vectors of a pair whose curvature under the Hessian of all samples is wanted.

    Attributes:
        vectors: flat, one of each batch.
        factor: from the sum of both curvatures to a numerator.
        denominators: by quantity.
    """

    vectors: tuple[Tensor, Tensor]
    factor: float
    denominators: dict[Quantity, float]


@dataclass
class PairMoments:
    """What one pair gave.

    Attributes:
        moments: by quantity, (6,); none where it gave nothing.
        zero_gradients: how many of its batches had no gradient.
        unconverged: of how many the eigenvalue was not found to the tolerance.
        crosses: what the whole probe set has still to be multiplied with.
    """

    moments: dict[Quantity, Tensor] = field(default_factory=dict)
    zero_gradients: int = 0
    unconverged: int = 0
    crosses: list[Cross] = field(default_factory=list)

    def add(self, quantity: Quantity, numerator: float, denominator: float = 1.0) -> None:
        """Add a draw of a quantity."""
        before = self.moments.get(quantity, torch.zeros(6, dtype=torch.float64))
        self.moments[quantity] = add_to_moments(before, numerator, denominator)

    def add_own(self, curvature: float, square: float) -> None:
        """Add a batch's curvature along its own gradient; one without a gradient says nothing of it."""
        if square:
            self.add("batch_sharpness", curvature / square)
            self.add("modified_batch_sharpness", curvature, square)

    def add_crossed(self, cross: Cross, curvature: float) -> None:
        """Add the curvature of both vectors together."""
        for quantity, denominator in cross.denominators.items():
            self.add(quantity, curvature * cross.factor, denominator)


class Pairs:
    """Base of the two ways.

    Args:
        options: what is measured.
        problem: on what.
        full: ∇L of the whole probe set, where a quantity needs it.
    """

    def __init__(self, options: DrawOptions, problem: SharpnessProblem, full: Tensor | None) -> None:
        self._options, self._problem, self._full = options, problem, full
        self._space = problem.space

    @cached_property
    def _full_square(self) -> float | None:
        return None if self._full is None else float(self._space.squared_norm(self._full))

    def observe(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Draw the pairs of these numbers and measure what is wanted of them."""
        raise NotImplementedError

    def _crosses(
        self, wanted: Collection[Quantity], gradients: tuple[Tensor, Tensor], squares: Sequence[float]
    ) -> list[Cross]:
        """What a pair wants to know of the Hessian of all samples."""
        crosses = []
        if set(CROSS_PRODUCT) & set(wanted):
            square = sum(squares) / PAIR
            denominators: dict[Quantity, float] = {"ias": square} if square else {}
            if self._full_square is not None:
                denominators["gni"] = self._full_square
            crosses.append(Cross(gradients, 1.0 / PAIR, denominators))
        if "lambda_gen" in wanted:
            assert self._problem.trials is not None
            assert self._full is not None
            lr = self._problem.lr
            own, other = (self._problem.trials.update_for(gradient) for gradient in gradients)
            descent = self._space.dot(self._full, own) + self._space.dot(self._full, other)
            crosses.append(Cross((own, other), 1.0 / (PAIR * lr**2), {"lambda_gen": descent / (PAIR * lr)}))
        return crosses


class PairsInTurn(Pairs):
    """One mini-batch after the other.

    Args:
        options: see :class:`Pairs`.
        problem: see :class:`Pairs`.
        full: see :class:`Pairs`.
        with_whole: leave the crosses to products with the whole probe set.
    """

    def __init__(
        self, options: DrawOptions, problem: SharpnessProblem, full: Tensor | None, with_whole: bool = False
    ) -> None:
        super().__init__(options, problem, full)
        self._with_whole = with_whole
        self._vector: list[Tensor] = []

    def observe(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Draw the pairs of these numbers and measure what is wanted of them."""
        return [self._observe(number, wanted) for number in numbers]

    def _observe(self, number: int, wanted: Collection[Quantity]) -> PairMoments:
        problem = self._problem
        pair, batches = PairMoments(), []
        crossed = bool(set(CROSSED) & set(wanted))
        with contextlib.ExitStack() as stack:
            for operator in problem.pair(number):
                batch = stack.enter_context(contextlib.closing(MiniBatch(operator)))
                self._observe_alone(batch, wanted, pair)
                batches.append(batch)
                if self._with_whole or not crossed:
                    batch.close()  # one graph at a time is enough
            if crossed:
                first, second = batches
                gradients, squares = (first.gradient, second.gradient), (first.squared_norm, second.squared_norm)
                pair.crosses = self._crosses(wanted, gradients, squares)
            if not self._with_whole:
                for cross in pair.crosses:
                    one, other = cross.vectors
                    pair.add_crossed(cross, second.curvature_along(one) + first.curvature_along(other))
                    problem.on_product()
        return pair

    def _observe_alone(self, batch: MiniBatch, wanted: Collection[Quantity], pair: PairMoments) -> None:
        """Quantities that a batch gives by itself."""
        if set(OWN_PRODUCT) & set(wanted):
            pair.add_own(batch.self_curvature, batch.squared_norm)
            self._problem.on_product()
        if "lambda_max_b" in wanted:
            value, found = batch.largest_eigenvalue(self._options.tolerance, self._vector)
            self._problem.on_product()
            if found is not None:
                self._vector = found.vectors
                pair.unconverged += not all(found.converged)
            pair.add("lambda_max_b", value)
        pair.zero_gradients += batch.squared_norm == 0.0


class PairsAtOnce(Pairs):
    """All mini-batches at once, by ``torch.vmap`` over them: pays where launching takes longer than computing.

    Neither "lambda_max_b" nor products with the whole probe set.

    Raises:
        Exception: where ``vmap`` cannot follow the training step, or the mini-batches differ in shape.
    """

    def observe(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Draw the pairs of these numbers and measure what is wanted of them."""
        problem, population = self._problem, self._problem.population
        assert population is not None
        draws = [population.draw(problem.key, PAIR * number + index) for number in numbers for index in range(PAIR)]
        copies = copies_of(problem.parameters, len(draws))
        parts = problem.loss.parts_of_many(draws, problem.parameters, copies)
        pairs = [PairMoments() for _ in numbers]
        operator = problem.curvature(parts, copies, processes=problem.trainer.num_devices)
        with contextlib.closing(MiniBatches(operator)) as batches:
            squares = batches.squared_norms.tolist()
            for index, square in enumerate(squares):
                pairs[index // PAIR].zero_gradients += square == 0.0
            if set(OWN_PRODUCT) & set(wanted):
                for index, curvature in enumerate(batches.curvatures_along(batches.gradients).tolist()):
                    pairs[index // PAIR].add_own(curvature, squares[index])
                problem.on_product()
            self._add_crosses(batches, wanted, pairs, squares)
        return pairs

    def _add_crosses(
        self, batches: MiniBatches, wanted: Collection[Quantity], pairs: Sequence[PairMoments], squares: list[float]
    ) -> None:
        """The vectors of each batch of a pair on the Hessian of the other."""
        if not set(CROSSED) & set(wanted):
            return
        rows = torch.cat([gradient.flatten(1) for gradient in batches.gradients], dim=1)
        crosses = []
        for index in range(0, len(rows), PAIR):
            gradients = (rows[index], rows[index + 1])
            crosses.append(self._crosses(wanted, gradients, squares[index : index + PAIR]))
        for kind in zip(*crosses, strict=True):
            swapped = torch.stack([vector for cross in kind for vector in reversed(cross.vectors)])
            curvatures = batches.curvatures_along(self._space.views(swapped)).reshape(-1, PAIR).sum(dim=1)
            for pair, cross, curvature in zip(pairs, kind, curvatures.tolist(), strict=True):
                pair.add_crossed(cross, curvature)
            self._problem.on_product()
