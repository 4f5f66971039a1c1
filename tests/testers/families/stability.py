"""StabilityMonitor."""

from __future__ import annotations

from typing import Any

from lightning_curvature import StabilityMonitor
from lightning_curvature.stability.options import KEYS
from tests.helpers.batch_sharpness import loader
from tests.helpers.modules import Plain, sharded
from tests.helpers.runs import mlp
from tests.testers.family import Family, Misfit

WHOLE = "must be a whole number of at least"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"window": 7}, rf"window {WHOLE} 8, got 7: 30 measured steps give an index to about ten per cent"),
    ({"window": 8.5}, rf"window {WHOLE} 8, got 8\.5"),
    *(
        ({"decay": value}, rf"decay must lie between 0 and 1, got {value!r}: 0\.95 averages over some twenty steps")
        for value in (0.0, 1.0, -0.1, float("nan"), "0.9")
    ),
    ({"probe_mode": "test"}, r"probe_mode must be 'train' or 'eval', got 'test'"),
    ({"every_n_train_steps": 0}, rf"every_n_train_steps {WHOLE} 1, got 0: 1 measures every optimizer step"),
    ({"on_error": "ignore"}, r"on_error must be 'warn' or 'raise', got 'ignore': 'warn' lets training go on"),
    ({"prefix": ""}, r"prefix must be a name without slashes at its ends, got '': use 'curvature'"),
    ({"optimizer_index": -1}, rf"optimizer_index {WHOLE} 0, got -1: 0 is the first optimizer"),
]


MISFITS: dict[str, Misfit] = {
    "shards": Misfit(
        lambda: Plain(mlp(4, 3, 3), sharded),
        {},
        r"parameters must be whole, or sharded by FSDP2's fully_shard alone, for StabilityMonitor, got "
        r"'network.2.weight' as a DTensor of another kind",
        loader,
        before_data=True,
    ),
}


COMMAND: dict[str, Any] = {
    "every_n_train_steps": 1,
    "window": 9,
    "decay": 0.01,
    "outputs": "network",
    "objective": None,
    "optimizer_index": 0,
    "probe_mode": "eval",
    "probe_precision": None,
    "seed": 3,
    "progress_bar": True,
    "on_error": "raise",
}

INDEX = frozenset(KEYS[:-1])
STABILITY = Family(
    monitor=StabilityMonitor,
    quick={"every_n_train_steps": 1, "decay": 0.01},
    few={"decay": 0.01},
    # An index takes eight measured steps; these runs make four.
    numbers=("stability_index_steps",),
    always=False,
    watched="stability_index_steps",
    shown=(),
    selections=[({}, set(KEYS))],
    undefined=INDEX,
    charts=[
        (
            {},
            {"stability index": ["stability_index", "stability_index_drift", "stability_index_noise"]},
            ["stability_index"],
        )
    ],
    bad_arguments=BAD_ARGUMENTS,
    misfits=MISFITS,
    commands=[(COMMAND, set(KEYS))],
    # tests/stability/test_values.py compares with the oracle, test_watching.py counts.
    compared=tuple,
    counted=[],
)
