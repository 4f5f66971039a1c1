"""NoiseCovarianceMonitor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_curvature import NoiseCovarianceMonitor
from lightning_curvature.noise.options import KEYS, QUANTITIES
from tests.helpers import traps
from tests.helpers.modules import NoOptimizer, Plain, TwoOptimizers
from tests.helpers.noise import BATCH, OF_VECTORS, TOP, dense, expected, monitor, network, samples
from tests.helpers.noise_runs import samples as shuffled
from tests.helpers.runs import Capture, Classifier, classification, loader, make_trainer, rows
from tests.helpers.setups import Measured
from tests.helpers.traps import Boom, Hooked
from tests.testers.family import Family, Misfit, Trap

WEIGHT = "network.0.weight"
WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"parameter": value}, r"parameter must be a name out of named_parameters\(\), got .*: give one such as 'fc2.w")
        for value in ("", None, 3)
    ),
    ({"quantities": "noise_gamma"}, r"quantities must be a non-empty sequence of names, got 'noise_gamma' \(did you"),
    ({"quantities": ()}, r"quantities must be a non-empty sequence of names, got \(\): choose from \('noise_gamma'"),
    (
        {"quantities": ["gamma"]},
        r"quantities must be names from .*'noise_awd_chain'\), got 'gamma' \(did you mean 'noise_gamma'\?\): cor",
    ),
    ({"top": 2}, rf"top {WHOLE} 3, or None, got 2: None takes 40 % of the directions"),
    ({"batch_size": 0}, rf"batch_size {WHOLE} 1, or None, got 0: None takes the samples of an optimizer step"),
    ({"haar_draws": 0}, rf"haar_draws {WHOLE} 1, got 0: 4 are enough where there are some hundred"),
    (
        {"pairing": "labels"},
        r"pairing must be a callable, or None, got a str: give one that returns inputs and labels of a ba",
    ),
    ({"at_steps": (3, -1)}, rf"at_steps {WHOLE} 0, got -1: \(0, 100\) measures before the first step and before step"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, or None, got 0: 1 measures every optimizer step"),
    ({"probe_samples": 0}, rf"probe_samples {WHOLE} 1, or None, got 0: None takes all training data"),
    ({"micro_batch_size": 0}, rf"micro_batch_size {WHOLE} 1, or None, got 0"),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test'"),
    ({"probe_precision": "64"}, r"probe_precision must be '32-true' or None, got '64'"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore'"),
    ({"prefix": "/"}, r"prefix must be a name without slashes at its ends, got '/'"),
    ({"optimizer_index": -1}, r"optimizer_index must be a whole number of at least 0, got -1"),
]


def frozen() -> pl.LightningModule:
    module = Plain()
    module.network[0].weight.requires_grad_(False)
    return module


def data() -> DataLoader[Any]:
    return DataLoader(samples(16), batch_size=8)


def misfit(make: Callable[[], Any], options: dict[str, Any], sentence: str, make_data: Any = data) -> Misfit:
    return Misfit(make, options, sentence, make_data, error=MisconfigurationException)


MISFITS: dict[str, Misfit] = {
    "no time to measure": misfit(
        Plain,
        {"at_end": False, "every_n_train_steps": None},
        r"at_end, at_steps or every_n_train_steps must say when to",
    ),
    "unknown name": misfit(
        Plain,
        {"parameter": "network.0.weigth"},
        r"parameter must be a name out of named_parameters\(\), got 'network\.0\.weigth': the nearest are "
        r"\['network\.0\.weight', ",
    ),
    "name like no other": misfit(
        Plain, {"parameter": "?"}, r"parameter must be a name .*, got '\?': the nearest are \['net"
    ),
    "a layer": misfit(
        Plain, {"parameter": "network.0"}, r"parameter must be a name .*, got 'network\.0': the nearest are "
    ),
    "frozen": misfit(
        frozen,
        {},
        r"parameter must require gradients, got the frozen 'network\.0\.weight': unfreeze it or choose another",
    ),
    "more directions than there are": misfit(
        Plain, {"top": 25}, r"top must be at most the number of entries, got 25 of 24: lower it, or leave it out"
    ),
    "too few entries": misfit(
        lambda: Plain(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)).double()),
        {"parameter": "network.0.bias"},
        r"parameter must have at least 3 entries for a power law, got 'network\.0\.bias' with 2: choose a weight",
    ),
    "several optimizers": misfit(TwoOptimizers, {}, r"needs objective= where several optimizers .*, got 2"),
    "optimizer that is not there": misfit(Plain, {"optimizer_index": 1}, r"optimizer_index must be below the number"),
    "no optimizer": misfit(NoOptimizer, {}, r"must find trainable parameters in the optimizer, got none: return it"),
    # Measured at the end alone, and found before the first step all the same.
    "whole batches that shall be cut": misfit(
        Plain,
        {"micro_batch_size": 4, "at_end": True, "every_n_train_steps": None},
        r"batch_size must be left to a dataloader that hands out whole batches, got 4: leave it out",
        lambda: loader(classification(2)),
    ),
    "several dataloaders": misfit(
        Plain,
        {"at_end": True, "every_n_train_steps": None},
        r"the probe set must come from one dataloader, got a",
        lambda: [data(), data()],
    ),
}


# Two batches: one after another, and single samples one by one where the step cannot be followed at once.
FEW = {"probe_samples": 16}


def first_of(place: str) -> Callable[[str, Any], dict[str, Any]]:
    """Watch the first weight or bias that is trained: before some steps, at a time of its own, and after the last."""

    def options(name: str, plain: Any) -> dict[str, Any]:
        first = next(n for n, p in plain.module.named_parameters() if n.endswith(place) and p.requires_grad)
        # The labels are where no pairing finds them by itself.
        quantities = QUANTITIES[:-1] if name == "dict batch" else QUANTITIES
        times = {"at_steps": (1,), "every_n_train_steps": 8}
        return {"parameter": first, "on_error": "raise", "quantities": quantities} | times | FEW

    return options


def first_layer(place: str) -> Callable[[str], dict[str, Any]]:
    """Watch the first layer before a step and at the end."""

    def options(name: str) -> dict[str, Any]:
        # The step that changes flags takes the gradient from the first bias, which then cannot be measured.
        layer = 3 if name == "changes_modes_and_flags" and place == "bias" else 0
        return {"parameter": f"network.{layer}.{place}", "at_steps": (3,), "every_n_train_steps": None} | FEW

    return options


def read(make: Callable[[], pl.LightningModule]) -> tuple[Callable[[], pl.LightningModule], Callable[[], Any]]:
    """Return a module, and options with its first parameter."""
    return make, lambda: {"parameter": next(name for name, _ in make().named_parameters())}


class Trapped(traps.Trapped):
    """Fails from some repetition of the first measurement on, with everything in disorder."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            return super().training_step(batch, batch_idx)
        except Boom:
            self.trap()[0] = 1  # the next one, too: a failure under ``torch.vmap`` is tried again without
            raise

    def on_train_batch_end(self, *args: Any) -> None:
        self.trap()[0] = 0


