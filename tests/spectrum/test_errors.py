"""Every mistake gets one sentence, before the first step: argument, rule, what was given, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import HessianSpectrumMonitor
from tests.helpers.modules import FromIterator, NoOptimizer, Plain, TwoOptimizers, unending
from tests.helpers.runs import Batch, Capture, classification, loader, make_trainer, warned

WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"quantities": "lambda_max"}, r"quantities must be a non-empty sequence of names, got 'lambda_max': choose from"),
    ({"quantities": []}, r"quantities must be a non-empty sequence of names, got \[\]: choose from \('lambda_max'"),
    (
        {"quantities": ["lambda_max", "lanczos"]},
        r"quantities must be names from .*'spectral_density'.*, got 'lanczos': correct or remove it",
    ),
    ({"k": 0}, rf"k {WHOLE} 1, got 0: 1 is the largest eigenvalue alone"),
    ({"k": 1.5}, rf"k {WHOLE} 1, got 1\.5"),
    ({"max_products": 5}, rf"max_products {WHOLE} 20, got 5: a search for one eigenvalue takes about ten"),
    ({"max_products": 30, "k": 30}, rf"max_products {WHOLE} 31, got 30"),
    ({"density_starts": 0}, rf"density_starts {WHOLE} 1, got 0: 2 tell the error"),
    ({"density_steps": 1}, rf"density_steps {WHOLE} 2, got 1: 40 make a good picture"),
    *(
        ({"tolerance": value}, rf"tolerance must lie between 0 and 1, got {value!r}: 1e-3 gives eigenvalues to five")
        for value in (0.0, 1.0, -0.1, float("nan"), "1e-3")
    ),
    ({"trace_error": 2.0}, r"trace_error must lie between 0 and 1, got 2\.0: 0\.05 gives the trace to 5 %"),
    ({"products": "hvp"}, r"products must be 'auto', 'exact' or 'difference', got 'hvp': 'auto' is exact where it can"),
    ({"keep_graph": "yes"}, r"keep_graph must be True, False or 'auto', got 'yes': 'auto' keeps what fits"),
    ({"probe_samples": 0}, rf"probe_samples {WHOLE} 1, or None, got 0: None takes all training data"),
    ({"probe_samples": 0.5}, rf"probe_samples {WHOLE} 1, or None, got 0\.5"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0: None takes the batch size of the loader"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test': 'train' leaves the module as it"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64': None computes in the run's"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, got 0: 1 measures every optimizer step"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"prefix": "train/"}, r"prefix must be a name without slashes at its ends, got 'train/': use 'curvature'"),
    ({"optimizer_index": -1}, r"optimizer_index must not be negative, got -1: 0 is the first optimizer"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        HessianSpectrumMonitor(**arguments)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        HessianSpectrumMonitor(("lambda_max",))  # type: ignore[misc]


class Adamlike(torch.optim.Adam):
    """With a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def monitor(*quantities: str, **options: Any) -> HessianSpectrumMonitor:
    given: Any = quantities or ("lambda_max",)
    return HessianSpectrumMonitor(**({"quantities": given, "every_n_train_steps": 1} | options))


