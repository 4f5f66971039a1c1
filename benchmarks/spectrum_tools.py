"""Computes λ_max by this package, PyHessian and curvlinops with SciPy: time, products and vector of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from spectrum_nets import Net
from timing import Clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature.linalg import Eigenpairs, eigenpairs
from lightning_curvature.operators import HessianOperator

# curvlinops multiplies with all columns of a matrix at once, and memory grows with them: so many at a time.
COLUMNS = 4

KeepGraph = bool | Literal["auto"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """What one search gave.

    Attributes:
        value: λ_max; of PyHessian the eigenvalue of largest magnitude.
        products: with the Hessian of all samples.
        seconds: from the network and its data to the value.
        vector: of length 1.
        kept: micro-batches whose graph was kept, of ours.
    """

    value: float
    products: int
    seconds: float
    vector: Tensor
    kept: int = 0


def repeated(clock: Clock, repeats: int, patience: float, run: Callable[[int], Result], least: int = 1) -> list[Result]:
    """Run with seeds 0, 1, …; after the ``least`` no more once it has taken longer than ``patience`` seconds in all."""
    found: list[Result] = []
    start = clock.now()
    for seed in range(repeats):
        found.append(run(seed))
        if len(found) >= least and clock.now() - start > patience:
            break
    return found


def ours(net: Net, clock: Clock, tolerance: float, keep_graph: KeepGraph, seed: int) -> Found:
    """Band Lanczos on the Hessian operator; making the graphs and giving them back are in the time."""
    start = clock.now()
    operator = HessianOperator.of(net.rows, nn.functional.cross_entropy, net.batches, keep_graph=keep_graph)
    generator = torch.Generator(net.device).manual_seed(seed)
    pairs = eigenpairs(operator, operator.space, largest=1, tolerance=tolerance, generator=generator)
    operator.close()
    seconds = clock.now() - start
    kept = sum(operator._graphs.keeps(i) for i in range(len(net.batches)))  # type: ignore[attr-defined]
    return Found(float(pairs.values[0]), pairs.matvecs, seconds, pairs.vectors[0], kept)


def our_pairs(net: Net, count: int, seed: int = 0) -> Eigenpairs:
    """The largest eigenpairs, for deflation."""
    operator = HessianOperator.of(net.rows, nn.functional.cross_entropy, net.batches)
    generator = torch.Generator(net.device).manual_seed(seed)
    pairs = eigenpairs(operator, operator.space, largest=count, tolerance=1e-2, generator=generator)
    operator.close()
    return pairs


class PyHessian:
    """PyHessian on a network, with its products counted."""

    def __init__(self, net: Net) -> None:
        from pyhessian import hessian

        cuda = net.device.type == "cuda"
        self.tool = hessian(net.rows, nn.CrossEntropyLoss(), dataloader=net.batches, cuda=cuda)
        self.products = 0
        inner = self.tool.dataloader_hv_product

        def counted(v: Any) -> Any:
            self.products += 1
            return inner(v)

        self.tool.dataloader_hv_product = counted


def pyhessian(net: Net, clock: Clock, seed: int, **options: Any) -> Found:
    """``hessian(…).eigenvalues()``, at its defaults (maxIter=100, tol=1e-3) unless told otherwise."""
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):
        start = clock.now()
        peer = PyHessian(net)
        (value,), (vector,) = peer.tool.eigenvalues(**options)
        seconds = clock.now() - start
    net.rows.zero_grad()
    return Found(value, peer.products, seconds, torch.cat([part.detach().flatten() for part in vector]))


class Counted:
    """A curvlinops operator with its products counted, and matrices multiplied a few columns at a time."""

    def __init__(self, net: Net, columns: int = COLUMNS) -> None:
        from curvlinops import HessianLinearOperator

        self.operator = HessianLinearOperator(
            net.rows,
            nn.CrossEntropyLoss(),
            net.parameters,
            net.batches,
            check_deterministic=False,
            num_data=net.samples,
        )
        self.shape, self.device, self.dtype = self.operator.shape, self.operator.device, self.operator.dtype
        self.columns, self.products = columns, 0

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a vector (N,) or a matrix (N, K)."""
        self.products += 1 if other.dim() == 1 else other.shape[1]
        with sdpa_kernel(SDPBackend.MATH):
            if other.dim() == 1:
                return self.operator @ other
            return torch.cat([self.operator @ part for part in other.split(self.columns, dim=1)], dim=1)


def curvlinops(net: Net, clock: Clock, seed: int, tolerance: float = 1e-3) -> Found:
    """``scipy.sparse.linalg.eigsh(which="LA", k=1)`` on ``HessianLinearOperator``, without its determinism check."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    start = clock.now()
    operator = Counted(net)

    def matvec(v: Any) -> Any:
        product = operator @ torch.from_numpy(v.reshape(-1)).to(operator.device, operator.dtype)
        return product.detach().cpu().numpy()

    first = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(np.float32)
    wrapped = LinearOperator(operator.shape, matvec=matvec, dtype=np.float32)
    values, vectors = eigsh(wrapped, k=1, which="LA", tol=tolerance, v0=first)
    seconds = clock.now() - start
    vector = torch.from_numpy(vectors[:, 0].copy()).to(net.device)
    return Found(float(values[0]), operator.products, seconds, vector)


def installed(package: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(package) is not None
