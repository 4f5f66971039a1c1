"""Measure the checkpoints of a run that LightningCLI has made, from its configuration."""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from lightning_curvature.arguments import sentence
from lightning_curvature.callbacks import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilizationMonitor,
)
from lightning_curvature.monitors.base import Monitor
from lightning_curvature.monitors.checkpoints import evaluate_checkpoints
from lightning_curvature.monitors.trajectory import Trajectory

Name = Literal["spectrum", "directional", "batch_sharpness", "stabilization", "noise"]
_MONITORS: dict[Name, type[Monitor]] = {
    "spectrum": HessianSpectrumMonitor,
    "directional": DirectionalCurvatureMonitor,
    "batch_sharpness": BatchSharpnessMonitor,
    "stabilization": StabilizationMonitor,
    "noise": NoiseCovarianceMonitor,
}
# Of a configuration: what says how module, data and optimizer are made. All else is the Trainer's.
_PARTS = ("seed_everything", "model", "data", "optimizer", "lr_scheduler")


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
) -> Trajectory:
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
    if monitor not in _MONITORS:
        raise sentence("monitor", f"be one of {', '.join(get_args(Name))}", repr(monitor), "'spectrum' gives λ_max")
    kind = _MONITORS[monitor]
    try:
        follow = kind(**dict(options or {}))
    except TypeError as error:  # a name that it does not know, or one that it needs
        raise sentence(
            "options", f"be arguments of {kind.__name__}", f"{options!r} ({error})", "see its docs"
        ) from None
    module, loader = _made(config, model, data)
    trajectory = evaluate_checkpoints(ckpt, follow, module, loader, weights_only=weights_only)
    trajectory.to_csv(out)
    if picture is not None:
        trajectory.plot().savefig(picture)
    return trajectory


def _made(config: str, model: str | None, data: str | None) -> tuple[pl.LightningModule, Any]:
    """Return the module and the training dataloader of a configuration."""
    try:
        import jsonargparse  # noqa: F401 - LightningCLI needs it
        import yaml  # type: ignore[import-untyped]
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise ModuleNotFoundError(
            "measure needs jsonargparse, which is not installed: run `pip install 'jsonargparse[signatures]'`."
        ) from error

    class Parts(LightningCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            """Make none: it is the run's."""

    given = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    given = given.get("fit", given) if isinstance(given, dict) else {}
    parts = {name: given[name] for name in _PARTS if given.get(name) is not None}
    for name, path in (("model", model), ("data", data)):
        if path is None and name in parts and "class_path" not in parts[name]:
            raise sentence(
                name, "be named where the configuration has no class_path of it", None, f"give {name}='package.Class'"
            )
    if "model" not in parts and model is None:
        raise sentence("config", "hold a model", f"{config!r} without", "give the config.yaml of a run of LightningCLI")
    made = Parts(
        pkgutil.resolve_name(model) if model else None,
        pkgutil.resolve_name(data) if data else None,
        run=False,
        args=parts,
        save_config_callback=None,
        subclass_mode_model=model is None,
        subclass_mode_data=data is None,
        seed_everything_default=False,
    )
    module, datamodule = made.model, made.datamodule
    for part in filter(None, (datamodule, module)):
        part.prepare_data()
        part.setup("fit")
    module.configure_model()
    return module, (datamodule or module).train_dataloader()
