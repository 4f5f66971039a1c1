"""The draws of one measurement of mini-batch sharpness: what each gives, and when there are enough."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.functional import add_to_moments, merge_moments, ratio_of_means, ratio_standard_error
from lightning_curvature.linalg import VectorSpace, eigenpairs
from lightning_curvature.mini_batch import MiniBatch
from lightning_curvature.operators import GaussNewtonOperator, HessianOperator, MicroBatch
from lightning_curvature.parallel import sum_over_ranks
from lightning_curvature.probe_draws import Population
from lightning_curvature.probe_loss import ProbeLoss
from lightning_curvature.reporting import warn
from lightning_curvature.trial_steps import TrialSteps

Quantity = Literal[
    "batch_sharpness", "step_sharpness", "modified_batch_sharpness", "ias", "gni", "lambda_gen", "lambda_max_b"
]
QUANTITIES: tuple[Quantity, ...] = (
    "batch_sharpness",
    "step_sharpness",
    "modified_batch_sharpness",
    "ias",
    "gni",
    "lambda_gen",
    "lambda_max_b",
)

# What each needs beside the gradient of a batch, with its graph.
_OWN_PRODUCT = ("batch_sharpness", "modified_batch_sharpness")
_CROSS_PRODUCT = ("ias", "gni")
CROSSED = (*_CROSS_PRODUCT, "lambda_gen")
# Of the pairs of batches that a rank draws at a time, each gives the curvature for the other's gradient.
PAIR = 2


@dataclass(frozen=True)
class SharpnessProblem:
    """What is measured at one step.

    Attributes:
        trainer: the Trainer.
        loss: makes micro-batches of what was drawn.
        parameters: the parameters that are differentiated.
        lr: η.
        population: of which mini-batches are drawn, or None where only the step's own batch counts.
        step: this rank's micro-batches of the coming step, weighted as its gradient weights them.
        trials: makes the updates of the optimizer, for "lambda_gen".
        key: of the draws: other batches at every step, and the same ones in a resumed run.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    loss: ProbeLoss
    parameters: Sequence[Tensor]
    lr: float
    population: Population | None
    step: Sequence[MicroBatch]
    trials: TrialSteps | None
    key: int
    on_product: Callable[[], None]


@dataclass(frozen=True)
class DrawOptions:
    """How many mini-batches are drawn, and what is measured on them.

    Attributes:
        quantities: names, without "step_sharpness".
        operator: of the curvature.
        num_batches: the most batches, over all ranks.
        min_batches: the fewest that tell something.
        relative_error: relative standard error to reach.
        tolerance: relative residual of "lambda_max_b".
    """

    quantities: tuple[Quantity, ...]
    operator: type[HessianOperator] | type[GaussNewtonOperator]
    num_batches: int
    min_batches: int
    relative_error: float
    tolerance: float


@dataclass(frozen=True)
class _Cross:
    """Two vectors of a pair whose curvature under the Hessian of all samples is wanted.

    Attributes:
        vectors: one of each batch.
        factor: from the sum of both curvatures to a numerator.
        denominators: by quantity.
    """

    vectors: tuple[Tensor, Tensor]
    factor: float
    denominators: dict[Quantity, float]


