"""Rules of arguments, and the sentence on a value that breaks one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# The largest number that counts and seeds of torch can hold.
LARGEST = 2**63 - 1
# The largest number of what is repeated or laid out in memory: more would take days.
MANY = 10**6


@dataclass(frozen=True)
class Rule:
    """The limits of an argument beyond its type, and what to do where it breaks them.

    Attributes:
        remedy: what to do instead; default: from the type.
        least, above, most, below: limits of a number; ``above`` and ``below`` exclude the limit itself.
        finite: whether infinity and NaN are refused.
        holds: a further condition on a text.
        phrase: the rule in words, after "must"; default: from type and limits.
        empty: whether a sequence may be empty.
        single: whether one number may stand for a sequence of them.
        bools: whether a tensor may be of booleans.
        also: names that users may mean by those of the argument, each with what to write in its place.
        shape: of a tensor: letters, which have one size in all arguments of a call, as "n out in"; see :mod:`.shapes`.
    """

    remedy: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True
    holds: Callable[[str], bool] | None = None
    phrase: str = ""
    empty: bool = False
    single: bool = False
    bools: bool = False
    also: Mapping[str, str] = field(default_factory=dict, hash=False)
    shape: str = ""

    def allows(self, value: float) -> bool:
        """Return whether a number is within the limits; NaN is where any number may be infinite."""
        if not math.isfinite(value) and (self.finite or math.isnan(value)):
            return not self.finite
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def limits(self) -> str:
        """Return the limits of a real number in words."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            if self.above is not None and self.below is not None:
                return f"lie between {low:g} and {high:g}"
            return f"lie in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"
        if high is not None:
            return f"be {'at most' if self.below is None else 'below'} {high:g}"
        finite = "finite" if self.finite else "a number"
        if low is None:
            return f"be {finite}"
        if low == 0.0:
            return f"be positive and {finite}" if self.above is not None else f"be {finite} and not negative"
        return f"be {finite} and {'at least' if self.above is None else 'above'} {low:g}"


# Of a number that was measured, and may have come out as NaN.
MEASURED = Rule("pass the number itself", finite=False)


def whole(least: int, remedy: str, most: int = LARGEST) -> Rule:
    """Return the rule of a count."""
    return Rule(remedy, least=least, most=most)


def positive(remedy: str, finite: bool = True) -> Rule:
    """Return the rule of a number above 0."""
    return Rule(remedy, above=0.0, finite=finite)


def not_negative(remedy: str, finite: bool = True) -> Rule:
    """Return the rule of a number of at least 0."""
    return Rule(remedy, least=0.0, finite=finite)


def fraction(remedy: str) -> Rule:
    """Return the rule of a number between 0 and 1."""
    return Rule(remedy, above=0.0, below=1.0)


def spelled(**also: str) -> Rule:
    """Return the rule of names that have other spellings, each with what to write in its place."""
    return Rule(also=also)


def shaped(shape: str, remedy: str = "", bools: bool = False) -> Rule:
    """Return the rule of a tensor."""
    return Rule(remedy, shape=shape, bools=bools)


def sentence(name: str, rule: str, value: object, remedy: str) -> ValueError:
    """Return the error of an argument that breaks a rule."""
    return ValueError(f"{name} must {rule}, got {value}: {remedy}.")


def check_count(name: str, value: int, least: int, remedy: str, optional: bool = False) -> None:
    """Raise unless a whole number has at least the value that other arguments ask for."""
    if value < least:
        raise sentence(name, f"be a whole number of at least {least}{', or None' * optional}", value, remedy)
