"""Set-ups in which a value was once wrong, or a run not what it is without the monitor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_curvature import CurvatureWarning
from lightning_curvature.batch_sharpness import pairs
from lightning_curvature.batch_sharpness.options import OF_UPDATES
from lightning_curvature.operators import mini_batch
from tests.helpers.batch_sharpness import Dense, fit, learner, loader, monitor, samples, sgd
from tests.helpers.runs import Classifier, make_trainer, mlp
from tests.oracles.hessian_spectrum import Curvature

# Sums over the same samples in another order.
SAME = 1e-10


class Counting(Dataset[Any]):
    """Its samples depend on how many were read; so do those of a transform inside."""

    class Transform:
        def __init__(self) -> None:
            self.calls, self.history = 0, [0]

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.history.append(self.calls)
            return x * (1.0 + 0.01 * self.calls + 0.001 * len(self.history))

    def __init__(self) -> None:
        self.calls, self.seen, self.transform = 0, dict[int, int](), self.Transform()

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        self.seen[index] = self.seen.get(index, 0) + 1
        x, y = samples()
        return self.transform(x[index]) * (1.0 + 0.01 * self.calls + 0.1 * self.seen[index]), y[index]


class Collate:
    """Its batches depend on how many it has made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: list[Any]) -> Any:
        self.calls += 1
        x, y = zip(*rows, strict=True)
        return torch.stack(x) * (1.0 + 0.01 * self.calls), torch.stack(y)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("counts", ["dataset", "collate_fn"])
def test_data_that_counts_its_calls(counts: str, workers: int) -> None:
    """It is read while nobody notices: training sees what it would have seen."""

    def run(*callbacks: Any) -> tuple[list[Tensor], Any]:
        data: Any = Counting() if counts == "dataset" else TensorDataset(*samples())
        collate: Any = Collate() if counts == "collate_fn" else None
        module = learner()
        # Not persistent: the workers of the second epoch begin with what this process holds then.
        batches = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate)
        make_trainer(*callbacks, max_epochs=2).fit(module, batches)
        return [p.detach().clone() for p in module.parameters()], collate or data

    # How data is read depends neither on the number of draws nor on what is made of them.
    follow = monitor("batch_sharpness", "gni", every_n_train_steps=1, num_batches=4)
    (plain, alone), (watched, seen) = run(), run(follow)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert alone.calls == seen.calls
    if counts == "dataset":
        assert (alone.seen, vars(alone.transform)) == (seen.seen, vars(seen.transform))


