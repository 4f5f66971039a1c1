"""Eigenvalues against ARPACK: random matrices with clusters, narrow gaps and negative values that dominate."""

import itertools

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import eigenpairs
from tests.oracles.spectra import with_spectrum

arpack = pytest.importorskip("scipy.sparse.linalg")

N = 200


def _values(kind: str, seed: int) -> Tensor:
    """A bulk of normal numbers, and outliers of either sign at either end."""
    g = torch.Generator().manual_seed(seed)
    bulk = torch.randn(N - 12, dtype=torch.float64, generator=g)
    jitter = torch.rand(6, dtype=torch.float64, generator=g)
    top, bottom = {
        # Within 0.1 % of each other, three and three.
        "clusters": (torch.cat([20.0 + 0.01 * jitter[:3], 12.0 + 0.01 * jitter[3:]]), -8.0 - jitter),
        "gaps of 1 %": (20.0 * 0.99 ** torch.arange(6), -10.0 * 0.99 ** torch.arange(6)),
        "negative ones dominate": (5.0 + jitter, -50.0 - 10.0 * jitter),
        "spread": (6.0 + 20.0 * jitter, -6.0 - 3.0 * jitter),
    }[kind]
    return torch.cat([top.double(), bottom.double(), bulk])


@pytest.mark.parametrize("asked", [{"largest": 1}, {"largest": 3}, {"smallest": 1}], ids=str)
@pytest.mark.thinned(3)
def test_values_are_those_of_eigsh(asked: dict[str, int]) -> None:
    """Within the error that is told, where no other eigenvalue is so near that the search counts both as one."""
    ((end, count),) = asked.items()
    far = 0
    for kind, seed in itertools.product(("clusters", "gaps of 1 %", "negative ones dominate", "spread"), range(5)):
        operator = with_spectrum(_values(kind, seed), seed)
        which = "LA" if end == "largest" else "SA"
        near = torch.from_numpy(arpack.eigsh(operator.matrix.numpy(), count + 6, which=which, tol=1e-12)[0])
        near = near.sort(descending=end == "largest").values
        found = eigenpairs(operator, operator.space, generator=torch.Generator().manual_seed(seed), **asked)
        assert all(found.converged)
        for value, error, true in zip(found.values, found.errors, near, strict=False):
            # The residual at which a search ends is about 1 %: two neighbours of that distance count as one.
            one = near[(near - true).abs() <= 0.02 * true.abs()]
            # Rounding of the products and of ARPACK's value: N·u·‖A‖ = 200·1e-16·60.
            assert float(one.min() - error) - 1e-12 <= value <= float(one.max() + error) + 1e-12, (kind, seed)
            far += bool((value - true).abs() > 0.01 * true.abs())
    # Six eigenvalues at distances of 1 % each: one value of these 100 was off by 1.1 %.
    assert far <= (asked == {"largest": 1})
