"""Monitors for a script that nobody wants to change: named by an environment variable, added by Lightning to a Trainer.

Lightning calls :func:`monitors` for every Trainer that it makes, through the entry point ``callbacks_factory``. Without
the variable nothing else of this package is imported.
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
    "stabilization": "StabilizationMonitor",
    "noise": "NoiseCovarianceMonitor",
}
# Those that must be told which parameter.
_OF_PARAMETER = ("noise",)


def monitors() -> "list[Monitor]":
    """Return the monitors that ``LIGHTNING_CURVATURE`` names, none where it is not set or empty.

    Names are separated by commas, "directional", "spectrum", "batch_sharpness", "stabilization" or
    "noise=<parameter>", each with its defaults (the last two measure when fit ends), or with ``@n`` behind it for
    ``every_n_train_steps=n``. Keys of a second "noise" come under ``curvature/<parameter>/``.

    Raises:
        ValueError: for an unknown name or a number that is none.

    Example:
        >>> os.environ["LIGHTNING_CURVATURE"] = "directional@10, spectrum"
        >>> [(type(one).__name__, one.every_n_train_steps) for one in monitors()]
        [('DirectionalCurvatureMonitor', 10), ('HessianSpectrumMonitor', 200)]
        >>> del os.environ["LIGHTNING_CURVATURE"]
        >>> monitors()
        []
    """
    found: list[Monitor] = []
    for entry in os.environ.get(VARIABLE, "").split(","):
        if entry.strip():
            found.append(_monitor(entry.strip(), {type(one).__name__ for one in found}))
    return found


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
        if NAMES[name] in before:  # whose keys are taken
            options["prefix"] = f"curvature/{parameter}"
    return getattr(callbacks, NAMES[name])(**options)
