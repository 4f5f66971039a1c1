"""Every estimator against the dense oracle: parameter groups, schedulers, kinds of layers, kinds of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers.runs import Batch, Classifier, MakeOptimizer, Outcome, classification, mlp, run
from tests.helpers.setups import regression
from tests.oracles.along_step import check, monitors, rows_of
from tests.oracles.dense import Loss


def momentum(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5)


def adamw(m: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.5)


def fit(network: nn.Module, make: MakeOptimizer = momentum, batches: int = 3, **options: Any) -> Outcome:
    return run(Classifier(network.double(), make), classification(batches), *monitors(), **options)


class Unused(nn.Module):
    """A layer stands beside the used ones and never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(4, 2), mlp(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Tied(nn.Module):
    """One weight matrix in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Shared(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


def frozen() -> nn.Module:
    network = mlp(4, 6, 5, 3)
    network[2].requires_grad_(False)
    return network


def batch_norm(training: bool = True) -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    network[1].train(training)
    return network


def dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dropout": dropout,
    "batch_norm": batch_norm,
    "batch_norm_in_eval_mode": lambda: batch_norm(training=False),
    "frozen_layer": frozen,
    "layer_without_gradient": Unused,
    "tied_weights": Tied,
    "shared_layer": Shared,
}


@pytest.mark.parametrize("make", [momentum, adamw])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.thinned(6)
def test_layers(name: str, make: MakeOptimizer) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    parameters = dict(network.named_parameters())
    check(fit(network, make), steps=3)
    assert {key: id(p) for key, p in network.named_parameters()} == {key: id(p) for key, p in parameters.items()}


@pytest.mark.parametrize("name", ["dropout", "batch_norm"])
def test_windows_repeat_every_batch_in_the_state_it_was_seen_in(name: str) -> None:
    outcome = fit(NETWORKS[name](), adamw, batches=5, accumulate_grad_batches=3)
    check(outcome, steps=2)


def test_batch_norm_ends_with_the_statistics_of_training_alone() -> None:
    """Evaluations run the layer many times, also at other parameters; the statistics are those without them."""
    watched, alone = batch_norm(), batch_norm()
    fit(watched, momentum)
    run(Classifier(alone.double(), momentum), classification(3))
    assert int(watched[1].num_batches_tracked) == 3
    assert torch.equal(watched[1].running_mean, alone[1].running_mean)
    assert torch.equal(watched[1].running_var, alone[1].running_var)


def unequal_groups(m: Any, first: float = 0.05, second: float = 0.4) -> torch.optim.Optimizer:
    layers = [m.network[0], m.network[2]]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, (first, second), strict=True)]
    return torch.optim.SGD(groups, momentum=0.5)


def test_groups_with_unequal_rates_are_in_units_of_the_first() -> None:
    outcome = fit(mlp(4, 6, 3), unequal_groups)
    truths = check(outcome, steps=3)
    for truth, row, step in zip(truths, rows_of(outcome), outcome.steps, strict=True):
        assert step.lr == 0.05
        # λη = dᵀHd/gᵀd: the form that means the same whatever the rates are.
        assert row["lambda_dir"] * 0.05 == pytest.approx(truth.hessian / truth.descent, rel=1e-9)


def test_a_first_group_at_rest_leaves_the_units_to_the_second() -> None:
    """A rate of 0 (a layer not yet released) has no 2/η."""
    outcome = fit(mlp(4, 6, 3), lambda m: unequal_groups(m, first=0.0))
    for step in outcome.steps:
        step.lr = 0.4
    check(outcome, steps=3)


def scheduled(m: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(m.parameters(), lr=0.4, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scheduler_moves_the_rate_only_after_the_step_was_measured(accumulate: int) -> None:
    outcome = fit(mlp(4, 6, 3), scheduled, batches=3 * accumulate, accumulate_grad_batches=accumulate)
    check(outcome, steps=3)
    # Halved after each step, starting at 0.4: the edge doubles from 5.
    assert [row["two_over_lr"] for row in rows_of(outcome)] == pytest.approx([5.0, 10.0, 20.0], rel=1e-12)


def flat_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def summed_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="sum")


def halved_squares(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(-1).mean()


def smoothed_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, label_smoothing=0.1)


def several_labels(count: int = 3) -> list[Batch]:
    return [(x, (y > 0).double()) for x, y in regression(count)]


def one_label(count: int = 3) -> list[Batch]:
    return [(x, (y[:, :1] > 0).double()) for x, y in regression(count)]


def labelled(count: int = 3) -> list[Batch]:
    return classification(count)


LOSSES: dict[str, tuple[Loss, Callable[[], list[Batch]], int]] = {
    "cross_entropy": (F.cross_entropy, labelled, 3),
    "summed_cross_entropy": (summed_cross_entropy, labelled, 3),
    # Smoothing changes the targets: neither the Hessian of the outputs nor the weights of the positions.
    "smoothed_cross_entropy": (smoothed_cross_entropy, labelled, 3),
    "mean_squared_error": (F.mse_loss, regression, 3),
    "half_squared_error": (halved_squares, regression, 3),
    "binary_cross_entropy": (F.binary_cross_entropy_with_logits, several_labels, 3),
    "binary_cross_entropy_of_one_output": (F.binary_cross_entropy_with_logits, one_label, 1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.thinned(3)
def test_losses(name: str) -> None:
    loss, make_batches, width = LOSSES[name]
    module = Classifier(mlp(4, 6, width), lambda m: torch.optim.SGD(m.parameters(), lr=0.2), loss)
    check(run(module, make_batches(), *monitors()), steps=3)


class Segmenter(nn.Module):
    """Outputs (B, C, H, W): the classes stand in the second place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Transformer(nn.Module):
    """One causal block over tokens, outputs (B, T, V); its fused attention has no second derivative."""

    def __init__(self, vocabulary: int = 5, width: int = 4, rate: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.query, self.out = nn.Linear(width, 3 * width), nn.Linear(width, vocabulary)
        self.rate = rate

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.query(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate)
        return self.out(x + mixed.transpose(1, 2).flatten(-2))


def tokens(count: int, ignored: bool) -> list[Batch]:
    g = torch.Generator().manual_seed(2)
    batches = [(torch.randint(5, (3, 4), generator=g), torch.randint(5, (3, 4), generator=g)) for _ in range(count)]
    if ignored:
        # As many as the batch's number says: batches of one window weigh the same however many targets they have.
        for index, (_, y) in enumerate(batches):
            y.view(-1)[: 2 * index + 1] = -100
    return batches


def pixels(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64)  # noqa: E731
    return [(draw(), torch.randint(3, (2, 3, 3), generator=g)) for _ in range(count)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.thinned(4)
def test_sequences_and_ignored_targets(ignored: bool, accumulate: int) -> None:
    torch.manual_seed(0)
    module = Classifier(Transformer().double(), adamw, flat_cross_entropy)
    # A window of three and the one that is left over.
    count = 2 if accumulate == 1 else 4
    outcome = run(module, tokens(count, ignored), *monitors(), accumulate_grad_batches=accumulate)
    with sdpa_kernel(SDPBackend.MATH):
        check(outcome, steps=2)


def test_dropout_inside_attention() -> None:
    torch.manual_seed(0)
    module = Classifier(Transformer(rate=0.3).double(), momentum, flat_cross_entropy)
    outcome = run(module, tokens(3, ignored=True), *monitors())
    with sdpa_kernel(SDPBackend.MATH):
        check(outcome, steps=3)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Tanh(), nn.Linear(4, 5)).double()
    module = Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.3), flat_cross_entropy)
    outcome = run(module, tokens(4, ignored=False), *monitors(), accumulate_grad_batches=2)
    network[0].sparse = False  # the dense oracle takes dense gradients
    check(outcome, steps=2)


def test_classes_in_the_second_place() -> None:
    torch.manual_seed(0)
    check(run(Classifier(Segmenter().double(), momentum), pixels(3), *monitors()), steps=3)
