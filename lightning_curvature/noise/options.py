"""Options of the noise covariance: which block of parameters, which quantities, and how they are measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, whole
from lightning_curvature.functional.noise import CHAIN
from lightning_curvature.monitors.modules import unwrapped
from lightning_curvature.monitors.names import NoiseQuantity, names
from lightning_curvature.monitors.options import OccasionalOptions, ProbeSamples

Quantity = NoiseQuantity
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
# Returns inputs (n, …) and class labels (n,) of a batch.
Pairing = Callable[[Any], tuple[Tensor, Tensor]]
PARAMETER = Rule("give one such as 'fc2.weight'", holds=bool, phrase="be a name out of named_parameters()")

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

    parameter: Annotated[str, PARAMETER]
    quantities: Annotated[Sequence[Quantity], names(KEYS)] = QUANTITIES[:-1]
    top: Annotated[int, whole(3, "None takes 40 % of the directions")] | None = None
    batch_size: Annotated[int, whole(1, "None takes the samples of an optimizer step")] | None = None
    haar_draws: Annotated[int, whole(1, "4 are enough where there are some hundred directions", MANY)] = 4
    pictures: bool = True
    pairing: Annotated[Pairing, Rule("give one that returns inputs and labels of a batch")] | None = None
    probe_samples: ProbeSamples | None = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        # Names of parameters are those of modules that are not compiled.
        self._normalize(parameter=unwrapped(self.parameter))

    @property
    def pairs(self) -> bool:
        """Whether samples of mini-batches are paired."""
        return "noise_awd_chain" in self.quantities

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        return keys_of(self.quantities)
