"""Searches that go on from each other, of operators that change."""

import math

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import Eigenpairs, EigenTracker, VectorSpace

N = 2000


def _diagonal(*largest: float, smallest: float = -0.5) -> Tensor:
    diagonal = 0.5 * torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagonal[: len(largest)], diagonal[-1] = torch.tensor(largest, dtype=torch.float64), smallest
    return diagonal


def _search(tracker: EigenTracker, diagonal: Tensor, seed: int = 0, **asked: int) -> Eigenpairs:
    made = 0

    def matvec(vector: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return diagonal * vector

    generator = torch.Generator().manual_seed(seed)
    found = tracker.search(matvec, VectorSpace([diagonal]), generator=generator, **({"largest": 1} | asked))
    assert found.matvecs == made
    return found


@pytest.mark.parametrize("asked", [{}, {"largest": 2}, {"smallest": 1}], ids=str)
def test_a_search_takes_a_product_a_pair_where_nothing_turns(asked: dict[str, int]) -> None:
    tracker = EigenTracker(recheck_every=4)
    made = [_search(tracker, (1.0 + 0.01 * step) * _diagonal(5.0, 3.0), **asked).matvecs for step in range(9)]
    pairs = 1 + (asked != {})
    # The first, and every fourth after it, from random vectors.
    assert [count > 2 * pairs for count in made] == [step % 4 == 0 for step in range(9)]
    assert all(count == pairs for step, count in enumerate(made) if step % 4)


def test_one_that_overtakes_is_found_at_the_next_search_from_random_vectors() -> None:
    tracker = EigenTracker(recheck_every=3)
    values = [float(_search(tracker, _diagonal(5.0, 4.0 + step), seed=step).values) for step in range(5)]
    # Overtaken at step 2; from random vectors again at step 3.
    assert values == pytest.approx([5.0, 5.0, 5.0, 7.0, 8.0], rel=2e-3)


def test_one_that_falls_below_another_is_found_at_once() -> None:
    tracker = EigenTracker()
    assert float(_search(tracker, _diagonal(5.0, 4.0)).values) == pytest.approx(5.0, rel=1e-3)
    found = _search(tracker, _diagonal(3.0, 4.0))
    assert float(found.values) == pytest.approx(4.0, rel=1e-3)
    assert math.isfinite(found.upper)
    # And goes on from there.
    assert _search(tracker, _diagonal(3.0, 4.1)).matvecs == 1


def test_a_smallest_that_rises_is_looked_for_again() -> None:
    tracker = EigenTracker()
    _search(tracker, _diagonal(5.0, smallest=-2.0), smallest=1)
    changed = _diagonal(5.0, -1.5, smallest=-1.0)
    found = _search(tracker, changed, smallest=1)
    assert found.values.tolist() == pytest.approx([5.0, -1.5], rel=1e-3)


def test_a_random_search_that_misses_what_was_known_does_not_lose_it() -> None:
    """A space whose random vectors have no part along the first: by its mask."""
    diagonal, tracker = _diagonal(5.0, 3.0), EigenTracker(recheck_every=2)
    for _ in range(2):
        assert float(_search(tracker, diagonal).values) == pytest.approx(5.0, rel=1e-3)

    class Blind(VectorSpace):
        def random(self, generator: torch.Generator) -> Tensor:
            vector = super().random(generator)
            vector[0] = 0.0
            return vector

    found = tracker.search(lambda v: diagonal * v, Blind([diagonal]), largest=1)
    assert float(found.values) == pytest.approx(5.0, rel=1e-3)


def test_the_state_goes_on_as_the_tracker_would() -> None:
    one, two = EigenTracker(3), EigenTracker(3)
    for step in range(2):
        _search(one, _diagonal(5.0 + 0.1 * step, 3.0), seed=step)
    two.load_state_dict(one.state_dict())
    for step in range(2, 6):
        found, again = (_search(tracker, _diagonal(5.0 + 0.1 * step, 3.0), seed=step) for tracker in (one, two))
        assert torch.equal(found.values, again.values)
        assert found.matvecs == again.matvecs
    two.load_state_dict(EigenTracker().state_dict())
    assert _search(two, _diagonal(5.0, 3.0)).matvecs > 1


def test_another_space_begins_anew() -> None:
    tracker = EigenTracker()
    _search(tracker, _diagonal(5.0, 3.0))
    small = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    found = tracker.search(lambda v: small * v, VectorSpace([small]), largest=1)
    assert float(found.values) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("value", [0, -1, 2.5, "ten"])
def test_recheck_every_has_a_rule(value: object) -> None:
    with pytest.raises(ValueError, match="recheck_every must be"):
        EigenTracker(recheck_every=value)  # type: ignore[arg-type]
