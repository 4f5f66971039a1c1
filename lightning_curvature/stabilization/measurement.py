"""One measurement of sample growth: the estimators of each criterion at each k, put into a table."""

import contextlib
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.functional import (
    QuadraticIncrement,
    gaussian_moment,
    increment,
    relative_model_error,
    sampled_gaussian_moment,
)
from lightning_curvature.operators.differentiation import differentiable
from lightning_curvature.stabilization.increments import increment_model, increments_at, subspace_at
from lightning_curvature.stabilization.options import GrowthOptions, GrowthProblem, Quantity
from lightning_curvature.stabilization.perturbed import (
    DirectionalTerms,
    increments_in,
    losses_around,
    probe_terms,
    rounding_of,
    trace_terms,
)
from lightning_curvature.stabilization.problem import GrowthTools
from lightning_curvature.stabilization.result import CriterionRow, SampleGrowth, mean_and_error
from lightning_curvature.stabilization.subspace import Subspace

# Quantity, k, D and σ of a row.
Place = tuple[Quantity, int, int, float]


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


@dataclass
class _FullSpace:
    """What is known of the full space for all k.

    Attributes:
        losses: of all samples around the parameters, by σ, (draws, samples).
        probes: the model along the directions of these draws, by k.
        traces: the model along random signs, by k.
        compared: on how many draws the model is compared.
    """

    losses: dict[float, Tensor] = field(default_factory=dict)
    probes: dict[int, DirectionalTerms] = field(default_factory=dict)
    traces: dict[int, DirectionalTerms] = field(default_factory=dict)
    compared: int = 0