class Listed(Dataset[Any]):
    """Whole batches of given sizes."""

    def __init__(self, *sizes: int) -> None:
        self.batches = list(zip(*(part.split(list(sizes)) for part in samples()), strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def test_batches_of_a_step_count_alike() -> None:
    """Two batches that are no samples' mean together: there is one step, and it is both quantities."""
    run = fit(
        monitor("batch_sharpness", "step_sharpness"),
        data=DataLoader(Listed(2, 12), batch_size=None),
        accumulate_grad_batches=2,
    )
    (row,) = run.rows.values()
    assert row["batch_sharpness"] == pytest.approx(row["step_sharpness"], rel=SAME)
    assert row["batch_sharpness_stderr"] <= 1e-7 * row["batch_sharpness"]


@pytest.mark.parametrize("full", ["pairs", "exact"])
@pytest.mark.thinned(2)
def test_all_samples_are_those_of_the_batches_that_count_alike(full: str) -> None:
    """For plain SGD GNI is λ_gen, also where batches have 1 and 10 samples."""
    run = fit(monitor("gni", "lambda_gen", full_hessian=full), data=DataLoader(Listed(1, 1, 1, 1, 10), batch_size=None))
    for step, row in run.rows.items():
        curvature = Curvature(run.module.network, run.module.loss, run.moment(step))
        dense = Dense(curvature)
        of = [dense.of(batch) for batch in ([0], [1], [2], [3], range(4, 14))]
        g = torch.stack([gradient for gradient, _ in of]).mean(dim=0)
        matrix = torch.stack([m for _, m in of]).mean(dim=0)
        drawn = {
            name: [of[_drawn(run, step, number)] for number in range(int(row[f"{name}_batches"]))]
            for name in ("gni", "lambda_gen")
        }
        above = {}
        for name, found in drawn.items():
            forms = []
            for (a, h), (b, f) in zip(found[::2], found[1::2], strict=True):
                one, other = (matrix, matrix) if full == "exact" else (f, h)
                forms.append((a @ one @ a + b @ other @ b) / 2)
            above[name] = torch.stack(forms).mean()
        assert row["gni"] == pytest.approx(float(above["gni"] / (g @ g)), rel=SAME)
        # Its denominator is gᵀE[g_B], of the draws instead of all.
        below = torch.stack([g @ gradient for gradient, _ in drawn["lambda_gen"]]).mean()
        assert row["lambda_gen"] == pytest.approx(float(above["lambda_gen"] / below), rel=1e-8)


def _drawn(run: Any, step: int, number: int) -> int:
    """Which of the listed batches a mini-batch is."""
    (population,) = run.beside.populations
    (part,) = population.draw(step, number)
    first = part.batch[0][0]
    return next(i for i, (x, _) in enumerate(Listed(1, 1, 1, 1, 10).batches) if torch.equal(x[0], first))


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        x, y = samples()
        yield from zip(x[: self.count], y[: self.count], strict=True)


@pytest.mark.parametrize("full", ["pairs", "exact"])
def test_an_incomplete_batch_of_a_stream_is_in_nothing(full: str) -> None:
    """Of 8 + 4 samples the 8 are drawn: they are all samples, too, and every ratio is that of one batch."""
    names = ("batch_sharpness", "ias", "gni", "lambda_gen")
    run = fit(monitor(*names, full_hessian=full), data=DataLoader(Stream(12), batch_size=8))
    for step, row in run.rows.items():
        curvature = Curvature(run.module.network, run.module.loss, run.moment(step))
        g, matrix = Dense(curvature).of(range(8))
        for name in names:
            assert row[name] == pytest.approx(float(g @ matrix @ g / (g @ g)), rel=1e-8)


def test_a_step_that_grows_beyond_the_samples_ends_no_run() -> None:
    """It could be measured before: NaN and a warning, even of what is an error at the start."""
    follow = monitor("batch_sharpness", probe_samples=8, every_n_train_steps=1, on_error="warn")
    grows = GradientAccumulationScheduler({0: 1, 1: 4})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(follow, callbacks_before=[grows], max_epochs=3)
    assert run.trainer.current_epoch == 3
    values = [row["batch_sharpness"] for row in run.rows.values()]
    assert [math.isnan(value) for value in values] == [False] * 4 + [True] * 2
    said = {str(w.message) for w in caught if w.category is CurvatureWarning}
    assert said == {
        "BatchSharpnessMonitor logs NaN: RuntimeError: batch_size must be at most the 8 samples that are drawn from "
        "without replacement, got 16 (an optimizer step): lower it, or raise probe_samples."
    }
    with pytest.raises(MisconfigurationException, match="got 16"):
        fit(monitor("batch_sharpness", probe_samples=8), accumulate_grad_batches=4)


def test_products_with_all_samples_know_no_weights() -> None:
    """Pairs have the Hessian of the samples as they are drawn."""
    data = TensorDataset(*samples())

    def weighted() -> DataLoader[Any]:
        return DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0, 10.0] * 7, 14))

    assert fit(monitor("ias"), data=weighted()).rows
    with pytest.raises(MisconfigurationException, match=r"must not hold 'ias' where samples are drawn by unequal weig"):
        fit(monitor("ias", full_hessian="exact"), data=weighted())


class Reloading(Classifier):
    """Another batch size in every epoch, in a collection of one loader."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 3, 3), sgd)

    def train_dataloader(self) -> Any:
        return {"a": DataLoader(TensorDataset(*samples()), batch_size=2 + 2 * self.trainer.current_epoch)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


def test_a_batch_size_that_changes_in_a_collection() -> None:
    follow, sizes = monitor("batch_sharpness", every_n_train_steps=1), []

    class After(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            sizes.append(follow._data.batch_size)

    trainer = make_trainer(follow, After(), max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Reloading())
    assert sizes == [2] * 7 + [4] * 4


class Manual(Classifier):
    """One step in the first batch, two in the others."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 3, 3), sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer: Any = self.optimizers()
        for _ in range(1 if self.global_step == 0 else 2):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.network(x), y))
            optimizer.step()


def test_steps_between_batches_are_measured_at_the_next_one() -> None:
    """Batches begin at the steps 0, 1, 3, 5, …, 23; of 0, 4, 8, … all but the first lie between."""
    run = fit(monitor("batch_sharpness", every_n_train_steps=4), Manual(), max_epochs=3)
    assert len(run.rows) == 6
    every = fit(monitor("batch_sharpness", every_n_train_steps=1), Manual(), max_epochs=3)
    assert len(every.rows) == 12


def test_one_parameter_has_an_eigenvalue() -> None:
    """It is the second derivative, without a search."""
    module = Classifier(nn.Linear(1, 1, bias=False).double(), sgd, F.mse_loss)
    x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    data = DataLoader(TensorDataset(x, torch.zeros_like(x)), batch_size=3)
    run = fit(monitor("lambda_max_b", "batch_sharpness"), module, data)
    for row in run.rows.values():
        assert row["lambda_max_b"] == pytest.approx(2.0 * 14.0 / 3.0, rel=SAME)
        assert row["lambda_max_b_unconverged"] == 0.0


