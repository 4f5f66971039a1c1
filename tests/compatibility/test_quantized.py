"""Modules and parameters that compute with eight bits or less are refused, by name and in one sentence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_curvature.monitors.checks import check_not_quantized
from tests.compatibility.monitors import Kind, each_monitor
from tests.helpers.modules import stand_in
from tests.helpers.runs import Classifier, classification, loader, make_trainer, mlp


def dynamic(network: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        torch.ao.quantization.quantize_dynamic(
            network, {"2": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
        )


def eight_bits(network: nn.Sequential) -> None:
    weight = network[2].weight.detach().to(torch.float8_e4m3fn)
    network[2].weight = nn.Parameter(weight, requires_grad=False)


QUANTIZED: dict[Callable[[nn.Sequential], None], str] = {
    dynamic: r"must find modules that can be differentiated, got the quantized 'network\.2' "
    r"\(torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\.Linear\): train the module in float32, bfloat16 or ",
    eight_bits: r"must find parameters of at least 16 bits, got 'network\.2\.weight' of torch\.float8_e4m3fn: train ",
}


@pytest.mark.parametrize("change", QUANTIZED)
@each_monitor
def test_quantized_modules_are_refused(kind: Kind, change: Callable[[nn.Sequential], None]) -> None:
    """Before the first batch; and only where there is something to differentiate."""
    network, follow = mlp(4, 6, 3, dtype=torch.float32), kind.make()
    change(network)
    module = Classifier(network, lambda m: torch.optim.SGD(m.network[0].parameters(), lr=0.1))
    batches = loader(classification(2, dtype=torch.float32))
    with pytest.raises(MisconfigurationException, match=f"{type(follow).__name__} {QUANTIZED[change]}") as caught:
        make_trainer(follow, precision="32-true").fit(module, batches)
    assert str(caught.value).endswith("or leave the monitor out.")
    assert "\n" not in str(caught.value)
    module.predict_step = lambda batch, batch_idx: batch[1]
    assert len(make_trainer(follow, precision="32-true").predict(module, batches)) == 2


MODULES = (
    "transformer_engine.pytorch.module.linear.Linear",
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "torchao.float8.float8_linear.Float8Linear",
    "torchao.quantization.qat.linear.FakeQuantizedLinear",
)
TENSORS = (
    "transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor",
    "bitsandbytes.nn.modules.Params4bit",
    "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor",
    "torchao.quantization.Int8Tensor",
    "torchao.prototype.quantized_training.int8.Int8QuantizedTrainingLinearWeight",
)


@pytest.mark.parametrize("name", MODULES)
def test_other_packages_modules_are_refused(name: str) -> None:
    """Stand-ins with the names of the real ones, which need devices or packages: also as a base class.

    Lightning's own plugin for bitsandbytes makes such a class.
    """
    linear = stand_in(name, nn.Linear)
    for cls in (linear, type("_Wrapped", (linear,), {})):
        network = mlp(4, 6, 3)
        network[2] = cls(6, 3)
        with pytest.raises(MisconfigurationException, match=rf"got the quantized '2' \({re.escape(name)}\): train "):
            check_not_quantized("Monitor", network)


@pytest.mark.parametrize("name", TENSORS)
def test_other_packages_tensors_are_refused(name: str) -> None:
    """Stand-ins, as above; their types are those of what they decode to."""
    network = mlp(4, 6, 3)
    weight = network[2].weight.detach().as_subclass(stand_in(name, Tensor))
    network[2].weight = nn.Parameter(weight)
    with pytest.raises(MisconfigurationException, match=rf"quantized '2\.weight' \({re.escape(name)}\): train "):
        check_not_quantized("Monitor", network)
