"""What the tests of the batch sharpness monitor have in common."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_curvature import BatchSharpnessMonitor
from lightning_curvature.batch_sharpness.options import OF_UPDATES, QUANTITIES
from lightning_curvature.data.population import Population, read_population
from tests.helpers.runs import Capture, Classifier, make_trainer, mlp, rows
from tests.oracles.dense import Loss
from tests.oracles.hessian_spectrum import Curvature, Moment, Moments, Part


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Grows with every call of a method."""
    calls: list[int] = []
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *args: calls.append(1) or real(self, *args))
    return calls


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*samples(), strict=True)


def whole_batches() -> DataLoader[Any]:
    x, y = samples()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 14, 4)]
    return DataLoader(batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


DRAWN = tuple(name for name in QUANTITIES if name != "step_sharpness")


# Sums of some hundred products in another order: roundings of 1e-16 each, of terms up to a thousand times larger than
# what is left of them. Errors of eigenvalues are below 1e-12. Measured: 6e-13.
EXACT = 1e-10


SAMPLES, BATCH = 14, 4


TOLERANCE = 1e-12


Make = Callable[[Any], Any]


def samples(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(count, 4, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g)


def loader(size: int = BATCH, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=size, **({"shuffle": True} | options))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3)


def learner(make: Make = sgd, loss: Loss = F.cross_entropy) -> Classifier:
    return Classifier(mlp(4, 3, 3), make, loss)


def monitor(*quantities: str, **options: Any) -> BatchSharpnessMonitor:
    """As many batches as it takes to stop at several places, of a dozen or so."""
    given: Any = quantities or DRAWN
    defaults: dict[str, Any] = {
        "quantities": given,
        "every_n_train_steps": 2,
        "num_batches": 24,
        "min_batches": 4,
        "relative_error": 0.2,
        "tolerance": TOLERANCE,
        "on_error": "raise",
    }
    return BatchSharpnessMonitor(**(defaults | options))


class Beside(Moments):
    """Notes of each step what it finds, and once the population that a monitor draws from. Stands before it."""

    def __init__(self, follow: BatchSharpnessMonitor) -> None:
        super().__init__()
        self.follow, self.populations, self.copies = follow, list[Population](), list[tuple[nn.Module, Any]]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.populations:
            follow = self.follow
            sizes = {"batch_size": follow.batch_size, "micro_batch_size": follow.micro_batch_size}
            population = read_population(
                trainer, follow.probe_dataloader, samples=follow.probe_samples, seed=follow.seed, **sizes
            )
            self.populations.append(population)
        if not self._open:
            self.copies.append(copy.deepcopy((pl_module.network, trainer.optimizers[0])))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def draws(self, step: int, count: int) -> list[list[int]]:
        """Which samples the first mini-batches of a measurement hold."""
        (population,), (x, _) = self.populations, samples()
        drawn = [torch.cat([part.batch[0] for part in population.draw(step, number)]) for number in range(count)]
        return [[int((x == row).all(dim=1).nonzero()) for row in batch] for batch in drawn]

    def updates(self, step: int, gradients: Sequence[Tensor], trained: Callable[[Tensor], bool]) -> list[Tensor]:
        """What the optimizer would make of gradients, over η: steps of its copies."""
        made = []
        for gradient in gradients:
            network, optimizer = copy.deepcopy(self.copies[step])
            parameters = [p for p in network.parameters() if trained(p)]
            before = torch.cat([p.detach().clone().reshape(-1) for p in parameters])
            for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.reshape(p.shape)
            optimizer.step()
            after = torch.cat([p.detach().reshape(-1) for p in parameters])
            made.append((before - after) / optimizer.param_groups[0]["lr"])
        return made


class Dense:
    """Gradients, (n, N), and curvature matrices, (n, N, N), of single samples; a mini-batch has their means.

    Args:
        curvature: the network at the moment.
        kind: "hessian" or "gauss_newton".
        among: those that mini-batches are drawn from; default: all.
        exact: whether the matrix of all samples is used as it is, or the other batch of a pair stands for it.
    """

    def __init__(
        self, curvature: Curvature, kind: str = "hessian", among: Sequence[int] | None = None, exact: bool = False
    ) -> None:
        self.exact = exact
        x, y = samples()
        self.among = among or range(len(y))
        singles = [Part(x[i : i + 1], y[i : i + 1]) for i in range(len(y))]

        def gradient(part: Part) -> Tensor:
            return torch.func.grad(lambda flat: curvature.loss(curvature.outputs(flat, part), part.y))(curvature.theta)

        self.gradients = torch.stack([gradient(part) for part in singles])
        self.matrices = torch.stack([getattr(curvature, kind)([part]) for part in singles])

    def of(self, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """g_B and H_B."""
        chosen = list(batch)
        return self.gradients[chosen].mean(dim=0), self.matrices[chosen].mean(dim=0)

    def terms(self, quantity: str, batches: Sequence[Sequence[int]], updates: Sequence[Tensor] = ()) -> list[Any]:
        """Numerator and denominator of each independent draw, as defined."""
        found, (full, every) = [self.of(batch) for batch in batches], self.of(self.among)
        if quantity == "batch_sharpness":
            return [(g @ h @ g / (g @ g), 1.0) for g, h in found]
        if quantity == "modified_batch_sharpness":
            return [(g @ h @ g, g @ g) for g, h in found]
        if quantity == "lambda_max_b":
            return [(torch.linalg.eigvalsh(h)[-1], 1.0) for _, h in found]
        if quantity == "update_sharpness":
            pairs = zip(found, updates, strict=True)
            return [(v @ h @ v / (v @ v), g @ v / (v @ v)) for (g, h), v in pairs if v.any()]
        terms = []
        vectors = list(updates) or [g for g, _ in found]
        for i in range(0, len(found), 2):
            (g, h), (k, f), v, w = *found[i : i + 2], *vectors[i : i + 2]
            h, f = (every, every) if self.exact else (h, f)
            below = {"ias": (g @ g + k @ k) / 2, "gni": full @ full, "lambda_gen": full @ (v + w) / 2}
            terms.append(((v @ f @ v + w @ h @ w) / 2, below[quantity]))
        return terms


def estimate(terms: Sequence[tuple[Any, Any]]) -> tuple[float, float]:
    """Ratio of means, and its standard error by the delta method."""
    x, y = (torch.tensor([float(term) for term in side], dtype=torch.float64) for side in zip(*terms, strict=True))
    ratio, n = x.mean() / y.mean(), len(x)
    spread = (x - ratio * y).square().sum() / (n * (n - 1))
    return float(ratio), float(spread.sqrt() / y.mean())


@dataclass
class Run:
    """A finished run."""

    module: Any
    beside: Beside
    rows: dict[int, dict[str, float]]
    trainer: pl.Trainer
    capture: Capture

    def moment(self, step: int) -> Moment:
        return self.beside.all[step]

    def compared(
        self,
        kind: str = "hessian",
        names: Sequence[str] | None = None,
        training: bool = True,
        among: Sequence[int] | None = None,
        exact: bool = False,
        quantities: Sequence[str] = DRAWN,
    ) -> Iterator[tuple[str, float, float, float]]:
        """Give name, value, what the draws give by definition, and tolerance, for each number of each measurement."""
        for step, row in self.rows.items():
            curvature = Curvature(self.module.network, self.module.loss, self.moment(step), names, training)
            dense = Dense(curvature, kind, among, exact)
            yield "two_over_lr", row["two_over_lr"], 2.0 / self.moment(step).lr, 0.0
            for quantity in (name for name in quantities if name in row):
                batches = self.beside.draws(step, int(row[f"{quantity}_batches"]))
                updates: Any = ()
                if quantity in OF_UPDATES:
                    gradients = [dense.of(batch)[0] for batch in batches]
                    updates = self.beside.updates(step, gradients, lambda p: p.requires_grad)
                terms = dense.terms(quantity, batches, updates)
                value, error = estimate(terms)
                yield quantity, row[quantity], value, EXACT
                # Deviations are differences of numbers a hundred times larger.
                yield f"{quantity}_stderr", row[f"{quantity}_stderr"], error, 100 * EXACT
                if quantity == "lambda_max_b":
                    each = torch.stack([value for value, _ in terms])
                    for end, share in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
                        yield f"{quantity}_{end}", row[f"{quantity}_{end}"], float(each.quantile(share)), EXACT

    def check(self, kind: str = "hessian", **options: Any) -> None:
        """Every value and standard error of every measurement is what the draws give by definition."""
        assert self.rows
        for name, found, expected, tolerance in self.compared(kind, **options):
            assert found == pytest.approx(expected, rel=tolerance), name


def fit(
    follow: BatchSharpnessMonitor,
    module: Any = None,
    data: Any = None,
    callbacks_before: Sequence[pl.Callback] = (),
    **options: Any,
) -> Run:
    capture, beside, module = Capture(), Beside(follow), module or learner()
    trainer = make_trainer(*callbacks_before, beside, follow, logger=capture, **options)
    trainer.fit(module, data if data is not None else loader())
    return Run(module, beside, rows(capture), trainer, capture)


@functools.cache
def plain_run(kind: str = "hessian", at_once: Any = "auto") -> Run:
    """The run of all that is drawn, by the plainest options; made once."""
    return fit(monitor(curvature=kind, batches_at_once=at_once))
