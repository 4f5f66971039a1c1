"""Options of the stabilization monitor: which criteria, by which estimators, on how many samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, check_count, fraction, positive, whole
from lightning_curvature.monitors.names import StabilizationQuantity, names
from lightning_curvature.monitors.options import OccasionalOptions, ascending

Law = Literal["top", "bottom", "random", "gradients"]
Quantity = StabilizationQuantity
Estimator = Literal["gaussian_moment", "quadratic", "direct"]
LAWS: tuple[Law, ...] = get_args(Law)
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
Directions = Callable[[pl.LightningModule], Tensor]
_PRODUCTS = "None allows 20 for each direction"


@dataclass(frozen=True, kw_only=True)
class StabilizationOptions(OccasionalOptions):
    """Options of :class:`~lightning_curvature.StabilizationMonitor`, which documents them.

    Attributes:
        subspace_dims: ``subspace_dim`` as a tuple, descending.
        sigmas: ``sigma`` as a tuple.
    """

    sample_sizes: Annotated[Sequence[int], Rule("(8, 64) measures at both", least=1, single=True)] = (4, 8, 16, 32, 64)
    subspace_dim: Annotated[int | Sequence[int], whole(1, "16 holds what matters of many networks", MANY)] = 8
    sigma: Annotated[float | Sequence[float], positive("1e-3 is a usual width in units of the parameters")] = 1e-3
    quantities: Annotated[Sequence[Quantity], names({})] = QUANTITIES
    estimators: Sequence[Estimator] = ("gaussian_moment",)
    candidates: Annotated[int, whole(1, "8 show how much samples differ", MANY)] = 8
    draws: Annotated[int, whole(2, "64 make a standard error that can be trusted", MANY)] = 64
    trace_vectors: Annotated[int, whole(3, "16 give the traces to a few per cent", MANY)] = 16
    validation_draws: Annotated[int, whole(0, "0 leaves the model unchecked", MANY)] = 8
    model_tolerance: Annotated[float, fraction("0.1 accepts a model that is right to 10 %")] = 0.1
    order: Annotated[float, positive("2 is the mean square")] = 2.0
    law: Annotated[Law, Rule("'top' takes the sharpest directions")] = "top"
    directions: Annotated[Directions, Rule("give one that returns (D, N) vectors for a module")] | None = None
    tolerance: Annotated[float, fraction("1e-3 gives eigenvectors to three digits")] = 1e-3
    max_products: Annotated[int, whole(1, _PRODUCTS, MANY)] | None = None
    subspace_dims: tuple[int, ...] = field(init=False)
    sigmas: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        dims = self.subspace_dim if isinstance(self.subspace_dim, Sequence) else (self.subspace_dim,)
        sizes, dims = ascending(self.sample_sizes), ascending(dims)
        if self.max_products is not None:
            check_count("max_products", self.max_products, dims[-1] + 1, _PRODUCTS, optional=True)
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
        sigmas = self.sigma if isinstance(self.sigma, Sequence) else (self.sigma,)
        self._normalize(
            sample_sizes=sizes,
            order=float(self.order),
            subspace_dims=dims[::-1],
            sigmas=tuple(dict.fromkeys(map(float, sigmas))),
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
