"""Second-order quantities along one step in float64 for networks whose dense Hessian would not fit."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from tests.oracles.dense import Part, Reference


def classification_reference(
    network: nn.Module, parts: list[Part], before: dict[str, Tensor], after: dict[str, Tensor]
) -> Reference:
    """gᵀd, dᵀHd and dᵀGd of the mean cross-entropy, as derivatives of L(θ_t + t·d) by t; no random draws, no buffers.

    dᵀGd is the mean variance of u = J d under the predicted distribution, E[u²] − E[u]² as in a textbook.
    """
    network = copy.deepcopy(network).double()
    theta = {name: p.double() for name, p in before.items()}
    d = {name: p - after[name].double() for name, p in theta.items()}
    descent = hessian = curvature = 0.0
    for part in parts:
        x = part.x.double()
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        z = functional_call(network, {name: p + t * d[name] for name, p in theta.items()}, (x,))
        (slope,) = torch.autograd.grad(F.cross_entropy(z, part.y), t, create_graph=True)
        (bend,) = torch.autograd.grad(slope, t)
        z, u = jvp(lambda values, x=x: functional_call(network, values, (x,)), (theta,), (d,))
        p = z.softmax(-1)
        variance = (p * u**2).sum(-1) - (p * u).sum(-1) ** 2
        descent += float(slope) / len(parts)
        hessian += float(bend) / len(parts)
        curvature += float(variance.mean()) / len(parts)
    return Reference(descent, hessian, curvature)