class Draws:
    """The draws of one measurement: moments of the pair that this rank has drawn, and of all pairs together.

    Args:
        options: what is measured, and how exactly.
        problem: on what.
        full: ∇L of the whole probe set, where a quantity needs it.
        whole: products with the whole probe set, shared out over the ranks; None where the other batch of a pair stands
            for it.
    """

    def __init__(
        self, options: DrawOptions, problem: SharpnessProblem, full: Tensor | None, whole: MiniBatch | None
    ) -> None:
        self._options, self._problem, self._full, self._whole = options, problem, full, whole
        self._ranks, self._rank = problem.trainer.world_size, problem.trainer.global_rank
        self._sum = sum_over_ranks(problem.trainer)
        self._pair: dict[Quantity, Tensor] = {}
        self._merged = {q: torch.zeros(6, dtype=torch.float64) for q in options.quantities}
        self._batches = dict.fromkeys(options.quantities, 0)
        # At η = 0 there is no update over η.
        self._open = [q for q in options.quantities if q != "lambda_gen" or problem.lr]
        self._zero_gradients = 0.0
        self._rounds = self._drawn = 0
        self._vector: list[Tensor] = []
        self._full_square = float(VectorSpace(problem.parameters).squared_norm(full)) if full is not None else math.nan
        self._failure: Exception | None = None

    @property
    def enough(self) -> bool:
        """Whether every quantity is known well enough, or there have been as many batches as may be."""
        return not self._open or self._drawn >= self._options.num_batches

    def next_pairs(self) -> None:
        """Draw a pair of batches on every rank, and add them one after the other. One collective."""
        self._pair, zeros = dict.fromkeys(self._options.quantities, torch.zeros(6, dtype=torch.float64)), 0
        crosses: list[_Cross] = []
        try:
            zeros, crosses = self._observe(self._rounds * self._ranks + self._rank)
        except Exception as error:
            self._failure = error.with_traceback(None)
        if self._whole is not None:
            self._multiply_by_whole(self._whole, crosses)
        self._rounds += 1
        pairs = self._exchange(zeros)
        if self._failure is not None:
            raise self._failure
        for pair in pairs:
            if not self.enough:  # one process would not have drawn what is left
                self._merge(pair)

    def _merge(self, pair: Tensor) -> None:
        """Add what a pair gave, and leave alone what is now known well enough."""
        self._drawn += PAIR
        self._zero_gradients += float(pair[-1])
        for column, quantity in enumerate(self._options.quantities):
            if quantity not in self._open:
                continue
            moments = merge_moments(torch.stack([self._merged[quantity], pair[6 * column : 6 * (column + 1)]]))
            check_finite(float(moments.sum()))
            self._merged[quantity], self._batches[quantity] = moments, self._drawn
            # Batches that tell something: of those without a gradient there may be any number.
            told = float(moments[0]) * (PAIR if quantity in CROSSED else 1)
            goal = self._options.relative_error * float(ratio_of_means(moments).abs())
            # Draws that all gave 0 have a standard error of 0 too, and may have missed those that do not.
            if told >= self._options.min_batches and goal > 0.0 and float(ratio_standard_error(moments)) <= goal:
                self._open.remove(quantity)

    def _observe(self, number: int) -> tuple[int, list[_Cross]]:
        """Measure pair ``number``; returns how many of its batches had no gradient, and what all samples shall tell."""
        problem, population = self._problem, self._problem.population
        assert population is not None
        zeros, pair, crosses = 0, [], []
        with contextlib.ExitStack() as stack:
            for index in (PAIR * number, PAIR * number + 1):
                drawn = population.draw(problem.key, index)
                parts = problem.loss.parts_of(drawn, sum(probe.size for probe in drawn))
                operator = self._options.operator(parts, problem.parameters, processes=problem.trainer.num_devices)
                batch = stack.enter_context(contextlib.closing(MiniBatch(operator)))
                self._observe_alone(batch)
                zeros += batch.squared_norm == 0.0
                pair.append(batch)
                if self._whole is not None or not self._crossed_open():
                    batch.close()  # one graph at a time is enough
            if self._crossed_open():
                first, second = pair
                crosses = self._crosses(first, second)
                if self._whole is None:
                    for cross in crosses:
                        one, other = cross.vectors
                        self._add_crossed(cross, second.curvature_along(one) + first.curvature_along(other))
        return zeros, crosses

    def _observe_alone(self, batch: MiniBatch) -> None:
        """Quantities that a batch gives by itself."""
        if set(_OWN_PRODUCT) & set(self._open):
            curvature, square = batch.self_curvature, batch.squared_norm
            self._problem.on_product()
            if square:
                self._add("batch_sharpness", curvature / square)
                self._add("modified_batch_sharpness", curvature, square)
        if "lambda_max_b" in self._open:
            found = eigenpairs(
                batch.operator,
                batch.operator.space,
                largest=1,
                tolerance=self._options.tolerance,
                start=self._vector,
            )
            self._problem.on_product()
            self._vector = found.vectors
            self._add("lambda_max_b", float(found.values))

    def _crossed_open(self) -> int:
        """How many :class:`_Cross` a pair makes."""
        return bool(set(_CROSS_PRODUCT) & set(self._open)) + ("lambda_gen" in self._open)

    def _crosses(self, first: MiniBatch, second: MiniBatch) -> list[_Cross]:
        crosses = []
        if set(_CROSS_PRODUCT) & set(self._open):
            square = (first.squared_norm + second.squared_norm) / PAIR
            denominators: dict[Quantity, float] = {"ias": square} if square else {}
            if self._full is not None:
                denominators["gni"] = self._full_square
            crosses.append(_Cross((first.gradient, second.gradient), 1.0 / PAIR, denominators))
        if "lambda_gen" in self._open:
            assert self._problem.trials is not None
            assert self._full is not None
            space, lr = first.operator.space, self._problem.lr
            own, other = (self._problem.trials.update_for(batch.gradient) for batch in (first, second))
            descent = space.dot(self._full, own) + space.dot(self._full, other)
            crosses.append(_Cross((own, other), 1.0 / (PAIR * lr**2), {"lambda_gen": descent / (PAIR * lr)}))
        return crosses

    def _multiply_by_whole(self, whole: MiniBatch, crosses: list[_Cross]) -> None:
        """Curvature of every rank's vectors on the whole set, of which each has a share: all ranks multiply each."""
        for rank in range(self._ranks):
            for index in range(self._crossed_open()):
                cross = crosses[index] if crosses and rank == self._rank else None
                curvature = 0.0
                for side in range(PAIR):
                    vector = whole.operator.space.zeros() if cross is None else cross.vectors[side]
                    if cross is None and rank == self._rank:
                        vector.fill_(torch.nan)  # this rank failed: what comes of it is NaN on all of them
                    curvature += whole.curvature_along(vector if self._sum is None else self._sum(vector))
                if cross is not None:
                    self._add_crossed(cross, curvature)
        self._failure = self._failure or whole.operator.error

    def _add_crossed(self, cross: _Cross, curvature: float) -> None:
        self._problem.on_product()
        for quantity, denominator in cross.denominators.items():
            self._add(quantity, curvature * cross.factor, denominator)

    def _add(self, quantity: Quantity, numerator: float, denominator: float = 1.0) -> None:
        if quantity in self._open:
            self._pair[quantity] = add_to_moments(self._pair[quantity], numerator, denominator)

    def _exchange(self, zeros: int) -> Tensor:
        """What the pairs of all ranks gave, (ranks, 6 quantities + 1): moments, and batches without a gradient."""
        own = [*self._pair.values(), torch.tensor([float(zeros), float(self._failure is not None)]).double()]
        table = torch.zeros(self._ranks, sum(map(len, own)), dtype=torch.float64)
        table[self._rank] = torch.cat(own)
        if self._sum is not None:
            table = self._sum(table.to(self._problem.trainer.strategy.root_device)).cpu()
        if self._failure is None and table[:, -1].any():
            self._failure = RuntimeError("a mini-batch failed on another rank, which tells more")
        return table[:, :-1]

    def values(self) -> dict[str, float]:
        """Estimates, standard errors, and how many batches each took."""
        if self._zero_gradients == self._drawn > 0:
            warn(
                "no mini-batch that was drawn has a gradient, and sharpness along it is not defined: all samples are "
                "fitted, or the loss is constant."
            )
        values = {"zero_gradient_batches": self._zero_gradients}
        for quantity, moments in self._merged.items():
            value, error = float(ratio_of_means(moments)), float(ratio_standard_error(moments))
            values |= {
                quantity: value,
                f"{quantity}_stderr": error,
                f"{quantity}_batches": float(self._batches[quantity]),
            }
        return values


def check_finite(number: float) -> None:
    """Refuse a number that is not finite."""
    if not math.isfinite(number):
        raise ArithmeticError(
            f"the loss of a mini-batch and its derivatives must be finite, got {number}: look at the loss there."
        )
