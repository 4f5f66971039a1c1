"""What modules hold and steps do that a measurement could trip over: measured right, or refused in a sentence."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor, spectrum
from lightning_curvature.evaluation import Evaluation
from lightning_curvature.linalg import Eigenpairs
from lightning_curvature.operators import GaussNewtonOperator, MicroBatch
from tests.callbacks.test_spectrum_errors import warned
from tests.callbacks.test_spectrum_values import TOLERANCE, monitor, rows, samples
from tests.oracles.hessian_spectrum import Curvature, Moments, Part, check_eigenvalue
from tests.runs import Capture, Classifier, make_trainer, mlp

SAMPLES, BATCH, LR = 40, 8, 0.1


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR)


def batches(size: int = BATCH, count: int = SAMPLES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(count)), batch_size=size)


def parts(size: int = SAMPLES) -> list[Part]:
    return [Part(x, y) for x, y in batches(size)]


def fitted(
    module: Any, *callbacks: pl.Callback, data: Any = None, steps: int = 5
) -> tuple[dict[int, dict[str, float]], Moments, list[str]]:
    """Rows by step, moments, and what was said; training reaches its end."""
    capture, moments = Capture(), Moments()
    trainer = make_trainer(moments, *callbacks, logger=capture, max_steps=steps, max_epochs=-1)
    said = warned(lambda: trainer.fit(module, batches() if data is None else data))
    assert trainer.global_step == steps
    return rows(capture), moments, said


def trained(make: Callable[[], Any], *callbacks: pl.Callback) -> dict[str, Tensor]:
    """Parameters and buffers after training."""
    torch.manual_seed(0)
    module = make()
    fitted(module, *callbacks)
    return module.state_dict()


def assert_same_training(make: Callable[[], Any], *callbacks: pl.Callback) -> None:
    watched, alone = trained(make, *callbacks), trained(make)
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def hessian(module: Any, moments: Moments, step: int) -> Tensor:
    return Curvature(module.network, module.loss, moments.all[step]).hessian(parts())


class Drawing(Classifier):
    """Scales its loss by numbers from an iterator that it holds."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.scales = iter(range(1, 100))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * next(self.scales)


def test_iterator_on_the_module_is_refused_and_not_consumed() -> None:
    module = Drawing()
    found, _, said = fitted(module, monitor("lambda_max", on_error="warn"))
    assert list(found) == [0, 2, 4]
    assert all(math.isnan(row["lambda_max"]) for row in found.values())
    assert set(said) == {
        "HessianSpectrumMonitor logs NaN: ValueError: training_step must not depend on what cannot be put back, got "
        "['scales'] on the module, iterators or open files: keep them elsewhere, or give objective=."
    }
    assert next(module.scales) == 6  # one for each step
    assert_same_training(Drawing, monitor("lambda_max", on_error="warn"))


def test_iterator_beside_an_objective() -> None:
    module = Drawing()
    found, moments, said = fitted(
        module, monitor("lambda_max", objective=lambda m, b: F.cross_entropy(m(b[0]), b[1]), every_n_train_steps=4)
    )
    assert said == []
    for step, row in found.items():
        check_eigenvalue(row, "lambda_max", hessian(module, moments, step), 0, TOLERANCE)
    assert next(module.scales) == 6


class Codebook(Classifier):
    """Writes in each step to a parameter that no optimizer holds, of a shape that no other has."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.code = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64), requires_grad=False)
        self.write = write

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.write(self.code)
        return super().training_step(batch, batch_idx) * (1.0 + 0.01 * self.code.mean())


@pytest.mark.parametrize("products", ["exact", "difference"])
@pytest.mark.parametrize("write", [lambda p: p.add_(1.0), lambda p: p.data.add_(1.0)], ids=["write", "data"])
def test_parameter_of_another_shape_is_left_as_it_was(write: Callable[[Tensor], Any], products: Any) -> None:
    make = lambda: Codebook(write)  # noqa: E731
    module = make()
    found, moments, said = fitted(module, monitor("lambda_max", products=products))
    assert said == []
    assert torch.equal(module.code, torch.full((5, 7), 5.0, dtype=torch.float64))
    # At step t the repeated step makes t + 1 of t: the loss is that which the step will have.
    for step, row in found.items():
        matrix = hessian(module, moments, step) * (1.0 + 0.01 * (step + 1))
        truth = float(torch.linalg.eigvalsh(matrix)[-1])
        # Differences are within 3e-10 of a product as they say of themselves; exact ones to 1e-12.
        assert row["lambda_max"] == pytest.approx(truth, rel=1e-8 if products == "difference" else 1e-11)
    assert_same_training(make, monitor("lambda_max", products=products))


class Counted(Classifier):
    """Halves gradients by hooks on parameters, and counts their calls outside of the module."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__(mlp(4, 6, 3), sgd)
        self.handles = [p.register_hook(self.hook(calls)) for p in self.network.parameters()]

    @staticmethod
    def hook(calls: list[int]) -> Callable[[Tensor], Tensor]:
        def halve(gradient: Tensor) -> Tensor:
            calls.append(1)
            return 0.5 * gradient

        return halve


