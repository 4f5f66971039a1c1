"""One measurement of sample growth: the estimators of each criterion at each k, put into a table."""

import contextlib
import math

import torch
from torch import Tensor

from lightning_curvature.differentiation import differentiable
from lightning_curvature.functional import (
    QuadraticIncrement,
    gaussian_moment,
    increment,
    relative_model_error,
    sampled_gaussian_moment,
)
from lightning_curvature.increment_model import increment_model, subspace_at
from lightning_curvature.perturbed_losses import increments_in, losses_around, trace_samples
from lightning_curvature.probing import Subspace
from lightning_curvature.sample_growth import POINT, CriterionRow, SampleGrowth, mean_and_error
from lightning_curvature.stabilization_problem import GrowthOptions, GrowthProblem, Quantity
from lightning_curvature.stabilization_tools import GrowthTools


def measure_growth(options: GrowthOptions, problem: GrowthProblem, at_once: int) -> SampleGrowth:
    """Measure all criteria at the parameters as they are. Called on every rank.

    Args:
        options: what is measured.
        problem: on what.
        at_once: vectors that are multiplied at once, the same on every rank.

    Raises:
        Exception: what a loss, or a rank, could not give.
    """
    # Also what is not differentiated: compiled code would be compiled anew, for single samples, and the run's with it.
    with differentiable():
        return _Measurement(GrowthTools(options, problem, at_once), problem.directions).run()


class _Measurement:
    """Adds rows to a table, k by k."""

    def __init__(self, tools: GrowthTools, directions: Tensor | None) -> None:
        self._tools, self._options, self._directions = tools, tools.options, directions
        self._result = SampleGrowth(tolerance=tools.options.model_tolerance, seconds=tools.seconds)

    def run(self) -> SampleGrowth:
        tools, estimators = self._tools, self._options.estimators
        around: dict[float, Tensor] = {}
        traces: dict[int, tuple[Tensor, Tensor]] = {}
        subspace: Subspace | None = None
        if "delta_2" in self._options.quantities and "direct" in estimators:
            with tools.timed("direct, full space"):
                around = {sigma: losses_around(tools, sigma) for sigma in self._options.sigmas}
        if "delta_2" in self._options.quantities and "gaussian_moment" in estimators:
            with tools.timed("traces, full space"):
                traces = trace_samples(tools)
        for k in self._options.sample_sizes:
            with contextlib.closing(tools.operator(range(k), k)) as operator, tools.products(operator):
                if "delta_2_subspace" in self._options.quantities:
                    with tools.timed("subspace"):
                        subspace = subspace_at(tools, k, operator, self._directions, subspace)
                    self._result.products += subspace.products
                    self._result.residuals[k] = subspace.residual
                with tools.timed("coefficients"):
                    model, squares = increment_model(tools, k, operator, subspace)
            if "delta_1" in self._options.quantities:
                value, error = mean_and_error(model.a.abs().tolist())
                self._result.rows.append(CriterionRow(k, POINT, "exact", 0, 0.0, value, error, 0.0))
            for sigma, losses in around.items():
                increments = increment(losses[:, list(tools.new(k))], losses[:, :k].mean(1, keepdim=True), k)
                self._add_draws(k, "delta_2", "direct", tools.space.dimension, sigma, increments, model.a)
            if traces:
                self._add_traces(k, model.a, squares, *traces[k])
            if subspace is not None:
                self._add_subspace(k, model, subspace)
        return self._result

    def _add_subspace(self, k: int, model: QuadraticIncrement, subspace: Subspace) -> None:
        options, tools = self._options, self._tools
        direct = "direct" in options.estimators
        compared = options.draws if direct else options.validation_draws
        generator = torch.Generator("cpu").manual_seed(tools.seed + 1)
        shape = (max(options.draws, compared), len(subspace.basis))
        z = torch.randn(shape, generator=generator, dtype=torch.float64).to(tools.space.device)
        for dimension in options.subspace_dims:
            part, where = model.first(dimension), (dimension, subspace.converged)
            for sigma in options.sigmas:
                error, probes = math.nan, sigma * z[:, :dimension]
                if compared and (direct or dimension == len(subspace.basis)):
                    with tools.timed("direct" if direct else "validation"):
                        true, rounding = increments_in(tools, k, subspace.basis[:dimension], probes[:compared])
                    error = relative_model_error(true, part.at(probes[:compared]), rounding)
                    if direct:
                        self._add_draws(
                            k, "delta_2_subspace", "direct", dimension, sigma, true, model.a, error, where[1]
                        )
                if "quadratic" in options.estimators:
                    with tools.timed("quadratic"):
                        values = part.at(probes[: options.draws])
                    self._add_draws(
                        k, "delta_2_subspace", "quadratic", dimension, sigma, values, model.a, error, where[1]
                    )
                if "gaussian_moment" in options.estimators:
                    with tools.timed("gaussian_moment"):
                        moments = gaussian_moment(part, sigma)
                    beyond = float(gaussian_moment(part.without_value(), sigma).mean())
                    value, spread = mean_and_error(moments.tolist())
                    name = options.name("delta_2_subspace")
                    self._result.rows.append(
                        CriterionRow(
                            k, name, "gaussian_moment", dimension, sigma, value, spread, 0.0, beyond, error, where[1]
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
        a: Tensor,
        model_error: float = math.nan,
        converged: bool = True,
    ) -> None:
        """Add the mean of |f|^p over draws and new samples; ``increments`` (S, candidates), at the parameters ``a``."""
        powers = increments.abs() ** self._options.order
        beyond = float(((increments - a).abs() ** self._options.order).mean())
        value, over_samples = mean_and_error(powers.mean(0).tolist())
        _, over_draws = mean_and_error(powers.mean(1).tolist())
        name = self._options.name(quantity)
        self._result.rows.append(
            CriterionRow(
                k, name, estimator, dimension, sigma, value, over_samples, over_draws, beyond, model_error, converged
            )
        )

    def _add_traces(self, k: int, a: Tensor, squares: Tensor, forms: Tensor, lengths: Tensor) -> None:
        """Add the closed form in the full space, of sampled traces."""
        name, size = self._options.name("delta_2"), self._tools.space.dimension
        for sigma in self._options.sigmas:
            value, over_draws = sampled_gaussian_moment(a, squares, forms, lengths, sigma)
            beyond = float(sampled_gaussian_moment(torch.zeros_like(a), squares, forms, lengths, sigma)[0])
            columns = zip(a, squares, forms.T, lengths.T, strict=True)
            each = [float(sampled_gaussian_moment(*column, sigma)[0]) for column in columns]
            _, over_samples = mean_and_error(each)
            self._result.rows.append(
                CriterionRow(
                    k, name, "gaussian_moment", size, sigma, float(value), over_samples, float(over_draws), beyond
                )
            )
