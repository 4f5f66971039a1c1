"""Files of an earlier measurement stay as they are."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger

from lightning_curvature.reporting.files import free_name
from tests.helpers.runs import warned
from tests.testers.families.stabilization import STABILIZATION
from tests.testers.reports import fit


def test_the_next_free_name(tmp_path: Path) -> None:
    """One that has no file of any ending: a table and its picture keep one name."""
    files, name, found = get_filesystem(tmp_path), str(tmp_path / "table"), list[str]()
    assert warned(lambda: found.append(free_name(files, name, (".csv", ".png")))) == []
    (tmp_path / "table.csv").touch()
    (tmp_path / "table-v1.png").touch()
    sentence = (
        "the logger's folder must not hold results of an earlier measurement under the same name, got "
        f"{name!r}: they are kept, and the new ones are written to {name + '-v2'!r}; give each run a folder of its own."
    )
    assert warned(lambda: found.append(free_name(files, name, (".csv", ".png")))) == [sentence]
    assert found == [name, f"{name}-v2"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    def run() -> None:
        fit(STABILIZATION.make_few(), logger=CSVLogger(tmp_path, name=None, version=""))

    def stored() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(tmp_path.glob("curvature-*"))}

    assert warned(run) == []
    first = stored()
    assert [name for name in first if name.endswith(".csv")] == [
        f"curvature-stabilization-step={s}.csv" for s in (0, 2)
    ]
    assert len(warned(run)) == 2
    second = stored()
    assert {name: second[name] for name in first} == first
    assert sorted(second) == sorted([*first, *(name.replace(".", "-v1.") for name in first)])
