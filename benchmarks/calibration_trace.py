"""Compares the trace of the Hessian with its true error, over spectra and networks.

python benchmarks/calibration_trace.py --write docs/calibration_trace.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median

import torch
import torch.nn.functional as F
from calibration import STEPS, tabulate
from calibration_spectrum import SAMPLES, Found, training_of
from precision import ninth_decile
from torch import Tensor

from lightning_curvature.linalg import TraceEstimate, VectorSpace, eigenpairs, trace
from lightning_curvature.operators import CurvatureOperator, HessianOperator

# After so many steps of training, with so many seeds.
POINTS, SEEDS, TARGET = (20, STEPS), 4, 0.05
# The true trace: to a fifth of the target, or from so many products.
TRUE = {"relative_error": TARGET / 5.0, "max_matvecs": 400, "sketch": 40}
# Random vectors have no direction: of an operator only its eigenvalues matter, so many, with so many seeds.
SIZE, SPECTRUM_SEEDS = 300, 200
WAYS = ("alone", "known", "PyHessian")


def spectra() -> dict[str, Tensor]:
    """Flat ones, few that dominate, power laws, and both signs."""
    even = torch.linspace(0.0, 1.0, SIZE, dtype=torch.float64)
    normal = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = torch.arange(1, SIZE + 1, dtype=torch.float64)
    signs = 1.0 - 2.0 * (rank % 3 == 0).double()

    def outliers(*values: float, bulk: Tensor) -> Tensor:
        return torch.cat([torch.tensor(values, dtype=torch.float64), bulk[len(values) :]])

    return {
        "equal": torch.ones_like(even),
        "even, 0 to 1": even,
        "squares of normal numbers": normal.square(),
        "one that is nearly all": outliers(50.0, bulk=0.02 * normal.abs()),
        "one of 30 over even, 0 to 1": outliers(30.0, bulk=even),
        "three of 30 over even, 0 to 1": outliers(30.0, 30.0, 30.0, bulk=even),
        "ten of 6 to 12 over even, 0 to 0.2": outliers(*(6.0 + 6.0 * i / 9.0 for i in range(10)), bulk=0.2 * even),
        "1/i": 1.0 / rank,
        "1/√i": rank.rsqrt(),
        "1/i²": rank**-2.0,
        "1/i, each third negative": signs / rank,
        "normal numbers around 0.5": normal + 0.5,
        "−10, −8, 9, 12, 20 over normal numbers": outliers(-10.0, -8.0, 9.0, 12.0, 20.0, bulk=0.1 * normal + 0.05),
    }


def spectrum_rows() -> Iterator[str]:
    """The table over spectra."""
    for title, values in spectra().items():
        space, total = VectorSpace([values]), float(values.sum())

        def estimate(seed: int, values: Tensor = values, space: VectorSpace = space) -> TraceEstimate:
            generator = torch.Generator().manual_seed(seed)
            return trace(lambda vector: values * vector, space, relative_error=TARGET, generator=generator)

        found = [estimate(seed) for seed in range(SPECTRUM_SEEDS)]
        needed = 2.0 * float((values - values.mean()).square().sum()) / (TARGET * total) ** 2
        # Sums of so many numbers are rounded.
        told = [one.standard_error + 1e-12 * abs(total) for one in found]
        within = [
            sum(abs(one.value - total) <= factor * error for one, error in zip(found, told, strict=True)) / len(found)
            for factor in (1.0, 2.0, 3.0)
        ]
        root = (fmean((one.value - total) ** 2 for one in found)) ** 0.5 / abs(total)
        products, deflated = fmean(one.matvecs for one in found), fmean(one.deflated for one in found)
        numbers = [f"{max(needed, 1.0):.1f}", f"{products:.1f}", f"{deflated:.1f}", f"{root:.1%}"]
        yield f"| {title} | {' | '.join([*numbers, *(f'{share:.0%}' for share in within)])} |"


def hutchinson(operator: CurvatureOperator, seed: int) -> tuple[int, float]:
    """Products and value of PyHessian's `trace()`: until a sample moves the mean by less than 1e-3, 100 at most."""
    generator, mean = torch.Generator().manual_seed(seed), 0.0
    for count in range(1, 101):
        vector = operator.space.random(generator, "rademacher")
        before, mean = mean, mean + (operator.space.dot(vector, operator(vector)) - mean) / count
        if abs(mean - before) < 1e-3 * (abs(before) + 1e-6):
            break
    return count, mean


