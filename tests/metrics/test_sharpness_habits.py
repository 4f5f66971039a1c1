"""The metrics of mini-batch sharpness as torchmetrics and training loops treat them, and what they cost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_curvature.metrics import (
    BatchLambdaMax,
    BatchSharpness,
    GradientNoiseInteraction,
    InteractionAwareSharpness,
    ModifiedBatchSharpness,
    RatioOfMeans,
    StepSharpness,
)
from lightning_curvature.operators import HessianOperator
from tests.distributed.launch import Launch
from tests.metrics.test_sharpness import CURVATURE, Point, fed, quadratic
from tests.operators.cases import Counter
from tests.operators.test_graphs import Mark, alive, no_collector  # noqa: F401
from tests.runs import Batch, classification, mlp

matplotlib.use("Agg")

# Means of a few draws in another order.
CLOSE = {"rel": 1e-12}
# Eigenvalues from another start: the square of their residual, 1e-6, over a gap of a hundredth at least.
RESTARTED = {"rel": 1e-10}
BATCHES = classification(6, 3)
DATA = classification(2, 4, seed=2)

Make = Callable[..., Any]
METRICS: dict[str, Make] = {
    "batch": BatchSharpness,
    "modified": ModifiedBatchSharpness,
    "step": StepSharpness,
    "lambda_max": lambda *args, **options: BatchLambdaMax(*args, tolerance=1e-6, **options),
    "ias": InteractionAwareSharpness,
    "ias, data": lambda *args, **options: InteractionAwareSharpness(*args, data=DATA, **options),
    "gni": GradientNoiseInteraction,
    "gni, data": lambda *args, **options: GradientNoiseInteraction(*args, data=DATA, **options),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def made(name: str, network: nn.Module | None = None) -> Any:
    return METRICS[name](network or mlp(4, 3, 3), F.cross_entropy)


def value_of(name: str, batches: list[Batch], network: nn.Module | None = None) -> float:
    return fed(made(name, network), batches)


def train(network: nn.Module) -> None:
    """Stand in for some training."""
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)


@every_metric
def test_clones_measure_the_model_that_is_trained(name: str) -> None:
    network = mlp(4, 3, 3)
    metric = made(name, network)
    cloned = [metric.clone(), copy.deepcopy(metric), MetricCollection([metric]).clone()[type(metric).__name__]]
    before = value_of(name, BATCHES, network)
    train(network)
    after = value_of(name, BATCHES, network)
    assert abs(after - before) > 1e-3 * abs(before)
    for one in (metric, *cloned):
        assert fed(one, BATCHES) == pytest.approx(after, **CLOSE)


@every_metric
def test_clones_and_pickles_go_on_from_where_it_was(name: str) -> None:
    metric, truth = made(name), value_of(name, BATCHES)
    # After an odd number, so that of pairs one waits.
    early = fed(metric, BATCHES[:3])
    for twin in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert fed(twin, BATCHES[3:]) == pytest.approx(truth, **CLOSE)
    assert metric.compute().item() == early
    if name.endswith("data"):
        assert metric.clone()._data[0][0] is DATA[0][0]  # all samples once in memory
    assert fed(metric, BATCHES[3:]) == pytest.approx(truth, **CLOSE)


@every_metric
def test_reset_forgets_the_draws(name: str) -> None:
    metric = made(name)
    fed(metric, BATCHES[:3])
    metric.reset()
    # The eigenvector stays.
    close = RESTARTED if name == "lambda_max" else CLOSE
    assert fed(metric, BATCHES[2:]) == pytest.approx(value_of(name, BATCHES[2:]), **close)
    assert metric.count() == {"step": 1, "ias": 2, "gni": 2}.get(name, 4)


@every_metric
def test_forward_gives_what_a_batch_adds_and_keeps_all(name: str) -> None:
    metric, paired = made(name), name in ("ias", "gni")
    for index, batch in enumerate(BATCHES):
        given = metric(*batch)
        if paired and index % 2 == 0:
            assert given.isnan()
            continue
        alone = value_of(name, BATCHES[index - 1 : index + 1] if paired else [batch])
        assert given.item() == pytest.approx(alone, nan_ok=True, **(RESTARTED if name == "lambda_max" else CLOSE))
        assert metric._forward_cache is given
    assert metric.compute().item() == pytest.approx(value_of(name, BATCHES), **CLOSE)


@every_metric
def test_a_batch_that_fails_loses_no_other(name: str) -> None:
    failing = [False]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if failing[0]:
            raise RuntimeError("no loss")
        return F.cross_entropy(z, y)

    metric = METRICS[name](mlp(4, 3, 3), loss)
    for batch in BATCHES[:3]:
        metric(*batch)
    for act in (metric, metric.update):
        failing[0] = True
        with pytest.raises(RuntimeError, match="no loss"):
            act(*BATCHES[5])
        failing[0] = False
    if name == "step":
        assert metric.compute().isnan()  # the last batch gave nothing
    assert fed(metric, BATCHES[3:]) == pytest.approx(value_of(name, BATCHES), **CLOSE)


def test_a_collection_keeps_them_apart() -> None:
    """Torchmetrics updates one metric for several whose states are close after the first batch."""
    network = mlp(4, 3, 3)
    # All gradients, and so all curvatures, below 1e-8, which it takes for equal.
    tiny = lambda z, y: 1e-12 * F.cross_entropy(z, y)  # noqa: E731
    for loss in (F.cross_entropy, tiny):
        for feed in (MetricCollection.update, MetricCollection.forward):
            collection = MetricCollection({name.replace(", ", "_"): METRICS[name](network, loss) for name in METRICS})
            for batch in BATCHES:
                feed(collection, *batch)
            found = collection.compute()
            for name in METRICS:
                expected = fed(METRICS[name](network, loss), BATCHES)
                assert found[name.replace(", ", "_")].item() == pytest.approx(expected, nan_ok=True, **CLOSE), name
            # Not by numbers that agree.
            assert len({round(value.item() / found["batch"].item(), 6) for value in found.values()}) == len(METRICS)


@every_metric
def test_merged_metrics_equal_one_over_the_union(name: str) -> None:
    first, second = made(name), made(name)
    for index, batch in enumerate(BATCHES):
        (first if index < 2 else second).update(*batch)
    first.merge_state(second)
    expected = made(name)
    fed(expected, BATCHES)
    if name == "step":
        last = [value_of(name, [BATCHES[1]]), value_of(name, [BATCHES[5]])]
        assert first.compute().item() == pytest.approx(sum(last) / 2.0, **CLOSE)
        return
    close = RESTARTED if name == "lambda_max" else CLOSE
    assert first.compute().item() == pytest.approx(expected.compute().item(), **close)
    # Sums of squares of differences: ten times the error of the values.
    assert first.standard_error().item() == pytest.approx(expected.standard_error().item(), rel=10.0 * close["rel"])
    if name in ("ias, data", "gni, data"):
        assert torch.allclose(first.over_batch_sizes([1, 8]), expected.over_batch_sizes([1, 8]), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("change", ["half", "double", "float", "bfloat16"])
def test_the_moments_stay_in_float64_when_a_module_changes_its_type(change: str) -> None:
    holder = nn.Module()
    holder.metric = RatioOfMeans()
    getattr(holder, change)()
    holder.metric.update(1.0 + 2.0**-40)
    assert holder.metric.compute().item() == 1.0 + 2.0**-40


def test_parameters_in_float64_are_not_rounded_to_float32() -> None:
    metric = BatchSharpness(Point(2.0**-40 + 1.0), quadratic)
    ones = torch.ones(1, dtype=torch.float64)
    # The gradient is h·2⁻⁴⁰, 0 in float32.
    metric.update(ones, ones)
    assert int(metric.skipped) == 0
    assert metric.compute().item() == pytest.approx(CURVATURE, **CLOSE)


# At θ = 1: gradients h·(1 − a) = 0 and −h.
STILL, MOVING = (torch.tensor([a], dtype=torch.float64) for a in (1.0, 2.0))


def test_a_mini_batch_without_gradient() -> None:
    point, mean, full = Point(1.0), torch.cat([STILL, MOVING]), CURVATURE
    batches = [(STILL, STILL), (MOVING, MOVING), (MOVING, MOVING), (STILL, STILL)]
    batch = BatchSharpness(point, quadratic)
    # Left out and counted.
    assert fed(batch, batches) == pytest.approx(full, **CLOSE)
    assert (batch.count(), int(batch.skipped)) == (2, 2)
    batch.reset()
    assert int(batch.skipped) == 0
    step = StepSharpness(point, quadratic)
    step.update(MOVING, MOVING)
    step.update(STILL, STILL)
    assert step.compute().isnan()
    step.update(MOVING, MOVING)
    assert (step.compute().item(), int(step.skipped)) == (pytest.approx(full, **CLOSE), 0)
    # So it is in a ratio of means, where it adds nothing; not in a pair with one that has a gradient.
    modified, ias = (kind(point, quadratic) for kind in (ModifiedBatchSharpness, InteractionAwareSharpness))
    assert fed(modified, batches) == pytest.approx(full, **CLOSE)
    assert (modified.count(), int(modified.skipped)) == (2, 2)
    assert fed(ias, batches) == pytest.approx(full, **CLOSE)
    assert (ias.count(), int(ias.skipped)) == (2, 0)
    fed(ias, [(STILL, STILL)] * 2)
    assert (ias.count(), int(ias.skipped)) == (2, 1)
    # GNI's denominator does not vanish with it.
    gni = GradientNoiseInteraction(point, quadratic, data=[(mean, mean)])
    # E[g_B²] = h²/2, g² = h²/4.
    assert fed(gni, batches) == pytest.approx(2.0 * full, **CLOSE)
    assert gni.count() == 4
    # Whether left out or not, it is one of the batches over which the law takes its means.
    ias = InteractionAwareSharpness(point, quadratic, data=[(mean, mean)])
    assert fed(ias, batches) == pytest.approx(full, **CLOSE)
    assert (ias.count(), int(ias.skipped)) == (2, 2)
    for law in (gni.noise_terms(), ias.noise_terms()):
        # Gradients of samples are 0 and −h: variance h²/4, curvature h.
        assert law.noise_square == pytest.approx(full**2 / 4.0, **CLOSE)
        assert law.noise_curvature == pytest.approx(full**3 / 4.0, **CLOSE)
    # Pairs of one with and one without: their dot products are all 0, and do not say how large g is.
    pairs = GradientNoiseInteraction(point, quadratic)
    pairs.update(STILL, STILL)
    pairs.update(MOVING, MOVING)
    assert pairs.compute().isnan()
    assert pairs.count() == 1


@pytest.mark.parametrize(
    ("name", "options", "forwards", "products"),
    [
        ("batch", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("modified", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("step", {}, [1, 1, 1, 1], [1, 1, 1, 1]),
        ("ias", {}, [0, 2, 0, 2], [0, 2, 0, 2]),
        ("gni", {}, [0, 2, 0, 2], [0, 2, 0, 2]),
        # The data are two batches: a forward of each, a product with each.
        ("ias, data", {}, [3, 3, 3, 3], [2, 2, 2, 2]),
        ("gni, data", {}, [3, 3, 3, 3], [2, 2, 2, 2]),
        ("ias, data", {"keep_graph": False}, [3, 3, 3, 3], [2, 2, 2, 2]),
        # The gradient beside the product.
        ("gni, data", {"keep_graph": False}, [5, 5, 5, 5], [2, 2, 2, 2]),
    ],
)
def test_cost(
    name: str, options: Any, forwards: list[int], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mlp(4, 3, 3)
    calls = dict.fromkeys(("_build", "product_of"), 0)

    def counted(method: str) -> Any:
        original = getattr(HessianOperator, method)

        def call(self: HessianOperator, *args: Any) -> Any:
            calls[method] += 1
            return original(self, *args)

        return call

    for method in calls:
        monkeypatch.setattr(HessianOperator, method, counted(method))
    counter, metric = Counter(network), METRICS[name](network, F.cross_entropy, **options)

    def spent(act: Callable[[], Any]) -> tuple[int, int, int]:
        """Forwards, of these with a graph that can be differentiated twice, and products."""
        before = (counter.count, *calls.values())
        act()
        now = (counter.count, *calls.values())
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    # With the data only their graphs are needed, not that of the mini-batch.
    plain = 1 if name.endswith("data") else 0
    expected = [(count, count - plain, product) for count, product in zip(forwards, products, strict=True)]
    assert [spent(lambda batch=batch: metric.update(*batch)) for batch in BATCHES[:4]] == expected
    assert spent(metric.compute) == spent(metric.standard_error) == (0, 0, 0)
    if plain:
        count = 4 if options.get("keep_graph", True) is False else 2
        assert spent(lambda: metric.over_batch_sizes([1, 2])) == (count, count, 2)


def test_eigenvalues_begin_with_the_last_vector() -> None:
    network = mlp(4, 3, 3)
    metric = BatchLambdaMax(network, F.cross_entropy, tolerance=1e-3)
    metric.update(*BATCHES[0])
    cold = metric.pairs
    counter = Counter(network)
    metric.update(*BATCHES[0])
    assert counter.count == 1
    assert cold is not None
    assert metric.pairs is not None
    assert torch.allclose(metric.pairs.values, cold.values, rtol=1e-5, atol=0.0)
    assert metric.pairs.matvecs < cold.matvecs


@every_metric
@pytest.mark.usefixtures("no_collector")
def test_no_graph_is_kept_between_batches(name: str) -> None:
    network = nn.Sequential(mlp(4, 3, 3), Mark())
    metric = made(name, network)
    for batch in BATCHES[:3]:
        metric.update(*batch)
        assert alive() == 0


@every_metric
def test_training_is_left_alone(name: str) -> None:
    network = mlp(4, 3, 3)
    for p in list(network.parameters())[::2]:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    fed(made(name, network), BATCHES)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [p.grad is None or bool((p.grad == 1.0).all()) for p in network.parameters()] == [True] * 4
    assert [p.grad is None for p in network.parameters()] == [False, True] * 2
    assert torch.equal(torch.get_rng_state(), random)


def test_errors_are_explained() -> None:
    network = mlp(4, 3, 3)
    for name in METRICS:
        with pytest.raises(
            ValueError, match=r"^curvature must be one of \('hessian', 'gauss_newton'\), got 'fisher': "
        ):
            METRICS[name](network, F.cross_entropy, curvature="fisher")
    with pytest.raises(ValueError, match=r"^data must hold at least one batch, got none: give a list of \(inputs, ta"):
        InteractionAwareSharpness(network, F.cross_entropy, data=[])
    with pytest.raises(ValueError, match=r"^data must be given where other batch sizes are wanted, got none: pass all"):
        GradientNoiseInteraction(network, F.cross_entropy).over_batch_sizes(1)
    metric = GradientNoiseInteraction(network, F.cross_entropy, data=DATA)
    with pytest.raises(ValueError, match=r"^mini-batches must be given first, got none: call update with each of them"):
        metric.over_batch_sizes(1)
    whole = tuple(torch.cat(parts) for parts in zip(*DATA, strict=True))
    metric.update(*whole)
    with pytest.raises(ValueError, match=r"^batch_size must be below the number of samples, got 8\.0 of 8: batches of"):
        metric.over_batch_sizes(1)
    assert metric.over_batch_sizes(8, replacement=True).isfinite()
    with pytest.raises(ValueError, match=r"^batch_size must not be above the number of samples, 8, got 9: only with"):
        metric.reset()
        metric.update(*DATA[0])
        metric.over_batch_sizes([1, 9])


def test_plot_draws_the_values() -> None:
    metric = made("batch")
    fed(metric, BATCHES)
    figure, _ = metric.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    _, axes = metric.plot([torch.tensor(v) for v in (1.0, 3.0, 2.0)])
    assert [float(y) for y in axes.lines[0].get_ydata()] == [1.0, 3.0, 2.0]
    matplotlib.pyplot.close("all")


def state(metric: Any) -> list[Any]:
    laws = metric.over_batch_sizes([1, 4]) if "data" in str(metric._shared) and metric._data else torch.zeros(1)
    return [metric.compute(), metric.standard_error(), metric.count(), laws]


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Each rank has some of the draws, rank 1 none of the last kind, and goes on after it has looked."""
    found: dict[str, Any] = {}
    for name in METRICS:
        metric = made(name)
        # Unequal shares, of whole pairs.
        fed(metric, BATCHES[:4] if rank == 0 else BATCHES[4:])
        found[name] = [state(metric), float(metric.moments[0]), state(metric)]
    for name in ("batch", "modified"):
        metric = made(name)
        for _ in range(3 + rank):
            metric.update(*BATCHES[0])
        found[f"{name}, constant"] = state(metric)
    lonely = made("batch")
    if rank == 0:
        fed(lonely, BATCHES)
    found["lonely"] = state(lonely)
    still = BatchSharpness(Point(1.0), quadratic)
    still.update(STILL, STILL)
    if rank == 0:
        still.update(MOVING, MOVING)
    with still.sync_context():
        found["skipped"] = int(still.skipped)
    return found


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Launch(__name__, ["on_ranks"], tmp_path_factory.mktemp("ranks")).results()["on_ranks"]