@pytest.mark.parametrize("options", [{}, {"keep_graph": False}, {"products": "difference"}], ids=str)
def test_gradient_hooks_are_for_the_gradients_of_the_run(options: dict[str, Any]) -> None:
    calls: list[int] = []
    module = Counted(calls)
    hooks = [dict(p._backward_hooks or {}) for p in module.network.parameters()]
    found, moments, said = fitted(module, monitor("lambda_max", "lambda_min", **options))
    assert said == []
    assert len(calls) == 5 * 4  # once a step for each of four parameters
    assert [dict(p._backward_hooks or {}) for p in module.network.parameters()] == hooks
    for step, row in found.items():
        values = torch.linalg.eigvalsh(hessian(module, moments, step))
        # H of the loss, not half of it. As above.
        for key, truth in (("lambda_max", values[-1]), ("lambda_min", values[0])):
            assert row[key] == pytest.approx(float(truth), rel=1e-8 if options.get("products") else 1e-10), key
    assert_same_training(lambda: Counted([]), monitor("lambda_max", **options))


# Micro-batches, or batches of the probe loader, of other sizes than the eight samples of a step: the groups are eight.
SIZES: list[dict[str, Any]] = [{"micro_batch_size": size} for size in (3, 20, 40)]
SIZES += [{"probe_dataloader": batches(4)}, {"probe_dataloader": batches(SAMPLES)}]


def test_second_moment_is_that_of_steps_whatever_the_micro_batches() -> None:
    found = []
    for options in ({}, *SIZES):
        module = Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=5.0))
        ask = monitor("second_moment_contraction", **options)
        found_rows, moments, said = fitted(module, ask, steps=1)
        assert said == []
        row = found_rows[0]
        found.append(row["second_moment_excess"])
        curvature = Curvature(module.network, module.loss, moments.all[0])
        matrix = curvature.contraction([[part] for part in parts(BATCH)], lr=5.0)
        truth = float(torch.linalg.eigvalsh(matrix)[-1])
        assert row["second_moment_contraction"] == pytest.approx(truth, rel=1e-9), options
    # The same sums in another order, from the same random start: rounding, through some twenty products.
    assert found == pytest.approx([found[0]] * len(found), rel=1e-9)
    # Micro-batches for groups would give another number: at this step size by a lot.
    wrong = torch.linalg.eigvalsh(curvature.contraction([[part] for part in parts(20)], lr=5.0))[-1]
    assert abs(float(wrong) - 1.0 - found[0]) > 1e-3 * abs(found[0])


def test_no_stray_sample_where_the_loader_drops_the_last() -> None:
    """BatchNorm has no statistics of one sample, which the 33rd would be."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    module, sizes = Classifier(network, sgd), []
    network.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    data = DataLoader(TensorDataset(*samples(33)), batch_size=BATCH, shuffle=True, drop_last=True)
    found, _, said = fitted(module, monitor("lambda_max", "lambda_min"), data=data)
    assert set(sizes) == {BATCH}
    assert list(found) == [0, 2, 4]
    for row in found.values():
        assert row["lambda_max"] > 0.0
        assert row["lambda_max_converged"] == row["lambda_min_converged"] == 1.0
        assert all(math.isfinite(value) for value in row.values())
    assert len(said) == 1  # of BatchNorm
    assert said[0].startswith("BatchNorm in training mode couples samples")


class Toggling(Classifier):
    """Freezes all its parameters between two steps."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 3), sgd)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.network.requires_grad_(self.trainer.global_step != 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.network.requires_grad_(True)
        return super().training_step(batch, batch_idx)