def estimates(title: str) -> Iterator[tuple[str, Found]]:
    """Train a network; estimate at some of its steps."""
    for step, network, probe in training_of(title):
        if step not in POINTS:
            continue
        operator = HessianOperator.of(network, F.cross_entropy, probe)
        pair = eigenpairs(operator, operator.space, largest=1)
        reference = trace(operator, operator.space, generator=torch.Generator().manual_seed(0), **TRUE)
        for seed in range(1, SEEDS + 1):
            for way, known in (("alone", None), ("known", pair)):
                generator = torch.Generator().manual_seed(seed)
                found = trace(operator, operator.space, relative_error=TARGET, deflation=known, generator=generator)
                yield way, compared(reference, found.matvecs, found.value, 2.0 * found.standard_error)
            yield "PyHessian", compared(reference, *hutchinson(operator, seed))
        operator.close()


def compared(reference: TraceEstimate, products: int, value: float, told: float = 0.0) -> Found:
    """Errors in units of the trace; the reference's own, where it is large, is part of what may be told."""
    scale = abs(reference.value)
    return Found(
        products, abs(value - reference.value) / scale, (told**2 + 4.0 * reference.standard_error**2) ** 0.5 / scale
    )


def row(title: str, found: Sequence[tuple[str, Found]]) -> str:
    """One line of the table."""
    columns = []
    for kind in WAYS:
        runs = [run for way, run in found if way == kind]
        products, errors = [run.products for run in runs], [run.error for run in runs]
        columns += [f"{fmean(products):.1f}", f"{median(errors):.1%}", f"{ninth_decile(errors):.1%}"]
        if kind != "PyHessian":
            columns.append(f"{sum(run.error <= run.told for run in runs) / len(runs):.0%}")
    return f"| {title} | {' | '.join(columns)} |"


def main() -> None:
    """Print the table; write it where asked."""
    names = ["products", "error", "9th decile"]
    header = [*names, "within", *names, "within", *names]
    rows = list(spectrum_rows())
    print("\n".join(rows), flush=True)
    lines = [
        "# Trace: products, and the error that is told",
        "",
        f"Made by `benchmarks/calibration_trace.py`: `linalg.trace` to {TARGET:.0%}, with at most 100 products.",
        "",
        f"Operators of {SIZE} eigenvalues, {SPECTRUM_SEEDS} seeds each. *Samples*: Hutchinson's, if one knew how many",
        "it takes (their variance over the square of the allowed error). *Products* and *deflated*: in the mean, those",
        "of the estimate, and the dimension on which it is exact. *Error*: root of its mean square, relative to the",
        "trace. *Within*: share of the values that are within one, two and three of their standard errors.",
        "",
        "| eigenvalues | samples | products | deflated | error | within 1 | within 2 | within 3 |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Hessians of networks on scikit-learn's digits ({SAMPLES} samples, cross-entropy, float32; torch",
        f"{torch.__version__}, CPU) after {POINTS[0]} and {POINTS[1]} steps of training, from {SEEDS} seeds each.",
        "Three groups of columns: the estimate; the same where the largest eigenvector is known, as the monitor knows",
        "it; Hutchinson's samples at the defaults of PyHessian, which end where one moves the mean by less than 0.1 %,",
        "and tell no error. *Products* in the mean; *error* relative to the trace, median and ninth decile; *within* 2",
        "standard errors.",
        "",
        f"| network | {' | '.join(header)} |",
        "|---" * (1 + len(header)) + "|",
    ]
    tabulate(__doc__, lines, estimates, row)


if __name__ == "__main__":
    main()
