"""What the monitor of regimes hears: values of other monitors, and the losses of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.distributed.reduce import sum_over_ranks
from lightning_curvature.functional.regime import EdgeRatio, Source, edge_ratio
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.optimizers.stability import StabilityRule
from lightning_curvature.reporting.loggers import written_now


@dataclass(frozen=True)
class Heard:
    """What other monitors have written at a step, under these keys; NaN where they have not, or could not measure."""

    lambda_max: float = math.nan
    preconditioned_lambda_max: float = math.nan
    lambda_osc: float = math.nan
    oscillation_cosine: float = math.nan
    oscillation_growth: float = math.nan
    stability_index: float = math.nan

    @classmethod
    def now(cls, trainer: pl.Trainer, prefix: str) -> "Heard | None":
        """Return what was written at this step, or None where nothing was."""
        written = written_now(trainer)
        keys = {field.name: f"{prefix}/{field.name}" for field in fields(cls)}
        found = {name: written[key] for name, key in keys.items() if key in written}
        return cls(**found) if found else None


class EdgeMeter:
    """The distance from the edge, which between measurements is that of the last curvature.

    Attributes:
        curvature: the last one, and which it is; None before the first.
    """

    def __init__(self) -> None:
        self.curvature: tuple[float, Source] | None = None

    def edge(self, heard: Heard, rule: StabilityRule, full_batch: bool) -> tuple[EdgeRatio, float]:
        """Return the distance from the edge with the optimizer as it is now, and a new λ_max or NaN."""
        adaptive = math.isnan(rule.hessian)
        threshold = rule.preconditioned if adaptive else rule.hessian
        sharpness = heard.preconditioned_lambda_max if adaptive else heard.lambda_max
        edge = edge_ratio(
            full_batch=full_batch,
            lambda_osc=heard.lambda_osc,
            cosine=heard.oscillation_cosine,
            lambda_max=sharpness,
            threshold=threshold,
            stability_index=heard.stability_index,
        )
        if edge.source in ("lambda_osc", "lambda_max"):
            self.curvature = (heard.lambda_osc if edge.source == "lambda_osc" else sharpness, edge.source)
        elif edge.source is None and self.curvature is not None and threshold > 0.0:
            edge = EdgeRatio(self.curvature[0] / threshold, self.curvature[1], "")
        return edge, sharpness


def take_place_behind_others(trainer: pl.Trainer, monitor: Monitor, prefix: str) -> bool:
    """Move a monitor behind those of other classes that write under a prefix; return whether there are any.

    What they write in a hook is there when it runs in the same hook. Lightning moves its checkpoint callbacks to the
    end in the same way.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    places = [
        place
        for place, one in enumerate(callbacks)
        if isinstance(one, Monitor) and type(one) is not type(monitor) and one.options.prefix == prefix
    ]
    if places and callbacks.index(monitor) < places[-1]:
        ahead, after = callbacks[: places[-1] + 1], callbacks[places[-1] + 1 :]
        # A new list: Lightning is iterating over the old one.
        moved = [*(one for one in ahead if one is not monitor), monitor, *after]
        trainer.callbacks = moved  # type: ignore[attr-defined]
    return bool(places)


def losses_over_ranks(trainer: pl.Trainer, losses: Sequence[Tensor | None]) -> list[float | None]:
    """Return the mean of each loss over the ranks that have one; None where none has. One synchronization."""
    device = trainer.strategy.root_device
    missing = torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.stack([missing if loss is None else loss.to(missing) for loss in losses])
    counts = torch.tensor([float(loss is not None) for loss in losses], dtype=torch.float64, device=device)
    both, add = torch.stack([sums, counts]), sum_over_ranks(trainer)
    rows = (both if add is None else add(both)).T.tolist()
    return [total / count if count else None for total, count in rows]
