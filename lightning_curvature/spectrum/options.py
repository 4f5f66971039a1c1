"""Options of the spectrum: which quantities, by which products, how well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from lightning_curvature.arguments import MANY, Rule, check_count, fraction, whole
from lightning_curvature.linalg.tracking import RECHECK
from lightning_curvature.monitors.modules import Patterns
from lightning_curvature.monitors.names import SpectrumQuantity, names
from lightning_curvature.monitors.options import Period, ProbeSamples, ProbeSetOptions
from lightning_curvature.operators.exact import KEEP_GRAPH
from lightning_curvature.operators.graphs import KeepGraph

Quantity = SpectrumQuantity
Products = Literal["auto", "exact", "difference"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

# The operator of each quantity that is not one of the Hessian. Quantities of one operator share graphs and vectors.
_OPERATORS: dict[str, str] = {
    "gauss_newton_lambda_max": "gauss_newton",
    "preconditioned_lambda_max": "preconditioned",
    "second_moment_contraction": "second_moment",
}
# Keys that accompany a quantity of another name.
_KEYS = {
    "lambda_max": ("lambda_2", "lambda_max_threshold", "stability_headroom"),
    "hessian_trace": ("trace",),
    "spectral_density": ("density",),
    "second_moment_contraction": ("second_moment_excess",),
}
# Operators that exist by exact products only.
EXACT_ONLY = ("gauss_newton", "second_moment")
_PRODUCTS = "a search for one eigenvalue takes about ten"


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions(ProbeSetOptions):
    """Options of :class:`~lightning_curvature.HessianSpectrumMonitor`, which documents them."""

    quantities: Annotated[Sequence[Quantity], names(_KEYS)] = ("lambda_max",)
    k: Annotated[int, whole(1, "1 is the largest eigenvalue alone", MANY)] = 1
    every_n_train_steps: Period = 200
    probe_samples: ProbeSamples | None = 2048
    tolerance: Annotated[float, fraction("1e-3 gives eigenvalues to three digits")] = 1e-3
    recheck_every: Annotated[int, RECHECK] = 10
    max_products: Annotated[int, whole(20, _PRODUCTS, MANY)] = 100
    trace_error: Annotated[float, fraction("0.05 gives the trace to 5 %")] = 0.05
    density_starts: Annotated[int, whole(1, "2 tell the error", MANY)] = 2
    density_steps: Annotated[int, whole(2, "40 make a good picture", MANY)] = 40
    products: Annotated[Products, Rule("'auto' is exact where it can be")] = "auto"
    keep_graph: Annotated[KeepGraph, KEEP_GRAPH] = "auto"
    parameters: Patterns | None = None
    save_eigenvectors: bool = True
    progress_bar: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_products", self.max_products, self.k + 1, _PRODUCTS)

    @property
    def shares(self) -> list[str]:
        """Keys of the shares of modules in eigenvectors."""
        eigenvalues = [q for q in self.quantities if q not in ("hessian_trace", "spectral_density")]
        return [key.removesuffix("_error") + SHARE for key in self.keys(eigenvalues) if key.endswith("_error")]

    @property
    def operators(self) -> dict[str, list[str]]:
        """Quantities by the operator that they are measured on."""
        by_operator: dict[str, list[str]] = {}
        for quantity in self.quantities:
            by_operator.setdefault(_OPERATORS.get(quantity, "hessian"), []).append(quantity)
        return by_operator

    def keys(self, quantities: Sequence[str] | None = None) -> list[str]:
        """Return the keys of all values, or those of some of the quantities."""
        keys: list[str] = []
        for quantity in self.quantities if quantities is None else quantities:
            if quantity == "hessian_trace":
                keys += [quantity, f"{quantity}_stderr"]
            elif quantity == "second_moment_contraction":
                keys += [*with_error(quantity), "second_moment_excess"]
            elif quantity == "lambda_max":
                keys += [key for i in range(1, self.k + 1) for key in with_error(largest_name(i))] + [UPPER]
            elif quantity != "spectral_density":
                keys += with_error(quantity)
        return keys


# No eigenvalue is above it, with 95 % probability.
UPPER = "lambda_max_upper"
# Of each module in the eigenvector of an eigenvalue.
SHARE = "_share"


def largest_name(index: int) -> str:
    """Return the key of the i-th largest eigenvalue, counted from 1."""
    return "lambda_max" if index == 1 else f"lambda_{index}"


def with_error(name: str) -> list[str]:
    """Return the keys of an eigenvalue, its error and whether it converged."""
    return [name, f"{name}_error", f"{name}_converged"]
