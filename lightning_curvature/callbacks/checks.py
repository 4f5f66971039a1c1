"""Checks of the arguments of monitors: one sentence with argument, rule, value and remedy."""

from collections.abc import Sequence


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
