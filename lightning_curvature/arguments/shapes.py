"""Shapes of tensors as letters: "n out in" is a shape of three sizes.

A letter has one size in all arguments of a call. A size can also be a product, "out*in", or a number; "n!" is not 0. A
shape that begins with "..." has any dimensions there, the same in all arguments.
"""

import math
from typing import Any

# Sizes by letter, and whole numbers by name, that earlier arguments of a call have set.
Scope = dict[str, Any]


def fits(shape: str, found: tuple[int, ...], scope: Scope) -> bool:
    """Return whether a tensor has the shape that letters stand for, and note the sizes of those that are new."""
    tokens = shape.split()
    if tokens[0] == "...":
        tokens = tokens[1:]
        split = len(found) - len(tokens)
        if split < 0 or scope.setdefault("...", found[:split]) != found[:split]:
            return False
        found = found[split:]
    return len(found) == len(tokens) and all(
        _has_size(token, size, scope) for token, size in zip(tokens, found, strict=True)
    )


def _has_size(token: str, size: int, scope: Scope) -> bool:
    letter = token.rstrip("!")
    if letter.isdigit():
        return size == int(letter)
    if "*" in letter:
        return size == math.prod(scope.get(one, 0) for one in letter.split("*"))
    return bool(scope.setdefault(letter, size) == size) and (size > 0 or letter == token)


def in_words(shape: str, known: Scope) -> str:
    """Return a shape as it stands in documentation, with the sizes of letters that are known."""
    tokens = shape.replace("!", "").split()
    letters = dict.fromkeys(letter for token in tokens for letter in token.split("*"))
    notes = [f"{token[:-1]} ≥ 1" for token in shape.split() if token.endswith("!")]
    notes += [f"{letter.replace('...', '…')} = {known[letter]}" for letter in letters if letter in known]
    listed = ", ".join(token.replace("*", " · ").replace("...", "…") for token in tokens)
    return f"({listed}{',' * (len(tokens) == 1 and tokens[0] != '...')})" + (
        f" with {', '.join(notes)}" if notes else ""
    )
