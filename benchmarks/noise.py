"""Measures the cost of the noise covariance beside the source's plain procedure and a peer's products, in one run.

python benchmarks/noise.py --fast                  # half a minute: does it run?
python benchmarks/noise.py                         # the source's MLP: D = 2500, 200 samples' spectra, 20,000 samples
python benchmarks/noise.py --device cuda --large   # 60,000 samples
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from directional import hardware
from spectrum import Page
from timing import Clock, LastRow
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.functional.noise import curvature_basis, linear_sample_spectra
from lightning_curvature.metrics import NoiseCurvatureRelation
from lightning_curvature.operators import linear_statistics

PARAMETER = "network.2.weight"
FAST: dict[str, Any] = {
    "width": 10,
    "samples": 2000,
    "spectra": 20,
    "plain_samples": 4,
    "peer_products": 4,
    "steps": 50,
}
# Of ours, of which the median is shown.
REPEATS = 5
SPECTRA_GOAL, WHOLE_GOAL, GOAL_SAMPLES = 1000.0, 60.0, 20_000

LEGEND = """\
*Plain* is the source's procedure: for each sample the D × D Hessian of its loss by D products, and its
eigendecomposition; timed on {plain} samples and scaled. *Ours* differentiates the losses of all samples by the output
of the layer, and decomposes out × out matrices. Both in {dtype}, with the products (u_m · v_i)² for {top} directions.
"""


class Classifier(pl.LightningModule):
    """The source's MLP, ReLU without bias."""

    def __init__(self, inputs: int, width: int, classes: int = 10) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Linear(width, classes, bias=False))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Spectra(NamedTuple):
    """Eigenvalues of some samples, and how long they took, with what the eigendecompositions took of it."""

    seconds: float
    values: Tensor
    solving: float


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=50, help="units of the hidden layers; D is its square")
    parser.add_argument("--samples", type=int, default=GOAL_SAMPLES)
    parser.add_argument("--spectra", type=int, default=200, help="samples whose spectra are compared")
    parser.add_argument("--plain-samples", type=int, default=3, help="of these, those done the plain way")
    parser.add_argument("--peer-products", type=int, default=10, help="products of the peer; D of them make H")
    parser.add_argument("--steps", type=int, default=400, help="training steps before")
    parser.add_argument("--large", action="store_true", help="60,000 samples")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (all cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--fast", action="store_true", help="half a minute's run on narrow layers")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    if arguments.fast:
        parser.set_defaults(**FAST)
        arguments = parser.parse_args()
    if arguments.large:
        arguments.samples = 60_000
    return arguments


def planted(samples: int, inputs: int = 784, classes: int = 10) -> TensorDataset:
    """Gaussian clouds about class means, as large as MNIST's images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % classes
    means = torch.randn(classes, inputs, generator=generator)
    return TensorDataset(0.3 * means[labels] + torch.randn(samples, inputs, generator=generator), labels)


def plain_spectra(model: Classifier, data: tuple[Tensor, Tensor], vectors: Tensor, clock: Clock) -> Spectra:
    """Dense Hessian and eigendecomposition of one sample after the other."""
    layer = model.network[2]
    assert isinstance(layer, nn.Linear)
    found, solving, start = [], 0.0, clock.now()
    for x, y in zip(*data, strict=True):
        loss = nn.functional.cross_entropy(model.network(x[None]), y[None])
        (gradient,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        rows = [torch.autograd.grad(g, layer.weight, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        hessian, before = torch.stack(rows), clock.now()
        values, own = torch.linalg.eigh(hessian)
        solving += clock.now() - before
        (own.mT @ vectors.mT.to(own)).square_()
        found.append(values.flip(0))
    return Spectra(clock.now() - start, torch.stack(found), solving)


def own_spectra(model: Classifier, data: tuple[Tensor, Tensor], vectors: Tensor, clock: Clock) -> Spectra:
    """All samples at once, by the factors of the layer."""
    layer = model.network[2]
    assert isinstance(layer, nn.Linear)
    start = clock.now()
    found = linear_statistics(layer, lambda: nn.functional.cross_entropy(model.network(data[0]), data[1]), len(data[0]))
    spectra = linear_sample_spectra(found.activations, found.curvatures, vectors)
    seconds = clock.now() - start
    before = clock.now()
    torch.linalg.eigh(found.curvatures)
    return Spectra(seconds, spectra.values, clock.now() - before)


def compare_spectra(
    arguments: argparse.Namespace, model: Classifier, data: TensorDataset, page: Page, clock: Clock
) -> None:
    """Spectra of single samples."""
    model = model.double()
    chosen = tuple(t[: arguments.spectra].to(clock.device) for t in data.tensors)
    chosen = (chosen[0].double(), chosen[1])
    size = arguments.width**2
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64).to(clock.device)
    vectors = curvature_basis(basis + basis.mT).vectors
    own_spectra(model, chosen, vectors, clock)  # warm
    own = sorted((own_spectra(model, chosen, vectors, clock) for _ in range(REPEATS)), key=lambda one: one.seconds)[
        REPEATS // 2
    ]
    count = min(arguments.plain_samples, arguments.spectra)
    plain = plain_spectra(model, (chosen[0][:count], chosen[1][:count]), vectors, clock)
    scaled, solving = (seconds * arguments.spectra / count for seconds in (plain.seconds, plain.solving))
    kept = min(arguments.width, plain.values.shape[1])
    # Of the D eigenvalues all but out are zero, wherever they stand.
    largest = plain.values.abs().sort(dim=1, descending=True).values[:, :kept]
    mine = own.values[:count].abs().sort(dim=1, descending=True).values
    error = float(((largest - mine).norm(dim=1) / largest.norm(dim=1)).max())
    page.add(
        f"## Spectra of single samples: D = {size:,}, {arguments.spectra} samples", "", hardware(clock.device), "",
        *LEGEND.format(plain=count, dtype="float64", top=len(vectors)).splitlines(), "",
        "| | seconds | a sample, ms |", "|---|---|---|",
        f"| plain | {scaled:,.1f} | {1e3 * plain.seconds / count:,.1f} |",
        f"| … eigendecompositions alone | {solving:,.1f} | {1e3 * plain.solving / count:,.1f} |",
        f"| ours | {own.seconds:.4f} | {1e3 * own.seconds / arguments.spectra:.3f} |",
        f"| … eigendecompositions alone | {own.solving:.4f} | {1e3 * own.solving / arguments.spectra:.3f} |", "",
        f"- {scaled / own.seconds:,.0f} times as fast (goal {SPECTRA_GOAL:,.0f} at D = 2500); "
        f"{solving / own.seconds:,.0f} times as fast as the plain eigendecompositions alone.",
        f"- eigenvalues differ by {error:.1e} of their norm.", "",
    )  # fmt: skip
    model.float()


def whole(arguments: argparse.Namespace, model: Classifier, data: TensorDataset, page: Page, clock: Clock) -> None:
    """A whole measurement, its parts, its limit, and a peer."""
    size, batch_size = arguments.width**2, 500
    accelerator = "gpu" if clock.device.type == "cuda" else "cpu"
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, logger=LastRow(), enable_checkpointing=False, enable_progress_bar=False
    )
    monitor = NoiseCovarianceMonitor(parameter=PARAMETER, probe_samples=None)
    loader = DataLoader(data, batch_size=batch_size)
    start = clock.now()
    result = monitor.evaluate(model, loader, trainer=trainer).result
    rows = [("whole measurement (`NoiseCovarianceMonitor.evaluate`)", clock.now() - start)]
    model.to(clock.device)
    batches = [(x.to(clock.device), y.to(clock.device)) for x, y in loader]
    metric = NoiseCurvatureRelation(model.network, nn.functional.cross_entropy, parameter="2.weight")
    metric.to(clock.device)
    start = clock.now()
    for batch in batches:
        metric.update(*batch)
    rows.append(("… sums over the samples (`NoiseCurvatureRelation.update`)", clock.now() - start))
    start = clock.now()
    metric.compute()
    rows.append(("… what follows from them (`compute`)", clock.now() - start))
    hessian = torch.randn(size, size, dtype=torch.float64, device=clock.device)
    start = clock.now()
    torch.linalg.eigh(hessian + hessian.mT)
    rows.append(("limit: one eigendecomposition of that size", clock.now() - start))
    start = clock.now()
    for x, y in batches:
        loss = nn.functional.cross_entropy(model.network(x), y)
        torch.autograd.grad(loss, list(model.network.parameters()))
    rows.append(("limit: one gradient of all samples", clock.now() - start))
    for name, seconds in peers(arguments, model, batches, clock):
        rows.append((name, seconds))
    page.add(
        f"## Whole measurement: D = {size:,}, {len(data):,} samples", "", hardware(clock.device), "",
        "C, H, E[h²], their relation and the baseline by random rotations. The others give H alone.", "",
        "| | seconds |", "|---|---|", *(f"| {name} | {seconds:,.2f} |" for name, seconds in rows), "",
        f"- {rows[0][1]:.1f} s (goal {WHOLE_GOAL:.0f} s for {GOAL_SAMPLES:,} samples at D = 2500, on two cores).", "",
        "```", str(result), "```",
    )  # fmt: skip


def peers(
    arguments: argparse.Namespace, model: Classifier, batches: list[tuple[Tensor, Tensor]], clock: Clock
) -> list[tuple[str, float]]:
    """Seconds for H by D products: of curvlinops where it is there, and by plain double backward; scaled."""
    weight, size, count = model.network[2].weight, arguments.width**2, arguments.peer_products
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, size, generator=generator).to(clock.device)

    def plain() -> None:
        for v in vectors:
            for x, y in batches:
                loss = nn.functional.cross_entropy(model.network(x), y)
                (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
                torch.autograd.grad(gradient, weight, v.view_as(weight))

    found = []
    start = clock.now()
    plain()
    found.append((f"H by plain products, {count} of {size:,} timed", (clock.now() - start) * size / count))
    try:
        import curvlinops
    except ImportError:
        return found
    operator = curvlinops.HessianLinearOperator(
        model.network, nn.CrossEntropyLoss(), [weight], batches, check_deterministic=False
    )
    start = clock.now()
    operator @ vectors.mT
    seconds = (clock.now() - start) * size / count
    name = f"curvlinops {version('curvlinops-for-pytorch')}"
    return [*found, (f"H by products of {name}, {count} of {size:,} timed", seconds)]


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    clock = Clock(device, time.process_time if arguments.clock == "processor" else time.perf_counter)
    pl.seed_everything(0, verbose=False)
    data = planted(arguments.samples)
    model = Classifier(data.tensors[0].shape[1], arguments.width)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=50, shuffle=True))
    page = Page(arguments.out)
    model.to(device)
    compare_spectra(arguments, model, data, page, clock)
    whole(arguments, model, data, page, clock)


if __name__ == "__main__":
    main()
