"""Networks, losses and micro-batches of the operators, with their dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.dense import Loss

Data = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """One head of causal attention between an embedding and a head, torch's fused kernel or the formula."""

    def __init__(self, tokens: int = 5, width: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.fused = True
        self.embedding, self.head = nn.Embedding(tokens, width), nn.Linear(width, tokens, bias=False)
        self.mix = nn.Linear(width, 3 * width, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)  # (B, T, C)
        q, k, v = self.mix(h).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, T, C) each
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.head(h + mixed.squeeze(1)).mT  # classes before positions, as cross_entropy has them


class Odd(nn.Module):
    """A scale without dimensions, a frozen layer, and a parameter that nothing uses, between those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.first = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0))


def normalized(training: bool) -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    network(torch.randn(20, 4) + 1.0)  # running statistics away from 0 and 1
    return network.train(training)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.2)


def penalized(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy and a penalty on the normalizer, whose own Hessian is not positive."""
    return torch.lerp(F.cross_entropy(z, y), torch.sin(z.logsumexp(1)).mean(), 0.2)


@dataclass(frozen=True)
class Case:
    """A network, a loss, and what inputs and targets look like."""

    make: Callable[[], nn.Module]
    loss: Loss
    shape: tuple[int, ...] = (4,)
    target: str = "label"

    def network(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype)

    def data(self, *sizes: int, dtype: torch.dtype = torch.float64) -> Data:
        """Batches of these sizes; all sizes with the same sum have the same samples."""
        g, count = torch.Generator().manual_seed(1), sum(sizes)
        if self.target == "next":
            x = torch.randint(5, (count, *self.shape), generator=g)
            y = x.roll(-1, 1)
        else:
            x = torch.randn(count, *self.shape, generator=g, dtype=torch.float64).to(dtype)
            y = {
                "label": torch.randint(3, (count,), generator=g),
                "binary": torch.randint(2, (count,), generator=g).to(dtype),
                "vector": torch.randn(count, 3, generator=g, dtype=torch.float64).to(dtype),
            }[self.target]
        return list(zip(x.split(sizes), y.split(sizes), strict=True))


CASES = {
    "perceptron": Case(perceptron, F.cross_entropy),
    "squared": Case(perceptron, F.mse_loss, target="vector"),
    "convolution": Case(convolution, F.binary_cross_entropy_with_logits, (1, 3, 3), "binary"),
    "attention": Case(Attention, F.cross_entropy, (4,), "next"),
    "tied": Case(lambda: Attention(tied=True), smoothed, (4,), "next"),
    "odd": Case(Odd, penalized),
    "batch norm, eval": Case(lambda: normalized(False), smoothed),
    "batch norm, train": Case(lambda: normalized(True), F.cross_entropy),
}


# Samples of a batch do not see each other.
INDEPENDENT = [name for name in CASES if name != "batch norm, train"]


def trained(network: nn.Module) -> list[Tensor]:
    return [p for p in network.parameters() if p.requires_grad]


def matrix(operator: Any) -> Tensor:
    """All columns, by unit vectors."""
    identity = torch.eye(operator.space.size, dtype=operator.space.dtype)
    return torch.stack([operator(row) for row in identity], dim=1)


def off(found: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def on_ranks(ranks: int, job: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Result of a job on each of some ranks that sum tensors, one rank after the other.

    A job is run up to the first sum that is not known yet; when all ranks have come to it, they begin again.
    """
    sums: list[Tensor] = []

    def until_unknown(rank: int) -> tuple[Any, Tensor | None]:
        known, own = iter(sums), list[Tensor]()

        def reduce(part: Tensor) -> Tensor:
            for total in known:
                return total.clone()
            own.append(part.clone())
            raise Waiting

        try:
            return job(rank, reduce), None
        except Waiting:
            return None, own[0]

    while True:
        outcomes = [until_unknown(rank) for rank in range(ranks)]
        parts = [part for _, part in outcomes if part is not None]
        if not parts:
            return [result for result, _ in outcomes]
        assert len(parts) == ranks, "a rank has left the others waiting"
        sums.append(torch.stack(parts).sum(dim=0))


class Waiting(BaseException):
    """Ends a job where its rank would wait for others; no error that an operator could catch."""


class Counter:
    """Counts forwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


# An entry comes out of some 30 operations one after the other, sums of up to 60 terms among them, each of which rounds
# by a unit or a few; batch norm over two samples divides by a small deviation. Units of the largest entry.
UNITS = 100


def rounding(dtype: torch.dtype) -> float:
    return UNITS * torch.finfo(dtype).eps
