"""The space of a list of tensors: memory, types, sums, random vectors, parts on two ranks."""

import pytest
import torch
from torch import Tensor

from lightning_curvature.linalg import VectorSpace
from lightning_curvature.linalg.basis import Basis

U32 = 2.0**-24  # unit roundoff


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_views_share_the_memory_of_the_vector() -> None:
    space = VectorSpace([torch.zeros(2, 3), torch.zeros(()), torch.zeros(4)])
    vector = torch.arange(11.0)
    matrix, scalar, row = space.views(vector)
    assert (matrix.shape, scalar.shape, row.shape) == ((2, 3), (), (4,))
    matrix[1, 2] = -1.0
    scalar.fill_(-2.0)
    assert vector.tolist() == [0, 1, 2, 3, 4, -1, -2, 7, 8, 9, 10]
    assert [v.shape for v in space.views(torch.zeros(5, 11))] == [(5, 2, 3), (5,), (5, 4)]


def test_pack_copies_and_takes_none_for_zeros() -> None:
    space = VectorSpace([torch.zeros(2), torch.zeros(2), torch.zeros(1)])
    part = torch.tensor([1.0, 2.0], requires_grad=True)
    vector = space.pack([part, None, torch.tensor([3.0])])
    assert vector.tolist() == [1, 2, 0, 0, 3]
    assert not vector.requires_grad
    vector.zero_()
    assert part.tolist() == [1, 2]


def test_add_scales_in_place() -> None:
    space = VectorSpace([torch.zeros(2), torch.zeros(1)])
    vector = torch.ones(3)
    assert space.add_(vector, [torch.tensor([2.0, 4.0]), None], -0.5) is vector
    assert vector.tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
)
def test_type_is_float32_at_least(types: list[torch.dtype], expected: torch.dtype) -> None:
    space = VectorSpace([torch.ones(2, dtype=t) for t in types])
    assert space.dtype == expected
    assert space.pack([torch.ones(2, dtype=t) for t in types]).dtype == expected
    assert space.random(_generator()).dtype == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_dots_of_large_float32_vectors(rows: int) -> None:
    # Several pieces of 65,536 coordinates, and a ragged last one.
    n = 5 * 2**16 + 17
    space = VectorSpace([torch.zeros(n)])
    block = torch.rand(rows, n, generator=_generator())
    vector = torch.rand(n, generator=_generator(1))
    exact = block.double() @ vector.double()
    found = space.dots([block, block[:1]], vector)
    assert found.dtype == torch.float64
    # A piece is summed in float32 in lanes, at worst 8 of them: 8192 additions one after the other, whose errors add
    # up like a random walk to √8192·u = 90u of the piece; the pieces' errors are independent, too.
    assert torch.allclose(found, torch.cat([exact, exact[:1]]), rtol=90 * U32, atol=0.0)


def test_dots_are_summed_in_float64_across_pieces() -> None:
    # 2²⁵ + 1 − 2²⁵ by pieces: in float32 the middle one is lost.
    piece = 2**16
    vector = torch.zeros(3 * piece)
    vector[0], vector[piece], vector[2 * piece] = 2.0**25, 1.0, -(2.0**25)
    assert VectorSpace([vector]).dot(torch.ones(3 * piece), vector) == 1.0


def test_norm() -> None:
    space = VectorSpace([torch.zeros(2), torch.zeros(1)])
    assert space.norm(torch.tensor([2.0, 3.0, 6.0])) == 7.0


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_random_has_mean_0_and_variance_1(distribution: str) -> None:
    n = 40_000
    vector = VectorSpace([torch.zeros(n, dtype=torch.float64)]).random(_generator(), distribution)
    # Four standard deviations: of a mean 1/√n, of a mean square √(2/n) at most.
    assert abs(float(vector.mean())) < 4.0 / n**0.5
    assert abs(float(vector.square().mean()) - 1.0) < 4.0 * (2.0 / n) ** 0.5
    assert (vector.abs() == 1.0).all() == (distribution == "rademacher")


def test_random_is_the_generators() -> None:
    space = VectorSpace([torch.zeros(3), torch.zeros(2)])
    state = torch.get_rng_state()
    assert torch.equal(space.random(_generator(5)), space.random(_generator(5)))
    assert not torch.equal(space.random(_generator(5)), space.random(_generator(6)))
    assert torch.equal(torch.get_rng_state(), state)


