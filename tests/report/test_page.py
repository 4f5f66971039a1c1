"""The page has a section for all that was logged, holds its pictures, and says what is missing."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from lightning_curvature.report.page import settings_table, values_table, write_report
from lightning_curvature.report.sections import SECTIONS
from lightning_curvature.report.series import Series, series_of
from lightning_curvature.report.style import COLOURS
from tests.helpers.devtools import CHROMIUM, seen
from tests.helpers.logged import everything, run_of, write_csv

FIGURES = [section.id for section in SECTIONS]
ALL = ["sentences", *FIGURES, "values", "configuration"]
# Of each section: its size on the page, and those of its pictures; once all pictures are there.
RENDERED = """(() => {
    const images = [...document.images];
    if (document.readyState !== "complete" || images.some(one => !one.complete)) return null;
    const size = one => [one.id, one.getBoundingClientRect().height,
        [...one.querySelectorAll("img")].map(image => image.naturalWidth)];
    return [...document.querySelectorAll("section")].map(size);
})()"""


def sections(page: Path) -> list[str]:
    return re.findall(r'<section id="(\w+)">', page.read_text(encoding="utf-8"))


def pictures(page: Path) -> list[bytes]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    return [base64.b64decode(one) for one in found]


def of(curves: dict[str, list[float]], name: str = "run", **hparams: object) -> Series:
    return series_of(run_of(curves, name, **hparams), "curvature")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of two runs: one with values of all monitors, the other with few."""
    folder = tmp_path_factory.mktemp("runs")
    write_csv(folder / "full", everything(), hparams="lr: 0.1\nnet:\n  width: 3\n  '<b>': '&'\n")
    few = {"train_loss": [2.0, 1.0], "curvature/lambda_max": [1.0, math.nan], "left/lambda_fd": [1.0, 1.0]}
    write_csv(folder / "few", few, every=5, hparams="lr: 0.2\n")
    return write_report([folder], folder / "out")


def test_each_section_and_its_picture(page: Path) -> None:
    assert sections(page) == ALL
    assert {path.stem for path in page.parent.glob("*.png")} == set(FIGURES)
    beside = [(page.parent / f"{name}.png").read_bytes() for name in FIGURES]
    assert pictures(page) == beside
    for picture in beside:
        assert len(Image.open(io.BytesIO(picture)).convert("RGB").getcolors(2**24)) > 20  # not empty


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(", text)


def test_what_the_page_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "Curvature of 2 runs" in text
    assert "other prefixes in these logs: <code>left</code>" in text
    assert text.count("<li>") == 6
    assert 'id="missing"' not in text
    assert "<b>" not in text  # names come from outside
    assert "net.&lt;b&gt;" in text


def test_sections_without_data_are_left_out_and_named(tmp_path: Path) -> None:
    found = write_report([write_csv(tmp_path, {"curvature/stability_index": [0.5] * 3})])
    assert found == tmp_path / "report" / "report.html"
    assert sections(found) == ["sentences", "edge", "stability", "values"]
    (line,) = re.findall(r'<p id="missing">(.*)</p>', found.read_text(encoding="utf-8"))
    named = ("RegimeMonitor()", "DirectionalCurvatureMonitor()", "BatchSharpnessMonitor()", "HessianSpectrumMonitor()")
    assert all(name in line for name in (*named, "by_module=True", "self.save_hyperparameters()"))
    assert "StabilityMonitor()" not in line


def test_last_values_with_errors_shares_and_steps() -> None:
    full = everything(5)
    full["curvature/lambda_dir"] = [1.0, 2.0, 3.0, 4.0, math.nan]
    rows = {row.key: row.cells for row in values_table([of(full), of({"curvature/lambda_dir": [1.0]}, "other")])}
    assert rows["lambda_max"] == ["1 ± 0.01 (0.5 of the edge) at step 4", ""]
    assert rows["lambda_dir"] == ["NaN; 4 at step 3", "1 at step 0"]
    assert rows["two_over_lr"] == ["2 at step 4", ""]
    assert list(rows)[:3] == ["edge_ratio", "stability_index", "lambda_max"]
    assert "regime" not in rows


def test_configurations_side_by_side() -> None:
    runs = [of({}, lr=0.1, net={"width": 3, "depth": {}}), of({}, "other", lr=0.2, net={"width": 3})]
    rows = [(row.name, row.cells, row.differs) for row in settings_table(runs)]
    assert rows == [
        ("lr", ["0.1", "0.2"], True),
        ("net.width", ["3", "3"], False),
        ("net.depth", ["{}", ""], True),
    ]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "values",
    [
        [math.nan, math.inf, -math.inf, 1.0, 2.0, 1e30],
        [math.nan] * 3,
        [math.inf] * 3,
        [0.0, 0.0],
        [5.0],
        [1e-9, 1.0, 1e9],
        [-1.0, -1e6, 3.0],
    ],
)
def test_values_of_any_kind_can_be_drawn(values: list[float]) -> None:
    keys = ("lambda_max", "lambda_dir", "batch_sharpness", "stability_index", "hessian_trace", "two_over_lr")
    curves = {f"curvature/{key}": values for key in keys} | {"train_loss": values}
    curves |= {f"curvature_diagnostics/{key}_stderr": values for key in keys}
    curves |= {"curvature_by_module/hessian_trace/a": values, "curvature/regime": [5.0] * len(values)}
    for section in SECTIONS:
        for figure in section.draw([of(curves), of(curves, "again")]):
            figure.savefig(io.BytesIO(), format="png", dpi=20)


