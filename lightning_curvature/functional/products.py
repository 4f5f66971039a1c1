"""Exact second derivatives along a direction."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_curvature.arguments import Rule, checked, sentence, shaped


@checked(loss=shaped("1", "reduce it to its mean"), parameters=Rule("give those that are trained"))
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
        ValueError: if the loss has no graph to any of the parameters, or the shapes differ.
        RuntimeError: if a function in its graph cannot be differentiated twice.

    Source: Directional curvature (2026), eq. 1; Pearlmutter 1994; see docs/references.md.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_quadratic_form((x**3).sum(), [x], [torch.tensor([1.0, 1.0])])
        (tensor(15., dtype=torch.float64), tensor(18., dtype=torch.float64))
    """
    descents, quadratics = hessian_form_terms(loss, parameters, direction)
    return descents.sum(), quadratics.sum()


def hessian_form_terms(
    loss: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Return the terms of :func:`hessian_quadratic_form` by parameter, (parameters,) float64 each.

    .. math:: \partial_{\theta_i} L \cdot d_i, \qquad d_i \cdot (H d)_i

    Example:
        >>> x, y = (torch.tensor([value], requires_grad=True) for value in (1.0, 2.0))
        >>> hessian_form_terms((x * y).sum(), [x, y], [torch.ones(1), torch.ones(1)])
        (tensor([2., 1.], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    if [d.shape for d in direction] != [p.shape for p in parameters]:
        shapes = [tuple(d.shape) for d in direction]
        raise sentence("direction", "have the shapes of the parameters", shapes, "give one tensor for each of them")
    if not all(p.requires_grad for p in parameters):
        raise sentence("parameters", "require gradients", "some that do not", "leave these out")
    if not loss.requires_grad:
        raise ValueError("loss must depend on the parameters, got a constant: compute it with gradients enabled.")
    gradients = differentiable_gradients(loss, parameters)
    used = [(i, g) for i, g in enumerate(gradients) if g is not None]
    if not used:
        raise ValueError("loss must depend on the parameters, got none of them in its graph: check the list.")
    terms = {i: (g.double() * direction[i].double()).sum() for i, g in used}
    descents = torch.stack([terms.get(i, loss.new_zeros((), dtype=torch.float64)) for i in range(len(parameters))])
    descent = torch.stack([*terms.values()]).sum()
    quadratics = torch.zeros_like(descents)
    if descent.requires_grad:
        products = torch.autograd.grad(descent, [parameters[i] for i in terms], allow_unused=True)
        for i, product in zip(terms, products, strict=True):
            if product is not None:
                quadratics[i] = (product.double() * direction[i].double()).sum()
    return descents.detach(), quadratics.detach()


def differentiable_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss with their graphs; None for inputs that it does not depend on.

    Raises:
        RuntimeError: if a function between them is marked ``once_differentiable``: a second ``grad`` takes what its
            backward has made for constants, and says nothing.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> differentiable_gradients((x**3).sum(), [x])[0]
        tensor([3., 3.], grad_fn=<MulBackward0>)
    """
    gradients = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    check_differentiable(loss, inputs, gradients)
    return gradients


def check_differentiable(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError if a function between a loss and inputs is marked ``once_differentiable``."""
    # A backward that is given a constant, as that of a loss is, leaves no trace in the graph of the gradients.
    marked = [node for node in graph_nodes([loss]) if _is_marked(node)]
    below = set(_nodes_from(marked))
    reached = any(x.grad_fn in below for x in inputs if x.grad_fn is not None) or not {
        id(getattr(node, "variable", None)) for node in below
    }.isdisjoint(map(id, inputs))
    # The node that torch puts there raises only when it runs, and a call of ``grad`` for inputs never runs it.
    if reached or any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradients)):
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def graph_nodes(tensors: Iterable[Tensor | None]) -> list[Any]:
    """Return all nodes of the graphs of some tensors."""
    return _nodes_from([x.grad_fn for x in tensors if x is not None and x.grad_fn is not None])


def _nodes_from(waiting: list[Any]) -> list[Any]:
    """Return all nodes of a graph below some, these included."""
    seen = dict.fromkeys(waiting)
    waiting = list(seen)
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None and following not in seen:
                seen[following] = None
                waiting.append(following)
    return list(seen)


_MARK = once_differentiable(lambda ctx: None).__code__


def _is_marked(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while backward is not None and getattr(backward, "__code__", None) is not _MARK:
        backward = getattr(backward, "__wrapped__", None)  # marked, then decorated
    return backward is not None
