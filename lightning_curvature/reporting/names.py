"""Full names of logged values. TensorBoard makes a group of cards of what stands before the first slash.

Values are in the group of the prefix; error bars, counts and flags in one beside it, values over their edges in
another, and values by module in a third.
"""

import re
from collections.abc import Mapping

# Error bars and bounds, counts, flags and settings, by the ends of their keys.
_DIAGNOSTIC = re.compile(
    r".*_(error|stderr|upper|converged|unconverged|batches|steps|numerator)|epsilon|validated_sigma.*"
)
# End of the key of a running mean.
AVERAGE = "_average"
# The line at 1 beside the values over their edges.
EDGE = "edge"
# Ends of the keys of errors: standard errors are absolute, estimated errors are relative to the value.
_ABSOLUTE, _RELATIVE = "_stderr", "_error"
# Keys of what values are compared with.
_EDGES = re.compile(r".*_threshold|two_over_lr|oscillation_edge|plateau_.*")


def is_diagnostic(key: str) -> bool:
    """Whether a key is that of an error bar, a count, a flag or a setting."""
    return _DIAGNOSTIC.fullmatch(key) is not None


def is_edge(key: str) -> bool:
    """Whether a key is that of an edge, which a value of another key is compared with."""
    return _EDGES.fullmatch(key) is not None


def split_errors(numbers: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers that are no errors of others, and the absolute errors of those that have one, by their keys.

    Example:
        >>> split_errors({"lambda_max": 4.0, "lambda_max_error": 0.25, "ias": 3.0, "ias_stderr": 0.5})
        ({'lambda_max': 4.0, 'ias': 3.0}, {'lambda_max': 1.0, 'ias': 0.5})
    """
    relative = {f"{key}{_RELATIVE}": key for key in numbers if f"{key}{_RELATIVE}" in numbers}
    absolute = {f"{key}{_ABSOLUTE}": key for key in numbers if f"{key}{_ABSOLUTE}" in numbers}
    errors = {key: abs(numbers[key]) * numbers[name] for name, key in relative.items()}
    errors |= {key: numbers[name] for name, key in absolute.items()}
    return {key: number for key, number in numbers.items() if key not in relative | absolute}, errors


def full_name(prefix: str, key: str) -> str:
    """Return the name under which the value of a key is logged."""
    return f"{_beside(prefix, 'diagnostics') if is_diagnostic(key) else prefix}/{key}"


def over_edge(prefix: str, key: str) -> str:
    """Return the name of a value over its edge."""
    return f"{_beside(prefix, 'over_edge')}/{key}"


def by_module(prefix: str) -> str:
    """Return the group of values by module."""
    return _beside(prefix, "by_module")


def _beside(prefix: str, kind: str) -> str:
    # The group is what stands before the first slash, of a prefix with slashes, too.
    group, slash, rest = prefix.partition("/")
    return f"{group}_{kind}{slash}{rest}"


def values_over_edge(prefix: str, values: Mapping[str, float], edges: Mapping[str, str | None]) -> dict[str, float]:
    """Return values over their edges by full name, and 1 for the edge itself; nothing where no value has one.

    Args:
        prefix: of the monitor.
        values: by key, also the edges.
        edges: key of the edge of each value, None of a value whose edge is 1.
    """
    known = {key: 1.0 if edge is None else values.get(edge) for key, edge in edges.items() if key in values}
    found = {over_edge(prefix, key): values[key] / edge for key, edge in known.items() if edge}
    return found | {over_edge(prefix, EDGE): 1.0} if found else {}
