"""Options of mini-batch sharpness: which quantities, of how many mini-batches, how well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from lightning_curvature.arguments import MANY, Rule, check_count, fraction, sentence, whole
from lightning_curvature.batch_sharpness.average import ERROR
from lightning_curvature.monitors.names import SharpnessQuantity, names
from lightning_curvature.monitors.options import Period, ProbeSamples, ProbeSetOptions
from lightning_curvature.operators import Curvature
from lightning_curvature.operators.exact import CURVATURE
from lightning_curvature.reporting.names import AVERAGE

Quantity = SharpnessQuantity
FullHessian = Literal["pairs", "exact"]
BatchesAtOnce = int | Literal["auto"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

# Quantities of one product with a mini-batch's own gradient, and of one product with the gradient of another one.
OWN_PRODUCT, CROSS_PRODUCT = ("batch_sharpness", "modified_batch_sharpness"), ("ias", "gni")
# Quantities that need products with vectors of another mini-batch, and those that need ∇L of the whole probe set.
CROSSED, FULL_GRADIENT = (*CROSS_PRODUCT, "lambda_gen"), ("gni", "lambda_gen")
# Quantities of the updates that the optimizer would make; there is none over η at η = 0.
OF_UPDATES = ("lambda_gen", "update_sharpness")
# Quantities that settle at the plateaus of the optimizer, and the keys of these.
SETTLING, PLATEAUS = ("batch_sharpness", "step_sharpness"), ("plateau_small_batch", "plateau_large_batch")
# Mini-batches are drawn in pairs, in which each gives the curvature along the other's gradient.
PAIR = 2
# Quantiles of λ_max^b over mini-batches, by the end of their key.
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
_MOST = "it is the most, min_batches the fewest"


@dataclass(frozen=True, kw_only=True)
class BatchSharpnessOptions(ProbeSetOptions):
    """Options of :class:`~lightning_curvature.BatchSharpnessMonitor`, which documents them and their errors."""

    quantities: Annotated[Sequence[Quantity], names({})] = ("batch_sharpness",)
    every_n_train_steps: Period = 100
    num_batches: Annotated[int, whole(1, _MOST, MANY)] = 256
    # The standard error needs two of the pairs in which batches are drawn.
    min_batches: Annotated[int, whole(2 * PAIR, "8 make a standard error that can be used", MANY)] = 8
    average_over: Annotated[int, whole(1, "1 takes each measurement by itself", MANY)] = 1
    relative_error: Annotated[float, fraction("0.05 gives values to 5 %")] = 0.05
    batch_size: Annotated[int, whole(1, "None takes the data of one optimizer step")] | None = None
    curvature: Annotated[Curvature, CURVATURE] = "hessian"
    full_hessian: Annotated[FullHessian, Rule("'pairs' is the one for large probe sets")] = "pairs"
    batches_at_once: Annotated[BatchesAtOnce, whole(1, "'auto' finds what pays")] = "auto"
    probe_samples: ProbeSamples | None = 8192
    tolerance: Annotated[float, fraction("1e-3 gives eigenvalues to three digits")] = 1e-3
    progress_bar: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_module and "batch_sharpness" not in self.quantities:
            got = f"{self.by_module!r} with {list(self.quantities)}"
            raise sentence("by_module", "come with 'batch_sharpness'", got, "add it, or leave by_module out")
        check_count("num_batches", self.num_batches, self.min_batches, _MOST)

    def at_a_point(self) -> "BatchSharpnessOptions":
        """Return them without running means: a single measurement is as accurate by itself."""
        return replace(super().at_a_point(), average_over=1)

    @property
    def of_step(self) -> bool:
        """Whether the batches of the coming step are measured."""
        return "step_sharpness" in self.quantities

    @property
    def drawn(self) -> tuple[Quantity, ...]:
        """Quantities of mini-batches that are drawn: all but that of the step's own batch."""
        return tuple(quantity for quantity in self.quantities if quantity != "step_sharpness")

    @property
    def error_of_one(self) -> float:
        """Relative standard error of a measurement with which the mean over ``average_over`` has ``relative_error``."""
        return self.relative_error * math.sqrt(self.average_over)

    def with_means(self, quantities: Sequence[str]) -> list[str]:
        """Return the keys of quantities, and of their running means where these are wanted."""
        return [*quantities, *(f"{quantity}{AVERAGE}" for quantity in quantities if self.average_over > 1)]

    @property
    def exact(self) -> bool:
        """Whether vectors are multiplied by the Hessian of the whole probe set."""
        return self.full_hessian == "exact" and bool(set(CROSSED) & set(self.quantities))

    def keys(self, quantities: Sequence[str] | None = None) -> list[str]:
        """Return the keys of all values, or those of some of the quantities."""
        names = self.quantities if quantities is None else quantities
        keys: list[str] = []
        for name in names:
            keys += [name, f"{name}_stderr"] + ([f"{name}_batches"] if name in self.drawn else [])
            keys += [f"{name}{AVERAGE}", f"{name}{ERROR}"] if self.average_over > 1 else []
        if "lambda_max_b" in names:
            keys += [f"lambda_max_b_{end}" for end in (*QUANTILES, "unconverged")]
        return keys + (["zero_gradient_batches"] if set(names) & set(self.drawn) else [])
