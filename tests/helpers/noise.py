"""Measurements of the noise covariance beside the dense oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.data.copies import mixed
from lightning_curvature.functional.noise import haar_rotated, random_commutativity_error
from lightning_curvature.noise.result import NoiseCurvature
from tests.helpers.runs import Classifier, classification, make_trainer
from tests.helpers.setups import sgd
from tests.oracles.dense import Loss
from tests.oracles.noise import Samples, samples_of

# Three batches, the last of them ragged.
COUNT, BATCH = 22, 8


# Sums of some twenty terms, each a product of a few dozen: thousands of roundings of 1e-16 at most.
EXACT = 1e-10


def samples(count: int = COUNT, seed: int = 1, classes: int = 3) -> TensorDataset:
    """Single samples of a classification."""
    return TensorDataset(*classification(1, count, classes=classes, seed=seed)[0])


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error after softmax."""
    return (F.softmax(outputs, -1) - F.one_hot(labels, outputs.shape[-1])).square().mean()


def network(activation: type[nn.Module] = nn.Tanh, bias: bool = True, first: Any = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first(4, 5, bias=bias), activation(), nn.Linear(5, 3, bias=bias)).double()


class Plain(nn.Module):
    """A linear layer that is no ``nn.Linear``."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def monitor(name: str, **options: Any) -> NoiseCovarianceMonitor:
    return NoiseCovarianceMonitor(parameter=f"network.{name}", **({"on_error": "raise"} | options))


def evaluated(module: Any, name: str, data: Any = None, **options: Any) -> NoiseCurvature:
    """By hand, in float64; in all directions, so that the matrices can be read off."""
    size = dict(module.network.named_parameters(remove_duplicate=False))[name].numel()
    loader = data if isinstance(data, DataLoader) else DataLoader(data or samples(), batch_size=BATCH)
    return monitor(name, **({"top": size} | options)).evaluate(module, loader, trainer=make_trainer()).result


def module_of(network: nn.Module, loss: Loss = F.cross_entropy) -> Classifier:
    return Classifier(network, sgd, loss)


def dense(module: Any, name: str, data: TensorDataset | None = None) -> Samples:
    return samples_of(module.network, module.loss, name, *(data or samples()).tensors)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """Relative to the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance * float(expected.abs().max()))


def assert_matrices(result: NoiseCurvature, expected: Samples, batch_size: int, tolerance: float = EXACT) -> None:
    """C, H and the diagonal of E[h²] are those of the oracle, whatever the basis."""
    vectors = result.vectors
    assert vectors.shape == (result.dimension, result.dimension)
    assert result.samples == len(expected.gradients)
    assert result.batch_size == batch_size
    assert_close(vectors.T @ result.shown @ vectors, expected.covariance(batch_size), tolerance)
    assert_close((vectors.T * result.curvatures) @ vectors, expected.hessian(), tolerance)
    assert result.second_moments is not None
    moments = torch.einsum("id,de,ie->i", vectors, expected.second_moment(), vectors)
    assert_close(result.second_moments, moments, tolerance)


TEN = 10


def images() -> TensorDataset:
    torch.manual_seed(2)
    return TensorDataset(torch.randn(TEN, 1, 5, 5).double(), torch.randint(0, 3, (TEN,)))


# Numbers of eigenvectors, whose roundings are those of H over the gaps between its eigenvalues, a hundredth of it and
# more, and of logarithms of what is a thousandth of the largest.
OF_VECTORS = 1e-8
TOP = 8


def line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of log y on log x over positive pairs, and its standard error."""
    used = (x > 1e-15 * x.max()) & (y > 0)
    u, v = x[used].log().numpy(), y[used].log().numpy()
    slope, intercept = np.polyfit(u, v, 1)
    left = v - slope * u - intercept
    return float(slope), math.sqrt(float(left @ left) / (len(u) - 2) / float(((u - u.mean()) ** 2).sum()))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Of numbers that all differ."""
    return float(np.corrcoef(a.argsort().argsort().numpy(), b.argsort().argsort().numpy())[0, 1])


def expected(one: Samples, batch_size: int, top: int = TOP, seed: int = 0) -> dict[str, float]:
    """All but the chain."""
    c, h = one.covariance(batch_size), one.hessian()
    values, vectors = (part[:top] for part in one.basis())
    own = vectors @ c @ vectors.T
    diagonal = own.diagonal()
    commutator = c @ h - h @ c
    off = [
        abs(float(own[i, j])) / math.sqrt(float(own[i, i] * own[j, j]))
        for i in range(top)
        for j in range(top)
        if i != j
    ]
    coupling = sum(off) / len(off)
    spikes = float(c.trace() ** 2 / (c * c).sum())
    error = math.sqrt((1.0 - 2.0 / math.pi) / spikes) / top
    found = {
        "noise_commutativity": float(commutator.norm() / c.norm() / h.norm()),
        "noise_commutativity_relative": float(commutator.norm() / (c @ h).norm()),
        "noise_commutativity_random": random_commutativity_error(c, h, relative=True),
        "noise_alignment": float(diagonal.square().sum() / own.square().sum()),
        "noise_spearman": rank_correlation(values, diagonal),
        "noise_coupling": coupling,
        "noise_coupling_random": coupling_by_chance(c, top, top, seed),
        "noise_coupling_z": (coupling - math.sqrt(2.0 / math.pi / spikes)) / error,
    }
    moments = (vectors @ one.second_moment() @ vectors.T).diagonal()
    for key, heights in (("noise_gamma", diagonal), ("noise_gamma_awd", moments)):
        found[key], found[f"{key}_stderr"] = line(values, heights)
    return found


def coupling_by_chance(c: Tensor, top: int, curved: int, seed: int = 0, draws: int = 4) -> float:
    """Mean |R_ij| in the first directions of C after random rotations, entry by entry."""
    means = []
    for draw in range(draws):
        rotated = haar_rotated(c, top, torch.Generator().manual_seed(mixed(seed, draw)))[:curved, :curved]
        scale = rotated.diagonal().abs().sqrt()
        off = (rotated / scale / scale[:, None]).abs() * (1.0 - torch.eye(curved, dtype=torch.float64))
        means.append(float(off.sum()) / (curved * (curved - 1)))
    return sum(means) / draws
