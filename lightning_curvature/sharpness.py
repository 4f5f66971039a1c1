"""The measurement of mini-batch sharpness at one step: of the step's own batch, and of batches that are drawn."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from lightning_curvature.failures import failure_of
from lightning_curvature.mini_batch import MiniBatch
from lightning_curvature.operators import Curvature, CurvatureOperator, operator_type
from lightning_curvature.parallel import sum_over_ranks
from lightning_curvature.sharpness_at_once import AtOnceChoice, BatchesAtOnce
from lightning_curvature.sharpness_draws import Draws, check_finite
from lightning_curvature.sharpness_pairs import PairsAtOnce, PairsInTurn
from lightning_curvature.sharpness_problem import CROSSED, FULL_GRADIENT, DrawOptions, Quantity, SharpnessProblem

FullHessian = Literal["pairs", "exact"]


class SharpnessMeasurement:
    """Estimates E_B over mini-batches until the standard errors are small enough.

    Each quantity is a ratio of two means over independent draws; it is left alone as soon as the standard error of that
    ratio falls below ``relative_error`` of it. A draw whose numerator and denominator are both 0 says nothing of a
    ratio and is left out, lest few others pass for many. Ranks draw different pairs of batches at a time, and then look
    at them one after the other as one process would, which stops at the same pair.

    Args:
        quantities: names.
        curvature: "hessian" or "gauss_newton".
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
        curvature: Curvature,
        num_batches: int,
        min_batches: int,
        relative_error: float,
        tolerance: float,
        full_hessian: FullHessian,
        batches_at_once: BatchesAtOnce,
    ) -> None:
        self.quantities = tuple(quantities)
        self.drawn: tuple[Quantity, ...] = tuple(q for q in self.quantities if q != "step_sharpness")
        self._operator = operator_type(curvature)
        self._exact = full_hessian == "exact" and bool(set(CROSSED) & set(self.drawn))
        self._options = DrawOptions(self.drawn, self._operator, num_batches, min_batches, relative_error, tolerance)
        # Products with the whole probe set take much longer than to launch a mini-batch.
        self.at_once = AtOnceChoice(1 if self._exact else batches_at_once)

    def keys(self) -> list[str]:
        """Keys of all values, the same at every measurement."""
        keys: list[str] = []
        for quantity in self.quantities:
            keys += [quantity, f"{quantity}_stderr"]
            if quantity in self.drawn:
                keys.append(f"{quantity}_batches")
        return keys + (["zero_gradient_batches"] if self.drawn else [])

    def measure(self, problem: SharpnessProblem, fail: Callable[[Exception], None]) -> dict[str, float]:
        """Measure everything asked for. Every rank comes here, and leaves together with the others.

        Args:
            problem: what is measured.
            fail: called with the error that ended a measurement; returns where training goes on.
        """
        values = dict.fromkeys(self.keys(), math.nan)
        for part in (self._step_sharpness, self._drawn_batches):
            errors: list[Exception] = []
            try:
                values |= part(problem)
            except Exception as error:
                # Let go of the frames, which hold graphs.
                errors.append(error.with_traceback(None))
            if errors:
                fail(errors.pop())
        return values

    def _step_sharpness(self, problem: SharpnessProblem) -> dict[str, float]:
        """Sharpness of the data of the coming step, of all ranks together."""
        if "step_sharpness" not in self.quantities:
            return {}
        operator = self._operator(problem.step, problem.parameters, reduce=sum_over_ranks(problem.trainer))
        with contextlib.closing(MiniBatch(operator)) as batch:
            curvature, square = batch.self_curvature, batch.squared_norm
            problem.on_product()
        check_together(problem, operator, curvature)
        return {"step_sharpness": curvature / square if square else math.nan}

    def _drawn_batches(self, problem: SharpnessProblem) -> dict[str, float]:
        if problem.population is None or not self.drawn:
            return {}
        with contextlib.closing(self._whole_set(problem)) as whole:
            full = None
            if set(FULL_GRADIENT) & set(self.drawn):
                full = whole.gradient
                check_together(problem, whole.operator, whole.operator.space.norm(full))
            draws = self._draws(problem, full, whole)
            while not draws.enough:
                draws.next_pairs()
        return draws.values()

    def _draws(self, problem: SharpnessProblem, full: Tensor | None, whole: MiniBatch) -> Draws:
        in_turn = PairsInTurn(self._options, problem, full, with_whole=self._exact)
        at_once = PairsAtOnce(self._options, problem, full)
        pairs = self.at_once.pairs(self._options, problem, in_turn, at_once)
        return Draws(
            self._options,
            problem,
            in_turn,
            at_once if pairs > 1 else None,
            pairs,
            whole if self._exact else None,
        )

    def _whole_set(self, problem: SharpnessProblem) -> MiniBatch:
        """The whole probe set as one batch: for its gradient, and with exact products for these."""
        assert problem.population is not None
        used = self._exact or set(FULL_GRADIENT) & set(self.drawn)
        parts = problem.loss.parts(problem.population.whole()) if used else []
        reduce = sum_over_ranks(problem.trainer)
        if not self._exact:
            return MiniBatch(CurvatureOperator(parts, problem.parameters, reduce=reduce))
        processes = problem.trainer.num_devices
        return MiniBatch(self._operator(parts, problem.parameters, reduce=reduce, processes=processes))


def check_together(problem: SharpnessProblem, operator: CurvatureOperator, number: float) -> None:
    """Check a number that all ranks have in common; one that failed sent NaN, so that all of them leave here."""
    try:
        check_finite(number)
    except ArithmeticError as error:
        raise failure_of(problem.trainer, operator.error, error).cause from None
