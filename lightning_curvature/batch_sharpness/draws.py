"""The draws of one measurement: which pairs this rank draws, and when they are enough."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_curvature.batch_sharpness.options import CROSS_PRODUCT, CROSSED, OF_UPDATES, PAIR, QUANTILES, Quantity
from lightning_curvature.batch_sharpness.pairs import PairMoments, Pairs
from lightning_curvature.distributed.together import cause_together, together
from lightning_curvature.functional import merge_moments, ratio_of_means, ratio_standard_error
from lightning_curvature.monitors.modules import ModuleTable
from lightning_curvature.operators.mini_batch import MiniBatch
from lightning_curvature.reporting.loggers import warn

Lose = Callable[[Sequence[Quantity], Exception], None]


class Draws:
    """Draws pairs on every rank until the quantities are known well enough.

    Args:
        count: number of pairs that each rank measures at once.
        whole: the whole probe set, shared out over the ranks, for exact products.
        lose: called with quantities that cannot be measured, and the error.
    """

    def __init__(self, pairs: Pairs, quantities: Sequence[Quantity], count: int, whole: MiniBatch, lose: Lose) -> None:
        self._pairs, self._quantities, self._count, self._whole, self._lose = pairs, quantities, count, whole, lose
        self._options, self._problem, (self._ranks, self._rank) = pairs.options, pairs.problem, pairs.problem.turns
        self._moments = {quantity: torch.zeros(6, dtype=torch.float64) for quantity in quantities}
        self._batches = dict.fromkeys(quantities, 0)
        modules = pairs.problem.modules
        self._terms = torch.zeros(2, 1 if modules is None else len(modules.names), dtype=torch.float64)
        # Of a pair's row in an exchange: moments, sums by module, counts.
        self._widths = [6 * len(quantities), self._terms.numel(), 3]
        self._open = [q for q in quantities if q not in OF_UPDATES or self._problem.lr]
        self._eigenvalues = list[float]()
        self._begun = self._drawn = self._zero_gradients = self._unconverged = self._skipped = 0

    def draw(self) -> None:
        """Draw until every quantity is known well enough, or as many batches are drawn as the options allow."""
        while not self._is_done():
            left = math.ceil((self._options.num_batches - self._drawn) / PAIR / self._ranks)
            count = min(self._before_exchange(), left)
            numbers = [self._begun + index * self._ranks + self._rank for index in range(count)]
            self._begun += count * self._ranks
            for row in self._exchange(*self._observe(numbers)):
                if not self._is_done():  # one process would not have drawn what is left
                    self._add(row)

    def give_up(self, error: Exception) -> None:
        """Lose the quantities that are not yet known well enough."""
        self._drop(list(self._open), error)

    def _is_done(self) -> bool:
        return not self._open or self._drawn >= self._options.num_batches

    def _before_exchange(self) -> int:
        """Return how many pairs each rank draws before the next exchange, for which the fastest waits.

        No quantity is known well enough before ``min_batches``. Exact products are made by all ranks, pair by pair.
        """
        if self._ranks == 1 or self._options.exact:
            return self._count
        return max(self._count, (self._options.min_batches - self._drawn) // PAIR // self._ranks)

    def _drop(self, quantities: Sequence[Quantity], error: Exception) -> None:
        for quantity in quantities:
            self._open.remove(quantity)
            del self._moments[quantity]
        self._lose(quantities, error)

    def _observe(self, numbers: Sequence[int]) -> tuple[list[PairMoments], Exception | None]:
        """Measure this rank's pairs; return them, and the error where this rank failed."""
        failure = None
        try:
            pairs = []
            for first in range(0, len(numbers), self._count):
                pairs += self._pairs.observe(numbers[first : first + self._count], self._open)
        except Exception as error:
            failure, pairs = error.with_traceback(None), [PairMoments() for _ in numbers]
        if self._options.exact and not (failure and self._problem.sharded):
            try:
                for pair in pairs:
                    self._multiply_by_whole(pair)
            except Exception as error:
                failure = error.with_traceback(None)
            failure = failure or self._whole.operator.error
        return pairs, failure

    def _multiply_by_whole(self, pair: PairMoments) -> None:
        """Add the curvature along the vectors of every rank's pair: all ranks multiply each by their share."""
        kinds = bool(set(CROSS_PRODUCT) & set(self._open)) + ("lambda_gen" in self._open)
        space, reduce = self._whole.operator.space, self._problem.reduce
        for rank in range(self._ranks):
            for index in range(kinds):
                cross = pair.crosses[index] if pair.crosses and rank == self._rank else None
                # NaN where this rank failed: the product is NaN on all of them.
                instead = torch.nan if rank == self._rank else 0.0
                vectors = cross[0] if cross else (space.zeros().fill_(instead),) * PAIR
                curvature = sum(self._whole.curvature_along(reduce(v) if reduce else v) for v in vectors)
                if self._problem.sharded and (error := not_finite(curvature)):
                    raise cause_together(self._problem.trainer, self._whole.operator.error, error)
                if cross is not None:
                    pair.add_crossed(cross, curvature)
                    self._problem.on_product()

    def _exchange(self, pairs: Sequence[PairMoments], failure: Exception | None) -> Tensor:
        """Return moments and counts of the pairs of all ranks, a row each, by their numbers. One collective."""
        empty = torch.zeros(len(pairs), self._ranks, sum(self._widths), dtype=torch.float64, device="cpu")

        def rows() -> Mapping[str, Tensor]:
            if failure is not None:
                raise failure
            table = empty.clone()
            for row, pair in zip(table[:, self._rank], pairs, strict=True):
                of_quantities, by_module, counts = row.split(self._widths)
                for moments, quantity in zip(of_quantities.split(6), self._quantities, strict=True):
                    moments.copy_(pair.moments.get(quantity, moments))
                by_module.view_as(self._terms).copy_(pair.by_module)
                counts.copy_(torch.tensor([pair.zero_gradients, pair.unconverged, pair.skipped]))
            return {"pairs": table}

        alone = self._ranks == 1
        table = rows() if alone else together(self._problem.trainer, rows, {"pairs": empty}, "a mini-batch")
        return table["pairs"].flatten(0, 1)

    def _add(self, row: Tensor) -> None:
        """Add the moments of a pair, and close the quantities that are now known well enough."""
        of_quantities, by_module, counts = row.split(self._widths)
        zero_gradients, unconverged, skipped = map(int, counts)
        self._drawn += PAIR
        self._zero_gradients += zero_gradients
        self._skipped += skipped
        self._unconverged += unconverged if "lambda_max_b" in self._open else 0
        if "batch_sharpness" in self._open:
            self._terms += by_module.view_as(self._terms)
        for quantity, draws in zip(self._quantities, of_quantities.split(6), strict=True):
            if quantity not in self._open:
                continue
            moments = merge_moments(torch.stack([self._moments[quantity], draws]))
            if error := not_finite(float(moments.sum())):
                self._drop([quantity], error)
                continue
            self._moments[quantity], self._batches[quantity] = moments, self._drawn
            if quantity == "lambda_max_b":
                self._eigenvalues += _both(draws)
            # Without those that have no gradient, of which there may be any number.
            batches = float(moments[0]) * (PAIR if quantity in CROSSED else 1)
            goal = self._options.error_of_one * float(ratio_of_means(moments).abs())
            # Draws that are all 0 have a standard error of 0 too, and may have missed those that are not.
            if batches >= self._options.min_batches and goal > 0.0 and float(ratio_standard_error(moments)) <= goal:
                self._open.remove(quantity)

    @property
    def eigenvalues(self) -> tuple[float, ...]:
        """λ_max of the mini-batches that were drawn for it, unless it is lost."""
        return tuple(self._eigenvalues) if "lambda_max_b" in self._moments else ()

    def values(self) -> dict[str, float]:
        """Return estimates, quantiles, standard errors and numbers of batches of the quantities that are not lost."""
        if self._skipped:
            pairs = f"{self._skipped} of {self._drawn // PAIR} pairs"
            warn(f"training_step returns None for a mini-batch of {pairs} that were drawn: they are left out.")
        if self._zero_gradients == self._drawn > 0:
            warn(
                "no mini-batch that was drawn has a gradient, and sharpness along it is not defined: all samples are "
                "fitted, or the loss is constant."
            )
        values = {"zero_gradient_batches": float(self._zero_gradients)} if self._moments else {}
        if "lambda_max_b" in self._moments:
            values["lambda_max_b_unconverged"] = float(self._unconverged)
        if self.eigenvalues:
            levels = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
            found = torch.tensor(self.eigenvalues, dtype=torch.float64).quantile(levels).tolist()
            values |= {f"lambda_max_b_{end}": value for end, value in zip(QUANTILES, found, strict=True)}
        for quantity, moments in self._moments.items():
            values[quantity] = float(ratio_of_means(moments))
            values[f"{quantity}_stderr"] = float(ratio_standard_error(moments))
            values[f"{quantity}_batches"] = float(self._batches[quantity])
        return values

    def table(self) -> ModuleTable | None:
        """Return the terms of batch sharpness by module with their standard errors, where they are wanted and known.

        They are those of means over mini-batches with a gradient. Of equal terms they are down to 1e-8 of these.
        """
        modules = self._pairs.problem.modules
        if modules is None or "batch_sharpness" not in self._moments:
            return None
        count = float(self._moments["batch_sharpness"][0])
        means, squares = self._terms / (count or math.nan)
        errors = ((squares - means.square()).clamp(min=0.0) / (count - 1.0)).sqrt()
        columns = {"batch_sharpness": means, "batch_sharpness_stderr": errors}
        return ModuleTable(modules.names, {key: tuple(column.tolist()) for key, column in columns.items()})


def _both(moments: Tensor) -> list[float]:
    """Return the numerators of two draws, which their mean and Sxx = (x₁ − x₂)²/2 tell; none where there are no two."""
    count, mean, _, squares, *_ = moments.tolist()
    half = math.sqrt(squares / 2.0)
    return [mean - half, mean + half] if count == PAIR else []


def not_finite(number: float) -> ArithmeticError | None:
    """Return the error of a number that is not finite; None for others."""
    if math.isfinite(number):
        return None
    return ArithmeticError(
        f"the loss of a mini-batch and its derivatives must be finite, got {number}: look at the loss there."
    )
