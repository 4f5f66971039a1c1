"""Terms of λ_dir by module, against dense matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.counting import Passes
from tests.helpers.directional import monitor
from tests.helpers.runs import Classifier, Step, classification, mlp, rows, run

NAMES = ("network.0", "network.2")
SIZES = [4 * 6 + 6, 6 * 3 + 3]


def learner(lr: float = 0.3, momentum: float = 0.9) -> Classifier:
    return Classifier(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=lr, momentum=momentum))


def terms_of(module: Classifier, step: Step) -> tuple[Tensor, Tensor]:
    """Terms of dᵀHd and gᵀd of both layers, by the dense Hessian of the window's mean loss."""
    before, after = (nn.utils.parameters_to_vector(list(side.values())) for side in (step.before, step.after))
    d = before - after
    quadratics, descents = torch.zeros(2).double(), torch.zeros(2).double()
    for part in step.parts:

        def loss(flat: Tensor, x: Tensor = part.x, y: Tensor = part.y) -> Tensor:
            pieces = flat.split([p.numel() for p in step.before.values()])
            values = {n: q.reshape(p.shape) for (n, p), q in zip(step.before.items(), pieces, strict=True)}
            return module.loss(torch.func.functional_call(module.network, values, (x,)), y)

        hessian = torch.autograd.functional.hessian(loss, before)
        gradient = torch.autograd.functional.jacobian(loss, before)
        quadratics += torch.stack([part.sum() for part in (d * (hessian @ d)).split(SIZES)]) / len(step.parts)
        descents += torch.stack([part.sum() for part in (d * gradient).split(SIZES)]) / len(step.parts)
    return quadratics, descents


@pytest.mark.parametrize("accumulate", [1, 2])
def test_terms_add_up_to_the_curvature(accumulate: int) -> None:
    follow, module = monitor(estimators=("hvp",), by_module=True), learner()
    outcome = run(module, classification(4), follow, accumulate_grad_batches=accumulate)
    wholes, found = rows(outcome.capture), rows(outcome.capture, "curvature_by_module")
    assert len(found) == len(outcome.steps) == 4 // accumulate
    for step, whole, row in zip(outcome.steps, wholes.values(), found.values(), strict=True):
        quadratics, descents = terms_of(module, step)
        # Sums of some hundred products in either; a term is compared with the size of the whole.
        unit = step.lr * float(descents.sum())
        curvatures = [row[f"lambda_dir/{name}"] for name in NAMES]
        assert curvatures == pytest.approx((quadratics / unit).tolist(), rel=0.0, abs=1e-12 * whole["lambda_dir"])
        assert sum(curvatures) == pytest.approx(whole["lambda_dir"], rel=1e-12)
        slopes = [row[f"descent/{name}"] for name in NAMES]
        assert slopes == pytest.approx((descents / step.lr).tolist(), rel=0.0, abs=1e-12 * whole["descent"])
        assert len(row) == 4
    assert follow.result is not None
    assert follow.result.modules is not None
    assert follow.result.modules.values() == row
    assert follow.charts(outcome.trainer)["curvature: lambda_dir by module"] == [
        f"curvature_by_module/lambda_dir/{name}" for name in NAMES
    ]


def test_layers_that_take_no_part_have_no_terms() -> None:
    """Frozen layers are no modules of the optimizer's parameters; unused ones have terms of zero."""
    module = learner()
    module.spare = nn.Linear(3, 3).double()
    for p in module.network[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)
    outcome = run(module, classification(2), monitor(estimators=("hvp",), by_module=True))
    row = rows(outcome.capture, "curvature_by_module")[1]
    assert {key.partition("/")[2] for key in row} == {"network.2", "spare"}
    assert row["lambda_dir/spare"] == row["descent/spare"] == 0.0
    assert row["lambda_dir/network.2"] == pytest.approx(rows(outcome.capture)[1]["lambda_dir"], rel=1e-12)


def test_uphill_steps_have_slopes_alone() -> None:
    """A step against the gradient."""

    class Ascent(torch.optim.SGD):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module.parameters(), lr=0.01, maximize=True)

    module = Classifier(mlp(4, 6, 3), Ascent)
    outcome = run(module, classification(1), monitor(estimators=("hvp",), by_module=True))
    row = rows(outcome.capture, "curvature_by_module")[0]
    assert all(math.isnan(row[f"lambda_dir/{name}"]) for name in NAMES)
    assert sum(row[f"descent/{name}"] for name in NAMES) == pytest.approx(rows(outcome.capture)[0]["descent"])
    assert rows(outcome.capture)[0]["descent"] < 0.0


def test_no_pass_more_and_the_same_training() -> None:
    counts, trained, wholes = [], [], []
    for options in ({"by_module": False}, {"by_module": True}):
        module = learner()
        passes = Passes(module.network)
        outcome = run(module, classification(4), passes, monitor(estimators=("hvp", "kl"), **options))
        counts.append((passes.forwards, passes.backwards))
        trained.append({name: p.detach().clone() for name, p in module.named_parameters()})
        wholes.append(rows(outcome.capture))
    assert counts[0] == counts[1]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert wholes[0] == wholes[1]


def test_it_needs_exact_products() -> None:
    with pytest.raises(ValueError) as caught:
        monitor(by_module=1)
    assert str(caught.value) == (
        "by_module must come with the estimator 'hvp', got 1 with ['kl', 'finite_difference']: add it, or leave "
        "by_module out."
    )
