"""Other ways to compute dᵀHd from θ_t and d: two full gradients, and the Hessian-vector product of curvlinops."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

import torch
from references import Step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import loss_of

# The gradients are taken at θ ± r·d. At r = 0.1 the truncation, r²/6 of the third order, is below the rounding of the
# float32 gradients themselves on these networks.
_DISTANCE = 0.1

Context = Callable[[], AbstractContextManager[object]]


@contextmanager
def _at(module: nn.Module, step: Step, position: float) -> Generator[None, None, None]:
    try:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(step.before[name]).lerp_(step.after[name], position)
        yield
    finally:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(step.after[name])


def two_gradients(module: nn.Module, step: Step, precision: Context) -> float:
    """Difference of two full gradients along d: dᵀ[g(θ + rd) − g(θ − rd)]/2r."""
    parameters = dict(module.named_parameters())
    total = torch.zeros((), dtype=torch.float64, device=step.batch[1].device)
    for sign in (1.0, -1.0):
        with _at(module, step, -sign * _DISTANCE):
            with torch.enable_grad(), precision():
                loss = loss_of(module, step.batch)
            for (name, _), g in zip(
                parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                total += sign * torch.sum(g * (step.before[name] - step.after[name]), dtype=torch.float64)
    return float(total) / (2.0 * _DISTANCE)


class _Rows(nn.Module):
    """A network with logits (P, V): curvlinops reads the rows of the outputs as the samples."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).flatten(0, -2)


def curvlinops_product(module: nn.Module, step: Step, precision: Context) -> float:
    """dᵀ(Hd) with ``HessianLinearOperator``, made anew for the batch, without its check for determinism."""
    from curvlinops import HessianLinearOperator

    parameters = dict(module.named_parameters())
    direction = [step.before[name] - step.after[name] for name in parameters]
    x, y = step.batch
    with _at(module, step, 0.0), sdpa_kernel(SDPBackend.MATH), precision():
        hessian = HessianLinearOperator(
            _Rows(module),
            nn.CrossEntropyLoss(),
            list(parameters.values()),
            [(x, y.flatten())],
            check_deterministic=False,
            num_data=len(x),
        )
        products = hessian @ direction
    return float(sum(torch.sum(h * d, dtype=torch.float64) for h, d in zip(products, direction, strict=True)))


def peers() -> dict[str, Callable[[nn.Module, Step, Context], float] | None]:
    """Name → function; None where the package is not installed."""
    try:
        import curvlinops
    except ImportError:
        return {"two full gradients": two_gradients, "curvlinops": None}
    name = f"curvlinops {getattr(curvlinops, '__version__', '')}".strip()
    return {"two full gradients": two_gradients, name: curvlinops_product}
