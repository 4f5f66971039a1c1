"""Noise covariance and Hessian of one weight from dense derivatives of single samples, in float64.

Entries of the weight are in row-major order. No structure of the layer is used, but for the activity–weight duality,
which is about a layer z = W a.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.oracles.dense import Loss
from tests.oracles.matrices import Matrices, double
from tests.oracles.spectra import rotation

# Which sample p of one mini-batch became which p' of another: indices into all samples.
Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Samples:
    """Derivatives of the losses of n samples by one weight of D entries: (n, D) and (n, D, D)."""

    gradients: Tensor
    hessians: Tensor

    def covariance(self, batch_size: int = 1) -> Tensor:
        """Of the gradient of a mini-batch that is drawn with replacement."""
        deviations = self.gradients - self.gradients.mean(0)
        return sum(torch.outer(d, d) for d in deviations) / len(deviations) / batch_size  # type: ignore[return-value]

    def hessian(self) -> Tensor:
        """H = E_p[h_p]."""
        return self.hessians.mean(0)

    def second_moment(self) -> Tensor:
        """E_p[h_p²]."""
        return torch.stack([h @ h for h in self.hessians]).mean(0)

    def basis(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of H, descending, and eigenvectors as rows."""
        return descending(self.hessian())


def descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors as rows."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1).T