def trap(call: int, name: str) -> Trap:
    """Fail in what is checked of the first batch, in a whole batch, in a single sample of the first or second one."""
    return Trap(lambda fails: Trapped([call if fails else 0]), options={"parameter": name}, data=shuffled)


class Before(pl.Callback):
    """Copies of the network as it is before each step and after the last."""

    def __init__(self) -> None:
        self.networks: list[nn.Module] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.networks.append(copy.deepcopy(pl_module.network))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.networks.append(copy.deepcopy(pl_module.network))


def compared() -> Iterable[tuple[str, float, float, float]]:
    """Compare with dense matrices at the parameters as they were before a step and at the end, and by hand."""
    before, capture = Before(), Capture()
    module = Classifier(network(), lambda m: torch.optim.Adam(m.parameters(), lr=0.05))
    follow = monitor("0.weight", top=TOP, at_steps=(1,), seed=5)
    make_trainer(before, follow, logger=capture).fit(module, DataLoader(samples(), batch_size=BATCH))
    found = rows(capture)
    assert list(found) == [1, 3]
    for step, row in found.items():
        module.network = before.networks[step]
        # The rotations are the same at each step.
        wanted = expected(dense(module, "0.weight"), BATCH, seed=5)
        assert row.keys() == wanted.keys()
        assert len(row) == 12
        for key, value in wanted.items():
            yield key, row[key], value, OF_VECTORS
    # The same on the module that came out.
    by_hand = (
        monitor("0.weight", top=TOP, seed=5)
        .evaluate(module, DataLoader(samples(), batch_size=BATCH), trainer=make_trainer())
        .result
    )
    for key, value in by_hand.values(QUANTITIES[:-1]).items():
        yield key, value, found[3][key], 1e-12


