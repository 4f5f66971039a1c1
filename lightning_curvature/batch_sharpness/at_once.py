"""Mini-batches differentiated many at once: how, and whether it pays."""

import contextlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_curvature.batch_sharpness.options import CROSSED, OF_UPDATES, OWN_PRODUCT, PAIR, Quantity
from lightning_curvature.batch_sharpness.pairs import PairMoments, Pairs
from lightning_curvature.batch_sharpness.problem import SharpnessProblem
from lightning_curvature.distributed.together import attempt_together
from lightning_curvature.losses.samples import equal_up_to_rounding
from lightning_curvature.losses.stacked import copies_of, forward_operations
from lightning_curvature.reporting.loggers import warn

# "auto" takes this many at once, which are as many as `min_batches` asks for, ...
_COUNT = 16
# ... where parameters and floating-point operations of a forward are at most so many. On a CPU, MLPs, CNNs and
# transformers below both were 1.1 to 3.4 times as fast at once, and slower above 200 thousand parameters, where copies
# of them no longer fit into the cache (docs/benchmark_batch_sharpness.md).
_PARAMETERS, _OPERATIONS = 100_000, 25_000_000


class PairsAtOnce(Pairs):
    """Measures pairs, all mini-batches at once by ``torch.vmap`` over a copy of the parameters for each.

    This pays where launching a mini-batch takes longer than computing it. Eigenvalues are searched for one after the
    other, and so is everything from the first mini-batches on that cannot be stacked.
    """

    _fails = False

    def observe(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Draw the pairs of these numbers and measure the wanted quantities."""
        eigenvalue = [quantity for quantity in wanted if quantity == "lambda_max_b"]
        if self._fails or len(eigenvalue) == len(wanted):
            return super().observe(numbers, wanted)
        try:
            pairs = self.stacked(numbers, wanted)
        except Exception:  # a mini-batch is smaller than others, say, or memory is short
            self._fails = True
            return super().observe(numbers, wanted)
        for pair, other in zip(pairs, super().observe(numbers, eigenvalue) if eigenvalue else (), strict=False):
            pair.moments |= other.moments
            pair.unconverged = other.unconverged
        return pairs

    def stacked(self, numbers: Sequence[int], wanted: Collection[Quantity]) -> list[PairMoments]:
        """Measure the wanted quantities, but "lambda_max_b", of all mini-batches at once.

        Raise where ``vmap`` cannot follow the training step, or the mini-batches differ in shape.
        """
        problem, population = self.problem, self.problem.population
        assert population is not None
        draws = [population.draw(problem.key, PAIR * number + index) for number in numbers for index in range(PAIR)]
        copies = copies_of(problem.parameters, len(draws))
        micro_batches = problem.loss.parts_of_many(draws, problem.parameters, copies)
        operator = problem.exact(micro_batches, copies)
        pairs = [PairMoments() for _ in numbers]

        def terms_along(vectors: Tensor, squares: Tensor) -> Tensor:
            """Return vᵀAv of each mini-batch for one vector of each, by parameter: (mini-batches, parameters).

            A single product; 0 for a vector of zeros.
            """
            # To unit length, so that products stay in the range of float32.
            lengths = torch.where(squares > 0.0, squares.sqrt(), 1.0)
            units = vectors / lengths.to(vectors.dtype)[:, None]
            products = operator.space.views(operator(operator.space.pack(problem.space.views(units))))
            problem.on_product()
            pieces = zip(problem.space.views(units), products, strict=True)
            rows = [_dots(u.reshape(len(u), -1), p.reshape(len(p), -1)) for u, p in pieces]
            return squares[:, None] * torch.stack(rows, dim=1)

        with contextlib.closing(operator):
            gradients = problem.space.pack(operator.space.views(operator.gradient()), len(draws))
            squares = _dots(gradients, gradients)
            norms = squares.tolist()
            for index, square in enumerate(norms):
                pairs[index // PAIR].zero_gradients += square == 0.0
            if set(OWN_PRODUCT) & set(wanted):
                for index, terms in enumerate(terms_along(gradients, squares).cpu()):  # waits for the device once
                    pairs[index // PAIR].add_own(float(terms.sum()), norms[index], problem.by_module(terms))
            updates = [self.update_for(gradient) for gradient in gradients] if set(OF_UPDATES) & set(wanted) else []
            if "update_sharpness" in wanted:
                vectors = torch.stack(updates)
                lengths = _dots(vectors, vectors)
                descents = problem.lr * _dots(gradients, vectors)
                numbers_of = torch.stack([terms_along(vectors, lengths).sum(1), descents, lengths], dim=1).tolist()
                for index, (curvature, descent, square) in enumerate(numbers_of):
                    pairs[index // PAIR].add_update(curvature, descent, square)
            if set(CROSSED) & set(wanted):
                rows = range(0, len(draws), PAIR)
                crosses = [
                    self._crosses(wanted, (gradients[i], gradients[i + 1]), norms[i : i + PAIR], updates[i : i + PAIR])
                    for i in rows
                ]
                for kind in zip(*crosses, strict=True):
                    # Each vector is multiplied by the Hessian of the other mini-batch.
                    swapped = torch.stack([vector for vectors, _ in kind for vector in reversed(vectors)])
                    curvatures = terms_along(swapped, _dots(swapped, swapped)).sum(1).reshape(-1, PAIR).sum(dim=1)
                    for pair, cross, curvature in zip(pairs, kind, curvatures.tolist(), strict=True):
                        pair.add_crossed(cross, curvature)
        return pairs


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of the rows, (rows,); in float64, as squares of float32 numbers may leave its range."""
    return torch.linalg.vecdot(a.double(), b.double())


def pairs_at_once(at_once: PairsAtOnce) -> int:
    """Return how many pairs every rank measures at once; 1 for one mini-batch after the other. At most one collective.

    The first pair is measured in both ways, which must agree: a step that ``torch.vmap`` cannot follow, that draws from
    Python's random numbers, or that holds its parameters elsewhere too, is measured one mini-batch after the other.
    """
    options, problem = at_once.options, at_once.problem
    wanted = options.batches_at_once
    count = _COUNT if wanted == "auto" else wanted
    # Products with the whole probe set take much longer than to launch a mini-batch.
    if options.exact or count == 1 or problem.sharded or set(options.drawn) == {"lambda_max_b"}:
        return 1

    def compare() -> Mapping[str, Tensor]:
        if wanted == "auto" and not _is_small(problem):
            raise ValueError("the model is too large for it to pay")
        names: list[Quantity] = ["modified_batch_sharpness"]
        (one,), (other,) = Pairs.observe(at_once, [0], names), at_once.stacked([0], names)
        if not same(one, other):
            raise ValueError("its gradients come out differently there")
        return {}

    outcome = attempt_together(problem.trainer, compare, {}, "measuring mini-batches at once")
    if outcome.error is None:
        return (count + 1) // PAIR
    if wanted != "auto":
        reason = f"{type(outcome.error).__name__}: {outcome.error}".splitlines()[0]
        warn(
            f"batches_at_once must be 1 for a training step that torch.vmap cannot repeat, got {wanted} ({reason}): "
            "mini-batches are measured one after the other.",
            any_rank=outcome.here,
        )
    return 1


def same(one: PairMoments, other: PairMoments) -> bool:
    """Return whether two measurements of one pair are the same but for rounding."""
    if one.zero_gradients != other.zero_gradients or one.moments.keys() != other.moments.keys():
        return False
    # n and the means of x and y; deviations from the means are rounding alone.
    return all(equal_up_to_rounding(one.moments[q][:3], other.moments[q][:3]) for q in one.moments)


def _is_small(problem: SharpnessProblem) -> bool:
    """Return whether launching a mini-batch takes longer than computing it."""
    if sum(p.numel() for p in problem.parameters) > _PARAMETERS:
        return False
    parts = problem.draw(0)
    problem.loss.check(parts[0])  # not to count the operations of the check
    return sum(forward_operations(part.evaluate) for part in parts) <= _OPERATIONS
