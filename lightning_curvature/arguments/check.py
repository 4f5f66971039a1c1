"""The check of one argument, by its annotation and a rule."""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_curvature.arguments.rules import LARGEST, MEASURED, Rule, sentence
from lightning_curvature.arguments.shapes import Scope, fits, in_words

# Whole numbers up to here are floats without rounding.
_EXACT = 2**53
# A longer value would hide the sentence.
_SHOWN = 100
# Types that have flags of their own in a check.
_PLAIN = (Tensor, str, bool, int, float, types.NoneType, torch.device)


class Check:
    """The check of one argument: gives the plain form of a value, or raises ``ValueError``.

    Args:
        hint: annotation of the argument, which may hold a rule, as ``Annotated``.
        rule: what the annotation does not say.
    """

    def __init__(self, hint: Any, rule: Rule | None = None) -> None:
        kinds, rules = _members(hint)
        self.anything = any(kind is Any or isinstance(kind, TypeVar) for kind in kinds)
        self.optional = types.NoneType in kinds
        self.number, self.whole = float in kinds, int in kinds and float not in kinds
        self.tensor, self.device = Tensor in kinds, torch.device in kinds
        self.text = str in kinds and not self.device
        # A number without a rule is a measured one.
        rule = rule or next(iter(rules), MEASURED if self.number else Rule())
        self.rule = replace(rule, most=LARGEST) if self.whole and rule.most is None else rule
        self.choices: list[Any] = [True, False] * (bool in kinds)
        self.item: Check | None = None
        self.callable, self.length, classes = False, 0, list[type]()
        for kind in kinds:
            origin, parts = typing.get_origin(kind), typing.get_args(kind)
            if origin is Literal:
                self.choices += parts
            elif origin in (Sequence, Iterable):
                plain = rule == Rule(also=rule.also)
                self.item = Check(parts[0], None if plain else replace(rule, empty=False, single=False))
                if self.item.choices and plain:
                    words = f"be names from {tuple(self.item.choices)}"
                    self.item.rule = Rule("correct or remove it", phrase=words, also=rule.also)
            elif origin is Callable:
                self.callable = True
            elif origin is tuple:
                self.length = len(parts)
            elif isinstance(origin or kind, type) and kind not in _PLAIN:
                classes.append(origin or kind)
        self.classes = tuple(classes)

    def __call__(self, name: str, value: Any, scope: Scope | None = None) -> Any:
        """Return a value in its plain form, and note its sizes in ``scope``."""
        if self.tensor and isinstance(value, Tensor):
            return self._tensor(name, value, {} if scope is None else scope)
        if self.anything or (value is None and self.optional) or isinstance(value, self.classes):
            return value
        if any(isinstance(value, type(one)) and value == one for one in self.choices):
            return value
        if (self.number or self.whole) and (plain := number(value, self.whole)) is not None:
            if not self.rule.allows(plain):
                raise self._error(name, value)
            if scope is not None:
                scope[name] = (plain, name)
            return plain
        if self.rule.single and not _is_series(value):
            value = (value,)
        if self.item is not None and _is_series(value):
            items = tuple(self.item(name, one) for one in value)
            if items or self.rule.empty:
                # A name that is given twice counts once.
                return tuple(dict.fromkeys(items)) if self.item.choices else items
        elif (
            (self.text and isinstance(value, str) and (self.rule.holds is None or self.rule.holds(value)))
            or (self.callable and callable(value))
            or (self.device and _is_device(value))
            or (self.length and isinstance(value, (tuple, list)) and len(value) == self.length)
        ):
            return value
        raise self._error(name, value)

    def _tensor(self, name: str, value: Tensor, scope: Scope) -> Tensor:
        if value.is_complex() or (value.dtype == torch.bool and not self.rule.bools):
            raise self._error(name, value)
        shape = self.rule.shape
        if not shape:
            return value
        known = dict(scope)
        if not fits(name, shape, tuple(value.shape), scope):
            remedy = self.rule.remedy or "see the shapes in the documentation"
            raise sentence(name, f"be {in_words(shape, known)}", tuple(value.shape), remedy)
        return value

    def _error(self, name: str, value: Any) -> ValueError:
        """Return the sentence on a value that breaks the rule."""
        wanted, remedy = self._in_words(value)
        others = "" if self.rule.phrase else _listed([*map(repr, self.choices), *["None"] * self.optional])
        wanted = f"{wanted}, or {others}" if wanted and others else wanted or f"be {others}"
        shown = _shown(value, by_type=self.callable or bool(self.classes))
        near = f"({self.item._near(value)},)" if self.item and self.item._near(value) else self._near(value)
        shown += f" (did you mean {near}?)" if near else ""
        return sentence(name, wanted, shown, self.rule.remedy or remedy)

    def _near(self, value: Any) -> str:
        """Return what a misspelt name stands for, as it is written; "" where it is none."""
        known = {_spelling(name): name for name in self.choices if isinstance(name, str)}
        if not isinstance(value, str) or not known:
            return ""
        written = {spelling: repr(name) for spelling, name in known.items()}
        written = {_spelling(name): right for name, right in self.rule.also.items()} | written
        spelling = _spelling(value)
        # Names that are looked for elsewhere must be exact: all but those that stand for one of these.
        close = [name for name, right in written.items() if right in map(repr, self.choices)]
        near = [spelling] if spelling in written else difflib.get_close_matches(spelling, close, 1)
        return written[near[0]] if near else ""

    def _in_words(self, value: Any) -> tuple[str, str]:
        """Return rule and remedy by type, but for choices."""
        rule, item = self.rule, self.item
        if rule.phrase:
            return rule.phrase, "give one"
        if self.whole:
            too_large = rule.most is not None and (number(value, whole=True) or 0) > rule.most
            least = "" if rule.least is None else f" of at least {rule.least:g}"
            return f"be a whole number{f' of at most {rule.most}' if too_large else least}", "give a whole number"
        if self.tensor and (not self.number or number(value) is None):
            remedy = "make one of integers or floating-point numbers, by torch.as_tensor"
            return f"be a {'number or a ' * self.number}real tensor", remedy
        if self.number:
            return rule.limits(), "give a number"
        if item is not None and rule.single:
            return item._in_words(value)
        if item is not None:
            remedy = f"choose from {tuple(item.choices)}" if item.choices else "give a list"
            return f"be a {'' if rule.empty else 'non-empty '}sequence of {item.plural()}", remedy
        if self.callable:
            return "be a callable", "give a function"
        if self.classes:
            kind = self.classes[0].__name__
            return f"be {_a(kind)}", f"make one by {kind}(…)"
        if self.length:
            return "be a pair", "give (inputs, targets)"
        if self.device:
            return "be a device", "give 'cpu' or 'cuda'"
        return "be a name" * self.text, "give one of them"

    def plural(self) -> str:
        """Return the name of several such values."""
        words = {"real tensors": self.tensor, "numbers": self.number, "whole numbers": self.whole}
        words |= {"names": bool(self.choices or self.text), "pairs": self.length > 0, "callables": self.callable}
        kinds = [word for word, holds in words.items() if holds] + [f"{kind.__name__} objects" for kind in self.classes]
        return " or ".join(kinds)


