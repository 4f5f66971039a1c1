"""Compares the error that is logged with the true one, over twelve networks, kinks frozen and crossed.

python benchmarks/calibration.py --write docs/calibration_directional.md
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from precision import Rows as Logged
from precision import ninth_decile, trained
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature import DirectionalCurvatureMonitor

KEYS = {"lambda_fd": "hessian", "lambda_kl": "gauss_newton"}
STEPS, BATCH = 240, 64
Found = TypeVar("Found")


class Tokens(nn.Module):
    """Attention over the rows of an image."""

    def __init__(self, activation: str, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.pool = nn.Linear(8, 24), pool
        self.place = nn.Parameter(0.1 * torch.randn(8, 24))
        layers = [nn.TransformerEncoderLayer(24, 4, 48, 0.0, activation, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.pool(self.layers(self.embed(x.view(-1, 8, 8)) + self.place)))


class Rows(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class Residual(nn.Module):
    """A block of two convolutions with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.inner = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """What went in, and what the convolutions made of it."""
        return torch.relu(x + self.inner(x))


def mlp(activation: Callable[[], nn.Module], depth: int = 3, width: int = 48) -> nn.Module:
    """Fully connected, with hidden layers of one width."""
    sizes = [64, *[width] * depth]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def convolutional(activation: Callable[[], nn.Module], pool: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions, each followed by pooling."""
    first = (nn.Conv2d(1, 12, 3, padding=1), activation(), pool())
    second = (nn.Conv2d(12, 24, 3, padding=1), activation(), pool())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *first, *second, nn.Flatten(), nn.Linear(96, 10))


def residual() -> nn.Module:
    """Two residual blocks, then the mean over places."""
    begin = (nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1))
    return nn.Sequential(*begin, Residual(12), Residual(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def sgd(lr: float, momentum: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    """Stochastic gradient descent."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Adam."""
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.optim.Optimizer]]] = {
    "MLP, ReLU": (lambda: mlp(nn.ReLU), sgd(0.1)),
    "MLP of 6 layers, leaky ReLU": (lambda: mlp(nn.LeakyReLU, depth=6), adam(1e-3)),
    "MLP, tanh": (lambda: mlp(nn.Tanh), sgd(0.1, 0.9)),
    "MLP, SiLU": (lambda: mlp(nn.SiLU), adam(1e-3)),
    "CNN, ReLU, max pooling": (lambda: convolutional(nn.ReLU, lambda: nn.MaxPool2d(2)), sgd(0.05, 0.9)),
    "CNN, hardswish, max pooling": (lambda: convolutional(nn.Hardswish, lambda: nn.MaxPool2d(2)), adam(2e-3)),
    "CNN, GELU, mean pooling": (lambda: convolutional(nn.GELU, lambda: nn.AvgPool2d(2)), adam(2e-3)),
    "ResNet, ReLU, BatchNorm": (residual, sgd(0.05, 0.9)),
    "Attention, GELU": (lambda: Tokens("gelu", lambda x: x.mean(1)), adam(1e-3)),
    "Attention, ReLU": (lambda: Tokens("relu", lambda x: x.mean(1)), adam(1e-3)),
    "Attention, GELU, maximum of tokens": (lambda: Tokens("gelu", lambda x: x.amax(1)), sgd(0.05, 0.9)),
    "LSTM": (Rows, adam(2e-3)),
}


