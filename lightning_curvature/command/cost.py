"""Say what a measurement costs, before there is a run, from a configuration of LightningCLI."""

from collections.abc import Mapping
from typing import Any

from lightning_curvature.command.parts import Name, module_and_data, monitor_of


def cost(
    config: str,
    monitor: Name = "spectrum",
    *,
    options: Mapping[str, Any] | None = None,
    model: str | None = None,
    data: str | None = None,
) -> Any:
    """Print what a measurement costs, in forward+backwards of a batch.

    Args:
        config: configuration that LightningCLI takes, or that it saved beside its logs, ``config.yaml``.
        monitor: which family to measure.
        options: arguments of the monitor, such as ``{"k": 5}``.
        model: import path of the module's class, where the configuration leaves it out.
        data: the same of the datamodule's class.

    Returns:
        The :class:`~lightning_curvature.monitors.cost.Cost` that was printed.

    Raises:
        ValueError: for a monitor, option or configuration that there is not.
        MisconfigurationException: for what module or data cannot give.
    """
    follow = monitor_of(monitor, options)
    found = follow.cost(*module_and_data(config, model, data))
    print(f"{type(follow).__name__}: {found}")
    return found
