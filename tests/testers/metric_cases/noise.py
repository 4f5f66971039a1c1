"""Metrics of the gradient noise, by dense derivatives of single samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.functional import noise as formulas
from lightning_curvature.metrics import NoiseCovariance, NoiseCurvatureRelation
from lightning_curvature.noise.options import NoiseOptions
from tests.helpers.noise import coupling_by_chance
from tests.oracles.noise import Samples, samples_of
from tests.testers.metric_case import MetricCase, Mistake
from tests.testers.metric_cases.directional import NO_MODEL

COUNT = 60
SIZES = (16, 9, 12, 6, 10, 7)
BATCH_SIZE = 4
# Sums over samples in another order.
REL = 1e-12
# Eigenvectors of a matrix whose entries are right to 1e-15: H_ii down to 1e-4 of the largest one then have ten digits.
RELATION = 1e-10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(COUNT, 5, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (COUNT,), generator=generator),
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data()
    return list(zip(inputs.split(SIZES), targets.split(SIZES), strict=True))


@functools.cache
def derivatives(x: Tensor, y: Tensor) -> Samples:
    return samples_of(network(), nn.functional.cross_entropy, "0.weight", x, y)


def gradients() -> list[tuple[Tensor]]:
    """Rows of three numbers, whose mean is not zero."""
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 3, generator=g, dtype=torch.float64) + 0.5,) for size in SIZES]


def covariance(updates: Sequence[Any]) -> Tensor:
    rows = torch.cat([gradient for (gradient,) in updates])
    return Samples(rows, rows).covariance(BATCH_SIZE)


def relation(updates: Sequence[Any]) -> dict[str, float]:
    """Every number from the dense C and H."""
    parts = [derivatives(*update) for update in updates]
    samples = Samples(torch.cat([p.gradients for p in parts]), torch.cat([p.hessians for p in parts]))
    c, h = samples.covariance(), samples.hessian()
    curvatures, vectors = (rows[: formulas.default_top(len(h))] for rows in samples.basis())
    within = vectors @ c @ vectors.T
    law = formulas.power_law(curvatures, within.diagonal())
    duality = formulas.power_law(curvatures, (vectors @ samples.second_moment() @ vectors.T).diagonal())
    coupling = formulas.mean_coupling(formulas.coupling_matrix(within))
    product = c @ h - h @ c
    return {
        "noise_gamma": law.exponent,
        "noise_gamma_stderr": law.standard_error,
        "noise_gamma_awd": duality.exponent,
        "noise_gamma_awd_stderr": duality.standard_error,
        "noise_commutativity": float(product.norm() / c.norm() / h.norm()),
        "noise_commutativity_relative": float(product.norm() / (c @ h).norm()),
        "noise_commutativity_random": formulas.random_commutativity_error(c, h, relative=True),
        "noise_alignment": float(within.diagonal().square().sum() / within.square().sum()),
        "noise_spearman": formulas.spearman_correlation(curvatures, within.diagonal()),
        "noise_coupling": coupling,
        "noise_coupling_random": coupling_by_chance(
            c, len(vectors), len(within), NoiseOptions.seed, NoiseOptions.haar_draws
        ),
        "noise_coupling_z": formulas.coupling_test(coupling, formulas.effective_spikes(c), len(within)).z,
    }


def made(model: Any = None, loss: Any = nn.functional.cross_entropy, **options: Any) -> NoiseCurvatureRelation:
    return NoiseCurvatureRelation(model or network(), loss, **({"parameter": "0.weight"} | options))


CASES = [
    MetricCase(
        name="covariance",
        kind=NoiseCovariance,
        make=lambda: NoiseCovariance(3, batch_size=BATCH_SIZE),
        updates=gradients(),
        reference=covariance,
        rel=REL,
        failing=[(torch.zeros(2, 4),), (torch.zeros(3),)],
        mistakes=[
            Mistake(
                lambda: NoiseCovariance(3).update(torch.zeros(2, 4)),
                r"gradients must be \(n, 3\), got \(2, 4\): give one flat row a sample",
            ),
            Mistake(lambda: NoiseCovariance(0), "size must be a whole number of at least 1, got 0: "),
            Mistake(lambda: NoiseCovariance(2, 0), "batch_size must be a whole number of at least 1, got 0: "),
        ],
        absent=NO_MODEL
        | {
            "more_numbers_on_ranks": "compute is all that it gives",
            "update_that_stops_halfway_adds_nothing": "update has one argument, which it checks",
            "plot_of_several_values": "a matrix is drawn as an image, one at a time",
        },
    ),
    MetricCase(
        name="relation",
        kind=NoiseCurvatureRelation,
        make=made,
        updates=batches(),
        reference=relation,
        rel=RELATION,
        abs=RELATION,
        network=network,
        mistakes=[
            Mistake(
                lambda: made(parameter="1.weight"),
                r"parameter must be the weight of a torch.nn.Linear, got '1.weight': choose one of \['0.weight'",
            ),
            Mistake(
                lambda: made(quantities=("noise_awd_chain",)),
                "quantities must not hold 'noise_awd_chain' here, got it: NoiseCovarianceMonitor has it",
            ),
            Mistake(lambda: made().compute(), "samples must be added before compute, got none: call update first"),
            Mistake(lambda: made(batch_size=0), "batch_size must be a whole number of at least 1, got 0: 1 is a"),
        ],
        absent={
            "more_numbers_on_ranks": "compute is all that it gives",
            "inputs_keep_no_graph": "inputs of a model are data",
            "forward_gives_no_graph": "inputs of a model are data",
            "bootstrap": "torchmetrics resamples tensors alone, not a dict of values",
            "composition": "a dict of values has no arithmetic",
            "update_that_stops_halfway_adds_nothing": "sums are added after everything that can fail",
        },
    ),
]
