"""Measure the checkpoints of a run that LightningCLI has made, from its configuration."""

from collections.abc import Mapping
from typing import Any

from lightning_curvature.command.parts import Name, module_and_data, monitor_of


def measure(
    config: str,
    ckpt: str,
    monitor: Name = "spectrum",
    out: str = "curvature.csv",
    *,
    options: Mapping[str, Any] | None = None,
    model: str | None = None,
    data: str | None = None,
    picture: str | None = None,
    weights_only: bool = True,
) -> Any:
    """Write the values of checkpoints to a CSV, a line for each step and key.

    Module, data and optimizer are made from the configuration as ``LightningCLI`` makes them; its Trainer is not: no
    logger, no callback and no strategy of the run is started. The data are those of the training dataloader.

    Args:
        config: configuration that LightningCLI saved beside its logs, ``config.yaml``, or one that it takes.
        ckpt: pattern of the checkpoints, such as ``"lightning_logs/version_0/checkpoints/*.ckpt"``.
        monitor: which family to measure.
        out: path of the CSV.
        options: arguments of the monitor, such as ``{"k": 5}``.
        model: import path of the module's class, where the configuration leaves it out, as one of
            ``LightningCLI(MyModule)`` does.
        data: the same of the datamodule's.
        picture: path of a picture of the values over the steps.
        weights_only: see :func:`~lightning_curvature.evaluate_checkpoints`.

    Returns:
        The :class:`~lightning_curvature.Trajectory` that was written.

    Raises:
        ValueError: for a monitor, option or configuration that there is not.
        MisconfigurationException: for what module, data or checkpoints cannot give.
    """
    from lightning_curvature.monitors.checkpoints import evaluate_checkpoints

    follow = monitor_of(monitor, options)
    module, loader = module_and_data(config, model, data)
    trajectory = evaluate_checkpoints(ckpt, follow, module, loader, weights_only=weights_only)
    trajectory.to_csv(out)
    if picture is not None:
        trajectory.plot().savefig(picture)
    return trajectory