def drawn(identity: str, runs: list[Series]) -> list[list[str]]:
    """Labels of the lines of each frame of a section."""
    (section,) = (one for one in SECTIONS if one.id == identity)
    (figure,) = section.draw(runs)
    return [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]


def test_one_run_has_all_quantities_and_several_have_one_each() -> None:
    full = everything()
    del full["curvature/edge_ratio"]
    assert drawn("edge", [of(full)]) == [["stability index", "λ_max", "λ_dir", "edge"]]
    both = drawn("edge", [of(full), of({"curvature_over_edge/x": [1.0], "curvature/lambda_dir": [1.0, 2.0]}, "few")])
    assert both == [["run\nstability index", "edge"]]
    assert drawn("loss", [of(full), of(full, "two")]) == [
        ["run\ntrain_loss", "two\ntrain_loss"],
        ["run\nval_loss", "two\nval_loss"],
    ]


def test_values_with_edges_of_their_own_have_a_frame_for_each_run() -> None:
    frames = drawn("spectrum", [of(everything()), of(everything(), "two")])
    of_run = ["λ_max", "λ_2", "λ_min", "threshold of λ_max"]
    assert frames == [of_run, of_run, ["run\ntr H", "two\ntr H"]]


def test_running_means_stand_beside_their_values() -> None:
    run = of({f"curvature/{key}": [1.0, 2.0] for key in ("gni", "gni_average", "two_over_lr")})
    assert drawn("sharpness", [run]) == [["GNI", "GNI, running mean", "2/η"]]


def test_points_beyond_the_frame_and_missing_ones_are_marked() -> None:
    values = [1.0 + 0.01 * i for i in range(200)]
    values[50], values[60], values[70] = 1e6, math.nan, math.inf
    (section,) = (one for one in SECTIONS if one.id == "curvature")
    (figure,) = section.draw([of({"curvature/lambda_dir": values, "curvature/two_over_lr": [2.0] * 200})])
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 4.0
    marks = {line.get_marker(): line.get_xdata().tolist() for line in axes.lines if line.get_marker() in "^v|"}
    assert marks == {"^": [50, 70], "v": [], "|": [60]}


def test_errors_are_bands(page: Path) -> None:
    (section,) = (one for one in SECTIONS if one.id == "stability")
    (figure,) = section.draw([of(everything())])
    (axes,) = figure.axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.08 * 11 + 0.02)  # the last value and its error


def test_runs_have_colours_of_their_own() -> None:
    (section,) = (one for one in SECTIONS if one.id == "loss")
    (figure,) = section.draw([of(everything(), name) for name in "abc"])
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_color() for line in lines] == list(COLOURS[:3])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_every_section_and_asks_for_nothing(page: Path) -> None:
    found = seen(page.as_uri(), RENDERED)
    assert [name for name, _, _ in found.value] == ALL
    for name, height, widths in found.value:
        assert height > 40.0, name
        assert (widths and min(widths) > 1000) or name not in FIGURES, name
    assert [url for url in found.requests if not url.startswith("data:")] == [page.as_uri()]
