"""Values by module: which parameters belong to which module, and the table of what was measured."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.arguments import Rule

ByModule = Annotated[
    bool | int | Sequence[str],
    Rule(
        "True takes each module that holds parameters, 1 those at the top",
        least=1,
        single=True,
        phrase="be True, False, a depth of at least 1, or names out of named_modules()",
    ),
]
Patterns = Annotated[
    str | Sequence[str],
    Rule("'encoder.*' takes those of encoder", single=True, holds=bool, phrase="be patterns of parameters' names"),
]
# What the names leave over, and parameters that no module holds.
REST, OUTSIDE = "(rest)", "(outside)"
# Modules around a module, of compiled and of checkpointed ones.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Modules:
    """A partition of the parameters into modules.

    Attributes:
        names: of the modules, in the order of their parameters.
    """

    names: tuple[str, ...]
    _places: Mapping[int, int] = field(repr=False)

    def labels(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return for each parameter the place of its module."""
        return [self._places[id(p)] for p in parameters]

    def sums(self, parameters: Sequence[Tensor], by_parameter: Tensor) -> Tensor:
        """Return the sum over the parameters of each module, (modules,), of numbers (parameters,)."""
        labels = torch.tensor(self.labels(parameters), device=by_parameter.device)
        return by_parameter.new_zeros(len(self.names)).index_add(0, labels, by_parameter)


@dataclass(frozen=True)
class ModuleTable:
    """Values by module.

    Attributes:
        names: of the modules.
        columns: by key, a value for each module.

    Example:
        >>> table = ModuleTable(("encoder", "head"), {"lambda_max_share": (0.25, 0.75)})
        >>> table.values()
        {'lambda_max_share/encoder': 0.25, 'lambda_max_share/head': 0.75}
        >>> print(table)
        module   lambda_max_share
        encoder              0.25
        head                 0.75
    """

    names: tuple[str, ...]
    columns: Mapping[str, Sequence[float]]

    def values(self) -> dict[str, float]:
        """Return all values by key and module."""
        rows = {key: zip(self.names, column, strict=True) for key, column in self.columns.items()}
        return {f"{key}/{name}": float(value) for key, row in rows.items() for name, value in row}

    def __str__(self) -> str:
        head = ["module", *self.columns]
        rows = [[name, *(f"{column[i]:.4g}" for column in self.columns.values())] for i, name in enumerate(self.names)]
        first, *others = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
        lines = ([name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in [head, *rows])
        return "\n".join("  ".join(line) for line in lines)


def modules_of(module: nn.Module, parameters: Sequence[Tensor], by_module: bool | int | Sequence[str]) -> Modules:
    """Return the modules of some parameters.

    A parameter that several modules share belongs to the first; one that stands in the outermost module is its own.

    Args:
        module: the outermost module.
        parameters: those to be parted.
        by_module: True for each module that holds parameters itself; a number for the modules at this depth, where
            those at the top have depth 1; or names of modules, of which the innermost counts, beside ``(rest)``.

    Raises:
        MisconfigurationException: if a name is not that of a module, or its module holds none of the parameters.
    """
    named = {id(p): name for name, p in _named_parameters(module)}
    owner = _owner(module, by_module)
    owners = {id(p): owner(named[id(p)]) if id(p) in named else OUTSIDE for p in parameters}
    names = tuple(sorted(dict.fromkeys(owners.values()), key=(REST, OUTSIDE).__contains__))
    if not isinstance(by_module, int) and (without := [name for name in by_module if name not in names]):
        raise MisconfigurationException(
            f"by_module must name modules with parameters that the optimizer moves, got {without[0]!r} without: leave "
            "it out."
        )
    return Modules(names, {key: names.index(name) for key, name in owners.items()})


def matching(module: nn.Module, parameters: Sequence[Tensor], patterns: str | Sequence[str]) -> list[Tensor]:
    """Return those of some parameters whose names match one of the patterns, as file names do.

    Raises:
        MisconfigurationException: if a pattern matches none.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    moved = {id(p) for p in parameters}
    named = {name: id(p) for name, p in _named_parameters(module) if id(p) in moved}
    wanted = set[int]()
    for pattern in patterns:
        matches = {key for name, key in named.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, named, 3, 0.0)
            raise MisconfigurationException(
                f"parameters must match names of parameters that the optimizer moves, got {pattern!r}: the nearest are "
                f"{near}."
            )
        wanted |= matches
    return [p for p in parameters if id(p) in wanted]


def _named_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters by the names that they have without wrappers."""
    return [(unwrapped(name), p) for name, p in module.named_parameters()]


def unwrapped(name: str) -> str:
    """Return the name of a module or parameter as it is without the modules that wrap others."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _owner(module: nn.Module, by_module: bool | int | Sequence[str]) -> Callable[[str], str]:
    """Return the function from the name of a parameter to that of its module."""
    if isinstance(by_module, int):  # so is True
        depth = None if by_module is True else by_module
        return lambda name: ".".join(name.split(".")[:-1][:depth]) or name
    known = {unwrapped(f"{name}.")[:-1] for name, _ in module.named_modules()} - {""}
    for name in by_module:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.0)
            raise MisconfigurationException(
                f"by_module must be names out of named_modules(), got {name!r}: the nearest are {near}."
            )
    innermost = sorted(by_module, key=len, reverse=True)
    return lambda name: next((one for one in innermost if name.startswith(f"{one}.")), REST)
