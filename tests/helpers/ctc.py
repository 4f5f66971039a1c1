"""The connectionist temporal classification loss twice: torch's, without second derivatives, and by hand with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMES, SYMBOLS = 6, 4


def of_torch(z: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of −log p(y | z) over the length of y; z (B, T, C), y (B, S), blank 0."""
    lengths = torch.full((len(z),), z.shape[1]), torch.full((len(y),), y.shape[1])
    return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), y, *lengths)


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    """The same by the forward algorithm."""
    logs, losses = z.log_softmax(-1), []
    for log, labels in zip(logs, y.tolist(), strict=True):
        path = [0, *(symbol for label in labels for symbol in (label, 0))]
        never = log.new_full((), -1e30)
        alphas = [log[0, s] if i < 2 else never for i, s in enumerate(path)]
        for row in log[1:]:
            alphas = [
                torch.stack(
                    [
                        alphas[i],
                        alphas[i - 1] if i else never,
                        alphas[i - 2] if i > 1 and s and s != path[i - 2] else never,
                    ]
                ).logsumexp(0)
                + row[s]
                for i, s in enumerate(path)
            ]
        losses.append(-torch.stack(alphas[-2:]).logsumexp(0) / len(labels))
    return torch.stack(losses).mean()


def network() -> nn.Module:
    """Logits (B, T, C) of inputs (B, T, 3)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, SYMBOLS)).double()


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Inputs (count, T, 3) and labels (count, 2)."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(count, TIMES, 3, generator=g, dtype=torch.float64)
    return x, torch.randint(1, SYMBOLS, (count, 2), generator=g)