def samples_of(network: nn.Module, loss: Loss, name: str, inputs: Tensor, targets: Tensor) -> Samples:
    """Differentiate each sample's loss twice by the parameter of that name; see :class:`Matrices`."""
    network = copy.deepcopy(network)
    for other, parameter in network.named_parameters():
        parameter.requires_grad_(other == name)
    dense = Matrices(network, loss)
    assert dense.names == [name]
    batches = [(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]
    return Samples(
        torch.stack([dense.gradient([batch]) for batch in batches]),
        torch.stack([dense.hessian([batch]) for batch in batches]),
    )


def activations_of(network: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """What the layer gets whose weight has that name, a, (n, in)."""
    network = copy.deepcopy(network).double()
    found: list[Tensor] = []
    layer = network.get_submodule(name.rpartition(".")[0])
    layer.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    network(double(inputs))
    assert len(found) == 1
    return found[0]


def layer_derivatives(network: nn.Module, loss: Loss, name: str, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """a, δ = ∂ℓ/∂z and S = ∂²ℓ/∂z∂zᵀ of the layer whose weight has that name: (n, in), (n, out), (n, out, out).

    By shifts of what the layer returns, one sample at a time.
    """
    network = copy.deepcopy(network).double()
    layer = network.get_submodule(name.rpartition(".")[0])
    activations = activations_of(network, name, inputs)
    gradients, curvatures = [], []
    for i in range(len(targets)):

        def loss_at(shift: Tensor, i: int = i) -> Tensor:
            handle = layer.register_forward_hook(lambda module, args, output: output + shift)
            value = loss(network(double(inputs[i : i + 1])), double(targets[i : i + 1]))
            handle.remove()
            return value

        zero = torch.zeros(network.get_parameter(name).shape[0], dtype=torch.float64)
        gradients.append(torch.autograd.functional.jacobian(loss_at, zero))
        curvatures.append(torch.autograd.functional.hessian(loss_at, zero))
    return activations, torch.stack(gradients), torch.stack(curvatures)


def nearest_of_class(inputs: Tensor, labels: Sequence[int], own: Sequence[int], other: Sequence[int]) -> Pairs:
    """Pairs of samples of two mini-batches; samples whose class the other one lacks are left out."""
    pairs = []
    for p in own:
        distances = [(float((inputs[k] - inputs[p]).norm()), k) for k in other if labels[k] == labels[p]]
        if distances:
            pairs.append((p, min(distances, key=lambda entry: entry[0])[1]))
    return pairs


@dataclass(frozen=True)
class Duality:
    """Approximations of the covariance of single samples by name, and σ_w²."""

    matrices: dict[str, Tensor]
    weight_variance: float


def weight_change(weight: Tensor, a: Tensor, shift: Tensor) -> Tensor:
    """ΔW* as a function of W, flat: Zhang, Yang and Tu (2026), eq. 54, row by row."""
    return torch.cat([(row @ shift) / (a @ a) * a for row in weight])


def two_terms(samples: Samples, weight: Tensor, activations: Tensor, p: int, other: int) -> tuple[Tensor, Tensor]:
    """h_p Δw_p and (∇Δw_p)ᵀ∇ℓ_p of eq. 57, with ∂Δw/∂w by automatic differentiation."""
    weight, a = weight.detach().double(), activations[p]
    shift = activations[other] - a
    change = weight_change(weight, a, shift)
    slope = torch.autograd.functional.jacobian(lambda w: weight_change(w, a, shift), weight).reshape(len(change), -1)
    return samples.hessians[p] @ change, slope.T @ samples.gradients[p]


def duality_of(samples: Samples, weight: Tensor, activations: Tensor, batches: Sequence[Pairs]) -> Duality:
    """The source's chain, eqs. 58–70, in loops over pairs of mini-batches, samples and eigendirections.

    The covariance of single samples is B times that of a mini-batch, of B samples.
    """
    size, out = weight.numel(), len(weight)
    names = ("hh", "hg", "gg", "hh_sd", "hh_sd_wd")
    sums = {name: torch.zeros(size, size, dtype=torch.float64) for name in names}
    traces = []
    for pairs in batches:
        count = len(pairs)
        terms = [two_terms(samples, weight, activations, p, other) for p, other in pairs]
        for one, _ in terms:
            sums["hh_sd"] += torch.outer(one, one) / (2 * count)
            for two in terms:
                sums["hh"] += torch.outer(one, two[0]) / (2 * count)
                # The source has one of both orders in eq. 58; the matrix is symmetric with both only.
                sums["hg"] += (torch.outer(one, two[1]) + torch.outer(two[1], one)) / (2 * count)
        for _, one in terms:
            for _, two in terms:
                sums["gg"] += torch.outer(one, two) / (2 * count)
        for p, other in pairs:
            a = activations[p]
            change = weight_change(weight.detach().double(), a, activations[other] - a)
            values, vectors = descending(samples.hessians[p])
            moments = (vectors @ change).square()
            sums["hh_sd_wd"] += (vectors.T * (values.square() * moments)) @ vectors / (2 * count)
            # Of the D directions, those out that are b ⊗ a see Δw; it is taken to be alike along them.
            traces.append(float(moments.sum()) / out)
    found = {name: total / len(batches) for name, total in sums.items()}
    variance = sum(traces) / len(traces)
    found["raw"] = found["hh"] + found["hg"] + found["gg"]
    found["hh_sd_wd_li"] = 0.5 * variance * samples.second_moment()
    return Duality(found, variance)


def in_coordinates(values: Tensor, basis: Tensor) -> Tensor:
    """The matrix with these eigenvalues and these eigenvectors as rows."""
    return (basis.T * values) @ basis


def shifted_gradients(hessian: Tensor, sigma: float) -> Tensor:
    """Gradients H δ of the random-shift model (eq. 99), (2D, D): the covariance of their δ is exactly σ²I."""
    shifts = sigma * len(hessian) ** 0.5 * torch.eye(len(hessian), dtype=torch.float64)
    return torch.cat([shifts, -shifts]) @ hessian


def planted_hessians(values: Tensor, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hessians with these nonzero eigenvalues, (n, m), in random directions, and those, (n, m, D)."""
    bases = torch.stack([rotation(size, seed + p)[: values.shape[1]] for p in range(len(values))])
    return torch.stack([in_coordinates(v, b) for v, b in zip(values.double(), bases, strict=True)]), bases
