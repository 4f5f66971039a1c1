"""What of a measurement cannot be trusted is said: equal eigenvalues, losses that are no means, rounding."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import CurvatureWarning
from tests.helpers.noise import BATCH, evaluated, module_of, monitor, samples
from tests.helpers.once import OnceSum
from tests.helpers.runs import Classifier, make_trainer
from tests.helpers.setups import sgd


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _said(record: pytest.WarningsRecorder, words: str) -> list[str]:
    return [str(one.message) for one in record if words in str(one.message)]


def test_equal_eigenvalues_have_no_eigenvectors() -> None:
    """The last layer under a squared error: H is a multiple of I ⊗ E[aaᵀ], each eigenvalue three times."""
    data = DataLoader(TensorDataset(_normal(40, 4), _normal(40, 3, seed=1)), batch_size=BATCH)
    module = Classifier(nn.Sequential(nn.Linear(4, 3)).double(), sgd, F.mse_loss)
    with pytest.warns(CurvatureWarning) as caught:
        result = monitor("0.weight", top=12).evaluate(module, data, trainer=make_trainer()).result
    # Of twelve eigenvalues eight are equal to the one before: 8 of 11.
    assert result.degenerate == pytest.approx(8 / 11)
    (sentence,) = _said(caught, "eigenvalues of the Hessian must differ")
    assert "got 73% of those of 'network.0.weight' equal to the one before" in sentence
    assert sentence.endswith("Choose another parameter.")


def test_other_eigenvalues_are_taken_for_what_they_are(recwarn: pytest.WarningsRecorder) -> None:
    module = module_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())
    assert evaluated(module, "0.weight").degenerate == 0.0
    assert not _said(recwarn, "must differ")


def test_one_eigenvalue_is_the_reason_for_no_rank_correlation() -> None:
    """A bias under a squared error."""
    data = DataLoader(TensorDataset(_normal(40, 4), _normal(40, 5, seed=1)), batch_size=BATCH)
    module = Classifier(nn.Sequential(nn.Linear(4, 5)).double(), sgd, F.mse_loss)
    with pytest.warns(CurvatureWarning) as caught:
        result = monitor("0.bias", top=5).evaluate(module, data, trainer=make_trainer()).result
    assert math.isnan(result.spearman)
    (sentence,) = _said(caught, "noise_spearman")
    assert sentence == (
        "noise_spearman is NaN: all eigenvalues of the Hessian are the same, so that its eigenvectors are any "
        "directions."
    )


def test_class_weights_make_another_loss() -> None:
    weights = torch.tensor([9.0, 1.0, 1.0], dtype=torch.float64)

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=weights)

    def mean(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    network = nn.Sequential(nn.Linear(4, 3)).double()
    with pytest.warns(CurvatureWarning) as caught:
        found = evaluated(module_of(network, weighted), "0.weight")
    (sentence,) = _said(caught, "not the mean")
    assert "C and H are of samples one by one, all alike, and not of the loss that is trained" in sentence
    # As it says: a sample alone has the weight that divides it away.
    torch.testing.assert_close(found.curvatures, evaluated(module_of(network, mean), "0.weight").curvatures)


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_loss_that_is_differentiable_once_has_no_hessian(name: str) -> None:
    """By the sums of a linear layer and by products: what its backward makes would be taken for a constant."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    module = module_of(network, lambda z, y: OnceSum.apply(z - F.one_hot(y, 3)))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        evaluated(module, name)


def test_a_mean_is_nothing_to_be_told(recwarn: pytest.WarningsRecorder) -> None:
    evaluated(module_of(nn.Sequential(nn.Linear(4, 3)).double()), "0.weight")
    assert not _said(recwarn, "not the mean")


def test_directions_that_rounding_alone_tells_apart_are_in_no_number() -> None:
    """Four samples of three classes bend the loss in eight directions at most, through ReLU units."""
    module = Classifier(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), sgd)
    x, y = samples(4).tensors
    few = DataLoader(TensorDataset(x.float(), y), batch_size=2)
    result = monitor("0.weight", top=20).evaluate(module, few, trainer=make_trainer(precision="32-true")).result
    assert len(result.curvatures) == 20
    assert 0 < result.curved <= 8
    # A mean of correlations, were there more than rounding in them.
    assert 0.0 <= result.coupling <= 1.0
    assert f"{result.curved} of 20 directions" in str(result)
    assert result.gamma is None or result.gamma.points <= result.curved


@pytest.mark.parametrize("pictures", [True, False])
def test_pictures_can_be_left_out(pictures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_curvature.noise import monitor as noise

    drawn = []
    monkeypatch.setattr(noise, "report_noise", lambda *_: drawn.append(1))
    follow = monitor("0.weight", pictures=pictures)
    make_trainer(follow).fit(
        module_of(nn.Sequential(nn.Linear(4, 3)).double()), DataLoader(samples(), batch_size=BATCH)
    )
    assert len(drawn) == pictures


def test_by_hand_nothing_is_told_of_devices(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """But which route it takes."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    module = module_of(nn.Sequential(nn.Linear(4, 3)))
    x, y = samples().tensors
    monitor("0.weight").evaluate(module, DataLoader(TensorDataset(x.float(), y), batch_size=BATCH))
    (line,) = caplog.messages
    assert line.startswith("noise covariance of 'network.0.weight': Kronecker route")
