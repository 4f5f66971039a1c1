"""Checks of arguments and modules of monitors: one sentence with argument or object, rule, value and remedy."""

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn


def check_names(argument: str, names: object, known: Sequence[str]) -> None:
    """Raise unless ``names`` is a non-empty sequence of known names."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(
            f"{argument} must be a non-empty sequence of names, got {names!r}: choose from {tuple(known)}."
        )
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument} must be names from {tuple(known)}, got {unknown[0]!r}: correct or remove it.")


def check_count(argument: str, value: object, least: int, remedy: str, optional: bool = False) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``, or None where it is optional."""
    if optional and value is None:
        return
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"{argument} must be a whole number of at least {least}{', or None' if optional else ''}, got {value!r}: "
            f"{remedy}."
        )


def check_fraction(argument: str, value: object, remedy: str) -> None:
    """Raise unless ``value`` lies between 0 and 1."""
    if not isinstance(value, float) or not 0.0 < value < 1.0:
        raise ValueError(f"{argument} must lie between 0 and 1, got {value!r}: {remedy}.")


def check_not_quantized(monitor: str, module: nn.Module) -> None:
    """Raise where a module computes with weights of eight bits or less, which have no derivatives worth the name."""
    remedy = "train the module in float32, bfloat16 or float16, or leave the monitor out"
    for name, submodule in module.named_modules():
        if kind := _quantized(submodule):
            raise MisconfigurationException(
                f"{monitor} must find modules that can be differentiated, got the quantized {name!r} ({kind}): "
                f"{remedy}."
            )
    for name, p in module.named_parameters():
        if p.is_floating_point() and p.dtype.itemsize == 1:
            raise MisconfigurationException(
                f"{monitor} must find parameters of at least 16 bits, got {name!r} of {p.dtype}: {remedy}."
            )


def _quantized(module: nn.Module) -> str | None:
    """Name of the class of ``torch.ao``'s quantized modules that a module is of, or None."""
    for kind in type(module).__mro__:
        packages = kind.__module__.split(".")
        # FloatFunctional stands there, too, and is what its name says.
        if packages[:3] == ["torch", "ao", "nn"] and "quantized" in packages and kind.__name__ != "FloatFunctional":
            return f"{kind.__module__}.{kind.__name__}"
    return None
