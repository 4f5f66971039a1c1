"""What a command makes of its arguments: a monitor by name, and module and data of a configuration.

Imports that load torch come when they are needed, since a report needs none.
"""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Name = Literal["spectrum", "directional", "batch_sharpness", "stabilization", "noise"]
_CLASSES: dict[Name, str] = {
    "spectrum": "HessianSpectrumMonitor",
    "directional": "DirectionalCurvatureMonitor",
    "batch_sharpness": "BatchSharpnessMonitor",
    "stabilization": "StabilizationMonitor",
    "noise": "NoiseCovarianceMonitor",
}
# Of a configuration: what says how module, data and optimizer are made. All else is the Trainer's.
_PARTS = ("seed_everything", "model", "data", "optimizer", "lr_scheduler")


def monitor_of(monitor: Name, options: Mapping[str, Any] | None) -> Any:
    """Return a monitor by the name of its family.

    Raises:
        ValueError: for a name or an option that there is not.
    """
    from lightning_curvature.arguments import sentence

    if monitor not in _CLASSES:
        raise sentence("monitor", f"be one of {', '.join(get_args(Name))}", repr(monitor), "'spectrum' gives λ_max")
    kind = pkgutil.resolve_name(f"lightning_curvature.callbacks:{_CLASSES[monitor]}")
    try:
        return kind(**dict(options or {}))
    except TypeError as error:  # a name that it does not know, or one that it needs
        raise sentence(
            "options", f"be arguments of {kind.__name__}", f"{options!r} ({error})", "see its docs"
        ) from None


def module_and_data(config: str, model: str | None, data: str | None) -> tuple[Any, Any]:
    """Return the module and the training dataloader of a configuration, made as ``LightningCLI`` makes them.

    Raises:
        ValueError: for a configuration without a module, or without a class of it.
        ModuleNotFoundError: without jsonargparse.
    """
    from lightning_curvature.arguments import sentence

    try:
        import jsonargparse  # noqa: F401 - LightningCLI needs it
        import yaml  # type: ignore[import-untyped]
        from lightning.pytorch.cli import LightningCLI
    except ImportError as error:
        raise ModuleNotFoundError(
            "the command needs jsonargparse, which is not installed: run `pip install 'jsonargparse[signatures]'`."
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
