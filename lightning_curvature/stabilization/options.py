"""What is measured of sample growth, on what, and how ranks bring together what each of them knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.losses.samples import SampleLosses
from lightning_curvature.stabilization.result import POINT

Law = Literal["top", "bottom", "random", "gradients"]


LAWS: tuple[Law, ...] = ("top", "bottom", "random", "gradients")


Quantity = Literal["delta_1", "delta_2", "delta_2_subspace"]
QUANTITIES: tuple[Quantity, ...] = ("delta_1", "delta_2", "delta_2_subspace")
Estimator = Literal["gaussian_moment", "quadratic", "direct"]
ESTIMATORS: tuple[Estimator, ...] = ("gaussian_moment", "quadratic", "direct")


@dataclass(frozen=True)
class GrowthOptions:
    """What is measured.

    Attributes:
        quantities: names.
        sample_sizes: k, ascending.
        candidates: how many samples stand for the next one, each by itself.
        subspace_dims: D, descending.
        sigmas: σ.
        estimators: names.
        draws: S, of Monte Carlo.
        trace_vectors: random vectors for the traces of the full space.
        validation_draws: probes on which the quadratic model is compared where nothing else asks for "direct".
        order: p.
        law: which directions.
        tolerance: relative residual of eigenvectors.
        max_products: of one search.
        model_tolerance: relative error up to which the quadratic model counts as valid.
    """

    quantities: tuple[Quantity, ...]
    sample_sizes: tuple[int, ...]
    candidates: int
    subspace_dims: tuple[int, ...]
    sigmas: tuple[float, ...]
    estimators: tuple[Estimator, ...]
    draws: int
    trace_vectors: int
    validation_draws: int
    order: float
    law: Law
    tolerance: float
    max_products: int
    model_tolerance: float

    def name(self, quantity: Quantity) -> str:
        """Name of a quantity at the order of aggregation."""
        return quantity if quantity == POINT else quantity.replace("delta_2", f"delta_{self._order}")

    @property
    def _order(self) -> str:
        # The criterion of the point has the name delta_1.
        return f"{self.order:g}" if self.order != 1.0 else "1_mean"


@dataclass(frozen=True)
class GrowthProblem:
    """On what it is measured.

    Attributes:
        trainer: the Trainer.
        losses: of single samples.
        parameters: those that are differentiated and moved.
        directions: vectors to span the subspace of a law of its own, (D, n), or None.
        seed: of all random vectors.
        on_product: called after every product.
    """

    trainer: pl.Trainer
    losses: SampleLosses
    parameters: Sequence[Tensor]
    directions: Tensor | None
    seed: int
    on_product: Callable[[], None]