class Digits(pl.LightningModule):
    """Cross-entropy on digits."""

    def __init__(self, title: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, self.make_optimizer = NETWORKS[title]
        self.network = make()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """That of the network."""
        return self.make_optimizer(self.parameters())


class Steps(pl.Callback):
    """Keeps what each step started from and led to."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note θ_t, and the buffers there."""
        self.before = {n: t.detach().clone() for n, t in pl_module.network.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note θ_{t+1}."""
        after = {n: p.detach().clone() for n, p in pl_module.network.named_parameters()}
        self.steps.append((self.before, after, batch))


def truth(
    network: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """gᵀd, dᵀHd, dᵀGd in float64, by automatic differentiation along the line."""
    x, y = batch[0].double(), batch[1]
    network = copy.deepcopy(network).double()
    network.load_state_dict(before)
    state = {n: t.clone() for n, t in network.state_dict().items()}
    d = {n: state[n] - after[n].double() for n in after}
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(functional_call(network, state | {n: state[n] + t * d[n] for n in d}, (x,)), y)
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        (bend,) = torch.autograd.grad(slope, t)
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(state[n], d[n]) for n in d}
        z, u = forward_ad.unpack_dual(functional_call(network, state | duals, (x,)))
    p = z.softmax(-1)
    variance = (p * u**2).sum(-1) - (p * u).sum(-1) ** 2
    return {"descent": slope.item(), "hessian": bend.item(), "gauss_newton": variance.mean().item()}


def batches() -> list[tuple[Tensor, Tensor]]:
    """Digits in shuffled batches."""
    digits, g = load_digits(), torch.Generator().manual_seed(0)
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16.0, torch.tensor(digits.target)
    places = [i for _ in range(STEPS // 20) for i in torch.randperm(len(x), generator=g).split(BATCH)[:-1]]
    return [(x[i], y[i]) for i in places[:STEPS]]


def compared(title: str, kinks: Any) -> Iterator[tuple[str, float, float]]:
    """Key, true and logged error of the first 40 steps and of the last 40."""
    module, steps, noted = Digits(title), Steps(), Logged()
    monitor = DirectionalCurvatureMonitor(every_n_train_steps=1, kinks=kinks)
    trained(module, batches(), noted, [steps, monitor], "32-true")
    for index in (*range(40), *range(STEPS - 40, STEPS)):
        row, exact = noted.rows[index], truth(module.network, *steps.steps[index])
        for key, form in KEYS.items():
            if exact["descent"] > 0.0:
                quadratic = row[f"curvature/{key}"] / row["curvature/two_over_lr"] * 2.0 * exact["descent"]
                yield key, abs(quadratic / exact[form] - 1.0), row[f"curvature_diagnostics/{key}_error"]


def described(pairs: list[tuple[float, float]]) -> str:
    """Columns of one key: values, lost ones, true error, share within the logged one, logged over true."""
    known = [(true, logged) for true, logged in pairs if not math.isnan(true)]
    if len(known) < 2:
        return f"{len(known)} | {len(pairs) - len(known)} | – | – | – | –"
    errors = [true for true, _ in known]
    tenth = ninth_decile(errors)
    within = sum(true <= logged for true, logged in known) / len(known)
    wide = median(logged / max(true, 1e-12) for true, logged in known)
    counts = f"{len(known)} | {len(pairs) - len(known)}"
    return f"{counts} | {median(errors):.1e} | {tenth:.1e} | {within:.0%} | {wide:.1f}"


def table(kinks: str, titles: list[str]) -> Iterator[str]:
    """Rows of all networks, and of all together."""
    yield "| network | key | values | NaN | median error | 9th decile | within logged | logged / true, median |"
    yield "|---|---|---|---|---|---|---|---|"
    every: dict[str, list[tuple[float, float]]] = {key: [] for key in KEYS}
    for title in titles:
        own: dict[str, list[tuple[float, float]]] = {key: [] for key in KEYS}
        for key, true, logged in compared(title, kinks):
            own[key].append((true, logged))
            every[key].append((true, logged))
        yield from (f"| {title} | {key} | {described(own[key])} |" for key in KEYS)
    yield from (f"| all | {key} | {described(every[key])} |" for key in KEYS)


def tabulate(
    description: str | None,
    lines: list[str],
    measured: Callable[[str], Iterable[Found]],
    row: Callable[[str, Sequence[Found]], str],
    networks: Iterable[str] = NETWORKS,
) -> None:
    """Add a row for each network, and one for all, to a page; print them, and write the page where asked."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="markdown file to write")
    parser.add_argument("--networks", nargs="*", default=list(networks), help="which networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every: list[Found] = []
    for title in arguments.networks:
        found = list(measured(title))
        every += found
        lines.append(row(title, found))
        print(lines[-1], flush=True)
    lines.append(row("all", every))
    print(lines[-1])
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print the tables; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="markdown file to write")
    parser.add_argument("--kinks", nargs="*", default=["frozen", "crossed"], help="which tables")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="which networks")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines = [
        "# Whether the logged error covers the true one",
        "",
        f"Made by `benchmarks/calibration.py`: twelve networks on scikit-learn's digits, cross-entropy, batch {BATCH},",
        f"float32, ε chosen by the monitor; the first 40 of {STEPS} steps (fresh) and the last 40 (trained);",
        f"torch {torch.__version__}, CPU. True error: |λ/λ₆₄ − 1|, λ₆₄ by automatic differentiation in float64 along",
        "the actual step (λ_KL against dᵀGd, λ_FD against dᵀHd), which sees no kinks.",
    ]
    for kinks in arguments.kinks:
        lines += ["", f'## kinks="{kinks}"', "", *table(kinks, arguments.networks)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