def shuffled(samples: int = 16) -> DataLoader[Any]:
    x, y = (torch.cat(parts)[:samples] for parts in zip(*classification(2), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


Make = Callable[[], pl.LightningModule]
EXACT = "must not need exact products where parameters are sharded or products='difference', got"
KNOWN = "must not hold 'preconditioned_lambda_max' where the preconditioner is not known, got"
# Module, monitor, data, sentence.
MISFITS: dict[str, tuple[Make, HessianSpectrumMonitor, Callable[[], Any], str]] = {
    "several optimizers": (
        TwoOptimizers,
        monitor(),
        shuffled,
        r"needs objective= where several optimizers .*, got 2 optimizers: give a callable \(module, batch\) -> loss",
    ),
    "optimizer that is not there": (
        Plain,
        monitor(optimizer_index=1),
        shuffled,
        r"optimizer_index must be below the number of optimizers, got 1 of 1: count from 0",
    ),
    "no optimizer": (
        NoOptimizer,
        monitor(),
        shuffled,
        r"must find trainable parameters in the optimizer, got none: return it from configure_optimizers",
    ),
    "step that fetches its own batch": (
        FromIterator,
        monitor(),
        shuffled,
        r"must see the batch of a step, got training_step\(dataloader_iter\): take \(batch, batch_idx\) instead",
    ),
    "outputs that name nothing": (
        Plain,
        monitor(outputs="head"),
        shuffled,
        r"outputs must name a submodule of Plain, got 'head': choose one of \['network', 'network.0'",
    ),
    "as many eigenvalues as parameters": (
        lambda: Plain(nn.Linear(4, 3, bias=False).double()),
        monitor(k=12),
        shuffled,
        r"k must be below the number of parameters, got 12 for 12: ask for fewer",
    ),
    "as many eigenvalues at both ends": (
        lambda: Plain(nn.Linear(4, 3, bias=False).double()),
        monitor("lambda_max", "lambda_min", k=11),
        shuffled,
        r"k must be below the number of parameters, got 11 for 12: ask for fewer",
    ),
    "Gauss-Newton by differences": (
        Plain,
        monitor("lambda_max", "gauss_newton_lambda_max", products="difference"),
        shuffled,
        rf"quantities {EXACT} \['gauss_newton_lambda_max'\]: leave them out",
    ),
    "second moment by differences": (
        Plain,
        monitor("second_moment_contraction", products="difference"),
        shuffled,
        rf"quantities {EXACT} \['second_moment_contraction'\]: leave them out",
    ),
    "unknown preconditioner": (
        lambda: Plain(make_optimizer=lambda m: torch.optim.Adadelta(m.parameters())),
        monitor("preconditioned_lambda_max"),
        shuffled,
        rf"quantities {KNOWN} Adadelta: leave it out",
    ),
    "preconditioner of a changed step": (
        lambda: Plain(make_optimizer=lambda m: Adamlike(m.parameters())),
        monitor("preconditioned_lambda_max"),
        shuffled,
        rf"quantities {KNOWN} Adamlike: leave it out",
    ),
    "several dataloaders": (
        Plain,
        monitor(),
        lambda: [shuffled(), shuffled()],
        r"the probe set must come from one dataloader, got a list of 2: give probe_dataloader= batches of the form",
    ),
    "several named dataloaders": (
        Plain,
        monitor(),
        lambda: {"a": shuffled(), "b": shuffled()},
        r"the probe set must come from one dataloader, got a dict of 2: give probe_dataloader= batches of the form",
    ),
    "empty probe set": (
        Plain,
        monitor(probe_dataloader=[]),
        shuffled,
        r"the probe set must hold at least one sample for each rank, got 0: give more data, or other data by probe_dat",
    ),
    "stream without end": (
        Plain,
        monitor(probe_samples=None),
        unending,
        r"samples must be a number where the dataloader has no length, got None: say how many to measure on",
    ),
    "micro-batches of whole batches": (
        Plain,
        monitor(micro_batch_size=3),
        lambda: loader(classification(2)),
        r"batch_size must be left to a dataloader that hands out whole batches, got 3: leave it out",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_found_before_the_first_step(name: str) -> None:
    make, follow, data, sentence = MISFITS[name]
    module = make()
    trainer = make_trainer(follow)
    with pytest.raises((MisconfigurationException, ValueError), match=sentence) as caught:
        trainer.fit(module, data())
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert module.seen == 0
    assert trainer.global_step == 0


def test_one_prefix_for_two_monitors() -> None:
    trainer = make_trainer(monitor(prefix="a"))
    trainer.callbacks.append(monitor(prefix="a"))  # type: ignore[attr-defined]
    sentence = r"prefix must differ between monitors of one class, got 'a' of two \w+s: give one of them another prefix"
    with pytest.raises(MisconfigurationException, match=sentence):
        trainer.fit(Plain(), shuffled())


@pytest.mark.parametrize("name", ["Adadelta", "LBFGS"])
def test_unknown_optimizer_gets_two_over_the_rate_and_one_note(name: str) -> None:
    capture = Capture()
    options = {"max_iter": 1} if name == "LBFGS" else {}
    make = lambda m: getattr(torch.optim, name)(m.parameters(), lr=0.25, **options)  # noqa: E731
    trainer = make_trainer(monitor(), logger=capture, max_epochs=2)
    assert warned(lambda: trainer.fit(Plain(make_optimizer=make), shuffled())) == [
        f"{name} is not known: 2/η of gradient descent is drawn."
    ]
    assert capture.curve("curvature/lambda_max_threshold") == [8.0] * 4


def test_validation_alone_is_left_alone() -> None:
    class Validated(Plain):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    trainer = make_trainer(monitor(on_error="raise"))
    (metrics,) = trainer.validate(Validated(), loader(classification(2)), verbose=False)
    assert list(metrics) == ["val_loss"]
