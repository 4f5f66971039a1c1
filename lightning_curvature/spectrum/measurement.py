"""One measurement of the spectrum: operators on a probe set, the algorithms on them, numbers by key."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_curvature.distributed.failures import Failure, attempted, failure_of
from lightning_curvature.linalg import (
    Eigenpairs,
    NonFiniteProductError,
    VectorSpace,
    eigenpairs,
    spectral_density,
    trace,
)
from lightning_curvature.optimizers.stability import NotYetSteppedError
from lightning_curvature.reporting.loggers import warn
from lightning_curvature.spectrum.problem import Operator, Problem, make_operator, preconditioned
from lightning_curvature.spectrum.result import Spectrum

Quantity = Literal[
    "lambda_max",
    "lambda_min",
    "hessian_trace",
    "spectral_density",
    "gauss_newton_lambda_max",
    "preconditioned_lambda_max",
    "second_moment_contraction",
]
Products = Literal["auto", "exact", "difference"]

QUANTITIES: tuple[Quantity, ...] = Quantity.__args__  # type: ignore[attr-defined]
# What each is measured on. Those of one operator share its graphs and its eigenvectors.
OPERATOR_OF: dict[str, str] = {
    "lambda_max": "hessian",
    "lambda_min": "hessian",
    "hessian_trace": "hessian",
    "spectral_density": "hessian",
    "gauss_newton_lambda_max": "gauss_newton",
    "preconditioned_lambda_max": "preconditioned",
    "second_moment_contraction": "second_moment",
}
# Operators that exist by exact products only.
EXACT_ONLY = ("gauss_newton", "second_moment")

# Gradients of the same loss by two ways differ by rounding, 1e-6 in float32 and 1e-2 in half precision.
_MISMATCH = 0.02

# No eigenvalue is above it, with 95 % probability.
_UPPER = "lambda_max_upper"


def _name(index: int) -> str:
    return "lambda_max" if index == 1 else f"lambda_{index}"


def _with_error(name: str) -> list[str]:
    return [name, f"{name}_error", f"{name}_converged"]


class SpectrumMeasurement:
    """Measures the spectrum again and again, each time from the eigenvectors of the time before.

    Args:
        quantities: which.
        k: how many of the largest eigenvalues of H.
        tolerance: relative residual of an eigenpair.
        max_products: cap on the products of one eigenvalue problem, and of one trace.
        trace_error: relative standard error of the trace.
        density_starts: random starts of the density.
        density_steps: products for each.
        products: how to multiply with H.
        keep_graph: whether graphs are kept from product to product.
    """

    def __init__(
        self,
        quantities: Sequence[Quantity],
        *,
        k: int,
        tolerance: float,
        max_products: int,
        trace_error: float,
        density_starts: int,
        density_steps: int,
        products: Products,
        keep_graph: bool | Literal["auto"],
    ) -> None:
        self.quantities = tuple(quantities)
        self.k = k
        self.tolerance = tolerance
        self.max_products = max_products
        self.trace_error = trace_error
        self.density_starts, self.density_steps = density_starts, density_steps
        self.products: Products = products
        self.keep_graph = keep_graph
        # By operator, on the CPU: between measurements the device keeps nothing.
        self.vectors: dict[str, list[Tensor]] = {}
        self.begin()

    def begin(self, sharded: bool = False) -> None:
        """Forget the module: a new fit may bring another. Eigenvectors stay, and are used where they fit.

        Args:
            sharded: whether ranks hold parts of the parameters, so that products are differences.
        """
        self._difference = sharded or self.products == "difference"
        self._told: set[str] = set()

    def measure(self, problem: Problem, fail: Callable[[Exception], None]) -> Spectrum:
        """Measure everything asked for.

        Every rank comes here and makes the same products. One that fails sends NaN in its product, or in one more, so
        that all of them leave the operator together; the other operators are still measured.

        Args:
            problem: what the spectrum is of.
            fail: called with the error that ended the measurement of one operator; returns where training goes on.
        """
        spectrum = Spectrum(dict.fromkeys(self.keys(), math.nan))
        for kind in dict.fromkeys(OPERATOR_OF[q] for q in self.quantities):
            wanted = [q for q in self.quantities if OPERATOR_OF[q] == kind]
            attempted(functools.partial(self._measure_operator, problem, kind, wanted, spectrum), fail)
        return spectrum

    def keys(self) -> list[str]:
        """Keys of all values, the same at every measurement."""
        return self._keys_of(self.quantities)

    def _keys_of(self, quantities: Sequence[str]) -> list[str]:
        keys = []
        for quantity in quantities:
            if quantity == "hessian_trace":
                keys += [quantity, f"{quantity}_stderr"]
            elif quantity == "second_moment_contraction":
                keys += [*_with_error(quantity), "second_moment_excess"]
            elif quantity == "lambda_max":
                keys += [key for i in range(1, self.k + 1) for key in _with_error(_name(i))] + [_UPPER]
            elif quantity != "spectral_density":
                keys += _with_error(quantity)
        return keys

    def _measure_operator(self, problem: Problem, kind: str, wanted: Sequence[str], spectrum: Spectrum) -> None:
        failure = self._attempt(problem, kind, wanted, spectrum)
        if failure is not None and failure.lacking and self._may_fall_back(kind):
            self._difference = True
            second = self._attempt(problem, kind, wanted, spectrum)
            # What ends differences as well was no lack of second derivatives: the next measurement is exact again.
            self._difference = second is None
            if second is None:
                warn(
                    "products with the Hessian are made by a difference of gradients from here on, since second "
                    f"derivatives cannot be had: {failure.cause}",
                    any_rank=failure.only_here,
                )
            failure = second
        if failure is not None:
            raise failure.cause from None

    def _may_fall_back(self, kind: str) -> bool:
        return self.products == "auto" and not self._difference and kind not in EXACT_ONLY

    def _attempt(self, problem: Problem, kind: str, wanted: Sequence[str], spectrum: Spectrum) -> Failure | None:
        with contextlib.closing(make_operator(problem, kind, self._difference, self.keep_graph)) as operator:
            try:
                whole = preconditioned(problem, operator) if kind == "preconditioned" else operator
                self._measure_on(whole, problem, kind, wanted, spectrum)
                if not operator.all_ended():
                    raise NonFiniteProductError(f"what was measured of the operator {kind!r} is lost")
            except NotYetSteppedError:
                return None  # nothing to measure, on any rank
            except Exception as error:
                if operator.reduce is None and not isinstance(error, (RuntimeError, NonFiniteProductError)):
                    raise
                between = not isinstance(error, NonFiniteProductError)
                if between:
                    operator.fail(error.with_traceback(None))  # which holds vectors
                failure = failure_of(problem.trainer, operator.error, error, between)
                if failure.between and operator.reduce is not None:
                    # Some ranks have come further than others, and all must have the same.
                    spectrum.values |= dict.fromkeys(self._keys_of(wanted), math.nan)
                    spectrum.density = spectrum.density if "spectral_density" not in wanted else None
                    self.vectors.pop(kind, None)
                return failure
        return None

    def _measure_on(
        self, operator: Operator, problem: Problem, kind: str, wanted: Sequence[str], spectrum: Spectrum
    ) -> None:
        space = operator.space
        generator = torch.Generator(space.device).manual_seed(problem.seed)

        def matvec(vector: Tensor) -> Tensor:
            product = operator(vector)
            problem.on_product()
            return product

        pairs = None
        smallest = int("lambda_min" in wanted)
        largest = self.k if "lambda_max" in wanted else 0 if kind == "hessian" else 1
        if largest + smallest:
            pairs = eigenpairs(
                matvec,
                space,
                largest=largest,
                smallest=smallest,
                tolerance=self.tolerance,
                max_matvecs=self.max_products,
                max_basis=problem.basis,
                start=self._start(space, kind),
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
            self.vectors[kind] = [v.to("cpu") for v in pairs.vectors]
            spectrum.values |= self._eigenvalues(pairs, kind, largest)
        if "hessian_trace" in wanted:
            found = trace(
                matvec,
                space,
                relative_error=self.trace_error,
                max_matvecs=self.max_products,
                deflation=pairs,
                generator=generator,
            )
            spectrum.values |= {"hessian_trace": found.value, "hessian_trace_stderr": found.standard_error}
        if "spectral_density" in wanted:
            spectrum.density = spectral_density(
                matvec,
                space,
                starts=self.density_starts,
                steps=self.density_steps,
                deflation=pairs,
                generator=generator,
            )

    def _warn_once(self, about: str, message: str) -> None:
        """Warn the first time in a fit: a message with a number in it would be a new one each time."""
        if about not in self._told:
            self._told.add(about)
            warn(message)

    def _start(self, space: VectorSpace, kind: str) -> list[Tensor]:
        vectors = [v.to(space.device, space.dtype) for v in self.vectors.get(kind, ())]
        return vectors if all(len(v) == space.size for v in vectors) else []

    def _eigenvalues(self, pairs: Eigenpairs, kind: str, largest: int) -> dict[str, float]:
        values: dict[str, float] = {}
        names = {
            "hessian": [*(_name(i) for i in range(1, largest + 1)), "lambda_min"],
            "gauss_newton": ["gauss_newton_lambda_max"],
            "preconditioned": ["preconditioned_lambda_max"],
            "second_moment": ["second_moment_contraction"],
        }[kind]
        for name, value, error, converged in zip(
            names, pairs.values.tolist(), pairs.errors.tolist(), pairs.converged, strict=False
        ):
            scale = abs(value)
            if kind == "second_moment":
                # Found without the identity: next to 1 its digits would be lost.
                values["second_moment_excess"], value = value, 1.0 + value
            if pairs.asymmetry > self.tolerance * scale and not converged:
                self._warn_once(
                    name,
                    f"products for {name} are not symmetric (by {pairs.asymmetry / (scale or 1.0):.1%} of it): the "
                    "precision is too low for the tolerance, or a layer's second derivative is wrong. "
                    "products='difference' does without second derivatives.",
                )
            relative = error / abs(value) if value else math.inf if error else 0.0
            values |= dict(zip(_with_error(name), (value, relative, float(converged)), strict=True))
        if kind == "hessian" and largest:
            values[_UPPER] = pairs.upper
        if pairs.matvecs >= self.max_products and not all(pairs.converged):
            warn(
                f"some eigenpairs had not converged after max_products={self.max_products} products: their _converged "
                "is 0, and their _error says how far they got; where it is small, others may have been overlooked. "
                "Raise max_products or tolerance."
            )
        if kind == "hessian" and not any(pairs.values.tolist()) and not any(pairs.errors.tolist()):
            warn(
                "the Hessian is zero: the loss is flat, or piecewise linear in the parameters, whose second derivative "
                "is 0 where it is defined and undefined at the kinks."
            )
        return values
