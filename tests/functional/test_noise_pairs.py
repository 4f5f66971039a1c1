"""Which sample of another mini-batch is the nearest of its class."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_curvature.functional.noise import matched_pairs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)])
def test_pairs_equal_a_loop(shape: tuple[int, ...]) -> None:
    """Classes that one side lacks, partners that several samples share, inputs of any shape."""
    x, others = random(30, *shape), random(20, *shape, seed=1)
    y, other_y = (torch.randint(6, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 20))
    other_y[other_y == 4] = 7
    found = matched_pairs(x, y, others, other_y)
    expected = []
    for one, label in zip(x, y.tolist(), strict=True):
        near = [(float((other - one).square().sum()), k) for k, other in enumerate(others) if other_y[k] == label]
        expected.append(min(near)[1] if near else -1)
    assert found.tolist() == expected
    assert -1 in expected
    assert len(set(expected)) < len(expected)


def test_pairs_at_equal_distances_and_far_from_the_origin() -> None:
    label = torch.zeros(2).long()
    inputs = torch.tensor([[0.0], [2.0]])
    assert matched_pairs(inputs, label, torch.tensor([[1.0], [-1.0], [1.0]]), torch.zeros(3).long()).tolist() == [0, 0]
    # ‖x‖² + ‖y‖² − 2xy has no digits left for this, in float32 nor in float64.
    far = 1e9 + torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    near = far.flip(0) + 1e-3
    assert matched_pairs(far, label, near, label).tolist() == [1, 0]
    pixels = torch.tensor([[0, 250], [3, 3]], dtype=torch.uint8)
    assert matched_pairs(pixels, label, pixels.flip(0), label).tolist() == [1, 0]


def test_pairs_with_nobody() -> None:
    x, y = random(3, 2), torch.tensor([0, 1, 1])
    assert matched_pairs(x, y, x[:0], y[:0]).tolist() == [-1] * 3
    assert matched_pairs(x[:0], y[:0], x, y).tolist() == []
    assert matched_pairs(x, y, x, y + 5).tolist() == [-1] * 3
    assert matched_pairs(torch.full((1, 2), math.nan), y[:1], x, y).tolist() == [-1]
