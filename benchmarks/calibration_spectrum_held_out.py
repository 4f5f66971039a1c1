"""Compares λ_max with its true error over 56 networks on which nothing was tuned: seven losses, eight kinds of network.

python benchmarks/calibration_spectrum_held_out.py --write docs/calibration_spectrum_held_out.md
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from calibration import BATCH, adam, sgd, tabulate
from calibration_spectrum import SAMPLES, Batch, Found, Loss, compared, header, row, training
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

CLASSES, MEASURED = 10, 6
# Steps of training before the first search, and between two that go on from each other.
BEGINS, BETWEEN = (0, 3, 10, 30, 100, 300), (1, 5, 20)


def hot(y: Tensor, z: Tensor) -> Tensor:
    """Labels as vectors of ones and zeros."""
    return F.one_hot(y, z.shape[-1]).to(z)


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy that counts what is right already for less."""
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1.0 - torch.exp(-losses)) ** 2 * losses).mean()


LOSSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "cross-entropy, smoothed labels": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "focal loss": focal,
    "squared error to one-hot labels": lambda z, y: F.mse_loss(z, hot(y, z)),
    "Huber loss": lambda z, y: F.smooth_l1_loss(z, hot(y, z), beta=0.1),
    "binary cross-entropy of each class": lambda z, y: F.binary_cross_entropy_with_logits(z, hot(y, z)),
    "Brier score": lambda z, y: (z.softmax(-1) - hot(y, z)).square().sum(-1).mean(),
}
ACTIVATIONS: list[Callable[[], nn.Module]] = [nn.ReLU, nn.Tanh, nn.GELU, nn.ELU, nn.Softplus, nn.Sigmoid]
IMAGE = nn.Unflatten(1, (1, 8, 8))


class Recurrent(nn.Module):
    """A GRU over eight parts of the sample."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.parts, self.size = 8, features // 8
        self.gru, self.head = nn.GRU(self.size, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.gru(x[:, : self.parts * self.size].view(len(x), self.parts, -1))[0][:, -1])


class Mixer(nn.Module):
    """Rows and columns of an image in turn, with LayerNorm and shortcuts."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, width), activation(), nn.Linear(width, 8))
        self.columns = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, width), activation(), nn.Linear(width, 8))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = x[:, :64].view(-1, 8, 8)
        x = x + self.rows(x)
        x = x + self.columns(x.mT).mT
        return self.head(x.flatten(1))


class Attention(nn.Module):
    """One layer of attention over eight parts, with LayerNorm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, CLASSES)
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.layer(self.embed(x[:, :64].view(-1, 8, 8))).mean(1))


def dense(features: int, width: int, depth: int, activation: Callable[[], nn.Module], norm: bool) -> nn.Module:
    """Fully connected, also with LayerNorm, or without hidden layers."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise([features, *[width] * depth]):
        layers += [nn.Linear(a, b), *([nn.LayerNorm(b)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(width if depth else features, CLASSES))


def convolved(width: int, activation: Callable[[], nn.Module], norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two convolutions with a norm, pooling between them."""
    first = (nn.Conv2d(1, width, 3), norm(width), activation(), nn.AvgPool2d(2))
    return nn.Sequential(
        IMAGE,
        *first,
        nn.Conv2d(width, width, 2),
        norm(width),
        activation(),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def network(kind: int, features: int, draw: random.Random) -> nn.Module:
    """A network of one of eight kinds, of drawn size."""
    width, depth, activation = draw.choice((8, 16, 32, 64)), draw.choice((1, 2, 4)), draw.choice(ACTIVATIONS)
    if kind in (0, 1):
        return dense(features, width, depth, activation, norm=kind == 1)
    if kind == 2:
        return dense(features, 0, 0, activation, norm=False)
    if kind in (3, 4):
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d if kind == 3 else lambda n: nn.GroupNorm(2, n)
        return convolved(width, activation, norm)
    if kind == 5:
        return Recurrent(features, width)
    return Mixer(width, activation) if kind == 6 else Attention(width, draw.choice((1, 2, 4)))


def samples(kind: int, draw: random.Random) -> list[Batch]:
    """Shuffled batches of digits, a part of the labels random; for dense and recurrent networks also of other data."""
    which = draw.randrange(3) if kind in (0, 1, 2, 5) else 0
    g = torch.Generator().manual_seed(draw.randrange(10**6))
    if which == 1:
        cancer = load_breast_cancer()
        x, y = torch.tensor(cancer.data, dtype=torch.float32), torch.tensor(cancer.target)
        x = (x - x.mean(0)) / x.std(0)
    elif which == 2:
        x = torch.randn(1024, 40, generator=g)
        y = (x @ torch.randn(40, CLASSES, generator=g)).argmax(-1)
    else:
        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    wrong = torch.rand(len(y), generator=g) < draw.choice((0.0, 0.2, 0.5))
    y = torch.where(wrong, torch.randint(int(y.max()) + 1, (len(y),), generator=g), y)
    places = torch.randperm(len(x), generator=g).split(BATCH)[:-1]
    return [(x[i], y[i]) for i in places]


def searches(title: str) -> Iterator[tuple[str, Found]]:
    """Train eight networks with one loss, up to a drawn step; search there, and along the next steps."""
    for kind in range(8):
        draw = random.Random(f"{title} {kind}")
        torch.manual_seed(draw.randrange(10**6))
        data = samples(kind, draw)
        begin, every = draw.choice(BEGINS), draw.choice(BETWEEN)
        optimizer = draw.choice((sgd(0.1), sgd(0.02, 0.9), sgd(0.5), adam(1e-3), adam(1e-2)))
        followed = range(begin, begin + MEASURED * every, every)
        run = training(network(kind, data[0][0].shape[1], draw), optimizer, LOSSES[title], data, followed[-1])
        yield from compared(run, LOSSES[title], (begin,), followed)


def main() -> None:
    """Print the table; write it where asked."""
    lines = [
        "# λ_max of networks on which nothing was tuned",
        "",
        "Made by `benchmarks/calibration_spectrum_held_out.py`: 56 networks, eight kinds (fully connected, with",
        "LayerNorm, linear, convolutional with BatchNorm or GroupNorm, recurrent, mixer, attention; 200 to 20,000",
        f"parameters) under each of seven losses; {SAMPLES} samples of digits, of medical data or of a teacher, up to",
        f"half of the labels random; SGD, momentum or Adam; float32, torch {torch.__version__}, CPU. Sizes, data,",
        f"optimizers and steps of training ({', '.join(map(str, BEGINS))}) are drawn. Columns as in",
        "[calibration_spectrum.md](calibration_spectrum.md): two searches from random vectors at a drawn step; five",
        f"that go on along the next steps, one every {', '.join(map(str, BETWEEN))} steps; the power iteration of",
        "PyHessian.",
        "",
        *header("loss"),
    ]
    tabulate(__doc__, lines, searches, row, LOSSES)


if __name__ == "__main__":
    main()
