"""Which distribution a loss belongs to, read off one step: every loss a user may write, on batches of every shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature.directional.likelihood import OutputModel, identify
from lightning_curvature.functional import output_quadratic_form
from lightning_curvature.replay.batches import tensors

SHAPES = {
    "vectors": ((6, 5), (6,), -1),
    "tokens": ((3, 4, 5), (3, 4), -1),
    "flat targets": ((3, 4, 5), (12,), -1),
    "flat outputs": ((12, 5), (3, 4), -1),
    "segmentation": ((2, 5, 3, 4), (2, 3, 4), 1),
    "sequence, classes second": ((2, 5, 3), (2, 3), 1),
    "square images": ((2, 3, 3, 3), (2, 3, 3), 1),
}
REDUCTIONS = ("mean", "sum", "per_sample")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _reduced(elements: Tensor, reduction: str, samples: int, counted: int | None = None) -> Tensor:
    """Sum of the elements, as the name of the reduction says."""
    total = elements.sum() * (0.5 if reduction.startswith("half") else 1.0)
    kind = reduction.removeprefix("half_")
    return total / {"mean": elements.numel() if counted is None else counted, "sum": 1, "per_sample": samples}[kind]


def _quadratic_of_loss(loss: Callable[[Tensor], Tensor], z: Tensor, change: Tensor) -> float:
    """Second derivative of the loss itself along a change of the outputs."""
    h = torch.autograd.functional.hessian(lambda t: loss(t.reshape(z.shape)), z.reshape(-1))
    return float(change.reshape(-1) @ h @ change.reshape(-1))


def _agrees(model: OutputModel, z: Tensor, batch: Any, loss: Callable[[Tensor], Tensor]) -> None:
    """What the model says about the outputs is the second derivative of the loss that it was read from."""
    change = torch.randn(z.shape, generator=_generator().manual_seed(9)).double()
    weights = model.weights(batch)
    form = output_quadratic_form(model.arrange(z), model.arrange(change), model.likelihood, weights)
    value = model.scale(z, weights) * form.item()
    # Sums of at most a hundred float64 products.
    assert value == pytest.approx(_quadratic_of_loss(loss, z, change), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignored", [False, True])
def test_categorical(shape: str, reduction: str, ignored: bool) -> None:
    outputs_shape, target_shape, dimension = SHAPES[shape]
    z = torch.randn(outputs_shape, generator=_generator()).double()
    y = torch.randint(z.shape[dimension], target_shape, generator=_generator())
    if ignored:
        y.view(-1)[::3] = -100
    counted = int((y != -100).sum())

    def loss(t: Tensor, y: Tensor = y) -> Tensor:
        rows = t.movedim(dimension, -1).reshape(-1, t.shape[dimension])
        elements = F.cross_entropy(rows, y.reshape(-1), reduction="none")
        return _reduced(elements, reduction, t.shape[0], int((y != -100).sum()))

    batch = (torch.randn(3), y)
    model = identify(z, batch, loss(z), "auto")
    assert model is not None
    assert (model.likelihood, model.target, model.class_dimension) == ("categorical", 1, dimension)
    weights = model.weights(batch)
    assert weights is not None
    assert int(weights.sum()) == counted
    _agrees(model, z, batch, loss)
    if y.shape[0] == z.shape[0]:
        _agrees(model, z[1:], (torch.zeros(1), y[1:]), lambda t: loss(t, y[1:]))  # a ragged last batch


@pytest.mark.parametrize("reduction", ["mean", "half_mean", "sum", "half_sum", "per_sample", "half_per_sample"])
@pytest.mark.parametrize(
    ("outputs_shape", "target_shape"), [((6, 5), (6, 5)), ((6, 1), (6,)), ((6,), (6, 1)), ((3, 2, 4), (3, 2, 4))]
)
def test_gaussian(outputs_shape: tuple[int, ...], target_shape: tuple[int, ...], reduction: str) -> None:
    shapes = (outputs_shape, target_shape)
    z, y = (torch.randn(s, generator=_generator().manual_seed(i)).double() for i, s in enumerate(shapes))

    def loss(t: Tensor, y: Tensor = y) -> Tensor:
        return _reduced((t - y.reshape(t.shape)).square(), reduction, t.shape[0])

    model = identify(z, (torch.zeros(1), y), loss(z), "auto")
    assert model is not None
    assert (model.likelihood, model.target) == ("gaussian", 1)
    assert model.weights((torch.zeros(1), y)) is None
    _agrees(model, z, (torch.zeros(1), y), loss)
    _agrees(model, z[1:], (torch.zeros(1), y[1:]), lambda t: loss(t, y[1:]))  # a ragged last batch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("outputs_shape", [(6, 5), (6, 1), (6,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_bernoulli(outputs_shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    z = torch.randn(outputs_shape, generator=_generator()).double()
    y = torch.randint(2, outputs_shape, generator=_generator()).to(dtype)

    def loss(t: Tensor) -> Tensor:
        elements = F.binary_cross_entropy_with_logits(t, y.double(), reduction="none")
        return _reduced(elements, reduction, z.shape[0])

    model = identify(z, (torch.zeros(1), y), loss(z), "auto")
    assert model is not None
    assert (model.likelihood, model.target) == ("bernoulli", 1)
    _agrees(model, z, (torch.zeros(1), y), loss)


def test_the_loss_decides_where_shapes_leave_it_open() -> None:
    """Targets between 0 and 1: squared error or cross-entropy; ids and labels: which of them was meant."""
    g = _generator()
    z, soft = torch.randn(8, 3, generator=g), torch.rand(8, 3, generator=g)
    squared = identify(z, (soft,), F.mse_loss(z, soft), "auto")
    crossed = identify(z, (soft,), F.binary_cross_entropy_with_logits(z, soft), "auto")
    assert squared is not None
    assert crossed is not None
    assert (squared.likelihood, crossed.likelihood) == ("gaussian", "bernoulli")
    ids, labels = (torch.randint(3, (8,), generator=g) for _ in range(2))
    for target, batch in ((1, (ids, labels)), (0, (labels, ids))):
        model = identify(z, batch, F.cross_entropy(z, labels), "auto")
        assert model is not None
        assert model.target == target


@pytest.mark.parametrize("extra", [{"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 3.0, 0.5])}])
@pytest.mark.parametrize("likelihood", ["auto", "categorical"])
def test_a_categorical_loss_that_is_not_matched_counts_as_its_mean(extra: dict[str, Any], likelihood: str) -> None:
    g = _generator()
    z, ids, labels = torch.randn(8, 3, generator=g), torch.arange(8), torch.randint(3, (8,), generator=g)
    model = identify(z, (labels,), F.cross_entropy(z, labels, **extra), likelihood)
    assert model == OutputModel("categorical", 0, "mean", reproduced=False)
    # Ignored positions mark the target among several integer tensors.
    labels[2] = -100
    batch = {"ids": ids, "labels": labels}
    model = identify(z, batch, F.cross_entropy(z, labels, **extra), likelihood)
    assert model == OutputModel("categorical", 1, "mean", reproduced=False)
    weights = model.weights(batch)
    assert weights is not None
    assert weights.tolist() == [True, True, False] + [True] * 5


def test_a_loss_divided_by_hand_keeps_its_factor() -> None:
    z, y = torch.randn(8, 3, generator=_generator()).double(), torch.randint(3, (8,), generator=_generator())
    model = identify(z, (y,), F.cross_entropy(z, y) / 4, "auto")
    assert model is not None
    assert model.likelihood == "categorical"
    _agrees(model, z, (y,), lambda t: F.cross_entropy(t, y) / 4)


@pytest.mark.parametrize("loss", [None, torch.tensor(torch.nan)])
def test_without_a_usable_loss_integers_mean_categorical(loss: Tensor | None) -> None:
    z, y = torch.randn(8, 3, generator=_generator()), torch.randint(3, (8,), generator=_generator())
    expected = OutputModel("categorical", 1, "mean", reproduced=False)
    assert identify(z, (torch.randn(8, 2), y), loss, "auto") == expected
    assert identify(z, (torch.randn(8, 3),), loss, "auto") is None


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_a_likelihood_by_name_holds_without_a_match(likelihood: str) -> None:
    z, y = torch.randn(8, 3, generator=_generator()), torch.rand(8, 3, generator=_generator())
    loss = F.mse_loss(z, y) + F.binary_cross_entropy_with_logits(z, y) + 1.0
    assert identify(z, (y,), loss, "auto") is None
    for target, index in ((y, 0), (y[:, 0], None)):
        expected = OutputModel(likelihood, index, "mean", reproduced=False)  # type: ignore[arg-type]
        assert identify(z, (target,), loss, likelihood) == expected
    # A name narrows the search: the squared error of these targets is no Bernoulli.
    other = identify(z, (y,), F.mse_loss(z, y), "bernoulli")
    assert other == OutputModel("bernoulli", 0, "mean", reproduced=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_language_model_predicts_its_own_input(reduction: str, ignored: bool) -> None:
    z = torch.randn(3, 6, 5, generator=_generator()).double()
    tokens = torch.randint(5, (3, 6), generator=_generator())
    if ignored:
        tokens[:, 4] = -100

    def loss(t: Tensor) -> Tensor:
        rows, y = t[:, :-1].reshape(-1, 5), tokens[:, 1:].reshape(-1)
        return _reduced(F.cross_entropy(rows, y, reduction="none"), reduction, 3, int((y != -100).sum()))

    model = identify(z, {"input_ids": tokens}, loss(z), "auto")
    assert model is not None
    assert model.shift == 1
    change = torch.randn(z.shape, generator=_generator().manual_seed(9)).double()
    weights = model.weights({"input_ids": tokens})
    form = output_quadratic_form(model.arrange(z), model.arrange(change), "categorical", weights)
    expected = _quadratic_of_loss(loss, z, change)
    assert model.scale(z, weights) * form.item() == pytest.approx(expected, rel=1e-12)  # as in _agrees


def test_class_indices_outside_the_outputs_are_not_targets() -> None:
    z, ids = torch.randn(8, 3, generator=_generator()), torch.arange(8) + 50
    y = torch.randint(3, (8,), generator=_generator())
    model = identify(z, (ids, y), F.cross_entropy(z, y), "auto")
    assert model == OutputModel("categorical", 1, "mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_and_loss(dtype: torch.dtype) -> None:
    z, y = torch.randn(8, 3, generator=_generator()).to(dtype), torch.randint(3, (8,), generator=_generator())
    assert identify(z, (y,), F.cross_entropy(z, y), "auto") == OutputModel("categorical", 0, "mean")


class _Graph:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.name = x, y, "a graph"


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: [x, [y]],
        lambda x, y: ({"x": x}, {"deep": {"y": y}}),
        lambda x, y: _Graph(x, y),
        lambda x, y: {"text": "words", "count": 3, "x": x, "y": y},
    ],
)
def test_batches_of_any_make(make: Callable[[Tensor, Tensor], Any]) -> None:
    z, x = torch.randn(8, 3, generator=_generator()), torch.randn(8, 7)
    y = torch.randint(3, (8,), generator=_generator())
    batch = make(x, y)
    assert [t.shape for t in tensors(batch)] == [x.shape, y.shape]
    model = identify(z, batch, F.cross_entropy(z, y), "auto")
    assert model == OutputModel("categorical", 1, "mean")


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_residual_is_the_derivative_of_each_position(likelihood: str) -> None:
    g = _generator()
    z = torch.randn(5, 3, generator=g)
    y = torch.randint(3, (5,), generator=g) if likelihood == "categorical" else torch.rand(5, 3, generator=g)
    leaf = z.clone().requires_grad_()
    if likelihood == "categorical":
        loss = F.cross_entropy(leaf, y, reduction="sum")
    elif likelihood == "gaussian":
        loss = 0.5 * F.mse_loss(leaf, y, reduction="sum")
    else:
        loss = F.binary_cross_entropy_with_logits(leaf, y, reduction="sum")
    (truth,) = torch.autograd.grad(loss, leaf)
    residual = OutputModel(likelihood, 0, "mean").residual(z, (y,))  # type: ignore[arg-type]
    torch.testing.assert_close(residual, truth, rtol=1e-6, atol=1e-6)  # float32, numbers below 4
