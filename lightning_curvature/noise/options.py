"""Options of the noise covariance: which block of parameters, which quantities, and how they are measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from lightning_curvature.functional.noise import CHAIN
from lightning_curvature.monitors.checks import check_count, check_names
from lightning_curvature.monitors.options import OccasionalOptions

Quantity = Literal[
    "noise_gamma",
    "noise_gamma_awd",
    "noise_commutativity",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
    "noise_awd_chain",
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
# Returns inputs (n, …) and class labels (n,) of a batch.
Pairing = Callable[[Any], tuple[Tensor, Tensor]]

KEYS: dict[str, tuple[str, ...]] = {
    "noise_gamma": ("noise_gamma", "noise_gamma_stderr"),
    "noise_gamma_awd": ("noise_gamma_awd", "noise_gamma_awd_stderr"),
    "noise_commutativity": ("noise_commutativity", "noise_commutativity_relative", "noise_commutativity_random"),
    "noise_alignment": ("noise_alignment",),
    "noise_spearman": ("noise_spearman",),
    "noise_coupling": ("noise_coupling", "noise_coupling_random", "noise_coupling_z"),
    "noise_awd_chain": tuple(f"noise_gamma_awd_{name}" for name in CHAIN),
}


def keys_of(quantities: Iterable[str]) -> list[str]:
    """Return the keys of some quantities."""
    return [key for quantity in quantities for key in KEYS[quantity]]


@dataclass(frozen=True, kw_only=True)
class NoiseOptions(OccasionalOptions):
    """Options of :class:`~lightning_curvature.NoiseCovarianceMonitor`, which documents them.

    Raises:
        ValueError: for a value outside its rule.
    """

    parameter: str
    quantities: Sequence[Quantity] = QUANTITIES[:-1]
    top: int | None = None
    batch_size: int | None = None
    haar_draws: int = 4
    pictures: bool = True
    pairing: Pairing | None = None
    probe_samples: int | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.parameter, str) or not self.parameter:
            raise ValueError(
                f"parameter must be a name out of named_parameters(), got {self.parameter!r}: give one such as "
                "'fc2.weight'."
            )
        check_names("quantities", self.quantities, QUANTITIES)
        check_count("top", self.top, 3, "None takes 40 % of the directions", optional=True)
        check_count("batch_size", self.batch_size, 1, "None takes the samples of an optimizer step", optional=True)
        check_count("haar_draws", self.haar_draws, 1, "4 are enough where there are some hundred directions")
        if self.pairing is not None and not callable(self.pairing):
            raise ValueError(
                f"pairing must be a callable, got a {type(self.pairing).__name__}: give one that returns inputs and "
                "labels of a batch."
            )
        # Names of parameters are those of modules that are not compiled.
        parameter, quantities = self.parameter.replace("_orig_mod.", ""), tuple(dict.fromkeys(self.quantities))
        self._normalize(parameter=parameter, quantities=quantities)

    @property
    def pairs(self) -> bool:
        """Whether samples of mini-batches are paired."""
        return "noise_awd_chain" in self.quantities

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        return keys_of(self.quantities)
