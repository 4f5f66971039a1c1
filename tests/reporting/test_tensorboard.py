"""What TensorBoard shows of a run: by its own matching of tags, and in a browser."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard import program
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
from torch import nn

from lightning_curvature import (
    BatchSharpnessMonitor,
    DirectionalCurvatureMonitor,
    HessianSpectrumMonitor,
    NoiseCovarianceMonitor,
    StabilityMonitor,
)
from tests.helpers.devtools import CHROMIUM, seen
from tests.helpers.runs import Capture, Classifier, batched_samples, make_trainer, mlp
from tests.helpers.tensorboard import charts, layouts, read

SHARES = [f"curvature_over_edge/{key}" for key in ("lambda_dir", "lambda_kl", "lambda_max", "stability_index", "edge")]
# Series by title, of plain SGD; sharpness along mini-batches has its edge at 2/η there.
CHARTS = {
    "curvature: share of the edge": [*SHARES, "curvature_over_edge/gni"],
    "curvature: λ and 2/η": [f"curvature/{key}" for key in ("lambda_dir", "lambda_kl", "two_over_lr")],
    "curvature: λ_max and its threshold": [f"curvature/{key}" for key in ("lambda_max", "lambda_max_threshold")],
    "curvature: mini-batch sharpness and 2/η": [f"curvature/{key}" for key in ("gni", "two_over_lr")],
    "curvature: stability index": [f"curvature/stability_index{end}" for end in ("", "_drift", "_noise")],
}
# In the page of TensorBoard 2.20: series of each chart, once all charts have some.
SERIES = """(() => {
    const within = one => [one, ...(one.shadowRoot ? all(one.shadowRoot) : [])];
    const all = root => [...root.querySelectorAll("*")].flatMap(within);
    const cards = all(document).filter(one => one.localName === "tf-custom-scalar-multi-line-chart-card");
    const entries = card => [...card.shadowRoot.querySelectorAll(".match-list-entry")];
    const series = card => entries(card).map(one => one.textContent.trim());
    const found = cards.map(card => [card.title, series(card)]);
    return found.length && found.every(one => one[1].length) && found;
})()"""


def learner(network: nn.Module, momentum: float = 0.0) -> Classifier:
    return Classifier(network, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=momentum))


def monitors() -> list[Any]:
    return [
        DirectionalCurvatureMonitor(estimators=("hvp", "kl"), every_n_train_steps=1, on_error="raise"),
        HessianSpectrumMonitor(every_n_train_steps=1, quantities=("lambda_max",)),
        BatchSharpnessMonitor(every_n_train_steps=1, quantities=("gni",), num_batches=4, min_batches=4),
        StabilityMonitor(every_n_train_steps=1),
        NoiseCovarianceMonitor(parameter="network.0.weight"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a run with all monitors that TensorBoard draws."""
    logger = TensorBoardLogger(tmp_path_factory.mktemp("board"), name="run", version="")
    trainer = make_trainer(*monitors(), logger=logger, max_epochs=10)
    trainer.fit(learner(mlp(4, 6, 3)), batched_samples())
    logger.experiment.flush()
    return logger.log_dir


def test_charts_draw_the_series_they_name_and_no_other(run: str) -> None:
    multiplexer = EventMultiplexer({"run": run})
    multiplexer.Reload()
    plugins: dict[str, Any] = {}
    context = TBContext(
        logdir=run, data_provider=MultiplexerDataProvider(multiplexer, run), plugin_name_to_instance=plugins
    )
    plugins["scalars"], plugin = ScalarsPlugin(context), CustomScalarsPlugin(context)
    (layout,) = layouts(run)
    drawn = {}
    for chart in layout.category[0].chart:
        answers = [plugin.scalars_impl(RequestContext(), "run", tag, "") for tag in chart.multiline.tag]
        assert all(answer["regex_valid"] for answer in answers)
        drawn[chart.title] = sorted(name for answer in answers for name in answer["tag_to_events"])
    assert drawn == {title: sorted(names) for title, names in CHARTS.items()}
    assert next(iter(drawn)) == "curvature: share of the edge"


def test_runs_of_other_monitors_share_the_first_chart(run: str, tmp_path: Path) -> None:
    """It would stand there once for each run, were its series named one by one."""
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    make_trainer(monitors()[1], logger=logger, max_steps=2).fit(learner(mlp(4, 6, 3)), batched_samples())
    logger.experiment.flush()
    multiplexer = EventMultiplexer({"one": run, "two": logger.log_dir})
    multiplexer.Reload()
    plugin = CustomScalarsPlugin(TBContext(data_provider=MultiplexerDataProvider(multiplexer, run)))
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    titles = [chart["title"] for chart in layout["category"][0]["chart"]]
    assert titles == list(CHARTS)


def test_diagnostics_are_a_group_and_a_single_measurement_is_a_text(run: str) -> None:
    tags = read(run).Tags()
    of_monitors = Counter(tag.partition("/")[0] for tag in tags["scalars"] if tag.startswith("curvature"))
    assert of_monitors.keys() == {"curvature", "curvature_diagnostics", "curvature_over_edge"}
    assert not [tag for tag in tags["scalars"] if "noise_" in tag.removeprefix("curvature/stability_index_")]
    assert "curvature/NoiseCovariance/text_summary" in tags["tensors"]
    assert sorted(name for name in charts(layouts(run)[0]) if "noise" in name) == []


def test_a_value_of_several_monitors_is_written_once_a_step(run: str) -> None:
    events = read(run).Scalars("curvature/two_over_lr")
    assert [event.step for event in events] == list(range(20))
    assert {event.value for event in events} == {20.0}


def test_shares_survive_a_schedule_to_zero() -> None:
    """2/η ends at infinity; λη/2 ends at zero."""

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / 5.0))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    capture = Capture()
    module = Scheduled(mlp(4, 6, 3), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    follow = HessianSpectrumMonitor(every_n_train_steps=1, quantities=("lambda_max",))
    make_trainer(follow, logger=capture, max_epochs=3).fit(module, batched_samples())
    rates = [0.1 * max(0.0, 1.0 - step / 5.0) for step in range(6)]
    largest = [row["curvature/lambda_max"] for row in capture.rows.values()]
    shares = capture.curve("curvature_over_edge/lambda_max")
    # One product and one quotient of doubles.
    assert shares == pytest.approx([value * rate / 2.0 for value, rate in zip(largest, rates, strict=True)], rel=1e-15)
    assert math.isinf(capture.rows[5]["curvature/lambda_max_threshold"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_series_of_each_chart(run: str) -> None:
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", run, "--port", "0", "--load_fast", "false"])
    found = seen(f"{board.launch()}#custom_scalars", SERIES)
    shown = {title: sorted(line.split()[1] for line in series) for title, series in found.value}
    assert shown == {title: sorted(names) for title, names in CHARTS.items()}
    assert Path(run).is_dir()
