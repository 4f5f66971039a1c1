"""Monitors for unchanged scripts: an environment variable names them, Lightning adds them to every Trainer.

Lightning calls :func:`monitors` for each Trainer that it makes, through the entry point ``callbacks_factory``. Without
the variable, nothing else of this package is imported.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curvature.monitors.base import Monitor

VARIABLE = "LIGHTNING_CURVATURE"
NAMES = {
    "directional": "DirectionalCurvatureMonitor",
    "spectrum": "HessianSpectrumMonitor",
    "batch_sharpness": "BatchSharpnessMonitor",
    "stability": "StabilityMonitor",
    "stabilization": "StabilizationMonitor",
    "noise": "NoiseCovarianceMonitor",
    "regimes": "RegimeMonitor",
}
# Monitors that need the name of a parameter.
_OF_PARAMETER = ("noise",)


def monitors() -> "list[Monitor]":
    """Return the monitors that ``LIGHTNING_CURVATURE`` names, none where it is not set or empty.

    Names are separated by commas: "directional", "spectrum", "batch_sharpness", "stability", "stabilization",
    "regimes" or "noise=<parameter>". ``@n`` after a name sets ``every_n_train_steps=n``; everything else has its
    default. Keys of a second "noise" begin with ``curvature/<parameter>/``.

    Raises:
        ValueError: for an unknown name or an invalid number.

    Example:
        >>> os.environ["LIGHTNING_CURVATURE"] = "directional@10, spectrum"
        >>> [(type(one).__name__, one.every_n_train_steps) for one in monitors()]
        [('DirectionalCurvatureMonitor', 10), ('HessianSpectrumMonitor', 200)]
        >>> del os.environ["LIGHTNING_CURVATURE"]
        >>> monitors()
        []
    """
    made: list[Monitor] = []
    for entry in os.environ.get(VARIABLE, "").split(","):
        if entry.strip():
            made.append(_monitor(entry.strip(), {type(one).__name__ for one in made}))
    return made


def _monitor(entry: str, before: "set[str]") -> Any:
    whole, at, number = entry.partition("@")
    name, _, parameter = whole.partition("=")
    if name not in NAMES or (at and not number.isdecimal()) or bool(parameter) != (name in _OF_PARAMETER):
        raise ValueError(
            f"{VARIABLE} must hold names from {tuple(NAMES)}, each with @n behind it or not, got {entry!r}: "
            "'directional@10,spectrum' measures every 10 steps and at the default ones, 'noise=fc2.weight' the "
            "noise on one parameter; unset it for none."
        )
    from lightning_curvature import callbacks

    options: dict[str, Any] = {"every_n_train_steps": int(number)} if at else {}
    if parameter:
        options["parameter"] = parameter
        if NAMES[name] in before:  # a second monitor needs other keys
            options["prefix"] = f"curvature/{parameter}"
    return getattr(callbacks, NAMES[name])(**options)
