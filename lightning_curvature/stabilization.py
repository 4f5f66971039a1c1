"""One measurement of sample growth: subspaces, coefficients of the increment, and the estimators for each k."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_curvature.failures import failure_of
from lightning_curvature.functional import (
    QuadraticIncrement,
    gaussian_moment,
    increment,
    relative_model_error,
    sampled_gaussian_moment,
)
from lightning_curvature.linalg import VectorSpace
from lightning_curvature.operators import HessianOperator
from lightning_curvature.operators.exact import check_graph
from lightning_curvature.operators.micro_batches import building_graphs
from lightning_curvature.parallel import sum_over_ranks
from lightning_curvature.probing import (
    Subspace,
    eigen_subspace,
    given_subspace,
    pairwise_dots,
    products_at_once,
    products_with,
)
from lightning_curvature.sample_growth import POINT, CriterionRow, SampleGrowth, mean_and_error
from lightning_curvature.stabilization_problem import GrowthOptions, GrowthProblem, Quantity


def measure_growth(options: GrowthOptions, problem: GrowthProblem) -> SampleGrowth:
    """Measure all criteria at the parameters as they are. Called on every rank.

    Raises:
        Exception: what a loss, or a rank, could not give.
    """
    return _Measurement(options, problem).run()


class _Measurement:
    def __init__(self, options: GrowthOptions, problem: GrowthProblem) -> None:
        self._options, self._problem = options, problem
        self._losses, self._samples = problem.losses, problem.losses.samples
        self._reduce = sum_over_ranks(problem.trainer)
        self._space = VectorSpace(problem.parameters)
        self._result = SampleGrowth(tolerance=options.model_tolerance)
        self._start: Sequence[Tensor] = ()

    def run(self) -> SampleGrowth:
        options = self._options
        full = self._full_space_draws() if "delta_2" in options.quantities and "direct" in options.estimators else {}
        traces = self._traces() if "delta_2" in options.quantities and "gaussian_moment" in options.estimators else {}
        for k in options.sample_sizes:
            with contextlib.closing(self._operator(range(k), k)) as operator:
                self._at(k, operator, full, traces)
        return self._result

    def _new(self, k: int) -> range:
        """Numbers of the samples that stand for the next one."""
        return range(k, k + self._options.candidates)

    def _operator(self, numbers: Iterable[int], total: int) -> HessianOperator:
        parts = self._losses.parts(list(numbers), total)
        processes = self._problem.trainer.num_devices
        return HessianOperator(parts, self._problem.parameters, reduce=self._reduce, processes=processes)

    # ---- one k -------------------------------------------------------------------------------------------------------

    def _at(
        self, k: int, operator: HessianOperator, full: dict[float, Tensor], traces: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        options = self._options
        wants_subspace = "delta_2_subspace" in options.quantities
        subspace = None
        if wants_subspace:
            with self._timed("subspace"):
                subspace = self._subspace(k, operator)
            self._result.products += subspace.products
        with self._timed("coefficients"):
            model, squares = self._coefficients(k, operator, subspace)
        if "delta_1" in options.quantities:
            value, error = mean_and_error(model.a.abs().tolist())
            self._result.rows.append(CriterionRow(k, POINT, "exact", 0, 0.0, value, error, 0.0))
        if "delta_2" in options.quantities:
            for sigma in options.sigmas:
                if k in traces:
                    with self._timed("gaussian_moment"):
                        self._add_full_moment(k, model.a, squares, traces[k], sigma)
                if full:
                    increments = self._increments_of(full[sigma], k)
                    self._add_draws(k, "delta_2", "direct", self._space.dimension, sigma, increments)
        if subspace is not None:
            self._add_subspace(k, model, subspace)

    def _subspace(self, k: int, operator: HessianOperator) -> Subspace:
        options, dimension = self._options, self._options.subspace_dims[0]
        generator = torch.Generator(self._space.device).manual_seed(self._problem.seed)
        if self._problem.directions is not None:
            return given_subspace(operator, self._problem.directions, self._problem.on_product)
        if options.law in ("top", "bottom"):
            found = eigen_subspace(
                operator,
                dimension,
                options.law,
                tolerance=options.tolerance,
                max_products=options.max_products,
                start=self._start,
                generator=generator,
                on_product=self._problem.on_product,
            )
            # The mean over more samples has nearly the same eigenvectors.
            self._start = list(found.basis)
            return found
        if options.law == "random":
            vectors = torch.stack([self._space.random(generator) for _ in range(dimension)])
        else:
            vectors = self._influential_gradients(k, dimension)
        return given_subspace(operator, vectors, self._problem.on_product)

    def _influential_gradients(self, k: int, dimension: int) -> Tensor:
        """Gradients of the D samples among the first k that have the longest ones; (D, n)."""
        norms = torch.zeros(k, dtype=torch.float64, device=self._space.device)

        def own_norms() -> Tensor:
            for number in self._samples.among(range(k)):
                norms[number] = self._space.squared_norm(self._space.pack(self._gradients(number, False)))[0]
            return norms

        chosen = self._together(own_norms, norms.shape).argsort(descending=True, stable=True)[:dimension].tolist()

        def own_gradients() -> Tensor:
            rows = self._space.zeros(dimension)
            for row, number in enumerate(chosen):
                if number in self._samples.own:
                    rows[row] = self._space.pack(self._gradients(number, False))
            return rows

        return self._together(own_gradients, (dimension, self._space.size))

    # ---- coefficients ------------------------------------------------------------------------------------------------

    def _coefficients(
        self, k: int, operator: HessianOperator, subspace: Subspace | None
    ) -> tuple[QuadraticIncrement, Tensor]:
        """a, c and B of each new sample, and ‖c‖² in the full space.

        B takes D products with the one new sample: UᵀHU of the first k is known.
        """
        new, basis = self._new(k), self._space.zeros(0) if subspace is None else subspace.basis
        dimension = len(basis)
        gradient = operator.gradient()
        # ℓ, ‖∇ℓ − ∇L‖², Uᵀ∇ℓ, UᵀhU of each, and this rank's share of L_k.
        shape = (len(new) + 1, 2 + dimension + dimension**2)

        def own_part() -> Tensor:
            table = torch.zeros(shape, dtype=torch.float64, device=self._space.device)
            with torch.no_grad():
                for part in self._losses.parts(range(k), k):
                    table[-1, 0] += part.weight * part.evaluate().loss.double()
            for row, number in enumerate(new):
                if number in self._samples.own:
                    table[row] = self._of_sample(number, gradient, basis)
            return table

        table = self._together(own_part, shape)
        mean = table[-1, 0]
        curvature = torch.zeros(0, 0) if subspace is None else subspace.curvature
        projected = pairwise_dots(gradient[None], basis)[0]
        own = table[:-1, 2 + dimension :].reshape(-1, dimension, dimension)
        model = QuadraticIncrement(
            increment(table[:-1, 0], mean, k),
            increment(table[:-1, 2 : 2 + dimension], projected, k),
            increment(0.5 * (own + own.mT), curvature.to(own), k),
        )
        return model, table[:-1, 1] / (k + 1) ** 2

    def _of_sample(self, number: int, mean_gradient: Tensor, basis: Tensor) -> Tensor:
        with building_graphs():
            loss = self._losses.one(number)
            gradients = self._gradients_of(loss, bool(len(basis)))
            own = self._space.pack(gradients)
            rows = []
            for vectors in basis.split(products_at_once(self._space, self._problem.trainer.num_devices)):
                if len(vectors):
                    products = products_with(gradients, self._problem.parameters, self._space, vectors)
                    rows.append(pairwise_dots(products, basis))
                    self._problem.on_product()
        square = self._space.squared_norm(own - mean_gradient)
        values = [loss.detach().double().reshape(1), square, pairwise_dots(own[None], basis)[0]]
        return torch.cat([*values, *(row.reshape(-1) for row in rows)])

    def _gradients(self, number: int, graph: bool) -> Sequence[Tensor | None]:
        with building_graphs():
            return self._gradients_of(self._losses.one(number), graph)

    def _gradients_of(self, loss: Tensor, graph: bool) -> Sequence[Tensor | None]:
        check_graph(loss)
        return torch.autograd.grad(loss, list(self._problem.parameters), create_graph=graph, allow_unused=True)

    # ---- estimators in the subspace ----------------------------------------------------------------------------------

    def _add_subspace(self, k: int, model: QuadraticIncrement, subspace: Subspace) -> None:
        options = self._options
        converged = {"converged": subspace.converged}
        count = options.draws if "direct" in options.estimators else options.validation_draws
        generator = torch.Generator("cpu").manual_seed(self._problem.seed + 1)
        z = torch.randn(max(options.draws, count), len(subspace.basis), generator=generator, dtype=torch.float64)
        z = z.to(self._space.device)
        for dimension in options.subspace_dims:
            part = model.first(dimension)
            for sigma in options.sigmas:
                error = math.nan
                direct = "direct" in options.estimators
                if count and (direct or dimension == options.subspace_dims[0]):
                    probes = sigma * z[:count, :dimension]
                    with self._timed("direct" if direct else "validation"):
                        table = self._losses_at(
                            (
                                self._space.zeros() + u.to(self._space.dtype) @ subspace.basis[:dimension]
                                for u in probes
                            ),
                            count,
                            k,
                        )
                        true = increment(table[:, 1:], table[:, :1], k)
                    error = relative_model_error(true, part.at(probes))
                    if direct:
                        self._add_draws(
                            k, "delta_2_subspace", "direct", dimension, sigma, true, model_error=error, **converged
                        )
                if "quadratic" in options.estimators:
                    with self._timed("quadratic"):
                        modelled = part.at(sigma * z[: options.draws, :dimension])
                    self._add_draws(
                        k, "delta_2_subspace", "quadratic", dimension, sigma, modelled, model_error=error, **converged
                    )
                if "gaussian_moment" in options.estimators:
                    with self._timed("gaussian_moment"):
                        values = gaussian_moment(part, sigma).tolist()
                    value, spread = mean_and_error(values)
                    self._result.rows.append(
                        CriterionRow(
                            k,
                            options.name("delta_2_subspace"),
                            "gaussian_moment",
                            dimension,
                            sigma,
                            value,
                            spread,
                            0.0,
                            error,
                            subspace.converged,
                        )
                    )

    def _add_draws(
        self,
        k: int,
        quantity: Quantity,
        estimator: str,
        dimension: int,
        sigma: float,
        increments: Tensor,
        model_error: float = math.nan,
        converged: bool = True,
    ) -> None:
        """Add the mean of |f|^p over draws and new samples; ``increments`` (S, candidates)."""
        powers = increments.abs() ** self._options.order
        value, over_samples = mean_and_error(powers.mean(0).tolist())
        _, over_draws = mean_and_error(powers.mean(1).tolist())
        self._result.rows.append(
            CriterionRow(
                k,
                self._options.name(quantity),
                estimator,
                dimension,
                sigma,
                value,
                over_samples,
                over_draws,
                model_error,
                converged,
            )
        )

    def _losses_at(self, moves: Iterable[Tensor], count: int, k: int) -> Tensor:
        """L_k and the losses of the new samples with the parameters moved, (count, 1 + candidates)."""
        new = self._new(k)
        parts, own = self._losses.parts(range(k), k), self._samples.among(new)
        shape = (count, 1 + len(new))

        def own_part() -> Tensor:
            table = torch.zeros(shape, dtype=torch.float64, device=self._space.device)
            for row, _ in enumerate(self._moved(moves)):
                for part in parts:
                    table[row, 0] += part.weight * part.evaluate().loss.double()
                if own:
                    table[row, [1 + n - k for n in own]] = self._losses.each(own).double()
            return table

        return self._together(own_part, shape)

    def _moved(self, moves: Iterable[Tensor]) -> Iterator[None]:
        """Move the parameters in place by each vector in turn, without gradients; bit for bit back afterwards."""
        targets = [p.detach() for p in self._problem.parameters]
        kept = [t.clone() for t in targets]
        try:
            with torch.no_grad():
                for move in moves:
                    torch._foreach_copy_(targets, kept)
                    for target, view in zip(targets, self._space.views(move), strict=True):
                        target.add_(view.to(target.dtype))
                    yield
        finally:
            torch._foreach_copy_(targets, kept)

    # ---- the full space ----------------------------------------------------------------------------------------------

    def _full_space_draws(self) -> dict[float, Tensor]:
        """Losses of all samples with the parameters moved, (S, n) for each σ: one pass serves every k."""
        total, count = self._samples.total, self._options.draws
        own = self._samples.among(range(total))
        found = {}
        for sigma in self._options.sigmas:
            generator = torch.Generator(self._space.device).manual_seed(self._problem.seed + 2)
            moves = (self._space.random(generator).mul_(sigma) for _ in range(count))

            def own_part(moves: Iterable[Tensor] = moves) -> Tensor:
                table = torch.zeros(count, total, dtype=torch.float64, device=self._space.device)
                for row, _ in enumerate(self._moved(moves)):
                    table[row, own] = self._losses.each(own).double()
                return table

            with self._timed("direct"):
                found[sigma] = self._together(own_part, (count, total))
        return found

    def _increments_of(self, losses: Tensor, k: int) -> Tensor:
        return increment(losses[:, list(self._new(k))], losses[:, :k].mean(1, keepdim=True), k)

    def _traces(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each k: vᵀAv and ‖Av‖² of each new sample with A = (h − H_k)/(k + 1), (vectors, candidates).

        Products with the sum over the first k are those with the sum before and the samples since.
        """
        options, problem, space = self._options, self._problem, self._space
        generator = torch.Generator(space.device).manual_seed(problem.seed + 3)
        sizes, left = options.sample_sizes, options.trace_vectors
        found: dict[int, list[Tensor]] = {k: [] for k in sizes}
        with self._timed("traces"):
            while left:
                count = min(left, products_at_once(space, problem.trainer.num_devices))
                left -= count
                vectors = torch.stack([space.random(generator, "rademacher") for _ in range(count)])
                running = torch.zeros_like(vectors)
                for before, k in zip((0, *sizes), sizes, strict=False):
                    with contextlib.closing(self._operator(range(before, k), 1)) as operator:
                        for row, vector in zip(running, vectors, strict=True):
                            row += operator(vector)
                            problem.on_product()
                    found[k].append(self._trace_terms(k, vectors, running / k))
        return {k: tuple(torch.cat(parts).unbind(-1)) for k, parts in found.items()}  # type: ignore[misc]

    def _trace_terms(self, k: int, vectors: Tensor, means: Tensor) -> Tensor:
        """(vectors, candidates, 2)."""
        new = self._new(k)
        shape = (len(vectors), len(new), 2)

        def own_part() -> Tensor:
            table = torch.zeros(shape, dtype=torch.float64, device=self._space.device)
            for column, number in enumerate(new):
                if number not in self._samples.own:
                    continue
                gradients = self._gradients(number, True)
                with building_graphs():
                    products = products_with(gradients, self._problem.parameters, self._space, vectors)
                for row, product in enumerate(increment(products, means, k)):
                    table[row, column, 0] = self._space.dot(vectors[row], product)
                    table[row, column, 1] = self._space.squared_norm(product)[0]
            return table

        return self._together(own_part, shape)

    def _add_full_moment(self, k: int, a: Tensor, squares: Tensor, traces: tuple[Tensor, Tensor], sigma: float) -> None:
        forms, lengths = traces
        value, over_draws = sampled_gaussian_moment(a, squares, forms, lengths, sigma)
        each = [
            float(sampled_gaussian_moment(a[i], squares[i], forms[:, i], lengths[:, i], sigma)[0])
            for i in range(len(a))
        ]
        self._result.rows.append(
            CriterionRow(
                k,
                self._options.name("delta_2"),
                "gaussian_moment",
                self._space.dimension,
                sigma,
                float(value),
                mean_and_error(each)[1],
                float(over_draws),
            )
        )

    # ---- ranks and clocks --------------------------------------------------------------------------------------------

    def _together(self, own_part: Callable[[], Tensor], shape: Sequence[int]) -> Tensor:
        """Sum over the ranks of float numbers, of which each has its part; all raise where one fails."""
        if self._reduce is None:
            return own_part()
        error: Exception | None = None
        part = torch.zeros(tuple(shape), dtype=torch.float64, device=self._space.device)
        failed = torch.zeros(1, dtype=torch.float64, device=self._space.device)
        try:
            part = own_part()
        except Exception as caught:
            error = caught.with_traceback(None)  # which holds graphs
            failed += 1.0
        # A loss may be NaN where it was moved to; that it failed is another thing.
        summed = self._reduce(torch.cat([failed, part.double().reshape(-1)]))
        if summed[0]:
            raise failure_of(self._problem.trainer, error, error or RuntimeError()).cause from None
        return summed[1:].reshape(part.shape).to(part.dtype)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Generator[None, None, None]:
        begun = self._clock()
        try:
            yield
        finally:
            self._result.seconds[stage] = self._result.seconds.get(stage, 0.0) + self._clock() - begun

    def _clock(self) -> float:
        if self._space.device.type == "cuda":
            torch.cuda.synchronize(self._space.device)
        return time.perf_counter()
