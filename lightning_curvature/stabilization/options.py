"""Options of the stabilization monitor: which criteria, by which estimators, on how many samples."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.monitors.checks import check_count, check_fraction, check_names, check_numbers
from lightning_curvature.monitors.options import OccasionalOptions

Law = Literal["top", "bottom", "random", "gradients"]
Quantity = Literal["delta_1", "delta_2", "delta_2_subspace"]
Estimator = Literal["gaussian_moment", "quadratic", "direct"]
LAWS: tuple[Law, ...] = get_args(Law)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
Directions = Callable[[pl.LightningModule], Tensor]


@dataclass(frozen=True, kw_only=True)
class StabilizationOptions(OccasionalOptions):
    """Options of :class:`~lightning_curvature.StabilizationMonitor`, which documents them.

    Attributes:
        subspace_dims: ``subspace_dim`` as a tuple, descending.
        sigmas: ``sigma`` as a tuple.
    """

    sample_sizes: Sequence[int] = (4, 8, 16, 32, 64)
    subspace_dim: int | Sequence[int] = 8
    sigma: float | Sequence[float] = 1e-3
    quantities: Sequence[Quantity] = QUANTITIES
    estimators: Sequence[Estimator] = ("gaussian_moment",)
    candidates: int = 8
    draws: int = 64
    trace_vectors: int = 16
    validation_draws: int = 8
    model_tolerance: float = 0.1
    order: float = 2.0
    law: Law = "top"
    directions: Directions | None = None
    tolerance: float = 1e-3
    max_products: int | None = None
    subspace_dims: tuple[int, ...] = field(init=False)
    sigmas: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("quantities", self.quantities, QUANTITIES)
        check_names("estimators", self.estimators, ESTIMATORS)
        check_names("law", [self.law], LAWS)
        sizes = check_numbers("sample_sizes", self.sample_sizes, "(8, 64) measures at both")
        dims = check_numbers("subspace_dim", self.subspace_dim, "16 holds what matters of many networks")
        check_count("candidates", self.candidates, 1, "8 show how much samples differ")
        check_count("draws", self.draws, 2, "64 make a standard error that can be trusted")
        check_count("trace_vectors", self.trace_vectors, 3, "16 give the traces to a few per cent")
        check_count("validation_draws", self.validation_draws, 0, "0 leaves the model unchecked")
        remedy = "None allows 20 for each direction"
        check_count("max_products", self.max_products, dims[-1] + 1, remedy, optional=True)
        check_fraction("tolerance", self.tolerance, "1e-3 gives eigenvectors to three digits")
        check_fraction("model_tolerance", self.model_tolerance, "0.1 accepts a model that is right to 10 %")
        if not isinstance(self.order, (int, float)) or not 0.0 < self.order < math.inf:
            raise ValueError(f"order must be positive, got {self.order!r}: 2 is the mean square.")
        if self.order != 2.0 and "gaussian_moment" in self.estimators:
            raise ValueError(
                f"estimators must not hold 'gaussian_moment' where order is not 2, got {self.order!r}, for which "
                "there is no closed form: use 'quadratic' or 'direct'."
            )
        if self.directions is None and self.law == "gradients" and sizes[0] < dims[-1]:
            raise ValueError(
                f"sample_sizes must not be below subspace_dim where law is 'gradients', got {sizes[0]} for {dims[-1]} "
                "directions, each the gradient of a sample: raise sample_sizes or lower subspace_dim."
            )
        if self.directions is not None and not callable(self.directions):
            raise ValueError(
                f"directions must be a callable, got a {type(self.directions).__name__}: give one that returns (D, N) "
                "vectors for a module."
            )
        self._normalize(
            sample_sizes=sizes,
            order=float(self.order),
            quantities=tuple(dict.fromkeys(self.quantities)),
            estimators=tuple(dict.fromkeys(self.estimators)),
            subspace_dims=dims[::-1],
            sigmas=_positive(self.sigma),
        )

    @property
    def product_limit(self) -> int:
        """Number of products after which a search for eigenvectors ends."""
        return self.max_products or 20 * self.subspace_dims[0] + 20

    @property
    def uses_model(self) -> bool:
        """Whether an estimator relies on the quadratic model of the increment."""
        return set(self.estimators) != {"direct"}

    @property
    def compared_in_subspace(self) -> int:
        """Number of draws on which the quadratic model is compared in the subspace."""
        return self.draws if "direct" in self.estimators else self.validation_draws

    @property
    def compared_in_full_space(self) -> int:
        """Number of draws on which the quadratic model is compared in the full space."""
        return self.validation_draws if self.uses_model else 0

    def name(self, quantity: Quantity) -> str:
        """Return the key of a quantity at the order p; ``delta_1`` is that of the point, so p = 1 has another."""
        order = "1_mean" if self.order == 1.0 else f"{self.order:g}"
        return quantity.replace("delta_2", f"delta_{order}")

    def validity_keys(self) -> tuple[str, ...]:
        """Return the keys of the largest σ up to which the quadratic model holds."""
        subspace = "delta_2_subspace" in self.quantities and self.compared_in_subspace > 0
        full_space = "delta_2" in self.quantities and self.compared_in_full_space > 0
        return ("validated_sigma",) * subspace + ("validated_sigma_full_space",) * full_space

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        names = [self.name(quantity) for quantity in self.quantities]
        return [*names, *(f"{name}_stderr" for name in names), *self.validity_keys()]


def _positive(sigma: float | Sequence[float]) -> tuple[float, ...]:
    """Return one width or several as a tuple; raise unless all are positive numbers."""
    sigmas = tuple(sigma) if isinstance(sigma, Iterable) and not isinstance(sigma, str) else (sigma,)
    if not sigmas or not all(isinstance(s, Real) and not isinstance(s, bool) and 0.0 < s < math.inf for s in sigmas):
        raise ValueError(
            f"sigma must be positive, got {sigma!r}: 1e-3 is a usual width in units of the parameters, a number and no "
            "text."
        )
    return tuple(dict.fromkeys(map(float, sigmas)))