def failing(call: Callable[[Tensor], bool]) -> Classifier:
    """A loss that fails for some inputs while measured, and counts in training as before."""

    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if torch.is_grad_enabled() and call(batch[0]):
                raise RuntimeError("too few samples")
            return super().training_step(batch, batch_idx)

    return Failing(mlp(4, 3, 3), sgd)


def test_what_needs_no_full_gradient_survives_its_failure() -> None:
    """As BatchNorm fails on a last micro-batch of one sample, that only the whole set has."""
    module = failing(lambda x: len(x) == 2)  # 4, 4, 4, 2
    follow = monitor("batch_sharpness", "ias", "gni", "lambda_gen", every_n_train_steps=1, on_error="warn")
    with pytest.warns(CurvatureWarning, match="too few samples"):
        run = fit(follow, module, limit_train_batches=3)
    for row in run.rows.values():
        assert {name for name, value in row.items() if math.isnan(value)} == {
            f"{name}{end}" for name in ("gni", "lambda_gen") for end in ("", "_stderr", "_batches")
        }


class Wild(torch.optim.SGD):
    """Steps that nobody can follow; none that training takes."""

    wild = False

    def step(self, closure: Any = None) -> Any:
        if Wild.wild:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.inf)
            return None
        return super().step(closure)


def test_a_quantity_that_is_not_finite_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier(mlp(4, 3, 3), lambda m: Wild(m.parameters(), lr=0.3))
    real = pairs.Pairs.update_for

    def update_for(*args: Any) -> Any:
        monkeypatch.setattr(Wild, "wild", True)
        try:
            return real(*args)
        finally:
            monkeypatch.setattr(Wild, "wild", False)

    monkeypatch.setattr(pairs.Pairs, "update_for", update_for)
    with pytest.warns(CurvatureWarning, match="must be finite, got"):
        run = fit(monitor("batch_sharpness", "gni", *OF_UPDATES, on_error="warn"), module)
    for row in run.rows.values():
        lost = {name for name, value in row.items() if math.isnan(value)}
        assert lost == {f"{name}{end}" for name in OF_UPDATES for end in ("", "_stderr", "_batches")}


def test_unequal_rates_are_in_units_of_the_first_group() -> None:
    """λ_gen·η = tr(H E[ΔΔᵀ])/gᵀE[Δ] is the same whatever η is; the one that is logged beside is the first."""

    def groups(m: Any) -> torch.optim.Optimizer:
        layers = [m.network[0], m.network[2]]
        return torch.optim.SGD(
            [{"params": p.parameters(), "lr": lr} for p, lr in zip(layers, (0.05, 0.4), strict=True)]
        )

    run = fit(monitor("lambda_gen", "gni"), Classifier(mlp(4, 3, 3), groups))
    for step, row in run.rows.items():
        assert row["two_over_lr"] == 2.0 / 0.05
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        batches = run.beside.draws(step, int(row["lambda_gen_batches"]))
        full, _ = dense.of(range(14))
        count = sum(p.numel() for p in run.module.network[0].parameters())
        rates = torch.full_like(full, 0.4)
        rates[:count] = 0.05
        above, below = [], []
        for a, b in zip(batches[::2], batches[1::2], strict=True):
            (g, h), (k, f) = dense.of(a), dense.of(b)
            above.append(((rates * g) @ f @ (rates * g) + (rates * k) @ h @ (rates * k)) / 2)
            below.append(full @ (rates * (g + k)) / 2)
        ratio = float(torch.stack(above).mean() / torch.stack(below).mean())
        assert row["lambda_gen"] * 0.05 == pytest.approx(ratio, rel=1e-8)


class Indexed(Classifier):
    """A loss that depends on the number of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + batch_idx) ** 2


def test_step_sharpness_knows_the_numbers_of_the_batches() -> None:
    """A loss four times as large is four times as sharp."""
    follow = monitor("step_sharpness", every_n_train_steps=1)
    run = fit(follow, Indexed(mlp(4, 3, 3), sgd), loader(shuffle=False), max_epochs=1)
    for step, row in run.rows.items():
        dense = Dense(Curvature(run.module.network, run.module.loss, run.moment(step)))
        g, h = dense.of(range(14)[4 * step : 4 * step + 4])
        assert row["step_sharpness"] == pytest.approx(float((1 + step) ** 2 * g @ h @ g / (g @ g)), rel=1e-8)
    assert len(run.rows) == 4


def test_eigenvalues_that_were_not_found_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mini_batch.eigenpairs
    monkeypatch.setattr(mini_batch, "eigenpairs", lambda *args, **kwargs: real(*args, **kwargs, max_matvecs=1))
    run = fit(monitor("lambda_max_b", "batch_sharpness"))
    for row in run.rows.values():
        assert row["lambda_max_b_unconverged"] == row["lambda_max_b_batches"] > 0.0