COMMAND = {
    "parameter": WEIGHT,
    "quantities": ["noise_gamma", "noise_awd_chain"],
    "top": None,
    "batch_size": None,
    "haar_draws": 2,
    "pairing": None,
    "at_end": True,
    "at_steps": [1],
    "every_n_train_steps": None,
    "probe_samples": 20,
    "probe_dataloader": None,
    "micro_batch_size": None,
    "objective": None,
    "optimizer_index": 0,
    "probe_mode": "eval",
    "probe_precision": "32-true",
    "seed": 3,
    "on_error": "raise",
}
COMMAND_KEYS = {*KEYS["noise_gamma"], *KEYS["noise_awd_chain"]}
EVERY_KEY = {key for keys in KEYS.values() for key in keys}

NOISE = Family(
    monitor=NoiseCovarianceMonitor,
    # All quantities, few rotations.
    quick={"parameter": WEIGHT, "quantities": QUANTITIES, "haar_draws": 2, "every_n_train_steps": 4},
    few={"parameter": WEIGHT, "quantities": ("noise_alignment",), "at_end": False, "pictures": False},
    # Fits need positive curvatures, which there are not always.
    numbers=("noise_commutativity", "noise_alignment", "noise_spearman", "noise_coupling"),
    always=True,
    watched="noise_alignment",
    shown=(),
    selections=[
        ({"quantities": QUANTITIES}, EVERY_KEY),
        ({"quantities": QUANTITIES[:-1]}, EVERY_KEY - set(KEYS["noise_awd_chain"])),
        *(({"quantities": (name,)}, set(KEYS[name])) for name in QUANTITIES),
    ],
    charts=[
        (
            {"quantities": QUANTITIES},
            {
                "noise exponent γ": [
                    f"noise_gamma{end}"
                    for end in ("", "_awd", *(f"_awd_{name}" for name in ("raw", "hh", "hh_sd", "hh_sd_wd")))
                ]
                + ["noise_gamma_awd_hh_sd_wd_li"],
                "noise commutativity and chance": ["noise_commutativity_relative", "noise_commutativity_random"],
                "noise coupling and chance": ["noise_coupling", "noise_coupling_random"],
            },
            [],
        )
    ],
    pictures=(
        {"pictures": True},
        ("noise_matrices", "noise_scatter"),
        "the noise covariance comes without pictures: install matplotlib to have them.",
    ),
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[
        (COMMAND, COMMAND_KEYS),
        (
            COMMAND
            | {"top": 5, "batch_size": 5, "every_n_train_steps": 10, "micro_batch_size": 10, "probe_precision": None},
            COMMAND_KEYS,
        ),
    ],
    variants={"weight": first_of("weight"), "bias": first_of("bias")},
    habits={place: first_layer(place) for place in ("weight", "bias")},
    reads={"Hooked": read(Hooked), "Measured": read(Measured)},
    traps={f"{call}, {name}": trap(call, name) for call in (1, 2, 5, 14, 25) for name in (WEIGHT, "network.3.bias")},
    compared=compared,
    # Of each of two micro-batches one with its graph and one of its single samples, at once. To see which way to go the
    # first one with and without its graph, and three of single samples. A sample is also what the step is checked on.
    counted=[({}, [9 + 1, 0, 9, 0])],
)
