"""Options of the stability index: how often, over how many measurements, about which average."""

from dataclasses import dataclass
from typing import Annotated

from lightning_curvature.arguments import MANY, fraction, whole
from lightning_curvature.monitors.options import Period, ProbeSetOptions

# A standard error of fewer measured steps is not reliable.
LEAST = 8
KEYS = (
    "stability_index",
    "stability_index_stderr",
    "stability_index_drift",
    "stability_index_noise",
    "stability_index_steps",
)


@dataclass(frozen=True, kw_only=True)
class StabilityOptions(ProbeSetOptions):
    """Options of :class:`~lightning_curvature.StabilityMonitor`, which documents them."""

    every_n_train_steps: Period = 10
    window: Annotated[int, whole(LEAST, "30 measured steps give an index to about ten per cent", MANY)] = 30
    decay: Annotated[float, fraction("0.95 averages over some twenty steps")] = 0.95
    progress_bar: bool = False

    def keys(self) -> list[str]:
        """Return the keys of all values."""
        return list(KEYS)
