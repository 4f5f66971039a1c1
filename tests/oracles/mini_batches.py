"""Exact expectations over all mini-batches of one size, from dense matrices in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.dense import Loss
from tests.oracles.matrices import Matrices

Batch = tuple[Any, Any]


class MiniBatches:
    """Every mini-batch that can be drawn from some samples, all equally likely, and what it gives.

    Args:
        network: see :class:`~tests.oracles.matrices.Matrices`.
        loss: mean loss of (outputs, targets).
        x: inputs of all samples.
        y: targets.
        size: samples of a mini-batch.
        replacement: all tuples with repetition, in any order, in place of all subsets.
        kind: "hessian" or "gauss_newton".
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        x: Tensor,
        y: Tensor,
        size: int,
        replacement: bool = False,
        kind: str = "hessian",
    ) -> None:
        self.count, self.kind, self.dense = len(y), kind, Matrices(network, loss)
        drawn: Any = (
            itertools.product(range(self.count), repeat=size)
            if replacement
            else itertools.combinations(range(self.count), size)
        )
        self.batches: list[Batch] = [(x[list(chosen)], y[list(chosen)]) for chosen in drawn]
        dense = self.dense
        self.gradients = torch.stack([dense.gradient([batch]) for batch in self.batches])  # (batches, N)
        self.gradient, self.matrix = dense.gradient([(x, y)]), getattr(dense, kind)([(x, y)])
        singles = torch.stack([dense.gradient([(x[i : i + 1], y[i : i + 1])]) for i in range(self.count)])
        deviations = singles - singles.mean(dim=0)
        self.covariance = deviations.T @ deviations / self.count

    @functools.cached_property
    def matrices(self) -> Tensor:
        """H_B or G_B of each mini-batch, (batches, N, N): most of the work, and not always needed."""
        return torch.stack([getattr(self.dense, self.kind)([batch]) for batch in self.batches])

    def own_curvatures(self) -> Tensor:
        """g_BᵀH_B g_B of each mini-batch."""
        return torch.einsum("bi,bij,bj->b", self.gradients, self.matrices, self.gradients)

    def full_curvatures(self) -> Tensor:
        """g_BᵀHg_B of each mini-batch, H of all samples."""
        return torch.einsum("bi,ij,bj->b", self.gradients, self.matrix, self.gradients)

    def squares(self) -> Tensor:
        """‖g_B‖² of each mini-batch."""
        return self.gradients.square().sum(dim=1)

    def batch_sharpness(self) -> float:
        return float((self.own_curvatures() / self.squares()).mean())

    def modified_batch_sharpness(self) -> float:
        return float(self.own_curvatures().mean() / self.squares().mean())

    def ias(self) -> float:
        return float(self.full_curvatures().mean() / self.squares().mean())

    def gni(self) -> float:
        return float(self.full_curvatures().mean() / self.gradient.square().sum())

    def lambda_max(self) -> float:
        return float(torch.linalg.eigvalsh(self.matrices)[:, -1].mean())

    def lambda_gen(self, updates: Sequence[Tensor]) -> float:
        """tr(H E[ΔΔᵀ])/(gᵀE[Δ]), for the update Δ of each mini-batch."""
        stacked = torch.stack(list(updates))
        second = stacked.T @ stacked / len(stacked)
        return float(torch.trace(self.matrix @ second) / (self.gradient @ stacked.mean(dim=0)))

    def update_sharpness(self, updates: Sequence[Tensor]) -> float:
        """E_B of ΔᵀH_BΔ over E_B of g_BᵀΔ, each over ‖Δ‖², for the update Δ of each mini-batch."""
        units = torch.stack([update / update.norm() for update in updates])
        lengths = torch.stack([update.norm() for update in updates])
        curvatures = torch.einsum("bi,bij,bj->b", units, self.matrices, units)
        return float(curvatures.mean() / ((self.gradients * units).sum(dim=1) / lengths).mean())

    def gradient_curvature(self) -> float:
        """gᵀHg."""
        return float(self.gradient @ self.matrix @ self.gradient)

    def noise_curvature(self) -> float:
        """tr(HΣ), Σ the covariance of the gradients of single samples, divisor n."""
        return float(torch.trace(self.matrix @ self.covariance))

    def noise_square(self) -> float:
        """tr Σ."""
        return float(torch.trace(self.covariance))
