"""Batches of one form are stacked and made whole again; others are refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.losses.stacked import copies_of, forward_operations, single_samples, stack

X = torch.arange(12.0).view(2, 3, 2)


def batch(index: int, **more: Any) -> dict[str, Any]:
    return {"x": X[index], "pair": (torch.tensor([index]), "name"), "rate": 0.5, **more}


def test_stacked_batches_are_made_whole_again() -> None:
    tensors, rebuild = stack([batch(0), batch(1)])
    assert [t.shape for t in tensors] == [(2, 3, 2), (2, 1)]
    for index in range(2):
        whole = rebuild([t[index] for t in tensors])
        expected = batch(index)
        assert torch.equal(whole["x"], expected["x"])
        assert torch.equal(whole["pair"][0], expected["pair"][0])
        assert (whole["pair"][1], whole["rate"]) == ("name", 0.5)


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([batch(0), {"x": X[1]}], "batches must be of one structure to be stacked, got several"),
        ([{"x": X[0]}, {"x": X[1, :2]}], r"batches must be of one shape to be stacked, got \[\(3, 2\), \(2, 2\)\]"),
        ([{"x": X[0]}, {"x": X[1].double()}], "batches must be of one shape"),
        ([batch(0), batch(1) | {"rate": 0.6}], "batches must differ in tensors alone to be stacked, got float"),
        ([batch(0, file=object()), batch(1, file=object())], "differ in tensors alone to be stacked, got object"),
        ([{"rate": 1}, {"rate": 1}], "batches must hold a tensor to be stacked, got none"),
    ],
)
def test_batches_of_several_forms_are_refused(batches: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        stack(batches)


def test_single_samples_share_what_has_no_row_for_each() -> None:
    """A tensor of three rows is cut; one of another length, a scalar and a name go to every sample."""
    weights = torch.tensor([1.0, 2.0])
    given = {"x": X[0], "y": torch.tensor([5, 6, 7]), "weights": weights, "scale": torch.tensor(2.0), "name": "a"}
    tensors, rebuild = single_samples(given, 3)
    assert [t.shape for t in tensors] == [(3, 1, 2), (3, 1)]
    for index in range(3):
        sample = rebuild([t[index] for t in tensors])
        assert torch.equal(sample["x"], X[0, index : index + 1])
        assert sample["y"].tolist() == [5 + index]
        assert sample["weights"] is weights
        assert (sample["scale"].item(), sample["name"]) == (2.0, "a")
    with pytest.raises(ValueError, match="a row for each of its 4 samples, got none"):
        single_samples(given, 4)


def test_copies_of_parameters_have_gradients_of_their_own_and_share_memory() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
    (copies,) = copies_of([weight], 3)
    assert copies.shape == (3, 2)
    assert copies.is_leaf
    assert copies.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    scales = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((scales[:, None] * copies.square()).sum(), copies)
    assert gradient.tolist() == [[4.0, 6.0], [40.0, 60.0], [400.0, 600.0]]
    assert weight.grad is None


def test_forward_operations_are_those_of_the_products() -> None:
    layer = nn.Linear(4, 5)
    # Two operations for each of 3·4·5 products.
    assert forward_operations(lambda: layer(torch.zeros(3, 4)).tanh()) == 2 * 3 * 4 * 5
    assert forward_operations(lambda: torch.zeros(3).exp()) == 0
