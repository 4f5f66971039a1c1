"""A sum of Kronecker products over many small batches is that of all samples at once."""

from __future__ import annotations

import pytest
import torch

from lightning_curvature.functional.noise import KroneckerSum, kronecker_sums


def _samples(count: int, kinds: int, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(count, kinds, out, out, generator=generator, dtype=torch.float64)
    return blocks + blocks.mT, torch.randn(count, into, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("most", [1, 100, 2**22])
def test_in_batches(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    blocks, activations = _samples(23, 2, 3, 4)
    total = KroneckerSum(2, 3, 4)
    monkeypatch.setattr(KroneckerSum, "_MOST", most)
    for start in range(0, 23, 5):
        total.add(blocks[start : start + 5], activations[start : start + 5])
    # Another order of 23 terms of size one: some units of 2e-16.
    torch.testing.assert_close(total.packed(), kronecker_sums(blocks, activations), rtol=0.0, atol=1e-12)
    again = total.packed().clone()
    assert torch.equal(total.packed(), again)
    total.add(blocks, activations)
    torch.testing.assert_close(total.packed(), 2.0 * again, rtol=0.0, atol=1e-12)


def test_nothing_added_is_zero() -> None:
    assert not KroneckerSum(1, 2, 2).packed().any()


def test_many_small_batches_are_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, activations = _samples(40, 1, 3, 4)
    products = []
    real = torch.Tensor.addmm_

    def counted(self: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        products.append(args)
        return real(self, *args)

    monkeypatch.setattr(torch.Tensor, "addmm_", counted)
    total = KroneckerSum(1, 3, 4)
    for start in range(40):
        total.add(blocks[start : start + 1], activations[start : start + 1])
    assert not products
    total.packed()
    assert len(products) == 1


def test_added_in_place() -> None:
    blocks, activations = _samples(5, 1, 2, 2)
    total = kronecker_sums(blocks[:2], activations[:2])
    found = kronecker_sums(blocks[2:], activations[2:], total)
    assert found is total
    torch.testing.assert_close(total, kronecker_sums(blocks, activations), rtol=0.0, atol=1e-13)
