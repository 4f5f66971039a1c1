"""One stabilization measurement: the estimators of each criterion at each k, put into a table."""

import contextlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_curvature import functional
from lightning_curvature.functional import QuadraticIncrement, relative_model_error, sampled_gaussian_moment
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.stabilization import perturbed
from lightning_curvature.stabilization.increments import increment_model, increments_at
from lightning_curvature.stabilization.options import Quantity
from lightning_curvature.stabilization.perturbed import DirectionalTerms
from lightning_curvature.stabilization.problem import StabilizationProblem
from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth
from lightning_curvature.stabilization.subspace import Subspace, subspace_at

# Quantity, k, D and σ of a row.
Place = tuple[Quantity, int, int, float]
# Of one estimator: the value for each new sample, its standard error over draws, and the value without that at w.
Moments = tuple[Tensor, float, Tensor]


def measure_stabilization(problem: StabilizationProblem) -> SampleGrowth:
    """Measure all criteria at the parameters as they are; raise on all ranks where a loss fails on one."""
    # Also for losses without derivatives: single samples would compile a module anew, and the run's code with it.
    with differentiable():
        return _Measurement(problem).result()


class _Measurement:
    """Collects rows, k by k."""

    def __init__(self, problem: StabilizationProblem) -> None:
        self._problem, self._options = problem, problem.options
        self._rows: list[CriterionRow] = []
        self._subspace: Subspace | None = None  # of the last k alone: its basis is large
        self._products, self._residuals = 0, dict[int, float]()
        # The full space: losses of all samples at perturbed parameters, by σ, (draws, samples); by k, the model along
        # the directions of these draws, and along random signs.
        self._losses: dict[float, Tensor] = {}
        self._draws: dict[int, DirectionalTerms] = {}
        self._traces: dict[int, DirectionalTerms] = {}

    def result(self) -> SampleGrowth:
        options = self._options
        if "delta_2" in options.quantities:
            self._explore_full_space()
        for k in options.sample_sizes:
            a, squares = self._increments_at(k)
            if "delta_1" in options.quantities:
                self._add(("delta_1", k, 0, 0.0), "exact", a.abs(), 0.0, torch.zeros_like(a))
            if "delta_2" in options.quantities:
                self._add_full_space(k, a, squares)
        return SampleGrowth(
            rows=tuple(sorted(self._rows, key=self._rank)),
            seconds=self._problem.seconds,
            products=self._products,
            residuals=self._residuals,
            tolerance=options.model_tolerance,
            validity_keys=options.validity_keys(),
        )

    def _rank(self, row: CriterionRow) -> tuple[int, ...]:
        """Return the place of a row in the table: in the order of the options."""
        options = self._options
        names = [options.name(quantity) for quantity in options.quantities]
        sigma = options.sigmas.index(row.sigma) if row.sigma else 0
        estimator = ("exact", *options.estimators).index(row.estimator)
        return row.k, names.index(row.criterion), -row.dimension, sigma, estimator

    def _increments_at(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Return a of each new sample and, where it is needed, ‖c‖² in the full space; add the rows of the subspace."""
        problem, in_subspace = self._problem, "delta_2_subspace" in self._options.quantities
        if not (in_subspace or self._traces):
            return increments_at(problem, k), None
        with contextlib.closing(problem.operator(range(k), k)) as operator, problem.fail_together(operator):
            if in_subspace:
                with problem.timed("subspace"):
                    self._subspace = subspace_at(problem, k, operator, self._subspace)
                self._products += self._subspace.products
                self._residuals[k] = self._subspace.residual
            with problem.timed("coefficients"):
                model, squares = increment_model(problem, k, operator, self._subspace)
        if self._subspace is not None:
            self._add_subspace(k, model, self._subspace)
        return model.a, squares

    def _add_subspace(self, k: int, model: QuadraticIncrement, subspace: Subspace) -> None:
        """Add all estimators of the subspace; the same draws serve them, every D and every σ."""
        options, problem = self._options, self._problem
        direct, compared = "direct" in options.estimators, options.compared_in_subspace
        generator = torch.Generator("cpu").manual_seed(options.seed + 1)
        shape = (max(options.draws, compared), len(subspace.basis))
        z = torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.space.device)
        for dimension, sigma in itertools.product(options.subspace_dims, options.sigmas):
            part, draws = model.first(dimension), sigma * z[:, :dimension]
            error, true, modelled, closed = math.nan, None, None, None
            if compared and (direct or dimension == len(subspace.basis)):
                with problem.timed("direct" if direct else "validation"):
                    true, rounding = perturbed.increments_in(problem, k, subspace.basis[:dimension], draws[:compared])
                error = relative_model_error(true, part.at(draws[:compared]), rounding)
            if "quadratic" in options.estimators:
                with problem.timed("quadratic"):
                    modelled = part.at(draws[: options.draws])
            if "gaussian_moment" in options.estimators:
                with problem.timed("gaussian_moment"):
                    moments = functional.gaussian_moment(part, sigma)
                closed = moments, 0.0, functional.gaussian_moment(part.without_value(), sigma)
            place: Place = ("delta_2_subspace", k, dimension, sigma)
            known = {"model_error": error, "converged": subspace.converged}
            self._add_estimators(place, model.a, {"direct": true, "quadratic": modelled}, closed, **known)

    def _explore_full_space(self) -> None:
        """Evaluate the losses at perturbed parameters, and the terms of the model along random directions."""
        options, problem, compared = self._options, self._problem, self._options.compared_in_full_space
        modelled = max(compared, options.draws if "quadratic" in options.estimators else 0)
        evaluated = max(compared, options.draws if "direct" in options.estimators else 0)
        if evaluated:
            with problem.timed("direct, full space"):
                self._losses = {s: perturbed.losses_around(problem, evaluated, s) for s in options.sigmas}
        if modelled:
            with problem.timed("quadratic, full space"):
                self._draws = perturbed.terms_along(problem, modelled, "draws")
        if "gaussian_moment" in options.estimators:
            with problem.timed("traces, full space"):
                self._traces = perturbed.terms_along(problem, options.trace_vectors, "signs")

    def _add_full_space(self, k: int, a: Tensor, squares: Tensor | None) -> None:
        """Add all estimators of the full space."""
        problem, compared = self._problem, self._options.compared_in_full_space
        for sigma in self._options.sigmas:
            error, true, modelled, closed = math.nan, None, None, None
            if sigma in self._losses:
                losses = self._losses[sigma]
                true = functional.increment(losses[:, list(problem.new(k))], losses[:, :k].mean(1, keepdim=True), k)
            if self._draws:
                modelled = self._draws[k].at(a, sigma)
            if true is not None and modelled is not None and compared:
                rounding = perturbed.rounding_of(problem, losses, k)
                error = relative_model_error(true[:compared], modelled[:compared], rounding)
            if self._traces and squares is not None:
                closed = _of_traces(a, squares, self._traces[k], sigma)
            place: Place = ("delta_2", k, problem.space.dimension, sigma)
            self._add_estimators(place, a, {"direct": true, "quadratic": modelled}, closed, model_error=error)

    def _add_estimators(
        self, place: Place, a: Tensor, drawn: Mapping[str, Tensor | None], closed: Moments | None, **known: Any
    ) -> None:
        """Add a row for each estimator: of increments at draws, (S, candidates), beside a at w; of a closed form."""
        for estimator, increments in drawn.items():
            if estimator in self._options.estimators and increments is not None:
                increments = increments[: self._options.draws]
                powers, beyond = (f.abs() ** self._options.order for f in (increments, increments - a))
                _, over_draws = _mean_and_error(powers.mean(1).tolist())
                self._add(place, estimator, powers.mean(0), over_draws, beyond, **known)
        if closed is not None:
            self._add(place, "gaussian_moment", *closed, **known)

    def _add(
        self, place: Place, estimator: str, values: Tensor, over_draws: float, beyond: Tensor, **known: Any
    ) -> None:
        """Add a row, of the values for each new sample, (candidates,)."""
        quantity, k, dimension, sigma = place
        value, over_samples = _mean_and_error(values.tolist())
        numbers = (value, over_samples, over_draws, float(beyond.mean()))
        self._rows.append(CriterionRow(k, self._options.name(quantity), estimator, dimension, sigma, *numbers, **known))


def _of_traces(a: Tensor, squares: Tensor, terms: DirectionalTerms, sigma: float) -> Moments:
    """Return the closed form in the full space, of sampled traces."""
    forms, lengths = terms.forms, terms.lengths
    _, over_draws = sampled_gaussian_moment(a, squares, forms, lengths, sigma)
    columns = zip(a, squares, forms.T, lengths.T, strict=True)
    values = torch.stack([sampled_gaussian_moment(*column, sigma)[0] for column in columns])
    beyond, _ = sampled_gaussian_moment(torch.zeros_like(a), squares, forms, lengths, sigma)
    return values, float(over_draws), beyond


def _mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN for the error of one number."""
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, math.nan
    square = math.fsum((number - mean) ** 2 for number in numbers)
    return mean, math.sqrt(square / (len(numbers) - 1) / len(numbers))