def test_all_parameters_frozen_for_a_while() -> None:
    module = Toggling()
    found, moments, said = fitted(module, monitor("lambda_max", on_error="warn"))
    assert list(found) == [0, 2, 4]
    assert math.isnan(found[2]["lambda_max"])
    assert len(said) == 1
    assert said[0].startswith("HessianSpectrumMonitor logs NaN: ValueError: ")
    for step in (0, 4):
        check_eigenvalue(found[step], "lambda_max", hessian(module, moments, step), 0, TOLERANCE)
    assert_same_training(Toggling, monitor("lambda_max", on_error="warn"))


class Transient(Classifier):
    """Fails once, in one repetition of its step. What it counts is on no instance, where it would be put back."""

    failing_call: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if Transient.failing_call is not None:
            Transient.failing_call -= 1
            if Transient.failing_call < 0:
                Transient.failing_call = None
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return super().training_step(batch, batch_idx)


class Arm(pl.Callback):
    """Lets a call inside the measurement of step 2 fail."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        Transient.failing_call = 7 if trainer.global_step == 2 else None


def test_a_passing_error_costs_one_measurement() -> None:
    module = Transient(mlp(4, 6, 3), sgd)
    # Five micro-batches a product: the eighth call is in the second.
    found, moments, said = fitted(module, Arm(), monitor("lambda_max", keep_graph=False, on_error="warn"))
    assert Transient.failing_call is None
    assert math.isnan(found[2]["lambda_max"])
    assert len(said) == 1
    assert said[0].startswith("HessianSpectrumMonitor logs NaN: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    # To 1e-13 beside the residual: no differences, which are off by 1e-9.
    for step in (0, 4):
        check_eigenvalue(found[step], "lambda_max", hessian(module, moments, step), 0, TOLERANCE)


class Headed(Classifier):
    """Its forward gives features; the head is applied in the step."""

    def __init__(self) -> None:
        super().__init__(mlp(4, 6, 5), sgd)
        self.head = nn.Linear(5, 3, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self(batch[0])), batch[1])


GAUSS_NEWTON = "gauss_newton_lambda_max"


def test_what_gauss_newton_leaves_out_is_said_once() -> None:
    torch.manual_seed(0)
    found, _, said = fitted(Headed(), monitor(GAUSS_NEWTON))
    assert len(found) == 3
    assert len(said) == 1
    assert said[0].startswith("the Gauss–Newton matrix leaves out ")
    for module, options in (
        (Headed(), {"outputs": "head"}),
        (Classifier(mlp(4, 6, 3), sgd), {}),
    ):
        assert fitted(module, monitor(GAUSS_NEWTON, **options))[2] == []


def test_mismatch_is_the_share_of_the_gradient_beside_the_outputs() -> None:
    torch.manual_seed(0)
    module = Headed()
    x, y = samples(BATCH)
    parameters = list(module.parameters())

    def evaluate(head_inside: bool) -> Evaluation:
        features = module.network(x)
        logits = module.head(features)
        return Evaluation(F.cross_entropy(logits, y), logits if head_inside else features)

    gradient = torch.autograd.grad(evaluate(True).loss, parameters)
    norm = lambda found: math.sqrt(sum(float(g.square().sum()) for g in found))  # noqa: E731
    head = {id(p) for p in module.head.parameters()}
    beside = norm([g for g, p in zip(gradient, parameters, strict=True) if id(p) in head])
    for inside, truth in ((False, beside / norm(gradient)), (True, 0.0)):
        operator = GaussNewtonOperator([MicroBatch(lambda: evaluate(inside), 1.0)], parameters)  # noqa: B023
        assert operator.mismatch is None
        operator(operator.space.random(torch.Generator().manual_seed(0)))
        # Two sums of the same roundings of 1e-16.
        assert operator.mismatch == pytest.approx(truth, rel=1e-12, abs=1e-14)
    assert 0.1 < beside / norm(gradient) < 0.99


class OpaqueTanh(torch.autograd.Function):
    """tanh whose backward is made by numpy: autograd takes its result for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.from_numpy(gradient.detach().numpy() * (1.0 - y.detach().numpy() ** 2))


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OpaqueTanh.apply(x)