def number(value: Any, whole: bool = False) -> float | int | None:
    """Return a number as one of Python; None for what is none, or no whole one."""
    if type(value) is float:
        return None if whole else value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return None
    if isinstance(value, Integral) and (whole or abs(int(value)) <= _EXACT):
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _members(hint: Any) -> tuple[list[Any], list[Rule]]:
    """Return the types of a union, or the one type, and the rules that stand beside them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        kinds, rules = _members(parts[0])
        return kinds, [*rules, *(extra for extra in parts[1:] if isinstance(extra, Rule))]
    if origin in (typing.Union, types.UnionType):
        both = [_members(part) for part in parts]
        return [kind for kinds, _ in both for kind in kinds], [rule for _, rules in both for rule in rules]
    return [hint], []


def _spelling(name: str) -> str:
    """Return a name without what spellings differ in: case, underscores, Greek letters."""
    for letter, word in (("λ", "lambda"), ("δ", "delta"), ("γ", "gamma")):
        name = name.casefold().replace(letter, word)
    return "".join(filter(str.isalnum, name))


def _is_series(value: Any) -> bool:
    """Return whether a value has items in an order."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Set, Mapping))


def _is_device(value: Any) -> bool:
    try:
        return torch.device(value) is not None
    except (RuntimeError, TypeError):
        return False


def _shown(value: Any, by_type: bool) -> str:
    """Return a value in words, on one line."""
    if isinstance(value, Tensor) and not by_type:
        plain = number(value)
        return f"a tensor {tuple(value.shape)} of {value.dtype}" if plain is None else repr(plain)
    words = repr(value)
    if value is None or not (by_type or len(words) > _SHOWN or "\n" in words):
        return words
    return f"the class {value.__name__}" if isinstance(value, type) else _a(type(value).__name__)


def _a(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _listed(words: list[str]) -> str:
    *others, last = words or [""]
    return f"{', '.join(others)} or {last}" if others else last
