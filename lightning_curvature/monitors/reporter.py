"""What a monitor writes: values and their names, charts, and values by module."""

from collections.abc import Iterable, Mapping, Sequence

import lightning.pytorch as pl
from torch import Tensor

from lightning_curvature.monitors.modules import Modules, ModuleTable, modules_of
from lightning_curvature.monitors.options import MonitorOptions
from lightning_curvature.reporting.bars import report_bars
from lightning_curvature.reporting.layout import SHARES
from lightning_curvature.reporting.loggers import report
from lightning_curvature.reporting.names import by_module, full_name, over_edge, values_over_edge


class Reporter(pl.Callback):
    """Base of all monitors, as far as loggers see them."""

    options: MonitorOptions

    def charts(self, trainer: pl.Trainer) -> dict[str, list[str]]:
        """Return the TensorBoard charts of this monitor: keys by title; none of a single measurement."""
        if not self._is_curve:
            return {}
        prefix, modules, edges = self.options.prefix, self._modules(trainer), self.edges(trainer)
        charts = {SHARES: [over_edge(prefix, "")] if edges else []}
        charts |= {title: [full_name(prefix, key) for key in keys] for title, keys in self.charted(trainer).items()}
        names = () if modules is None else modules.names
        for key in self.charted_by_module():
            charts[f"{key} by module"] = [f"{by_module(prefix)}/{key}/{name}" for name in names]
        return {f"{prefix}: {title}": keys for title, keys in charts.items() if keys}

    def edges(self, trainer: pl.Trainer) -> Mapping[str, str | None]:
        """Return the values that have an edge, each with the key of its edge; None where that is 1."""
        return {}

    def charted(self, trainer: pl.Trainer) -> Mapping[str, list[str]]:
        """Return the keys of each chart by its title, both without the prefix."""
        return {}

    def charted_by_module(self) -> Sequence[str]:
        """Return the keys of which each has a chart of its values by module."""
        return ()

    def _write(self, trainer: pl.Trainer, values: Mapping[str, float], shown: Iterable[str] = ()) -> None:
        """Write values under the prefix, also over their edges, and show some of them on the progress bar."""
        prefix = self.options.prefix
        named = {full_name(prefix, key): value for key, value in values.items()}
        named |= values_over_edge(prefix, values, self.edges(trainer))
        report(trainer, named, [full_name(prefix, key) for key in shown], points=self._is_curve)

    @property
    def _is_curve(self) -> bool:
        """Whether there may be several measurements in a fit."""
        return True

    def _write_modules(self, trainer: pl.Trainer, table: ModuleTable | None) -> None:
        """Write values by module, where there are any, and their picture."""
        if table is not None:
            group = by_module(self.options.prefix)
            report(trainer, {f"{group}/{key}": value for key, value in table.values().items()})
            report_bars(trainer, group, table.names, table.columns)

    def _parameters(self, trainer: pl.Trainer) -> list[Tensor]:
        """Return the parameters that the followed optimizer moves; by hand there is one optimizer, of all of them."""
        index = self.options.optimizer_index if len(trainer.optimizers) > self.options.optimizer_index else 0
        groups = trainer.optimizers[index].param_groups if trainer.optimizers else []
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _modules(self, trainer: pl.Trainer) -> Modules | None:
        """Return the modules of the parameters, where values by module are wanted."""
        wanted = self.options.by_module
        return modules_of(trainer.lightning_module, self._parameters(trainer), wanted) if wanted else None