def _two_ranks() -> tuple[VectorSpace, list[VectorSpace], list[list[Tensor]]]:
    """A space of two tensors; the same on two ranks, the first tensor cut in uneven parts, the second a replica."""
    matrix = torch.arange(15, dtype=torch.float64).reshape(5, 3) - 6.0
    replica = torch.tensor([1.0, -2.0], dtype=torch.float64)
    parts = [[matrix[:3], replica], [matrix[3:], replica]]

    def count(_: Tensor) -> Tensor:
        return torch.tensor(17.0, dtype=torch.float64)

    spaces = [
        VectorSpace(
            part,
            reduce=count,
            shares=[1.0, 0.5],
            shapes=[matrix.shape, replica.shape],
            cut=[lambda full, rows=rows: full[rows], lambda full: full],
        )
        for part, rows in zip(parts, (slice(0, 3), slice(3, 5)), strict=True)
    ]
    return VectorSpace([matrix, replica]), spaces, [[matrix, replica], *parts]


def test_parts_count_what_the_ranks_hold_together() -> None:
    whole, spaces, _ = _two_ranks()
    assert whole.dimension == whole.size == 17
    assert [space.size for space in spaces] == [11, 8]
    assert [space.dimension for space in spaces] == [17, 17]


def test_each_rank_adds_its_share() -> None:
    whole, spaces, lists = _two_ranks()
    added = []
    for space, tensors in zip(spaces, lists[1:], strict=True):
        space._reduce = lambda local: (added.append(local.clone()), local)[1]
        vector = space.pack(tensors)
        space.dots([torch.stack([vector, torch.ones_like(vector)])], vector)
    vector = whole.pack(lists[0])
    # Sums of small whole numbers and halves are exact.
    assert torch.equal(added[0] + added[1], whole.dots([torch.stack([vector, torch.ones_like(vector)])], vector))


def test_random_is_the_same_however_it_is_cut() -> None:
    whole, spaces, _ = _two_ranks()
    matrix, replica = whole.views(whole.random(_generator(3)))
    first, second = (space.views(space.random(_generator(3))) for space in spaces)
    assert torch.equal(torch.cat([first[0], second[0]]), matrix)
    assert torch.equal(first[1], replica)
    assert torch.equal(second[1], replica)


def test_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tensors must be a non-empty sequence of real tensors, got \[\]: give the"):
        VectorSpace([])


def test_basis_rows_are_orthonormal_and_combinations_of_themselves() -> None:
    # More coordinates than are gathered at once, more rows than a block of memory.
    n, rows = 2**16 + 100, 11
    space = VectorSpace([torch.zeros(n, dtype=torch.float64)])
    basis, generator = Basis(space), _generator()
    for _ in range(rows):
        vector = space.random(generator)
        basis.orthogonalize(vector)
        basis.append(vector / space.norm(vector))
    before = torch.stack([basis[i].clone() for i in range(rows)])
    # Each dot product of unit vectors of n coordinates is off by a few u, a random walk of its n roundings.
    assert torch.allclose(before @ before.T, torch.eye(rows, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert torch.allclose(basis.combine(torch.arange(3.0)), before[1] + 2.0 * before[2], rtol=0.0, atol=1e-15)
    turn = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64, generator=generator))[0]
    basis.replace(turn, tail=2)
    assert len(basis) == 6
    after = torch.stack([basis[i] for i in range(6)])
    assert torch.allclose(after, torch.cat([turn.T @ before[:9], before[9:]]), rtol=0.0, atol=1e-15)
    with pytest.raises(IndexError):
        basis[6]


def test_dot_products_by_tensor() -> None:
    """Of tensors longer than a piece, empty ones, and scalars; with shares, their sum over the ranks is weighted."""
    sizes = [70_000, 0, 1, 5]
    a, b = (torch.randn(sum(sizes), generator=_generator(seed)) for seed in (0, 1))
    space = VectorSpace([torch.zeros(size) for size in sizes])
    truth = [float(x.double() @ y.double()) for x, y in zip(a.split(sizes), b.split(sizes), strict=True)]
    found = space.dots_by_tensor(a, b)
    assert found.dtype == torch.float64
    # Float32 sums of up to 65,536 products, with a rounding of u each, of random sign: √65,536 u of their total size.
    bounds = [256 * U32 * float(x.abs() @ y.abs()) for x, y in zip(a.split(sizes), b.split(sizes), strict=True)]
    assert all(abs(x - y) <= bound for x, y, bound in zip(found.tolist(), truth, bounds, strict=True))
    twice = VectorSpace([torch.zeros(size) for size in sizes], reduce=lambda t: 2 * t, shares=[1.0, 1.0, 0.5, 1.0])
    assert torch.equal(twice.dots_by_tensor(a, b), found * torch.tensor([2.0, 2.0, 1.0, 2.0]).double())
