"""The Hessian is that of the whole probe set, whatever the module, the loader and the Trainer make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.helpers.runs import Classifier, mlp, rows
from tests.helpers.setups import Tied
from tests.helpers.spectrum import BATCH, SAMPLES, TOLERANCE, monitor, samples, whole
from tests.helpers.spectrum_setups import QUANTITIES, check, fit, loader, same_rows, sgd
from tests.oracles.hessian_spectrum import Curvature, Part, check_eigenvalue


@pytest.mark.parametrize("micro", [None, 1, 7, 30, 100])
@pytest.mark.slow
def test_micro_batches_add_up(micro: int | None) -> None:
    """8+8+8+6, 30 of 1, 7+7+7+7+2 and 30 give one Hessian."""
    module = Classifier(mlp(4, 6, 3), sgd)
    capture, moments, seen = fit(module, loader(), monitor(*QUANTITIES, micro_batch_size=micro))
    check(module, capture, moments)
    sizes = {len(x) for x, _ in seen.measured()[0]}
    assert sizes == {None: {8, 6}, 1: {1}, 7: {7, 2}, 30: {30}, 100: {30}}[micro]


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "max_epochs": 2},
        {"accumulate_grad_batches": 3, "max_epochs": 4},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
@pytest.mark.thinned(4)
def test_trainer_options(options: dict[str, Any]) -> None:
    module = Classifier(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES), **options)
    check(module, capture, moments)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_subset_is_the_same_at_every_step(seed: int) -> None:
    module = Classifier(mlp(4, 6, 3), sgd)
    capture, moments, seen = fit(module, loader(), monitor(*QUANTITIES, probe_samples=12, seed=seed))
    x, y = samples()
    chosen = [[same_rows(part, x) for part, _ in parts] for parts in seen.measured()]
    assert len(chosen) == 2
    assert chosen[0].pop(0) == chosen[0][0]  # the check of the first
    # The network's two passes, of H and of G, go through the same batches: 8 + 4 samples without repetition.
    assert all(one == chosen[0] for one in chosen)
    first, second = chosen[0][:2]
    assert chosen[0] == [first, second] * 2
    assert len(set(first + second)) == 12
    check(module, capture, moments, [Part(x[first + second], y[first + second])])


def test_other_seeds_choose_other_samples() -> None:
    def chosen(seed: int) -> set[int]:
        module = Classifier(mlp(4, 6, 3), sgd)
        _, _, seen = fit(module, loader(), monitor("lambda_max", probe_samples=12, seed=seed))
        return {row for part, _ in seen.measured()[0] for row in same_rows(part, samples()[0])}

    assert chosen(0) != chosen(5)


def frozen() -> nn.Module:
    network = mlp(4, 6, 5, 3)
    network[2].requires_grad_(False)
    return network


class Unused(nn.Module):
    """With a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = mlp(4, 5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


@pytest.mark.parametrize("make", [frozen, Tied, Unused])
def test_parameters_of_all_kinds(make: Callable[[], nn.Module]) -> None:
    network = seeded(make)
    module = Classifier(network, sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES))
    check(module, capture, moments)


def test_hessian_of_what_the_optimizer_moves() -> None:
    """Parameters that the optimizer does not hold are constants, though they require gradients."""
    module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.network[2].parameters(), lr=0.3))
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES))
    check(module, capture, moments, names=["2.weight", "2.bias"])


class Direct(Classifier):
    """Never calls its own forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])


@pytest.mark.parametrize("outputs", ["network", "network.2"])
def test_outputs_by_name(outputs: str) -> None:
    module = Direct(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, outputs=outputs))
    check(module, capture, moments)


class Regularized(Classifier):
    """A step whose loss holds more than the objective is about."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.network.parameters())


def objective(module: Any, batch: Any) -> dict[str, Tensor]:
    z = module.network(batch[0])
    return {"loss": F.cross_entropy(z, batch[1]), "outputs": z}


def test_objective_takes_the_place_of_the_step() -> None:
    module = Regularized(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, objective=objective))
    check(module, capture, moments)


