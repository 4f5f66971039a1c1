"""Shapes of tensors as letters: "n out in" is a shape of three sizes.

A letter has one size in all arguments of a call. A size can also be a product, "out*in", or a number; "n!" is not 0.
"..." are any dimensions, the same in all arguments; "1" alone is one number in any shape.
"""

import math
from typing import Any

# Sizes by letter, and whole numbers by name, with the argument of the call that has set each.
Scope = dict[str, tuple[Any, str]]


def fits(name: str, shape: str, found: tuple[int, ...], scope: Scope) -> bool:
    """Return whether an argument has the shape that letters stand for, and note the sizes of those that are new."""
    tokens = shape.split()
    if shape == "1":
        return math.prod(found) == 1
    if "..." in tokens:
        first, others = tokens.index("..."), len(found) - len(tokens) + 1
        some = found[first : first + others]
        if others < 0 or scope.setdefault("...", (some, name))[0] != some:
            return False
        tokens, found = [*tokens[:first], *tokens[first + 1 :]], (*found[:first], *found[first + others :])
    return len(found) == len(tokens) and all(
        _has_size(name, token, size, scope) for token, size in zip(tokens, found, strict=True)
    )


def _has_size(name: str, token: str, size: int, scope: Scope) -> bool:
    letter = token.rstrip("!")
    if letter.isdigit():
        return size == int(letter)
    if "*" in letter:
        return size == math.prod(scope.get(one, (0, name))[0] for one in letter.split("*"))
    return bool(scope.setdefault(letter, (size, name))[0] == size) and (size > 0 or letter == token)


def in_words(shape: str, known: Scope) -> str:
    """Return a shape as it stands in documentation, with the sizes of letters that are known."""
    tokens = shape.replace("!", "").split()
    letters = dict.fromkeys(letter for token in tokens for letter in token.split("*"))
    notes = [f"{token[:-1]} ≥ 1" for token in shape.split() if token.endswith("!")]
    for letter, (size, argument) in ((letter, known[letter]) for letter in letters if letter in known):
        notes.append(f"{letter.replace('...', '…')} = {size}{f' of {argument}' if argument != letter else ''}")
    listed = ", ".join(token.replace("*", " · ").replace("...", "…") for token in tokens)
    return f"({listed}{',' * (len(tokens) == 1 and tokens[0] != '...')})" + (
        f" with {', '.join(notes)}" if notes else ""
    )
