"""The measurement of mini-batch sharpness at one step: of the step's own batch, and of batches that are drawn."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from lightning_curvature.batch_sharpness.at_once import AtOnceChoice, BatchesAtOnce
from lightning_curvature.batch_sharpness.draws import Draws, check_finite
from lightning_curvature.batch_sharpness.pairs import PairsAtOnce, PairsInTurn
from lightning_curvature.batch_sharpness.problem import CROSSED, FULL_GRADIENT, DrawOptions, Quantity, SharpnessProblem
from lightning_curvature.distributed.failures import attempted, failure_of
from lightning_curvature.operators import CurvatureOperator
from lightning_curvature.operators.mini_batch import MiniBatch

FullHessian = Literal["pairs", "exact"]


class SharpnessMeasurement:
    """Estimates E_B over mini-batches until the standard errors are small enough.

    Each quantity is a ratio of two means over independent draws; it is left alone as soon as the standard error of that
    ratio falls below ``relative_error`` of it. A draw whose numerator and denominator are both 0 says nothing of a
    ratio and is left out, lest few others pass for many. Ranks draw different pairs of batches at a time, and then look
    at them one after the other as one process would, which stops at the same pair. Where parameters are sharded, all
    ranks measure each pair together (see :class:`~.batch_sharpness.sharded.ShardedProblem`).

    Args:
        quantities: names.
        num_batches: the most batches, over all ranks, in whole pairs: an odd number is rounded up.
        min_batches: the fewest that have a gradient.
        relative_error: relative standard error to reach.
        tolerance: relative residual of "lambda_max_b".
        full_hessian: "pairs", in which the other batch stands for all samples, or "exact" products with these.
        batches_at_once: how many mini-batches are differentiated at once, or "auto".
    """

    def __init__(
        self,
        quantities: Sequence[Quantity],
        *,
        num_batches: int,
        min_batches: int,
        relative_error: float,
        tolerance: float,
        full_hessian: FullHessian,
        batches_at_once: BatchesAtOnce,
    ) -> None:
        self.quantities = tuple(quantities)
        self.drawn: tuple[Quantity, ...] = tuple(q for q in self.quantities if q != "step_sharpness")
        self._exact = full_hessian == "exact" and bool(set(CROSSED) & set(self.drawn))
        self._options = DrawOptions(self.drawn, num_batches, min_batches, relative_error, tolerance)
        # Products with the whole probe set take much longer than to launch a mini-batch.
        self.at_once = AtOnceChoice(1 if self._exact else batches_at_once)

    def keys(self) -> list[str]:
        """Keys of all values, the same at every measurement."""
        keys: list[str] = []
        for quantity in self.quantities:
            keys += [quantity, f"{quantity}_stderr"]
            if quantity in self.drawn:
                keys.append(f"{quantity}_batches")
        if "lambda_max_b" in self.drawn:
            keys.append("lambda_max_b_unconverged")
        return keys + (["zero_gradient_batches"] if self.drawn else [])

    def measure(self, problem: SharpnessProblem, fail: Callable[[Exception], None]) -> dict[str, float]:
        """Measure everything asked for. Every rank comes here, and leaves together with the others.

        What fails takes with it what needs it, and nothing else.

        Args:
            problem: what is measured.
            fail: called with the error that ended a measurement; returns where training goes on.
        """
        values = dict.fromkeys(self.keys(), math.nan)
        if "step_sharpness" in self.quantities:
            values |= attempted(lambda: self._step_sharpness(problem), fail) or {}
        if problem.population is not None and self.drawn:
            values |= self._drawn_batches(problem, fail)
        return values

    def _step_sharpness(self, problem: SharpnessProblem) -> dict[str, float]:
        """Sharpness of the data of the coming step, of all ranks together."""
        operator = problem.together(problem.step)
        with contextlib.closing(MiniBatch(operator)) as batch:
            curvature, square = batch.self_curvature, batch.squared_norm
            problem.on_product()
        check_together(problem, operator, curvature)
        return {"step_sharpness": curvature / square if square else math.nan}

    def _drawn_batches(self, problem: SharpnessProblem, fail: Callable[[Exception], None]) -> dict[str, float]:
        whole = attempted(lambda: self._whole_set(problem), fail)
        if whole is None:
            return {}
        options, full = self._options, None
        with contextlib.closing(whole):
            if set(FULL_GRADIENT) & set(self.drawn):
                full = attempted(lambda: self._full_gradient(problem, whole), fail)
                if full is None:
                    options = replace(options, quantities=tuple(q for q in self.drawn if q not in FULL_GRADIENT))
            if not options.quantities:
                return {}
            draws = self._draws(options, problem, full, whole)
            if attempted(draws.draw, fail) is None:
                draws.give_up()
        for error in draws.errors:
            fail(error)
        return draws.values()

    def _full_gradient(self, problem: SharpnessProblem, whole: MiniBatch) -> Tensor:
        gradient = whole.gradient
        check_together(problem, whole.operator, whole.operator.space.norm(gradient))
        return gradient

    def _draws(self, options: DrawOptions, problem: SharpnessProblem, full: Tensor | None, whole: MiniBatch) -> Draws:
        in_turn = PairsInTurn(options, problem, full, with_whole=self._exact)
        at_once = PairsAtOnce(options, problem, full)
        pairs = self.at_once.pairs(options, problem, in_turn, at_once)
        return Draws(
            options,
            problem,
            in_turn,
            at_once if pairs > 1 else None,
            pairs,
            whole if self._exact else None,
        )

    def _whole_set(self, problem: SharpnessProblem) -> MiniBatch:
        """The whole probe set as one batch: for its gradient, and with exact products for these."""
        used = self._exact or set(FULL_GRADIENT) & set(self.drawn)
        return MiniBatch(problem.together(problem.whole() if used else [], multiplied=self._exact))


def check_together(problem: SharpnessProblem, operator: CurvatureOperator, number: float) -> None:
    """Check a number that all ranks have in common; one that failed sent NaN, so that all of them leave here."""
    try:
        check_finite(number)
    except ArithmeticError as error:
        own, operator.error = operator.error, None  # told here: its next product may well do
        raise failure_of(problem.trainer, own, error).cause from None