def test_what_the_step_adds_to_the_loss_counts() -> None:
    """Σθ² in the step adds 2 to every eigenvalue of H, and nothing to the Gauss–Newton matrix of the outputs."""
    module = Regularized(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(module, loader(), monitor("lambda_max", "lambda_min"))
    for step, row in rows(capture).items():
        hessian = Curvature(module.network, module.loss, moments[step]).hessian(whole())
        hessian = hessian + 2.0 * torch.eye(len(hessian)).double()
        check_eigenvalue(row, "lambda_max", hessian, 0, TOLERANCE)
        check_eigenvalue(row, "lambda_min", hessian, -1, TOLERANCE)


class Manual(Classifier):
    """Manual optimization, a step each second batch."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(self(batch[0]), batch[1]))
        if batch_idx % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization() -> None:
    module = Manual()
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, every_n_train_steps=1), max_epochs=2)
    # Lightning counts batches along the x-axis here.
    check(module, capture, dict(zip((0, 2, 4, 6), moments, strict=True)), least=4)


class TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.network[0].parameters(), lr=0.3),
            torch.optim.SGD(self.network[2].parameters(), lr=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("index", [0, 1])
def test_two_optimizers(index: int) -> None:
    """The Hessian of the followed optimizer's parameters, its own threshold, at the start of the batch."""
    module = TwoOptimizers()
    follow = monitor(*QUANTITIES, objective=objective, optimizer_index=index, every_n_train_steps=4)
    capture, moments, _ = fit(module, loader(), follow, index=index, max_epochs=2)
    names = [["0.weight", "0.bias"], ["2.weight", "2.bias"]][index]
    check(module, capture, moments, names=names, least=4)
    assert {row["lambda_max_threshold"] for row in rows(capture).values()} == {2.0 / (0.3, 0.1)[index]}


class DictBatch(Classifier):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        outputs = self(batch["image"]["pixels"])
        return {"loss": self.loss(outputs, batch["label"]), "outputs": outputs}


class DictData(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = samples()
        return {"image": {"pixels": x[index]}, "name": f"sample {index}", "label": y[index]}


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        x, y = samples()
        return zip(x, y, strict=True)


class WholeBatches(Dataset[Any]):
    """Hands out batches of unequal size, of which the last has one sample."""

    cuts = (0, 11, 22, 29, SAMPLES)

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, index: int) -> Any:
        x, y = samples()
        return x[self.cuts[index] : self.cuts[index + 1]], y[self.cuts[index] : self.cuts[index + 1]]


LOADERS: dict[str, tuple[type[Classifier], Callable[[], Any]]] = {
    "dict batches": (DictBatch, lambda: DataLoader(DictData(), batch_size=BATCH, shuffle=True)),
    "iterable": (Classifier, lambda: DataLoader(Streamed(), batch_size=BATCH)),
    "whole batches": (Classifier, lambda: DataLoader(WholeBatches(), batch_size=None)),
    "last batch dropped": (Classifier, lambda: loader(drop_last=True)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name: str) -> None:
    kind, make = LOADERS[name]
    module = kind(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(module, make(), monitor(*QUANTITIES))
    x, y = samples()
    # What training never sees in any epoch is no part of the probe set, if it would make a smaller batch.
    seen = len(x) // BATCH * BATCH if name == "last batch dropped" else len(x)
    check(module, capture, moments, [Part(x[:seen], y[:seen])])


def test_iterable_up_to_the_batch_that_completes_the_samples() -> None:
    module = Classifier(mlp(4, 6, 3), sgd)
    capture, moments, _ = fit(
        module, DataLoader(Streamed(), batch_size=BATCH), monitor(*QUANTITIES, probe_samples=10), max_epochs=1
    )
    x, y = samples()
    check(module, capture, moments, [Part(x[:16], y[:16])])


def test_probe_dataloader() -> None:
    """Measured on other data than training sees; a list of batches will do."""
    x, y = samples()
    module = Classifier(mlp(4, 6, 3), sgd)
    held_out = [(x[16:25], y[16:25]), (x[25:], y[25:])]
    for given in (held_out, loader(x[16:], y[16:])):
        capture, moments, _ = fit(
            module, loader(x[:16], y[:16]), monitor(*QUANTITIES, probe_dataloader=given, every_n_train_steps=1)
        )
        check(module, capture, moments, [Part(x[16:], y[16:])])
