"""Checks of all arguments of a call, and of all fields of a dataclass."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_curvature.arguments.check import Check
from lightning_curvature.arguments.rules import Rule, sentence
from lightning_curvature.arguments.shapes import Scope

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(**rules: Rule) -> Callable[[Function], Function]:
    """Return a decorator that checks the arguments of a function: all by their annotations, some also by rules."""

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters.items()
        named = {name: p for name, p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        # Without that of the result, which may be a class that is not there yet.
        annotations = {name: p.annotation for name, p in named.items() if p.annotation is not p.empty}
        arguments = types.SimpleNamespace(__annotations__=annotations)
        hints = typing.get_type_hints(arguments, vars(inspect.getmodule(function)), include_extras=True)
        # A default is no mistake.
        checks = {name: (Check(hints.get(name, Any), rules.get(name)), p.default) for name, p in named.items()}
        in_order = [(name, *check) for name, check in checks.items()]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            scope: Scope = {}
            given = [
                value if value is default else check(name, value, scope)
                for value, (name, check, default) in zip(args, in_order, strict=False)
            ]
            for name, value in kwargs.items():
                check, default = checks.get(name, (None, None))
                if check is not None and value is not default:
                    kwargs[name] = check(name, value, scope)
            return function(*given, *args[len(given) :], **kwargs)

        return typing.cast(Function, call)

    return decorate


def check_fields(instance: Any, **rules: Rule) -> None:
    """Check the fields of a dataclass, which may be frozen, and give them their plain forms; while it is made."""
    scope: Scope = {}
    for name, check in _checks_of(typing.cast(Hashable, type(instance)), **rules).items():
        object.__setattr__(instance, name, check(name, getattr(instance, name), scope))


@functools.cache
def _checks_of(kind: Hashable, **rules: Rule) -> Mapping[str, Check]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: Check(hints[field.name], rules.get(field.name))
        for field in fields(typing.cast(Any, kind))
        if field.init
    }


def check_broadcast(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless the shape of an argument broadcasts with that of another one."""
    try:
        torch.broadcast_shapes(value.shape, other.shape)
    except RuntimeError:
        wanted = f"be of a shape that broadcasts with {other_name}, {tuple(other.shape)}"
        raise sentence(name, wanted, tuple(value.shape), "give as many of both") from None
