"""Exact second derivatives along a direction."""

from collections.abc import Sequence

import torch
from torch import Tensor


def hessian_quadratic_form(
    loss: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Return the first and the second derivative of the loss along a direction, by double backward.

    .. math:: g^\top d = \sum_i \partial_{\theta_i} L \cdot d_i, \qquad
        d^\top H d = \partial_\theta (g^\top d) \cdot d

    Args:
        loss: scalar with a graph to ``parameters``, which is consumed.
        parameters: θ, leaves of that graph; parameters that the loss does not depend on count as constants.
        direction: d, one tensor for each parameter, same shapes.

    Returns:
        (gᵀd, dᵀHd), detached scalars, summed over the parameters in float64.

    Raises:
        ValueError: if the loss has no graph to any of the parameters.
        RuntimeError: if a function in its graph cannot be differentiated twice.

    Source: Directional curvature (2026), eq. 1; Pearlmutter 1994; see docs/references.md.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_quadratic_form((x**3).sum(), [x], [torch.tensor([1.0, 1.0])])
        (tensor(15., dtype=torch.float64), tensor(18., dtype=torch.float64))
    """
    if not loss.requires_grad:
        raise ValueError("loss must depend on the parameters, got a constant: compute it with gradients enabled.")
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    check_differentiable(gradients)
    used = [(g, p, d) for g, p, d in zip(gradients, parameters, direction, strict=True) if g is not None]
    if not used:
        raise ValueError("loss must depend on the parameters, got none of them in its graph: check the list.")
    descent = torch.stack([(g.double() * d.double()).sum() for g, _, d in used]).sum()
    if not descent.requires_grad:
        return descent, torch.zeros_like(descent)
    products = torch.autograd.grad(descent, [p for _, p, _ in used], allow_unused=True)
    terms = [(h.double() * d.double()).sum() for h, (_, _, d) in zip(products, used, strict=True) if h is not None]
    quadratic = torch.stack(terms).sum() if terms else torch.zeros_like(descent)
    return descent.detach(), quadratic


def check_differentiable(gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError if a backward in the graph of the gradients is marked ``once_differentiable``.

    A second ``grad`` silently takes gradients made by that backward with ``create_graph=True`` for constants.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> check_differentiable(torch.autograd.grad((x**3).sum(), x, create_graph=True))
    """
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        # The node that torch puts there raises only when it runs, and a call of ``grad`` for inputs never runs it.
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
