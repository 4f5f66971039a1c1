"""One measurement of mini-batch sharpness: of the step's own batch, and of mini-batches that are drawn."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_curvature.batch_sharpness.at_once import PairsAtOnce, pairs_at_once
from lightning_curvature.batch_sharpness.average import RunningMeans
from lightning_curvature.batch_sharpness.draws import Draws, Lose, not_finite
from lightning_curvature.batch_sharpness.options import FULL_GRADIENT, BatchSharpnessOptions, Quantity
from lightning_curvature.batch_sharpness.pairs import Pairs
from lightning_curvature.batch_sharpness.problem import SharpnessProblem
from lightning_curvature.batch_sharpness.result import BatchSharpnessResult
from lightning_curvature.distributed.together import attempted, cause_together
from lightning_curvature.operators.mini_batch import MiniBatch


class SharpnessMeasurement:
    """Estimates means over mini-batches until their standard errors are small enough.

    Each quantity is a ratio of two means over independent draws; drawing for it ends as soon as the standard error of
    that ratio falls below ``relative_error`` of it. A draw whose numerator and denominator are both 0 says nothing of a
    ratio and is left out, lest few others pass for many. Ranks draw different pairs at a time, exchange their moments
    and add them in order, as one process would, which stops at the same pair.

    Attributes:
        pairs_at_once: how many pairs each rank measures at once; None lets the next measurement choose.
        means: running means over the measurements.
    """

    def __init__(self, options: BatchSharpnessOptions) -> None:
        self._options = options
        self.pairs_at_once: int | None = None
        self.means = RunningMeans(options.average_over)

    def measure(self, problem: SharpnessProblem, fail: Callable[[Exception], None]) -> BatchSharpnessResult:
        """Measure all quantities. Every rank calls it, and leaves it together with the others.

        A failure takes with it the quantities that need what failed, and no others. ``fail`` is called with its error,
        and returns where training goes on.
        """
        values, reasons = dict.fromkeys(self._options.keys(), math.nan), dict[str, str]()

        def lose(quantities: Sequence[Quantity], error: Exception) -> None:
            reasons.update(dict.fromkeys(self._options.keys(quantities), str(error)))
            fail(error)

        if "step_sharpness" in self._options.quantities:
            lose_step = functools.partial(lose, ("step_sharpness",))
            values |= attempted(lambda: self._step_sharpness(problem), lose_step) or {}
        draws = None if problem.population is None else self._drawn_batches(problem, lose)
        values |= draws.values() if draws else {}
        if self._options.average_over > 1:
            values |= self.means.add(values, self._options.quantities)
        return BatchSharpnessResult(
            values,
            draws.table() if draws else None,
            draws.eigenvalues if draws else (),
            {key: reasons[key] for key in reasons if math.isnan(values[key])},
        )

    def _step_sharpness(self, problem: SharpnessProblem) -> dict[str, float]:
        """Return the sharpness of the data of the coming step, of all ranks together."""
        with contextlib.closing(MiniBatch(problem.operator(problem.step))) as batch:
            curvature, square = batch.self_curvature, batch.squared_norm
            problem.on_product()
        _check_finite(problem, batch, curvature)
        return {"step_sharpness": curvature / square if square else math.nan}

    def _drawn_batches(self, problem: SharpnessProblem, lose: Lose) -> Draws | None:
        options, quantities, full = self._options, self._options.drawn, None
        needing = [quantity for quantity in quantities if quantity in FULL_GRADIENT]

        def whole_set() -> MiniBatch:
            """For its gradient, and with exact products for these."""
            used = options.exact or needing
            return MiniBatch(problem.operator(problem.whole() if used else [], multiplied=options.exact))

        whole = attempted(whole_set, functools.partial(lose, quantities))
        if whole is None:
            return None
        with contextlib.closing(whole):
            if needing:
                full = attempted(lambda: _full_gradient(problem, whole), functools.partial(lose, needing))
                quantities = quantities if full is not None else tuple(q for q in quantities if q not in needing)
            if not quantities:
                return None
            at_once = PairsAtOnce(options, problem, full)
            if self.pairs_at_once is None:
                self.pairs_at_once = pairs_at_once(at_once)
            pairs = at_once if self.pairs_at_once > 1 else Pairs(options, problem, full)
            draws = Draws(pairs, quantities, self.pairs_at_once, whole, lose)
            attempted(draws.draw, draws.give_up)
        return draws


def _full_gradient(problem: SharpnessProblem, whole: MiniBatch) -> Tensor:
    _check_finite(problem, whole, whole.operator.space.norm(whole.gradient))
    return whole.gradient


def _check_finite(problem: SharpnessProblem, batch: MiniBatch, number: float) -> None:
    """Raise on all ranks unless a number that they have in common is finite; a rank that failed sent NaN."""
    if error := not_finite(number):
        operator = batch.operator
        failure, operator.error = operator.error, None  # reported here: its next product may succeed
        raise cause_together(problem.trainer, failure, error) from None
