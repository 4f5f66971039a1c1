"""A batch is cut into its samples: rows, items, fields, graphs by their own protocol; what cannot be cut is refused."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.losses.cut import cut_samples
from tests.helpers.runs import make_trainer

X, Y = torch.arange(12.0).view(3, 4), torch.tensor([5, 6, 7])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    name: str


class Bag:
    """Holds tensors, and says nothing of its samples."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Graphs:
    """Nodes of several graphs in one tensor, cut by the protocol of PyTorch Geometric."""

    def __init__(self, nodes: Tensor, counts: list[int]) -> None:
        self.nodes, self.counts = nodes, counts

    def to_data_list(self) -> list[Tensor]:
        return list(self.nodes.split(self.counts))

    @classmethod
    def from_data_list(cls, parts: list[Tensor]) -> Graphs:
        return cls(torch.cat(parts), [len(part) for part in parts])


def test_rows_and_what_is_shared() -> None:
    table = torch.ones(2, 4)
    given = {"pair": Pair(X, Y), "record": Record(X, "a"), "table": table, "rate": 0.5, "none": None}
    parts = cut_samples(given, 3)
    assert len(parts) == 3
    for index, part in enumerate(parts):
        assert isinstance(part["pair"], Pair)
        assert torch.equal(part["pair"].x, X[index : index + 1])
        assert part["pair"].y.tolist() == [5 + index]
        assert torch.equal(part["record"].x, X[index : index + 1])
        assert part["table"] is table
        assert (part["record"].name, part["rate"], part["none"]) == ("a", 0.5, None)
    assert torch.equal(given["pair"].x, X)  # type: ignore[union-attr]


def test_kin_of_dicts_stay_what_they_are() -> None:
    (first, *_) = cut_samples(collections.UserDict(x=X, y=Y), 3)
    assert isinstance(first, collections.UserDict)
    assert first["y"].tolist() == [5]


def test_images_of_several_sizes_are_items() -> None:
    images = [torch.zeros(1, 4, 4), torch.ones(1, 5, 4)]
    targets = ({"boxes": torch.zeros(3, 4)}, {"boxes": torch.ones(1, 4)})
    first, second = cut_samples((images, targets), 2)
    assert isinstance(first[0], list)
    assert isinstance(first[1], tuple)
    assert (first[0][0] is images[0], len(first[0]), len(second[1])) == (True, 1, 1)
    assert torch.equal(second[1][0]["boxes"], torch.ones(1, 4))


def test_a_pair_of_two_rows_is_no_list_of_samples() -> None:
    (first, second) = cut_samples([X[:2], torch.ones(3)], 2)
    assert torch.equal(first[0], X[:1])
    assert torch.equal(second[1], torch.ones(3))


def test_graphs_by_their_own_protocol() -> None:
    parts = cut_samples((Graphs(torch.arange(6.0), [1, 3, 2]), Y), 3)
    assert [part[0].nodes.tolist() for part in parts] == [[0.0], [1.0, 2.0, 3.0], [4.0, 5.0]]
    assert [part[1].item() for part in parts] == [5, 6, 7]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="got a Bag that holds tensors: make batches of tensors, lists, dicts and"):
        cut_samples((Bag(torch.arange(6.0)), Y), 3)
    with pytest.raises(ValueError, match="a row for each of its 3 samples, got none"):
        cut_samples((torch.ones(2), "a"), 3)


class Pooled(pl.LightningModule):
    """Sums over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(1, 3).double(), nn.Linear(3, 1).double()

    def training_step(self, batch: tuple[Graphs, Tensor], batch_idx: int) -> Tensor:
        graphs, y = batch
        hidden = torch.tanh(self.first(graphs.nodes[:, None]))
        sums = torch.stack([part.sum(0) for part in hidden.split(graphs.counts)])
        return F.mse_loss(self.second(sums)[:, 0], y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
    return Graphs.from_data_list([x for x, _ in rows]), torch.stack([y for _, y in rows])


def test_noise_of_graphs_is_that_of_single_graphs() -> None:
    """Covariance of the gradient noise and Hessian of a block, against the gradients of the graphs one by one."""
    g = torch.Generator().manual_seed(1)
    rows = [
        (torch.randn(1 + i % 3, generator=g, dtype=torch.float64), torch.randn((), generator=g, dtype=torch.float64))
        for i in range(24)
    ]
    module = Pooled()
    follow = NoiseCovarianceMonitor(parameter="second.weight", on_error="raise")
    loader = DataLoader(rows, batch_size=6, collate_fn=collate)  # type: ignore[arg-type]
    found = follow.evaluate(module, loader, trainer=make_trainer()).result
    gradients, sums = [], []
    for row in rows:
        loss = module.training_step(collate([row]), 0)
        gradients.append(torch.autograd.grad(loss, module.second.weight)[0].flatten())
        sums.append(torch.tanh(module.first(row[0][:, None])).sum(0).detach())
    centred = torch.stack(gradients) - torch.stack(gradients).mean(0)
    covariance = centred.T @ centred / len(rows) / 6
    hessian = 2.0 * torch.stack(sums).T @ torch.stack(sums) / len(rows)
    # Of three by three matrices of sums over 24 graphs: some tens of roundings.
    torch.testing.assert_close(found.curvatures, torch.linalg.eigvalsh(hessian).flip(0), rtol=1e-10, atol=0.0)
    variances = torch.einsum("id,de,ie->i", found.vectors, covariance, found.vectors)
    torch.testing.assert_close(found.variances, variances, rtol=1e-10, atol=0.0)
