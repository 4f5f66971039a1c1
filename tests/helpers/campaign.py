"""Every wrong value for every argument of everything public, and what came of it."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.helpers.good_calls import CALLS, Good
from tests.helpers.wrong_values import Wrong, hints, same_numbers, wrong_values

SENTENCE = re.compile(r"(?P<subject>.+?) must (?P<rule>.+), got (?P<value>.+): (?P<remedy>.+)\.", re.DOTALL)
# A call takes milliseconds; one that goes on for this long does not end.
SECONDS = 5


class Hung(BaseException):
    """A call that does not end."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call: "refused", "accepted", "bare" or "hung"."""

    function: str
    argument: str
    wrong: Wrong
    result: str
    words: str

    def __str__(self) -> str:
        value = repr(self.wrong.value)
        shown = value if len(value) < 60 else f"{value[:57]}..."
        words = self.words.replace("\n", " ")
        return f"{self.function}({self.argument}={shown}) [{self.wrong.kind}]: {self.result}: {words[:200]}"


def outcomes(name: str, good: Good) -> Iterator[Outcome]:
    """Call with each wrong value of each argument."""
    for argument, hint in hints(good.function).items():
        given = good.arguments()
        if argument not in given:
            continue
        for wrong in wrong_values(hint, given[argument]):
            result, words = attempt(good, argument, wrong.value)
            if wrong.kind in good.allowed.get(argument, ()) and (
                result == "accepted" or SENTENCE.fullmatch(words.partition(": ")[2])
            ):
                result = "allowed"
            yield Outcome(name, argument, wrong, result, words)


def attempt(good: Good, argument: str, value: Any, seconds: int = SECONDS) -> tuple[str, str]:
    """Return what came of a call with one argument changed."""
    try:
        with limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            good(**{argument: value})
    except Hung:
        return "hung", ""
    except Exception as error:
        return ("refused" if in_own_words(error, argument) else "bare"), f"{type(error).__name__}: {error}"
    return "accepted", ""


def in_own_words(error: Exception, argument: str) -> bool:
    """Whether an error is raised by the package, as one sentence on the argument, maybe beside another one."""
    deepest = traceback.extract_tb(error.__traceback__)[-1].filename
    sentence = SENTENCE.fullmatch(str(error))
    named = sentence is not None and re.search(rf"\b{argument}\b", "{subject} {rule}".format(**sentence.groupdict()))
    return isinstance(error, ValueError) and f"{os.sep}lightning_curvature{os.sep}" in deepest and bool(named)


@contextlib.contextmanager
def limited(seconds: int) -> Generator[None, None, None]:
    """Break off what does not end."""

    def stop(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def other_forms(good: Good) -> Iterator[tuple[str, Wrong]]:
    """Yield each number of a good call in its other forms."""
    given = good.arguments()
    for argument, hint in hints(good.function).items():
        if argument in given:
            for form in same_numbers(hint, given[argument]):
                yield argument, form


def table(found: Iterable[Outcome]) -> str:
    """Return outcomes by callable."""
    counts: dict[str, collections.Counter[str]] = {}
    for outcome in found:
        counts.setdefault(outcome.function, collections.Counter())[outcome.result] += 1
    columns = ("refused", "allowed", "accepted", "bare", "hung")
    lines = [f"{'callable':<34}" + "".join(f"{column:>10}" for column in columns)]
    for name, count in counts.items():
        lines.append(f"{name:<34}" + "".join(f"{count[column]:>10}" for column in columns))
    total = sum(counts.values(), collections.Counter())
    lines.append(f"{'all':<34}" + "".join(f"{total[column]:>10}" for column in columns) + f"{total.total():>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    ends = sys.argv[1:]
    every = [one for name, good in CALLS.items() if not ends or name in ends for one in outcomes(name, good)]
    for one in every:
        if one.result in ("bare", "accepted", "hung"):
            print(one)
    print(table(every))
