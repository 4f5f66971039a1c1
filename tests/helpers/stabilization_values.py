"""Cases of sample growth whose values the oracle knows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import TensorDataset

from lightning_curvature.functional import gaussian_moment
from tests.helpers.growth import model_of
from tests.helpers.runs import Classifier, mlp
from tests.oracles.sample_growth import dense_increment, order_of

# Eigenvectors to 1e-10 of their eigenvalues, over gaps of a tenth, in sums of a hundred terms.
TIGHT = 1e-7
SAMPLES, CANDIDATES, SIZES = 30, 4, (3, 9)


def in_order(count: int, seed: int = 0, of: int = SAMPLES) -> list[int]:
    """The order of samples that follows from a seed."""
    return order_of(of, seed)[:count]


def classifier_case(scale: float = 1.0) -> tuple[Classifier, TensorDataset, Callable[[Tensor], Tensor], Tensor]:
    """Module, data, losses in order as a function of flat parameters, and these."""
    torch.manual_seed(1)
    network = mlp(3, 4, 3).double()
    x, y = torch.randn(SAMPLES, 3, dtype=torch.float64), torch.randint(0, 3, (SAMPLES,))
    order = in_order(SIZES[-1] + CANDIDATES)
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]

    def losses(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(network, values, (x[order],)), y[order], reduction="none")

    w = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    return Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), TensorDataset(x, y), losses, w


def dense_moment(losses: Callable[[Tensor], Tensor], w: Tensor, k: int, basis: Tensor, sigma: float) -> list[float]:
    """Closed form for each new sample, from dense derivatives."""
    new = range(k, k + CANDIDATES)
    return [float(gaussian_moment(model_of(dense_increment(losses, w, k, j).within(basis)), sigma)) for j in new]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over new samples, and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(values))