class _Measurement:
    """Adds rows to a table, k by k."""

    def __init__(self, tools: GrowthTools, directions: Tensor | None) -> None:
        self._tools, self._options, self._directions = tools, tools.options, directions
        self._result = SampleGrowth(tolerance=tools.options.model_tolerance, seconds=tools.seconds)

    def run(self) -> SampleGrowth:
        tools = self._tools
        full, subspace = _FullSpace(), None
        if "delta_2" in self._options.quantities:
            full = self._full_space()
        for k in self._options.sample_sizes:
            squares = None
            if full.traces or "delta_2_subspace" in self._options.quantities:
                model, squares, subspace = self._model_at(k, subspace)
                a = model.a
                if subspace is not None:
                    self._add_subspace(k, model, subspace)
            else:
                a = increments_at(tools, k)
            if "delta_1" in self._options.quantities:
                self._add(("delta_1", k, 0, 0.0), "exact", a.abs(), 0.0, torch.zeros_like(a))
            if "delta_2" in self._options.quantities:
                self._add_full_space(k, a, squares, full)
        self._result.rows.sort(key=self._rank)
        return self._result

    def _rank(self, row: CriterionRow) -> tuple[int, ...]:
        """Place of a row in the table: in the orders in which things were asked for."""
        options = self._options
        names = [options.name(quantity) for quantity in options.quantities]
        sigma = options.sigmas.index(row.sigma) if row.sigma else 0
        return (
            row.k,
            names.index(row.criterion),
            -row.dimension,
            sigma,
            ("exact", *options.estimators).index(row.estimator),
        )

    def _model_at(self, k: int, before: Subspace | None) -> tuple[QuadraticIncrement, Tensor, Subspace | None]:
        """The quadratic model, ‖c‖² in the full space, and the subspace, where it is asked for."""
        tools, subspace = self._tools, None
        with contextlib.closing(tools.operator(range(k), k)) as operator, tools.products(operator):
            if "delta_2_subspace" in self._options.quantities:
                with tools.timed("subspace"):
                    subspace = subspace_at(tools, k, operator, self._directions, before)
                self._result.products += subspace.products
                self._result.residuals[k] = subspace.residual
            with tools.timed("coefficients"):
                return *increment_model(tools, k, operator, subspace), subspace

    def _add_subspace(self, k: int, model: QuadraticIncrement, subspace: Subspace) -> None:
        """Add all estimators of the subspace; the same probes serve them, every D and every σ."""
        options, tools = self._options, self._tools
        direct = "direct" in options.estimators
        compared = options.draws if direct else options.validation_draws
        generator = torch.Generator("cpu").manual_seed(tools.seed + 1)
        shape = (max(options.draws, compared), len(subspace.basis))
        z = torch.randn(shape, generator=generator, dtype=torch.float64).to(tools.space.device)
        for dimension, sigma in itertools.product(options.subspace_dims, options.sigmas):
            place: Place = ("delta_2_subspace", k, dimension, sigma)
            part, probes, error = model.first(dimension), sigma * z[:, :dimension], math.nan
            if compared and (direct or dimension == len(subspace.basis)):
                with tools.timed("direct" if direct else "validation"):
                    true, rounding = increments_in(tools, k, subspace.basis[:dimension], probes[:compared])
                error = relative_model_error(true, part.at(probes[:compared]), rounding)
            known = {"model_error": error, "converged": subspace.converged}
            if direct:
                self._add_draws(place, "direct", true, model.a, **known)
            if "quadratic" in options.estimators:
                with tools.timed("quadratic"):
                    modelled = part.at(probes[: options.draws])
                self._add_draws(place, "quadratic", modelled, model.a, **known)
            if "gaussian_moment" in options.estimators:
                with tools.timed("gaussian_moment"):
                    moments = gaussian_moment(part, sigma)
                beyond = gaussian_moment(part.without_value(), sigma)
                self._add(place, "gaussian_moment", moments, 0.0, beyond, **known)

    def _full_space(self) -> _FullSpace:
        """What all k have in common: losses around the parameters, and terms of the model along random directions."""
        options, tools = self._options, self._tools
        modelled = options.draws if "quadratic" in options.estimators else 0
        compared = options.validation_draws if set(options.estimators) - {"direct"} else 0
        moved = max(compared, options.draws if "direct" in options.estimators else 0)
        full = _FullSpace(compared=compared)
        if moved:
            with tools.timed("direct, full space"):
                full.losses.update({sigma: losses_around(tools, moved, sigma) for sigma in options.sigmas})
        if modelled or compared:
            with tools.timed("quadratic, full space"):
                full.probes.update(probe_terms(tools, max(modelled, compared)))
        if "gaussian_moment" in options.estimators:
            with tools.timed("traces, full space"):
                full.traces.update(trace_terms(tools))
        return full

    def _add_full_space(self, k: int, a: Tensor, squares: Tensor | None, full: _FullSpace) -> None:
        options, tools = self._options, self._tools
        for sigma in options.sigmas:
            place: Place = ("delta_2", k, tools.space.dimension, sigma)
            error, true, modelled = math.nan, None, None
            if sigma in full.losses:
                losses = full.losses[sigma]
                true = increment(losses[:, list(tools.new(k))], losses[:, :k].mean(1, keepdim=True), k)
            if full.probes:
                modelled = full.probes[k].at(a, sigma)
            if true is not None and modelled is not None and full.compared:
                first = slice(full.compared)
                error = relative_model_error(true[first], modelled[first], rounding_of(tools, losses, k))
            if true is not None and "direct" in options.estimators:
                self._add_draws(place, "direct", true[: options.draws], a, model_error=error)
            if modelled is not None and "quadratic" in options.estimators:
                self._add_draws(place, "quadratic", modelled[: options.draws], a, model_error=error)
            if full.traces:
                assert squares is not None
                self._add_traces(place, a, squares, full.traces[k], error)

    def _add_traces(self, place: Place, a: Tensor, squares: Tensor, terms: DirectionalTerms, error: float) -> None:
        """Add the closed form in the full space, of sampled traces."""
        forms, lengths, sigma = terms.forms, terms.lengths, place[-1]
        _, over_draws = sampled_gaussian_moment(a, squares, forms, lengths, sigma)
        columns = list(zip(a, squares, forms.T, lengths.T, strict=True))
        values = torch.stack([sampled_gaussian_moment(*column, sigma)[0] for column in columns])
        beyond, _ = sampled_gaussian_moment(torch.zeros_like(a), squares, forms, lengths, sigma)
        self._add(place, "gaussian_moment", values, float(over_draws), beyond, model_error=error)

    def _add_draws(self, place: Place, estimator: str, increments: Tensor, a: Tensor, **known: Any) -> None:
        """Add the mean of |f|^p over draws and new samples; ``increments`` (S, candidates), at the parameters ``a``."""
        powers, beyond = (part.abs() ** self._options.order for part in (increments, increments - a))
        _, over_draws = mean_and_error(powers.mean(1).tolist())
        self._add(place, estimator, powers.mean(0), over_draws, beyond, **known)

    def _add(
        self, place: Place, estimator: str, values: Tensor, over_draws: float, beyond: Tensor, **known: Any
    ) -> None:
        """Add a row, of the values for each new sample, (candidates,)."""
        quantity, k, dimension, sigma = place
        value, over_samples = mean_and_error(values.tolist())
        row = CriterionRow(
            k=k,
            criterion=self._options.name(quantity),
            estimator=estimator,
            dimension=dimension,
            sigma=sigma,
            value=value,
            stderr_samples=over_samples,
            stderr_draws=over_draws,
            deformation=float(beyond.mean()),
            **known,
        )
        self._result.rows.append(row)
