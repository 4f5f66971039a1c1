"""The example of sample growth, in its short form: what it prints, draws and logs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(load: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The short form with fewer samples yet, of which the largest k is 8."""
    out: Path = tmp_path_factory.mktemp("growth") / "run"
    options = ["--fast", "--max-steps", "20", "--candidates", "6", "--draws", "6", "--subspace-dim", "1", "3"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        example = load("sample_growth")
        patch.setattr(example, "CONVERGENCE_DRAWS", (4, 8))
        example.main([*options, "--out", str(out), "--accelerator", "cpu"])
    return SimpleNamespace(out=out, printed="\n".join(lines))


def test_the_table_has_all_criteria_with_their_slopes(demo: SimpleNamespace) -> None:
    rows = {tuple(words[:4]): words for line in demo.printed.splitlines() if len(words := line.split()) == 11}
    assert ("delta_1", "exact", "–", "–") in rows
    for sigma in ("0.0001", "0.001", "0.01", "0.1"):
        assert {("delta_2", way, "63024", sigma) in rows for way in ("direct", "quadratic", "gaussian_moment")} == {
            True
        }
        for dimension in ("1", "3"):
            for way in ("direct", "quadratic", "gaussian_moment"):
                slope, error = map(float, rows["delta_2_subspace", way, dimension, sigma][-2:])
                # −2 for independent samples; five k between 1 and 16 and six new samples say no more than this.
                assert -3.0 < slope < -1.0
                assert 0.0 < error < 0.6


def test_small_probes_see_the_point_alone(demo: SimpleNamespace) -> None:
    ratios = [
        words for line in demo.printed.splitlines() if len(words := line.split()) == 6 and words[-1].endswith("%")
    ]
    assert [(words[0], words[1]) for words in ratios] == [
        (sigma, d) for d in ("3", "1") for sigma in ("0.0001", "0.001", "0.01", "0.1")
    ]
    for words in ratios:
        if words[0] == "0.0001":
            assert float(words[2]) == pytest.approx(1.0, abs=0.02)


def test_pictures_and_logs(demo: SimpleNamespace) -> None:
    assert (demo.out / "sample_growth.png").stat().st_size > 20_000
    (folder,) = demo.out.glob("version_*")
    (table,) = folder.glob("*stabilization-step=*.csv")
    assert len(table.read_text().splitlines()) == 1 + 5 * (1 + 3 * 4 + 2 * 4 * 3)
    events = EventAccumulator(str(folder)).Reload().Tags()
    # Of the one measurement of the fit.
    assert "curvature/Stabilization/text_summary" in events["tensors"]
    assert "curvature/delta_1" not in events["scalars"]
    assert sum("by_samples" in tag for tag in events["scalars"]) == 1 + 3 * 4 + 2 * 4 * 3
    assert events["images"] == ["curvature/sample_growth"]
