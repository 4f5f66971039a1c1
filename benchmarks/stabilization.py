"""Measures the cost of stabilization beside the source's plain procedure, on one network in one run.

python benchmarks/stabilization.py --fast                  # half a minute: does it run?
python benchmarks/stabilization.py                         # a GPT of 1.8 million parameters, D = 45, k = 8
python benchmarks/stabilization.py --device cuda --large   # about 107 million, as the source's
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from directional import hardware
from spectrum import Page
from spectrum_nets import subject
from stabilization_recipe import ITERATIONS, TOLERANCE, Recipe, flat_product, recipe
from timing import Clock, LastRow, fit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import Batch, Workload, _example

from lightning_curvature import SampleGrowth, StabilizationMonitor

# Curvature-aligned probing (2026), table 3: seconds on its GPU for D = 45, k = 8, S = 64 and 107 million parameters.
SOURCE = {"subspace": 17.53, "coefficients": 1.777, "direct": 2.197, "quadratic": 3.68e-3, "gaussian_moment": 1.22e-4}
STAGES = tuple(SOURCE)
FAST: dict[str, Any] = {"dimension": 6, "train_steps": 4, "repeats": 1, "draws": 8, "workload": "mlp"}
GOALS = {"subspace": 3.0, "coefficients": 10.0, "whole": 3.0}

LEGEND = f"""\
*Plain* is the source's procedure: power iteration with deflation, at most {ITERATIONS} iterations or until an
eigenvalue changes by {TOLERANCE:g}; D products with the Hessian of each mean; S = {{draws}} evaluations of both means.
*Ours* is `StabilizationMonitor.evaluate` with one candidate and all three estimators, with the times of its own stages.
Both run on the same network, in turns; median of {{repeats}}. *Residual* is the largest ‖Hu − (uᵀHu)u‖ over the
directions, relative to the largest |uᵀHu|. Plain power iteration finds the largest magnitudes, ours the largest
eigenvalues; the criteria differ by the eigenvalues in between.
"""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["mlp", "gpt"], default="gpt")
    parser.add_argument("--large", action="store_true", help="about 107 M parameters in place of it: for a GPU")
    parser.add_argument("--k", type=int, default=8, help="samples before the new one")
    parser.add_argument("--dimension", type=int, default=45, help="D")
    parser.add_argument("--sigma", type=float, default=1e-3)
    parser.add_argument("--draws", type=int, default=64, help="S")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="relative residual of our eigenvectors")
    parser.add_argument("--train-steps", type=int, default=100, help="steps before the measurement")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (all cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--fast", action="store_true", help="half a minute's run on a small MLP")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if arguments.fast:
        parser.set_defaults(**FAST)
        arguments = parser.parse_args()
    return arguments


def _workload(arguments: argparse.Namespace) -> tuple[Workload, TensorDataset]:
    if not arguments.large:
        one = subject(arguments.workload, None, 16 * arguments.k, 8)
        batches = one.workload.batches
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return one.workload, TensorDataset(x, y)
    example = _example("char_transformer")
    g, vocabulary, context = torch.Generator().manual_seed(1), 32_768, 512
    tokens = torch.randint(vocabulary, (16 * arguments.k, context + 1), generator=g)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    workload = Workload(
        "GPT, 107 M parameters",
        lambda: example.CharTransformer(
            vocabulary_size=vocabulary, context=context, width=896, heads=14, layers=8, learning_rate=3e-4
        ),
        list(zip(x.split(8), y.split(8), strict=True)),
        precision="32-true",
    )
    return workload, TensorDataset(x, y)


def ours(
    arguments: argparse.Namespace, module: pl.LightningModule, data: TensorDataset, accelerator: str
) -> SampleGrowth:
    """Measure with the monitor."""
    monitor = StabilizationMonitor(
        sample_sizes=(arguments.k,),
        candidates=1,
        subspace_dim=arguments.dimension,
        sigma=arguments.sigma,
        quantities=("delta_2_subspace",),
        estimators=("direct", "quadratic", "gaussian_moment"),
        draws=arguments.draws,
        tolerance=arguments.tolerance,
    )
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, logger=LastRow(), enable_checkpointing=False, enable_progress_bar=False
    )
    return monitor.evaluate(module, DataLoader(data, batch_size=arguments.k), trainer=trainer).result


def first_samples(total: int, count: int) -> list[int]:
    """Return the samples that the monitor takes, in its order (docs/stabilization.md) for seed 0."""
    shuffle, order = random.Random(0), list(range(total))
    for place in range(count):
        other = shuffle.randrange(place, total)
        order[place], order[other] = order[other], order[place]
    return order[:count]


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    clock = Clock(device, time.process_time if arguments.clock == "processor" else time.perf_counter)
    workload, data = _workload(arguments)
    module = fit(workload, device, arguments.train_steps, []).lightning_module.to(device).eval()
    size = sum(p.numel() for p in module.parameters())
    order = first_samples(len(data), arguments.k + 1)
    x, y = (t[order].to(device) for t in data.tensors)
    first, both = (x[:-1], y[:-1]), (x, y)

    plain: list[Recipe] = []
    own: list[SampleGrowth] = []
    for _ in range(arguments.repeats):
        own.append(ours(arguments, module, data, "gpu" if device.type == "cuda" else "cpu"))
        plain.append(recipe(module, first, both, arguments.dimension, arguments.sigma, arguments.draws, clock))
    page = Page(arguments.out)
    report(arguments, page, f"{workload.title.split(',')[0]}, {size:,} parameters", device, plain, own)
    page.add(
        f"- residual: {residual(module, first, plain[0].basis):.2g} plain, {own[0].residuals[arguments.k]:.2g} ours."
    )


def report(
    arguments: argparse.Namespace,
    page: Page,
    name: str,
    device: torch.device,
    plain: list[Recipe],
    own: list[SampleGrowth],
) -> None:
    """Print the table and the goals."""
    page.add(f"## Stabilization: {name}, D = {arguments.dimension}, k = {arguments.k}", "", hardware(device), "")
    page.add(*LEGEND.format(draws=arguments.draws, repeats=arguments.repeats).splitlines(), "")
    page.add(
        "| stage | plain, s | ours, s | plain / ours | source, s | plain: value | ours: value |",
        "|---|---|---|---|---|---|---|",
    )
    whole = {"plain": 0.0, "ours": 0.0}
    ratios = {}
    for stage in STAGES:
        theirs = median(one.seconds[stage] for one in plain)
        mine = median(one.seconds[stage] for one in own)
        whole["plain"] += theirs
        whole["ours"] += mine
        ratios[stage] = theirs / mine
        values = [row.value for row in own[0].rows if row.estimator == stage]
        shown = [f"{plain[0].values[stage]:.4e}", f"{values[0]:.4e}"] if values else ["–", "–"]
        page.add(
            f"| {stage} | {theirs:.4g} | {mine:.4g} | {ratios[stage]:.3g} | {SOURCE[stage]:g} | {' | '.join(shown)} |"
        )
    ratios["whole"] = whole["plain"] / whole["ours"]
    source = sum(SOURCE.values())
    page.add(f"| whole | {whole['plain']:.4g} | {whole['ours']:.4g} | {ratios['whole']:.3g} | {source:.4g} | | |", "")
    faster = own[0].seconds["direct"] / own[0].seconds["gaussian_moment"]
    page.add(
        f"Products for the subspace: {plain[0].products['subspace']} plain, {own[0].products} ours; for the "
        f"coefficients {2 * arguments.dimension} with the means plain, {arguments.dimension} with one sample ours. "
        f"The closed form is {faster:,.0f} times as fast as direct Monte Carlo (goal 10,000)."
    )
    for goal, factor in GOALS.items():
        page.add(f"- {goal}: {ratios[goal]:.2f} times as fast (goal {factor:g}).")


def residual(module: Any, first: Batch, basis: Tensor) -> float:
    """Largest ‖Hu − (uᵀHu)u‖ over the rows, relative to the largest |uᵀHu|."""
    product = flat_product(module, first, [p for p in module.parameters() if p.requires_grad])
    lengths, values = [], []
    for u in basis:
        own = product(u)
        values.append(abs(float(u @ own)))
        lengths.append(float((own - (u @ own) * u).norm()))
    return max(lengths) / max(values)


if __name__ == "__main__":
    main()
