"""Batches that a training step passes over: it returns None for them, and Lightning makes no step."""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature.data.probe_set import ProbeSet
from lightning_curvature.distributed.together import together
from lightning_curvature.losses.fixed import ProbeLoss
from lightning_curvature.reporting.loggers import warn

# A step may call the method that computes the loss, and that one another.
_DEPTH = 3
_LIBRARIES = ("lightning.", "pytorch_lightning.", "torch.")


def may_skip(module: pl.LightningModule) -> bool:
    """Return whether the step, or a method that it calls, returns a value in one place and None in another.

    By its source, and that of the module's methods. In manual optimization None says nothing.
    """
    return module.automatic_optimization and _returns_both(type(module), "training_step", _DEPTH)


def _returns_both(kind: type, name: str, depth: int) -> bool:
    function = inspect.unwrap(getattr(kind, name, may_skip))
    if not isinstance(function, types.FunctionType) or (function.__module__ or "").startswith(_LIBRARIES):
        return False
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):  # without a source
        return False
    if not isinstance(body, ast.FunctionDef):
        return False
    returns = [one for one in _own(body.body) if isinstance(one, ast.Return)]
    values = [value for one in returns for value in _branches(one.value)]
    given = [value for value in values if not (value is None or (isinstance(value, ast.Constant) and not value.value))]
    if given and (len(given) < len(values) or not _ends(body.body)):
        return True
    return depth > 0 and any(_returns_both(kind, other, depth - 1) for other in function.__code__.co_names)


def _branches(value: ast.expr | None) -> list[ast.expr | None]:
    return [*_branches(value.body), *_branches(value.orelse)] if isinstance(value, ast.IfExp) else [value]


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield all nodes below some, but for those of functions inside."""
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield node
            yield from _own(ast.iter_child_nodes(node))


def _ends(body: Sequence[ast.stmt]) -> bool:
    """Return whether statements never come to their end: they return, raise, or go round for ever."""
    last = body[-1] if body else None
    if isinstance(last, ast.With):
        return _ends(last.body)
    if isinstance(last, ast.If):
        return _ends(last.body) and _ends(last.orelse)
    if isinstance(last, ast.Try):
        tried = _ends(last.body) or _ends(last.orelse)
        return _ends(last.finalbody) or (tried and all(_ends(one.body) for one in last.handlers))
    if isinstance(last, ast.Match):
        return all(_ends(one.body) for one in last.cases)
    return isinstance(last, (ast.Return, ast.Raise, ast.While))


def without_skipped(trainer: pl.Trainer, make_loss: Callable[[], ProbeLoss], data: ProbeSet) -> ProbeSet:
    """Return the batches of a probe set for which the step returns a loss at the parameters as they are.

    One forward of each batch, and one collective.

    Raises:
        ValueError: if a rank has none.
    """
    kept: list[int] = []
    # Of each rank: batches that are left, and samples.
    empty = torch.zeros(trainer.world_size, 2, dtype=torch.float64, device="cpu")

    def make() -> dict[str, Tensor]:
        kept[:] = make_loss().with_loss(data)
        table = torch.zeros_like(empty)
        table[trainer.global_rank, 0] = len(kept)
        table[trainer.global_rank, 1] = sum(data.batches[index].size for index in kept)
        return {"kept": table}

    table = together(trainer, make, {"kept": empty}, "evaluating the probe set")["kept"]
    left, samples = (round(column) for column in table.sum(0).tolist())
    if left == data.count:
        return data
    skipped = f"{data.count - left} of {data.count} batches of the probe set"
    if not table[:, 0].all():
        raise ValueError(
            f"training_step must return a loss for a batch of each rank, got None for {skipped}: give other data, "
            "probe_dataloader=."
        )
    warn(f"training_step returns None for {skipped}: they are left out.")
    batches = tuple(data.batches[index] for index in kept)
    return replace(data, batches=batches, total=samples, rounds=round(table[:, 0].max().item()), count=left)
