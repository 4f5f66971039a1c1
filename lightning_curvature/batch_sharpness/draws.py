"""The draws of one measurement of mini-batch sharpness: which are made on this rank, and when there are enough."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curvature.batch_sharpness.pairs import PairMoments, Pairs, PairsInTurn
from lightning_curvature.batch_sharpness.problem import (
    CROSS_PRODUCT,
    CROSSED,
    PAIR,
    DrawOptions,
    Quantity,
    SharpnessProblem,
)
from lightning_curvature.distributed.failures import elsewhere, severity
from lightning_curvature.functional import merge_moments, ratio_of_means, ratio_standard_error
from lightning_curvature.operators.mini_batch import MiniBatch
from lightning_curvature.reporting.loggers import warn


class Draws:
    """The draws of one measurement: moments of the pairs that this rank has drawn, and of all pairs together.

    A quantity that is not finite is lost, and the others go on.

    Args:
        options: what is measured, and how exactly.
        problem: on what.
        in_turn: how a pair is measured.
        at_once: how several are, or None; where it fails on this rank, ``in_turn`` takes its place.
        pairs: how many pairs each rank draws between two looks at what all of them know.
        whole: products with the whole probe set, shared out over the ranks; None where the other batch of a pair stands
            for it.

    Attributes:
        errors: why quantities were lost.
    """

    def __init__(
        self,
        options: DrawOptions,
        problem: SharpnessProblem,
        in_turn: PairsInTurn,
        at_once: Pairs | None = None,
        pairs: int = 1,
        whole: MiniBatch | None = None,
    ) -> None:
        self._options, self._problem, self._whole = options, problem, whole
        self._in_turn, self._at_once, self._pairs = in_turn, at_once, pairs
        (self._ranks, self._rank), self._sum = problem.turns, problem.reduce
        self._merged = {q: torch.zeros(6, dtype=torch.float64) for q in options.quantities}
        self._batches = dict.fromkeys(options.quantities, 0)
        # At η = 0 there is no update over η.
        self._open = [q for q in options.quantities if q != "lambda_gen" or problem.lr]
        self._zero_gradients = self._unconverged = 0.0
        self._begun = self._drawn = 0
        self._failure: Exception | None = None
        self._lost: list[Quantity] = []
        self.errors: list[Exception] = []

    @property
    def enough(self) -> bool:
        """Whether every quantity is known well enough, or there have been as many batches as may be."""
        return not self._open or self._drawn >= self._options.num_batches

    def draw(self) -> bool:
        """Draw until there are enough."""
        while not self.enough:
            self.next_pairs()
        return True

    def give_up(self) -> None:
        """Draw no more: what is not known well enough by now is lost."""
        for quantity in list(self._open):
            self._lose(quantity)

    def _lose(self, quantity: Quantity) -> None:
        self._open.remove(quantity)
        self._lost.append(quantity)
        self._merged[quantity] = torch.full((6,), torch.nan, dtype=torch.float64)

    def next_pairs(self) -> None:
        """Draw pairs of batches on every rank, and add them one after the other. One collective."""
        left = math.ceil((self._options.num_batches - self._drawn) / PAIR / self._ranks)
        count = min(self._pairs, left)
        numbers = [self._begun + index * self._ranks + self._rank for index in range(count)]
        pairs = [PairMoments() for _ in numbers]
        try:
            pairs = self._observe(numbers)
        except Exception as error:
            self._failure = error.with_traceback(None)
        if self._whole is not None:
            for pair in pairs:
                self._multiply_by_whole(self._whole, pair)
        self._begun += count * self._ranks
        rows = self._exchange(pairs)
        if self._failure is not None:
            raise self._failure
        for row in rows:
            if not self.enough:  # one process would not have drawn what is left
                self._merge(row)

    def _observe(self, numbers: Sequence[int]) -> list[PairMoments]:
        # An eigenvalue takes products with one mini-batch until it is found.
        alone = [quantity for quantity in self._open if quantity == "lambda_max_b"]
        if self._at_once is not None and alone != self._open:
            try:
                pairs = self._at_once.observe(numbers, self._open)
            except Exception:  # a mini-batch is smaller than others, say, or memory is short: in turn it may do
                self._at_once = None
            else:
                for pair, other in zip(pairs, self._in_turn.observe(numbers, alone) if alone else [], strict=False):
                    pair.moments |= other.moments
                    pair.unconverged = other.unconverged
                return pairs
        return self._in_turn.observe(numbers, self._open)

    def _merge(self, row: Tensor) -> None:
        """Add what a pair gave, and leave alone what is now known well enough."""
        self._drawn += PAIR
        self._zero_gradients += float(row[-2])
        self._unconverged += float(row[-1]) if "lambda_max_b" in self._open else 0.0
        for column, quantity in enumerate(self._options.quantities):
            if quantity not in self._open:
                continue
            moments = merge_moments(torch.stack([self._merged[quantity], row[6 * column : 6 * (column + 1)]]))
            try:
                check_finite(float(moments.sum()))
            except ArithmeticError as error:
                self.errors.append(error.with_traceback(None))
                self._lose(quantity)
                continue
            self._merged[quantity], self._batches[quantity] = moments, self._drawn
            # Batches that tell something: of those without a gradient there may be any number.
            told = float(moments[0]) * (PAIR if quantity in CROSSED else 1)
            goal = self._options.relative_error * float(ratio_of_means(moments).abs())
            # Draws that all gave 0 have a standard error of 0 too, and may have missed those that do not.
            if told >= self._options.min_batches and goal > 0.0 and float(ratio_standard_error(moments)) <= goal:
                self._open.remove(quantity)

    def _multiply_by_whole(self, whole: MiniBatch, pair: PairMoments) -> None:
        """Curvature of every rank's vectors on the whole set, of which each has a share: all ranks multiply each."""
        kinds = bool(set(CROSS_PRODUCT) & set(self._open)) + ("lambda_gen" in self._open)
        for rank in range(self._ranks):
            for index in range(kinds):
                cross = pair.crosses[index] if pair.crosses and rank == self._rank else None
                curvature = 0.0
                for side in range(PAIR):
                    vector = whole.operator.space.zeros() if cross is None else cross.vectors[side]
                    if cross is None and rank == self._rank:
                        vector.fill_(torch.nan)  # this rank failed: what comes of it is NaN on all of them
                    curvature += whole.curvature_along(vector if self._sum is None else self._sum(vector))
                if cross is not None:
                    pair.add_crossed(cross, curvature)
                    self._problem.on_product()
        self._failure = self._failure or whole.operator.error

    def _exchange(self, pairs: Sequence[PairMoments]) -> Tensor:
        """What the pairs of all ranks gave, in the order of their numbers: moments, and counts of batches."""
        nothing = torch.zeros(6, dtype=torch.float64)
        own = [
            torch.cat(
                [pair.moments.get(quantity, nothing) for quantity in self._options.quantities]
                + [torch.tensor([pair.zero_gradients, pair.unconverged, severity(self._failure)]).double()]
            )
            for pair in pairs
        ]
        table = torch.zeros(len(pairs), self._ranks, len(own[0]), dtype=torch.float64)
        table[:, self._rank] = torch.stack(own)
        if self._sum is not None:
            table = self._sum(table.to(self._problem.trainer.strategy.root_device)).cpu()
        if self._failure is None and table[..., -1].any():
            self._failure = elsewhere("a mini-batch", float(table[..., -1].max()))
        return table[..., :-1].flatten(0, 1)

    def values(self) -> dict[str, float]:
        """Estimates, standard errors, and how many batches each took."""
        if self._zero_gradients == self._drawn > 0:
            warn(
                "no mini-batch that was drawn has a gradient, and sharpness along it is not defined: all samples are "
                "fitted, or the loss is constant."
            )
        lost_all = len(self._lost) == len(self._merged)
        values = {"zero_gradient_batches": math.nan if lost_all else self._zero_gradients}
        if "lambda_max_b" in self._merged:
            values["lambda_max_b_unconverged"] = math.nan if "lambda_max_b" in self._lost else self._unconverged
        for quantity, moments in self._merged.items():
            value, error = float(ratio_of_means(moments)), float(ratio_standard_error(moments))
            values |= {
                quantity: value,
                f"{quantity}_stderr": error,
                f"{quantity}_batches": math.nan if quantity in self._lost else float(self._batches[quantity]),
            }
        return values


def check_finite(number: float) -> None:
    """Refuse a number that is not finite."""
    if not math.isfinite(number):
        raise ArithmeticError(
            f"the loss of a mini-batch and its derivatives must be finite, got {number}: look at the loss there."
        )
