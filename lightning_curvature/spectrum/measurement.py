"""One measurement of the spectrum: the algorithms of ``linalg`` on operators of the probe set."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_curvature import linalg
from lightning_curvature.distributed.together import Outcome, attempt_together, attempted
from lightning_curvature.linalg import Eigenpairs, EigenTracker, NonFiniteProductError, SpectralDensity
from lightning_curvature.monitors.modules import Modules, ModuleTable
from lightning_curvature.operators import CurvatureOperator, PreconditionedOperator
from lightning_curvature.operators.differences import DifferenceHistory
from lightning_curvature.operators.fallback import BY_DIFFERENCES
from lightning_curvature.optimizers.stability import NotYetSteppedError
from lightning_curvature.reporting.loggers import inform, warn
from lightning_curvature.spectrum.options import EXACT_ONLY, SHARE, UPPER, SpectrumOptions, largest_name, with_error
from lightning_curvature.spectrum.problem import SpectrumProblem
from lightning_curvature.spectrum.result import Spectrum

# Gradients of the same loss by two ways differ by rounding, 1e-6 in float32 and 1e-2 in half precision.
_MISMATCH = 0.02
# As much as counts as another eigenvalue; the nodes of clusters may lie a little beyond what was found of these.
_BEYOND = 0.01


@dataclass
class _Numbers:
    """Numbers of a measurement under way; an operator that fails leaves those it has."""

    values: dict[str, float]
    density: SpectralDensity | None = None
    by_module: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def table(self, modules: Modules | None) -> ModuleTable | None:
        """Return the values by module, where they are wanted."""
        columns = {key: tuple(column.tolist()) for key, column in self.by_module.items()}
        return None if modules is None else ModuleTable(modules.names, columns)

    def forget(self, keys: Sequence[str]) -> None:
        """Forget the values of some keys."""
        self.values |= dict.fromkeys(keys, math.nan)
        self.by_module = {key: column for key, column in self.by_module.items() if key.removesuffix(SHARE) not in keys}


class SpectrumMeasurement:
    """Measures the spectrum again and again, each time going on from the last eigenpairs.

    ``trackers`` hold these by operator. ``warn_once`` warns the first time in a fit, and takes a topic and a message.
    """

    def __init__(self, options: SpectrumOptions, warn_once: Callable[[str, str], None]) -> None:
        self._options, self._warn_once = options, warn_once
        self.trackers: dict[str, EigenTracker] = {}
        self.begin()

    def begin(self, sharded: bool = False) -> None:
        """Forget the module: a new fit may bring another. Eigenpairs stay, and are used where they fit."""
        self._difference = sharded or self._options.products == "difference"
        self._left_out = False
        self._history = DifferenceHistory()

    def take_up(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from the trackers' states."""
        self.trackers = {kind: EigenTracker(self._options.recheck_every) for kind in state}
        for kind, tracker in self.trackers.items():
            tracker.load_state_dict(state[kind])

    def measure(self, problem: SpectrumProblem, basis: int, fail: Callable[[Exception], None]) -> Spectrum:
        """Measure all quantities.

        Every rank calls it and makes the same products. A rank that fails sends NaN in its product, or in one more, so
        that all of them leave the operator at once; the other operators are still measured. ``fail`` is called with the
        error that ended one, and returns where training goes on. ``basis`` is the length of the eigensolver's basis,
        the same on every rank: all restart at the same product.
        """
        options = self._options
        numbers = _Numbers(dict.fromkeys(options.keys(), math.nan))
        for kind, quantities in options.operators.items():

            def failed(error: Exception, quantities: Sequence[str] = quantities) -> None:
                numbers.reasons.update(dict.fromkeys(options.keys(quantities), str(error)))
                fail(error)

            attempted(functools.partial(self._measure_operator, problem, kind, quantities, basis, numbers), failed)
        reasons = {key: reason for key, reason in numbers.reasons.items() if math.isnan(numbers.values[key])}
        return Spectrum(numbers.values, numbers.density, numbers.table(problem.modules), reasons)

    def _measure_operator(
        self, problem: SpectrumProblem, kind: str, wanted: Sequence[str], basis: int, numbers: _Numbers
    ) -> None:
        failure = self._attempt(problem, kind, wanted, basis, numbers)
        may_fall_back = self._options.products == "auto" and not self._difference and kind not in EXACT_ONLY
        if failure is not None and failure.lacking and may_fall_back:
            self._difference = True
            second = self._attempt(problem, kind, wanted, basis, numbers)
            # Where differences fail as well, second derivatives were not missing: the next measurement is exact.
            self._difference = second is None
            if second is None:
                warn(
                    f"{BY_DIFFERENCES} {failure.error}",
                    any_rank=failure.here and failure.failed < problem.trainer.world_size,
                )
            failure = second
        if failure is not None and failure.error is not None:
            raise failure.error from None

    def _attempt(
        self, problem: SpectrumProblem, kind: str, wanted: Sequence[str], basis: int, numbers: _Numbers
    ) -> Outcome | None:
        history = self._history if self._difference else None
        with contextlib.closing(problem.operator(kind, history, self._options.keep_graph)) as operator:
            try:
                whole = problem.preconditioned(operator) if kind == "preconditioned" else operator
                self._measure_on(whole, problem, kind, wanted, basis, numbers)
                self._tell_of_memory(getattr(operator, "left_out", ""))
                if not operator.all_ended():
                    raise NonFiniteProductError(f"the measurement on the operator {kind!r} is lost")
            except NotYetSteppedError as error:
                numbers.reasons.update(dict.fromkeys(self._options.keys(wanted), str(error)))
                return None  # nothing to measure, on any rank
            except Exception as error:
                alone = not operator.together
                if alone and not isinstance(error, (RuntimeError, NonFiniteProductError)):
                    raise
                # Between products the others may have come further than this rank.
                between = not isinstance(error, NonFiniteProductError)
                if between:
                    operator.fail(error.with_traceback(None))  # whose frames hold vectors
                own = operator.error or (error if alone or between else None)
                failure = _failure_of(problem, own, error, between)
                if failure.sums["between"] and not alone:
                    numbers.forget(self._options.keys(wanted))
                    numbers.density = numbers.density if "spectral_density" not in wanted else None
                    self.trackers.pop(kind, None)
                return failure
        return None

    def _tell_of_memory(self, message: str) -> None:
        """Say once in a fit which graphs do not fit into the memory."""
        if message and not self._left_out:
            self._left_out = True
            inform(message)

    def _measure_on(
        self,
        operator: CurvatureOperator | PreconditionedOperator,
        problem: SpectrumProblem,
        kind: str,
        wanted: Sequence[str],
        basis: int,
        numbers: _Numbers,
    ) -> None:
        options, space = self._options, operator.space
        generator = torch.Generator(space.device).manual_seed(problem.seed)

        def matvec(vector: Tensor) -> Tensor:
            product = operator(vector)
            problem.on_product()
            return product

        smallest = int("lambda_min" in wanted)
        largest = options.k if "lambda_max" in wanted else 0 if kind == "hessian" else 1
        tracker = self.trackers.setdefault(kind, EigenTracker(options.recheck_every)) if largest + smallest else None

        def search(tracker: EigenTracker) -> Eigenpairs:
            pairs = tracker.search(
                matvec,
                space,
                largest=largest,
                smallest=smallest,
                tolerance=options.tolerance,
                max_matvecs=options.max_products,
                max_basis=basis,
                generator=generator,
            )
            mismatch = getattr(operator, "mismatch", None)
            if mismatch is not None and mismatch > _MISMATCH:
                self._warn_once(
                    "mismatch",
                    f"the Gauss–Newton matrix leaves out {mismatch:.1%} of the gradient, which does not pass through "
                    "the outputs (several outputs, a head applied outside self(…), a penalty): name the submodule that "
                    "makes the outputs, outputs='head', or give objective=.",
                )
            names = [*map(largest_name, range(1, largest + 1)), "lambda_min"] if kind == "hessian" else wanted
            off = [operator.uncertainty(*pair) for pair in zip(pairs.vectors, pairs.quotients.tolist(), strict=True)]
            self._add_eigenvalues(numbers, pairs, kind, names, off)
            if problem.modules is not None:
                for name, vector in zip(names, pairs.vectors, strict=False):
                    squares = space.dots_by_tensor(vector, vector)
                    numbers.by_module[name + SHARE] = problem.modules.sums(problem.parameters, squares)
            return pairs

        pairs = None if tracker is None else search(tracker)
        if "hessian_trace" in wanted:
            estimate = linalg.trace(
                matvec,
                space,
                relative_error=options.trace_error,
                max_matvecs=options.max_products,
                deflation=pairs,
                blocks=None if problem.modules is None else problem.modules.labels(problem.parameters),
                generator=generator,
            )
            if estimate.blocks is not None and estimate.block_errors is not None:
                numbers.by_module |= {"hessian_trace": estimate.blocks, "hessian_trace_stderr": estimate.block_errors}
            numbers.values |= {"hessian_trace": estimate.value, "hessian_trace_stderr": estimate.standard_error}
        if "spectral_density" in wanted:
            numbers.density = linalg.spectral_density(
                matvec,
                space,
                starts=options.density_starts,
                steps=options.density_steps,
                deflation=pairs,
                generator=generator,
            )
            if tracker is not None and pairs is not None and _contradicts(numbers.density, pairs, largest, smallest):
                tracker.doubt()
                search(tracker)

    def _add_eigenvalues(
        self, numbers: _Numbers, pairs: Eigenpairs, kind: str, names: Sequence[str], off: Sequence[float]
    ) -> None:
        options, values = self._options, numbers.values
        errors = [error + other for error, other in zip(pairs.errors.tolist(), off, strict=True)]
        for name, value, error, converged in zip(names, pairs.values.tolist(), errors, pairs.converged, strict=False):
            scale = abs(value)
            if kind == "second_moment":
                # Found without the identity: next to 1 its digits would be lost.
                values["second_moment_excess"], value = value, 1.0 + value
            if pairs.asymmetry > options.tolerance * scale and not converged:
                self._warn_once(
                    name,
                    f"products for {name} are not symmetric (by {pairs.asymmetry / (scale or 1.0):.1%} of it): the "
                    "precision is too low for the tolerance, or a layer's second derivative is wrong. "
                    "products='difference' does without second derivatives.",
                )
            relative = error / abs(value) if value else math.inf if error else 0.0
            values |= dict(zip(with_error(name), (value, relative, float(converged)), strict=True))
        if "lambda_max" in names:
            values[UPPER] = pairs.upper if math.isfinite(pairs.upper) else math.nan
            numbers.reasons[UPPER] = "the search went on from the last eigenvectors: what it overlooks is not known"
        if pairs.matvecs >= options.max_products and not all(pairs.converged):
            warn(
                f"some eigenpairs did not converge within max_products={options.max_products} products: their "
                "_converged is 0, and their _error says how far they got; where it is small, the search may have "
                "overlooked others. Raise max_products or tolerance."
            )
        if kind == "hessian" and not any(pairs.values.tolist()) and not any(pairs.errors.tolist()):
            warn(
                "the Hessian is zero: the loss is flat, or piecewise linear in the parameters, whose second derivative "
                "is 0 where it is defined and undefined at the kinks."
            )


def _contradicts(density: SpectralDensity, pairs: Eigenpairs, largest: int, smallest: int) -> bool:
    """Return whether the density has an eigenvalue, beside those that were found, beyond them: by more than 1 %."""
    nodes, allowed = density.nodes[:, density.deflated :], pairs.errors + _BEYOND * pairs.values.abs()
    above = largest and float(nodes.max()) > float((pairs.values + allowed)[largest - 1])
    return bool(above or (smallest and float(nodes.min()) < float((pairs.values - allowed)[-1])))


def _failure_of(problem: SpectrumProblem, own: Exception | None, error: Exception, between: bool) -> Outcome:
    """Return what all ranks know of the failure of an operator's products. One collective."""
    flag = {"between": torch.full((1,), float(between), dtype=torch.float64, device="cpu")}

    def make() -> dict[str, Tensor]:
        if own is not None:
            raise own
        return flag

    outcome = attempt_together(problem.trainer, make, flag, "a product")
    return replace(outcome, error=outcome.error or error.with_traceback(None))
