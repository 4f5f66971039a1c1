"""W&B offline and MLflow beside TensorBoard: all get the values, and the run and its own records are what they were.

Skipped where the packages are missing, which weigh 200 MB: ``pip install -e ".[loggers]"``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.compatibility.features import Learner, data
from tests.compatibility.monitors import MONITORS, SPECTRUM, Kind, each_monitor
from tests.helpers.witness import Record, assert_same, watch, without_curvature

Rows = dict[int, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is sent, and nothing written elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(tmp_path_factory.getbasetemp() / "wandb"))
        # The last: MLflow writes to files only where it is told that this is meant.
        for name in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
            patch.setenv(name, "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        # WandbLogger(offline=True) sets it for the whole process.
        patch.setenv("WANDB_MODE", "offline")
        pytest.importorskip("wandb")
        pytest.importorskip("mlflow")
        yield


def fit(folder: Path, monitor: pl.Callback | None) -> tuple[Record, dict[str, Rows]]:
    """A run, and what W&B and MLflow have of it."""
    import wandb

    uri = f"file:{folder / 'mlflow'}"
    weights, flow = WandbLogger(offline=True, save_dir=folder), MLFlowLogger(tracking_uri=uri)

    def module() -> Learner:
        made = Learner()
        # Hooks on the gradients of parameters and on forwards, which count, and log every second.
        weights.experiment.watch(made, log="all", log_freq=2, idx=0)
        return made

    loggers = [weights, flow, TensorBoardLogger(folder, name="tensorboard")]
    record = watch(module, data, monitor, loggers=loggers, max_epochs=2, num_sanity_val_steps=0)
    wandb.finish()
    # Its own process ends, and has written all.
    wandb.teardown()
    return record, {"wandb": of_wandb(next(folder.glob("wandb/offline-run-*/*.wandb"))), "mlflow": of_mlflow(uri, flow)}


def of_mlflow(uri: str, logger: MLFlowLogger) -> Rows:
    """Values by step and key."""
    from mlflow.tracking import MlflowClient

    client, rows = MlflowClient(uri), dict[int, dict[str, Any]]()
    for key in client.get_run(logger.run_id).data.metrics:
        for entry in client.get_metric_history(logger.run_id, key):
            rows.setdefault(entry.step, {})[key] = entry.value
    return rows


def of_wandb(file: Path) -> Rows:
    """Values by step and key, without W&B's own clocks and count of rows."""
    from wandb.proto.wandb_internal_pb2 import Record as Entry

    rows: Rows = {}
    for entry in map(Entry.FromString, records(file)):
        if entry.WhichOneof("record_type") == "history":
            row = {
                i.key or "/".join(i.nested_key): json.loads(i.value_json, parse_int=float) for i in entry.history.item
            }
            step = row.pop("trainer/global_step")
            rows.setdefault(int(step), {}).update({key: v for key, v in row.items() if not key.startswith("_")})
    return rows


def records(file: Path) -> Iterator[bytes]:
    """Records of a log as LevelDB writes them: in pieces of a checksum, a length, a kind, and so many bytes."""
    content, block, head = file.read_bytes(), 2**15, 7
    at, record = head, b""
    while at + head <= len(content):
        if (left := -at % block) and left < head:
            at += left  # no piece begins in the last bytes of a block
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record, at = record + content[at + head : at + head + length], at + head + length
        if kind in (1, 4):  # all of a record, or its end; 2 and 3 are its beginning and middle
            yield record
            record = b""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, dict[str, Rows]]:
    return fit(tmp_path_factory.mktemp("plain"), None)


def split(rows: Mapping[int, dict[str, Any]]) -> tuple[Rows, Rows]:
    """The module's own values, and the monitor's."""
    own = {step: without_curvature(row) for step, row in rows.items()}
    rest = {step: {key: v for key, v in row.items() if key not in own[step]} for step, row in rows.items()}
    return own, {step: row for step, row in sorted(rest.items()) if row}


@each_monitor
def test_wandb_and_mlflow(kind: Kind, plain: tuple[Record, dict[str, Rows]], tmp_path: Path) -> None:
    """Beside TensorBoard, which alone gets a density and the charts."""
    density = {"quantities": (*SPECTRUM, "spectral_density")} if kind is MONITORS["spectrum"] else {}
    watched, logged = fit(tmp_path, kind.make(**density))
    assert_same(plain[0], watched)
    _, measured = split(watched.logger.rows)
    kind.check(measured, (0, 3, 6, 9))
    for name, rows in logged.items():
        own, values = split(rows)
        assert own == plain[1][name]
        # Not in the order in which they were logged; and NaN equals itself as a string.
        assert {step: str(sorted(row.items())) for step, row in values.items()} == {
            step: str(sorted(row.items())) for step, row in measured.items()
        }
    tags = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload().Tags()
    assert tags["histograms"] == (["curvature/spectral_density"] if density else [])
    assert measured[0].keys() <= set(tags["scalars"])