@every_metric
def test_two_ranks_give_the_numbers_of_one(name: str, by_rank: list[dict[str, Any]]) -> None:
    alone = made(name)
    fed(alone, BATCHES)
    expected = state(alone)
    if name == "step":
        last = [value_of(name, [BATCHES[3]]), value_of(name, [BATCHES[5]])]
        expected = [sum(last) / 2.0, abs(last[0] - last[1]) / 2.0, 2, torch.zeros(1)]
    for rank, found in enumerate(by_rank):
        (value, error, count, laws), own, again = found[name]
        close = RESTARTED if name == "lambda_max" else CLOSE
        assert value.item() == pytest.approx(float(expected[0]), **close)
        assert error.item() == pytest.approx(float(expected[1]), rel=10.0 * close["rel"])
        assert count == expected[2]
        assert torch.allclose(laws, expected[3], rtol=1e-10, atol=0.0)
        # Afterwards each has its own draws again, and looks another time.
        assert own == {"step": 1, "ias": 2 - rank, "gni": 2 - rank}.get(name, 4 - 2 * rank)
        assert [float(x) for x in again[:3]] == [float(x) for x in (value, error, count)]
        # The same bits on both.
        for mine, theirs in zip(found[name][0], by_rank[0][name][0], strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


def test_constant_draws_and_a_rank_without_any(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        for name in ("batch", "modified"):
            value, error, count, _ = found[f"{name}, constant"]
            assert value.item() == value_of(name, BATCHES[:1])
            assert error.item() == 0.0
            assert count == 7
        value, _, count, _ = found["lonely"]
        assert value.item() == pytest.approx(value_of("batch", BATCHES), **CLOSE)
        assert count == 6
        assert found["skipped"] == 2
