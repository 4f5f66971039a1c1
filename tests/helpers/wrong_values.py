"""Wrong values of an argument, by its annotation, and what is to be thought of each."""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

HUGE = 10**30
NUMBERS = (int, float)


class Wrong(NamedTuple):
    """A value that the annotation of an argument excludes, or that only some arguments may have, by its kind."""

    kind: str
    value: Any


def members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(part for one in typing.get_args(hint) for part in members(one))
    return (hint,)


def wrong_values(hint: Any, good: Any) -> Iterator[Wrong]:
    """Yield wrong values for an argument of an annotation, beside a good value of it."""
    kinds = members(hint)
    if Any in kinds or hint is inspect.Parameter.empty:
        return
    if types.NoneType not in kinds:
        yield Wrong("None", None)
    yield Wrong("an object", object())
    names = [name for kind in kinds if typing.get_origin(kind) is typing.Literal for name in typing.get_args(kind)]
    numeric = [kind for kind in kinds if kind in NUMBERS]
    tensor, whole = Tensor in kinds, int in kinds and float not in kinds
    sequences = [kind for kind in kinds if typing.get_origin(kind) is collections.abc.Sequence]
    if names:
        yield from (Wrong("a misspelt name", n[0] + n) for n in names if isinstance(n, str))
        yield from (Wrong("an empty name", ""), Wrong("an unhashable name", ["x"]), Wrong("a set", {"x"}))
        yield from () if numeric else [Wrong("a number", 7)]
    if numeric:
        yield from (Wrong("text", "2"), Wrong("True", True), Wrong("complex", 1j), Wrong("a set", {1}))
        yield from (Wrong("NaN", math.nan), Wrong("infinity", math.inf), Wrong("negative", -1), Wrong("zero", 0))
        yield Wrong("NumPy bool", np.bool_(True))
        yield Wrong("huge", HUGE)
        yield from [Wrong("a fraction", 1.5)] if whole else [Wrong("minus infinity", -math.inf)]
        yield from () if sequences else [Wrong("a list", [1]), Wrong("an array", np.ones(3))]
        yield from () if tensor else [Wrong("a complex number", torch.tensor(1j))]
        yield from () if tensor or sequences else [Wrong("a vector", torch.ones(3))]
    if tensor:
        yield from wrong_tensors(good, scalar=bool(numeric))
    if bool in kinds:
        yield from (Wrong("text", "yes"), Wrong("a number", 2), Wrong("a list", []))
    if str in kinds:
        yield from (Wrong("a number", 7), Wrong("a list", []), Wrong("True", True), Wrong("an empty name", ""))
    for kind in sequences:
        yield from wrong_sequences(typing.get_args(kind)[0], numeric=bool(numeric))
    if any(typing.get_origin(kind) is collections.abc.Callable for kind in kinds):
        yield from (Wrong("text", "mse"), Wrong("a number", 7), Wrong("a list", [len]))
    for kind in kinds:
        known = kind in (Tensor, str, bool, int, float, types.NoneType) or not isinstance(kind, type)
        if not known:
            yield from (Wrong("text", "x"), Wrong("a number", 7), Wrong("a list", [7]), Wrong("the class", kind))
            if issubclass(kind, nn.Module):
                yield Wrong("another object", torch.zeros(2))


def wrong_tensors(good: Any, scalar: bool) -> Iterator[Wrong]:
    """Yield what is no tensor, and tensors of other types and shapes."""
    yield from (Wrong("text", "x"), Wrong("a set", {1.0}))
    complex_values = torch.ones(2, dtype=torch.complex64)
    if not isinstance(good, Tensor):
        yield Wrong("complex", complex_values)
        yield Wrong("bool", torch.tensor(True))
        return
    if not scalar:
        yield from (Wrong("a list", good.tolist()), Wrong("a number", 1.0), Wrong("an array", good.numpy(force=True)))
    yield Wrong("complex", good.detach().to(torch.complex64))
    yield Wrong("bool", torch.ones(good.shape, dtype=torch.bool))
    if good.ndim:
        yield Wrong("scalar", good.detach().flatten()[0])
        yield Wrong("empty", good.detach()[:0])
        yield Wrong("one row more", torch.cat([good.detach(), good.detach()[:1]]))
        yield Wrong("one column more", torch.cat([good.detach(), good.detach()[..., :1]], dim=-1))
    yield Wrong("one dimension more", good.detach()[None].expand(2, *good.shape))


def wrong_sequences(item: Any, numeric: bool) -> Iterator[Wrong]:
    """Yield what is no sequence, and sequences of wrong items."""
    kinds = members(item)
    yield from (Wrong("text", "abc"), Wrong("empty", []), Wrong("a list of None", [None]), Wrong("an object", object()))
    yield from () if numeric else [Wrong("a number", 7), Wrong("True", True)]
    yield Wrong("a list of objects", [object()])
    yield Wrong("an unhashable item", [["x"]])
    if int in kinds or float in kinds:
        yield from (
            Wrong("a list of text", ["2"]),
            Wrong("a list of bools", [True]),
            Wrong("a list of NaN", [math.nan]),
        )
        yield from (Wrong("a negative item", [-1]), Wrong("a list of infinity", [math.inf]), Wrong("a zero item", [0]))
    if int in kinds:
        yield from (Wrong("a fraction item", [1.5]), Wrong("a huge item", [HUGE]))
    if any(typing.get_origin(kind) is typing.Literal for kind in kinds):
        known = [name for kind in kinds for name in typing.get_args(kind)]
        yield from (Wrong("a misspelt item", [known[0][0] + known[0]]), Wrong("an empty item", [""]))
        yield Wrong("a misspelt item more", [*known, f"{known[-1]}s"])
    if Tensor in kinds:
        yield Wrong("a list of complex", [torch.ones(2, dtype=torch.complex64)])
        yield Wrong("a list of numbers", [1.0])


def same_numbers(hint: Any, good: Any) -> Iterator[Wrong]:
    """Yield other forms of a good number: NumPy's, and tensors of one element where a number is documented."""
    kinds = members(hint)
    if isinstance(good, bool) or not isinstance(good, NUMBERS) or not {int, float} & set(kinds):
        return
    if isinstance(good, int):
        yield from (Wrong("np.int64", np.int64(good)), Wrong("np.int32", np.int32(good)))
        yield from (Wrong("a tensor", torch.tensor(good)), Wrong("a tensor (1,)", torch.tensor([good])))
    if float in kinds:
        yield from (Wrong("np.float64", np.float64(good)), Wrong("np.float32", np.float32(good)))
        yield from (Wrong("a tensor", torch.tensor(float(good))), Wrong("a tensor (1,)", torch.tensor([float(good)])))


def hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of the arguments of a function or constructor."""
    target = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    if isinstance(function, type) and issubclass(function, tuple):
        target = function.__new__
    found = typing.get_type_hints(target)
    return {name: found.get(name, Any) for name in inspect.signature(function).parameters}
