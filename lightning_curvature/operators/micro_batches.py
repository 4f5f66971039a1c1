"""The data an operator sums over: micro-batches with their weights."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_curvature.arguments import Rule, check_fields, checked, not_negative
from lightning_curvature.operators.differentiation import differentiable

_WEIGHT = not_negative("divide its number of samples by that of all")
MakeContext = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass
class Evaluation:
    """Scalar mean loss of one batch and, where available, outputs, (B, …), and mask: the weight of each position.

    ``calls`` are those of the modules at which the loss is cut off, where it is.
    """

    loss: Tensor
    outputs: Tensor | None = None
    mask: Tensor | None = None
    calls: list[Any] = field(default_factory=list)

    def detached(self) -> "Evaluation":
        """Return the evaluation without its graph; one in forward mode keeps its derivatives, and has none."""
        if forward_ad.unpack_dual(self.loss).tangent is not None:
            return self
        outputs = None if self.outputs is None else self.outputs.detach()
        return Evaluation(self.loss.detach(), outputs, self.mask, [call.detached() for call in self.calls])


@dataclass(frozen=True)
class MicroBatch:
    """Data that is differentiated at once.

    Attributes:
        evaluate: returns loss and outputs at the present parameters, always the same, with a graph if gradients are on.
        weight: its number of samples over that of all ranks: the loss is Σ weight · loss.
        stepwise: does so too, with a context around each step of which the evaluation consists, made by its argument;
            None where a context can only be put around the whole.
    """

    evaluate: Callable[[], Evaluation]
    weight: float
    stepwise: Callable[[MakeContext], Evaluation] | None = None

    def __post_init__(self) -> None:
        check_fields(self, weight=_WEIGHT)

    def with_graph(self) -> Evaluation:
        """Evaluate, and raise unless the loss has a graph."""
        result = self.evaluate()
        check_graph(result.loss)
        return result


@checked(batches=Rule("give a list of (inputs, targets)"))
def micro_batches(
    model: Callable[[Any], Tensor], loss_function: Callable[[Tensor, Any], Tensor], batches: Iterable[tuple[Any, Any]]
) -> list[MicroBatch]:
    """Return micro-batches of (inputs, targets), each weighted by its number of samples.

    Args:
        model: maps inputs to outputs, always in the same way: no dropout, no BatchNorm in training mode.
        loss_function: mean loss of (outputs, targets).
        batches: all data; kept, since every product evaluates it again.

    Raises:
        ValueError: if there are none.

    Example:
        >>> data = [(torch.ones(8, 1), torch.ones(8, 1)), (torch.ones(2, 1), torch.ones(2, 1))]
        >>> [batch.weight for batch in micro_batches(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data)]
        [0.8, 0.2]
    """

    def evaluate(x: Any, y: Any, context: MakeContext = contextlib.nullcontext) -> Evaluation:
        with context():
            outputs = model(x)
            return Evaluation(loss_function(outputs, y), outputs)

    total = sum(sample_count(y) for _, y in batches)
    calls = [(functools.partial(evaluate, x, y), sample_count(y) / total) for x, y in batches]
    return [MicroBatch(call, weight, call) for call, weight in calls]


def sample_count(targets: Any) -> int:
    """Return the number of samples: length of the first tensor in a batch's targets; raise ValueError without one."""
    for leaf in tree_leaves(targets):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return len(leaf)
    raise ValueError(
        f"targets must hold a tensor with the samples along its first dimension, got {type(targets).__name__}: give "
        "the batches as (inputs, targets)."
    )


def check_graph(loss: Tensor) -> None:
    """Raise unless a loss has a graph."""
    if not loss.requires_grad:
        raise ValueError(
            "the loss must depend on the parameters, got a constant: compute it with gradients enabled, without detach "
            "and outside of no_grad and inference_mode."
        )


@contextlib.contextmanager
def building_graphs() -> Generator[None, None, None]:
    """Enable gradients in code that can be differentiated twice."""
    with torch.enable_grad(), differentiable():
        yield