def test_a_wrong_second_derivative_is_seen() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), Opaque(), nn.Linear(6, 3)).double()
    found, _, said = fitted(Classifier(network, sgd), monitor("lambda_max", tolerance=1e-3))
    assert len(found) == 3
    for row in found.values():
        assert row["lambda_max_converged"] == 0.0
        assert row["lambda_max_error"] > 1e-3
    assert len(said) == 1  # though the number in it is another at each step
    assert said[0].startswith("products for lambda_max are not symmetric (by ")
    # By differences, as the sentence advises, it is that of tanh.
    module = Classifier(network, sgd)
    found, moments, said = fitted(module, monitor("lambda_max", products="difference"))
    assert said == []
    smooth = Classifier(nn.Sequential(network[0], nn.Tanh(), network[2]), sgd)
    for step, row in found.items():
        truth = float(torch.linalg.eigvalsh(hessian(smooth, moments, step))[-1])
        assert row["lambda_max"] == pytest.approx(truth, rel=1e-8)


class Diagonal(pl.LightningModule):
    """½ Σ dᵢ wᵢ²: its Hessian has the eigenvalues dᵢ. From step 1 on another than at step 0 is the largest."""

    def __init__(self, size: int, complex_weight: bool = False) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.weight = nn.Parameter(torch.ones(size, dtype=torch.complex64 if complex_weight else torch.float32))
        values = torch.rand(size, generator=torch.Generator().manual_seed(9)) - 0.2
        values[0] = 10.0
        self.register_buffer("values", values)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values[1:2] = 11.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.values * self.network.weight.abs().square()).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvalue_that_overtakes_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[Eigenpairs] = []
    search = spectrum.eigenpairs

    def noted(*args: Any, **options: Any) -> Eigenpairs:
        searches.append(search(*args, **options))
        return searches[-1]

    monkeypatch.setattr(spectrum, "eigenpairs", noted)
    capture = Capture()
    watch = monitor("lambda_max", every_n_train_steps=1, tolerance=1e-3, seed=seed)
    trainer = make_trainer(watch, logger=capture, max_steps=2, precision="32-true")
    trainer.fit(Diagonal(20_000), DataLoader(torch.zeros(4, 1), batch_size=2))
    # Residuals of 0.01 beside distances of 9 and 1; roundings of 6e-8 of some sums.
    assert [row["lambda_max"] for row in rows(capture).values()] == pytest.approx([10.0, 11.0], abs=1e-3)
    assert [row["lambda_max_upper"] for row in rows(capture).values()] == [pairs.upper for pairs in searches]
    assert all(pairs.values[0] <= pairs.upper <= 1.15 * pairs.values[0] for pairs in searches)


def test_one_parameter_has_a_trace() -> None:
    capture = Capture()
    trainer = make_trainer(monitor("hessian_trace"), logger=capture, max_steps=1, precision="32-true")
    trainer.fit(Diagonal(1), DataLoader(torch.zeros(4, 1), batch_size=2))
    (row,) = rows(capture).values()
    # One product in float32.
    assert row == {"hessian_trace": pytest.approx(10.0, rel=1e-6), "hessian_trace_stderr": 0.0}


def test_complex_parameters_are_refused() -> None:
    trainer = make_trainer(monitor("lambda_max"), max_steps=1)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(Diagonal(3, complex_weight=True), DataLoader(torch.zeros(4, 1), batch_size=2))
    assert str(caught.value) == (
        "HessianSpectrumMonitor must find real parameters, got complex ones: train their real and imaginary parts."
    )


def test_loaded_eigenvectors_are_not_altered() -> None:
    first = monitor("lambda_max")
    fitted(Classifier(mlp(4, 6, 3), sgd), first, steps=1)
    state = first.state_dict()
    (loaded,) = state["vectors"]["hessian"]
    before = loaded.clone()
    second = monitor("lambda_max")
    second.load_state_dict(state)
    fitted(Classifier(mlp(4, 6, 3), sgd), second)
    assert torch.equal(loaded, before)
    assert state["vectors"]["hessian"][0] is loaded
    assert second.state_dict()["vectors"]["hessian"][0] is not loaded


@pytest.mark.parametrize("error", [None, RuntimeError("ends training")])
def test_the_module_is_let_go_of_after_fit(error: Exception | None) -> None:
    quantities = ("lambda_max", "hessian_trace", "gauss_newton_lambda_max", "second_moment_contraction")
    watch = [monitor(*quantities), DirectionalCurvatureMonitor(every_n_train_steps=2)]

    class Ending(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if error is not None and batch_idx == 3:
                raise error

    module = Ending(mlp(4, 6, 3), sgd)
    if error is None:
        fitted(module, *watch)
    else:
        with pytest.raises(RuntimeError, match="ends training"):
            fitted(module, *watch)
        error.__traceback__ = None
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None
    assert isinstance(watch[0], HessianSpectrumMonitor)  # which are there still
