"""First and second derivatives of sample losses by the output of a linear layer, with the inputs of the layer."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.arguments import checked, whole
from lightning_curvature.functional.products import differentiable_gradients
from lightning_curvature.operators.differentiation import patched
from lightning_curvature.operators.graphs import pull_back, pull_back_rows
from lightning_curvature.operators.memory import SavedBytes, available_memory
from lightning_curvature.operators.micro_batches import building_graphs

# Share of the free memory for rows of S that are computed at once; each needs about as much as the graph itself.
_SHARE = 0.1


class NotSeparableError(ValueError):
    """The loss of a batch is not a mean over samples, each of which enters the layer exactly once, as z = W a."""


@dataclass(frozen=True)
class LinearStatistics:
    """Inputs and derivatives of a linear layer z = W a + c at n samples.

    Attributes:
        activations: a, (n, in).
        gradients: δ = ∂ℓ/∂z, (n, out).
        curvatures: S = ∂²ℓ/∂z∂zᵀ, (n, out, out).
    """

    activations: Tensor
    gradients: Tensor
    curvatures: Tensor

    def mean_gradient(self) -> Tensor:
        """Return the gradient of the mean loss by W, (out, in)."""
        return self.gradients.mT @ self.activations / len(self.activations)

    def mean_product(self, direction: Tensor) -> Tensor:
        """Return the product of the Hessian of the mean loss by W with a matrix, (out, in) each."""
        moved = self.activations @ direction.mT
        return (self.curvatures @ moved[:, :, None]).squeeze(-1).mT @ self.activations / len(self.activations)


@contextlib.contextmanager
def _tapped(layer: nn.Linear, saved: SavedBytes) -> Generator[list[tuple[Tensor, Tensor, int]], None, None]:
    """Add a zero to each output of a layer; yield its inputs, the zeros, and the bytes that the graph saved before."""
    calls: list[tuple[Tensor, Tensor, int]] = []
    forward = layer.forward

    def tapped(*args: Any, **kwargs: Any) -> Tensor:
        z, given = forward(*args, **kwargs), [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(z, Tensor):  # of a subclass
            raise NotSeparableError("the layer is no map of one tensor to another")
        zero = torch.zeros_like(z).requires_grad_()
        calls.append((given[0].detach(), zero, saved.count))
        return z + zero

    with patched(layer, forward=tapped), saved.counting():
        yield calls


@checked(
    samples=whole(1, "count the samples of the batch"), processes=whole(1, "count the processes that share the memory")
)
def linear_statistics(
    layer: nn.Linear, evaluate: Callable[[], Tensor], samples: int, processes: int = 1, check: bool = False
) -> LinearStatistics:
    """Differentiate the mean loss of a batch by the output of a layer: one backward, and one more for each output.

    The part of the model before the layer is not differentiated. The samples must not interact, so that the mean loss
    has no second derivatives between them.

    Args:
        layer: the layer.
        evaluate: returns the mean loss of the batch at the present parameters.
        samples: n.
        processes: number of processes that share the machine's memory.
        check: compare gradient and Hessian of the weight with direct ones: another backward, and one product.

    Raises:
        NotSeparableError: if the layer is not called exactly once, with one row for each sample, or if its weight also
            enters the loss in another way.
        ValueError: if the loss does not depend on the weight.

    Example:
        >>> layer, inputs = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> linear_statistics(layer, lambda: layer(inputs).square().mean(), samples=2).curvatures  # ℓ = z²
        tensor([[[2.]],
        <BLANKLINE>
                [[2.]]])
    """
    saved = SavedBytes(list(layer.parameters()))
    with building_graphs():
        with _tapped(layer, saved) as calls:
            loss = evaluate()
        if len(calls) != 1:
            raise NotSeparableError(f"the layer is called {len(calls)} times for a batch")
        a, zero, before = calls[0]
        if a.ndim != 2 or len(a) != samples:
            raise NotSeparableError(f"the layer gets inputs of shape {tuple(a.shape)} for {samples} samples")
        if not loss.requires_grad:
            raise ValueError(
                "the loss must depend on the parameter, got a constant: leave no_grad and detach out of it."
            )
        (slope,) = differentiable_gradients(loss, [zero])
        if slope is None:
            raise ValueError("the loss must depend on the parameter, got one that does not: choose another parameter.")
        out = zero.shape[1]
        free = available_memory(zero.device, processes)
        at_once = int(min(max(1, _SHARE * free // max(saved.count - before, 1)), out))
        # S has one block a sample: the cotangents are unit vectors of the outputs, the same for all samples.
        curvatures = torch.zeros(samples, out, out, dtype=zero.dtype, device=zero.device)
        units = torch.eye(out, dtype=slope.dtype, device=slope.device)
        for first in range(0, out, at_once):
            rows = pull_back_rows(slope, zero, units[first : first + at_once, None, :].expand(-1, samples, -1))
            if rows is not None:
                curvatures[:, first : first + at_once] = samples * rows.transpose(0, 1)
        # Under autocast the layer sees its input in the type of its output; sums over samples need more digits.
        low, dtype = zero.dtype, torch.promote_types(zero.dtype, torch.float32)
        statistics = LinearStatistics(a.to(low).to(dtype), samples * slope.detach().to(dtype), curvatures.to(dtype))
        if check:
            _check(layer, loss, statistics, torch.finfo(low).eps ** 0.5)
    return statistics


def _check(layer: nn.Linear, loss: Tensor, statistics: LinearStatistics, tolerance: float) -> None:
    """Raise unless the statistics give the gradient and a product of the weight's Hessian as autograd does.

    The tolerance is the square root of the rounding unit: roundings are far below it, a missing term is far above it.
    """
    weight = layer.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    (product,) = pull_back([gradient], [weight], [direction], retain=False)
    product = torch.zeros_like(weight) if product is None else product
    if not bool(gradient.isfinite().all() and product.isfinite().all()):
        return  # no route has a finite value
    moved = direction.to(statistics.activations)
    lengths = statistics.activations.norm(dim=1)
    # Scales of single samples: their mean may be small by cancellation.
    steep = statistics.gradients.norm(dim=1) * lengths
    curved = statistics.curvatures.flatten(1).norm(dim=1) * lengths.square()
    for name, direct, combined, scale in (
        ("gradient", gradient.detach(), statistics.mean_gradient(), steep),
        ("Hessian", product, statistics.mean_product(moved), curved),
    ):
        if not float((direct - combined).norm()) <= tolerance * max(float(direct.norm()), float(scale.mean())):
            raise NotSeparableError(
                f"the {name} of the weight is another than that of z = W a: the weight is used elsewhere, or samples "
                "see each other"
            )
