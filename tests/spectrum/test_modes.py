"""Dropout, BatchNorm and precision: what is random is fixed, what couples samples is said, what rounds is kept out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import HessianSpectrumMonitor
from lightning_curvature.reporting.loggers import CurvatureWarning
from tests.helpers.counting import on_forward
from tests.helpers.runs import Classifier, mlp, rows
from tests.helpers.spectrum import BATCH, SAMPLES, monitor, samples, whole
from tests.helpers.spectrum_setups import QUANTITIES, check, fit, loader, same_rows, sgd
from tests.oracles.hessian_spectrum import Curvature, Part, check_eigenvalue

ONE_BATCH_NORM = pytest.mark.filterwarnings("ignore:BatchNorm in training mode couples samples")


def network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


def with_dropout(rate: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return network(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(rate), nn.Linear(6, 3))


def with_batchnorm() -> nn.Module:
    torch.manual_seed(0)
    return network(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def with_both() -> nn.Module:
    torch.manual_seed(0)
    return network(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3))


def drawn(parts: list[tuple[Tensor, Tensor]]) -> list[Part]:
    """Parts that a measurement went through, with the random state in which the network met each."""
    x, y = samples()
    return [Part(part, y[same_rows(part, x)], rng) for part, rng in parts]


def test_dropout_has_one_mask_a_batch() -> None:
    """The Hessian is that of the masks drawn; they are the same in H and G, and at every step."""
    module = Classifier(with_dropout(), sgd)
    capture, moments, seen = fit(module, loader(), monitor(*QUANTITIES))
    batches = [drawn(parts) for parts in seen.measured()]
    assert len(batches) == 2
    batches[0].pop(0)  # the check of the first
    for parts in batches:
        assert len(parts) == 8  # four for H, four for G
        for part, first in zip(parts, batches[0][:4] * 2, strict=True):
            assert torch.equal(part.x, first.x)
            assert torch.equal(part.rng, first.rng)
    assert len({part.rng.numpy().tobytes() for part in batches[0][:4]}) == 4  # each batch its own
    check(module, capture, moments, batches[0][:4])
    # It would not be that of another draw.
    other = Curvature(module.network, module.loss, moments[0]).hessian([Part(*samples(), torch.get_rng_state())])
    with pytest.raises(AssertionError):
        check_eigenvalue(rows(capture)[0], "lambda_max", other, 0, tolerance=1e-6)


@pytest.mark.slow
def test_equal_seeds_give_equal_bits() -> None:
    def both(*seeds: int) -> list[list[dict[str, float]]]:
        module = Classifier(with_dropout(), sgd)
        monitors = [
            HessianSpectrumMonitor(
                quantities=(*QUANTITIES, "hessian_trace"), every_n_train_steps=2, seed=seed, prefix=f"p{number}"
            )
            for number, seed in enumerate(seeds)
        ]
        capture, _, _ = fit(module, loader(), *monitors)
        return [list(rows(capture, f"p{number}").values()) for number in range(len(seeds))]

    first, second, third = both(0, 0, 1)
    assert len(first) == 2
    assert first == second
    assert abs(first[0]["lambda_max"] - third[0]["lambda_max"]) > 1e-3  # other masks
    # Nor does a monitor see that others stand beside it.
    assert both(0) == [first]


@pytest.mark.parametrize("make", [with_dropout, with_batchnorm, with_both])
@pytest.mark.thinned(3)
def test_eval_mode(make: Any) -> None:
    """No dropout, and running statistics as constants: those that the step finds."""
    module = Classifier(make(), sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, probe_mode="eval"))
    check(module, capture, moments, training=False)


@ONE_BATCH_NORM
@pytest.mark.parametrize("micro", [None, 15, 30])
@pytest.mark.thinned(3)
def test_batchnorm_in_training_mode(micro: int | None) -> None:
    """Each micro-batch by its own statistics, weighted by its size."""
    module = Classifier(with_batchnorm(), sgd)
    capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, micro_batch_size=micro))
    x, y = samples()
    size = micro or BATCH
    check(module, capture, moments, [Part(x[i : i + size], y[i : i + size]) for i in range(0, SAMPLES, size)])


@pytest.mark.parametrize(("mode", "said"), [("train", 1), ("eval", 0)])
def test_batchnorm_is_spoken_of(mode: Any, said: int, recwarn: pytest.WarningsRecorder) -> None:
    module = Classifier(with_batchnorm(), sgd)
    fit(module, loader(), monitor("lambda_max", probe_mode=mode))
    messages = [str(w.message) for w in recwarn if issubclass(w.category, CurvatureWarning)]
    assert len(messages) == said
    for message in messages:
        assert message.startswith("BatchNorm in training mode couples samples: H is that of the mean of micro-batches'")
        assert message.endswith("probe_mode='eval' takes the running statistics instead.")


def test_a_module_that_trains_in_eval_mode() -> None:
    """probe_mode="train" leaves modes as the user set them: a frozen BatchNorm stays frozen."""

    class Frozen(Classifier):
        def on_train_start(self) -> None:
            self.network[1].eval()

    module = Frozen(with_batchnorm(), sgd)
    with pytest.warns(CurvatureWarning, match="BatchNorm"):
        capture, moments, _ = fit(module, loader(), monitor(*QUANTITIES, probe_mode="train"))
    check(module, capture, moments, training=False)


# float32: a product sums some hundred terms, each rounded to 6e-8 of its size; an eigenvalue is off by that at most.
SINGLE = 100 * 6e-8


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_single_precision(precision: str) -> None:
    """Under bf16-mixed the parameters are float32, and the probe leaves autocast: the value is that of float32."""
    x, y = samples(dtype=torch.float32)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), sgd)
    seen: list[torch.dtype] = []
    on_forward(module.network, lambda m, args, output: seen.append(output.dtype))
    quantities = (*QUANTITIES, "preconditioned_lambda_max", "second_moment_contraction")
    capture, moments, _ = fit(module, loader(x, y), monitor(*quantities, tolerance=1e-3), precision=precision)
    assert set(seen) == ({torch.float32} if precision == "32-true" else {torch.float32, torch.bfloat16})
    groups = [[Part(x[i : i + BATCH], y[i : i + BATCH])] for i in range(0, SAMPLES, BATCH)]
    for step, row in rows(capture).items():
        curvature = Curvature(module.network, module.loss, moments[step])
        hessian = curvature.hessian([Part(x, y)])
        for key, matrix, place in (
            ("lambda_max", hessian, -1),
            ("lambda_min", hessian, 0),
            ("gauss_newton_lambda_max", curvature.gauss_newton([Part(x, y)]), -1),
            ("preconditioned_lambda_max", hessian, -1),
            ("second_moment_contraction", curvature.contraction(groups, lr=0.3), -1),
        ):
            values = torch.linalg.eigvalsh(matrix)
            error = row[f"{key}_error"] * abs(row[key])
            assert error <= 1e-3 * abs(row[key]) + SINGLE
            # The noise of the products moves the value by itself.
            assert abs(row[key] - float(values[place])) <= error + SINGLE * float(values.abs().max()), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_of_the_run_shows_in_the_error(precision: str) -> None:
    """Products in bfloat16 are noisy, and the error bar tells. There is no way around it where parameters are so."""
    x, y = samples(dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32)
    module = Classifier(mlp(4, 6, 3, dtype=torch.float32), sgd)
    follow = monitor("lambda_max", tolerance=1e-3, **({"probe_precision": None} if precision == "bf16-mixed" else {}))
    capture, moments, _ = fit(module, loader(x, y), follow, precision=precision)
    for step, row in rows(capture).items():
        hessian = Curvature(module.network, module.loss, moments[step]).hessian([Part(x, y)])
        truth = float(torch.linalg.eigvalsh(hessian)[-1])
        # bfloat16 has 8 bits: each of a handful of factors is off by up to 2⁻⁹.
        assert abs(row["lambda_max"] - truth) <= 5 * 2**-8 * truth
        assert 1e-4 < row["lambda_max_error"] < 5 * 2**-8


class Attention(nn.Module):
    """One layer of attention over four tokens of one feature each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Linear(1, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(-1))
        q, k, v = F.linear(h, self.mix.in_proj_weight, self.mix.in_proj_bias).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(dim=1))


@pytest.mark.slow
def test_fused_attention() -> None:
    torch.manual_seed(0)
    module = Classifier(Attention().double(), sgd)
    follow = monitor(*QUANTITIES, products="exact")
    capture, moments, _ = fit(module, loader(), follow)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check(module, capture, moments, whole())
