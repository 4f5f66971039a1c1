"""Checks of arguments: a rule is stated once, beside its argument, and broken by one sentence.

Types come from annotations, limits from a :class:`Rule`. A mistake is a ``ValueError`` with argument, rule, value and
remedy. Tensors are judged by type and shape alone: to read their values would wait for the device. A number may be one
of NumPy, or a tensor of one element, and becomes one of Python; booleans are no numbers.
"""

from lightning_curvature.arguments.calls import check_broadcast, check_fields, checked
from lightning_curvature.arguments.rules import (
    MANY,
    MEASURED,
    Rule,
    check_count,
    fraction,
    not_negative,
    positive,
    sentence,
    shaped,
    spelled,
    whole,
)

__all__ = [
    "MANY",
    "MEASURED",
    "Rule",
    "check_broadcast",
    "check_count",
    "check_fields",
    "checked",
    "fraction",
    "not_negative",
    "positive",
    "sentence",
    "shaped",
    "spelled",
    "whole",
]
