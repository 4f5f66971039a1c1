"""Options of mini-batch sharpness: which quantities, of how many mini-batches, how well."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_curvature.monitors.checks import check_choice, check_count, check_fraction, check_names
from lightning_curvature.monitors.options import ProbeSetOptions
from lightning_curvature.operators import Curvature, operator_type

Quantity = Literal[
    "batch_sharpness", "step_sharpness", "modified_batch_sharpness", "ias", "gni", "lambda_gen", "lambda_max_b"
]
FullHessian = Literal["pairs", "exact"]
BatchesAtOnce = int | Literal["auto"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

# Quantities of one product with a mini-batch's own gradient, and of one product with the gradient of another one.
OWN_PRODUCT, CROSS_PRODUCT = ("batch_sharpness", "modified_batch_sharpness"), ("ias", "gni")
# Quantities that need products with vectors of another mini-batch, and those that need ∇L of the whole probe set.
CROSSED, FULL_GRADIENT = (*CROSS_PRODUCT, "lambda_gen"), ("gni", "lambda_gen")
# Mini-batches are drawn in pairs, in which each gives the curvature along the other's gradient.
PAIR = 2


@dataclass(frozen=True, kw_only=True)
class BatchSharpnessOptions(ProbeSetOptions):
    """Options of :class:`~lightning_curvature.BatchSharpnessMonitor`, which documents them and their errors."""

    quantities: Sequence[Quantity] = ("batch_sharpness",)
    every_n_train_steps: int | None = 100
    num_batches: int = 256
    min_batches: int = 16
    relative_error: float = 0.05
    batch_size: int | None = None
    curvature: Curvature = "hessian"
    full_hessian: FullHessian = "pairs"
    batches_at_once: BatchesAtOnce = "auto"
    probe_samples: int | None = 8192
    tolerance: float = 1e-2
    progress_bar: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("quantities", self.quantities, QUANTITIES)
        # The standard error needs two of the pairs in which batches are drawn.
        check_count("min_batches", self.min_batches, 2 * PAIR, "16 make a standard error that can be trusted")
        check_count("num_batches", self.num_batches, self.min_batches, "it is the most, min_batches the fewest")
        check_count("batch_size", self.batch_size, 1, "None takes the data of one optimizer step", optional=True)
        if self.batches_at_once != "auto":
            check_count("batches_at_once", self.batches_at_once, 1, "'auto' finds what pays")
        check_fraction("relative_error", self.relative_error, "0.05 gives values to 5 %")
        check_fraction("tolerance", self.tolerance, "1e-2 gives eigenvalues to three digits or so")
        operator_type(self.curvature)
        check_choice("full_hessian", self.full_hessian, ("pairs", "exact"), "'pairs' is the one for large probe sets")
        self._normalize(quantities=tuple(dict.fromkeys(self.quantities)))

    @property
    def drawn(self) -> tuple[Quantity, ...]:
        """Quantities of mini-batches that are drawn: all but that of the step's own batch."""
        return tuple(quantity for quantity in self.quantities if quantity != "step_sharpness")

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
        keys += ["lambda_max_b_unconverged"] if "lambda_max_b" in names else []
        return keys + (["zero_gradient_batches"] if set(names) & set(self.drawn) else [])
