"""Real digits in batches, and networks of two kinds for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.helpers.runs import Batch

# Of the full batch. A mean over fewer samples has no less rounding.
SAMPLES = 512


def digits(batch_size: int | None, steps: int) -> list[Batch]:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16.0, torch.tensor(data.target)
    if batch_size is None:
        return [(x[:SAMPLES], y[:SAMPLES])] * steps
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(x), generator=generator).split(batch_size)[:-1] for _ in range(steps)]
    indices = [index for order in orders for index in order][:steps]
    return [(x[index], y[index]) for index in indices]


class Attending(nn.Module):
    """Attention over the rows of a digit, a residual, the mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.view(-1, 8, 8))
        q, k, v = self.mix(rows).chunk(3, dim=-1)
        rows = rows + torch.softmax(q @ k.mT / 4.0, dim=-1) @ v
        return self.head(nn.functional.gelu(rows).mean(1))


def convolving() -> nn.Module:
    first = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.AvgPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(8, 12, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(192, 10))
