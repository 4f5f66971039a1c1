"""The tests lie as the package does, and no test file imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lightning_curvature"
# Folders of tests that no folder of the package stands for.
OWN = {"compatibility", "examples", "helpers", "oracles", "testers"}
# Rooms that hand on names of others.
WITHOUT = {"callbacks"}

pytestmark = pytest.mark.check


def rooms(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/*.py")}


def imported_tests(source: str) -> list[str]:
    """Return the test files that a file imports from."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if any(part.startswith("test_") for part in name.split("."))]


def importers(files: Iterable[Path]) -> dict[str, list[str]]:
    return {str(path): found for path in files if (found := imported_tests(path.read_text()))}


def test_folders_mirror_the_package() -> None:
    assert rooms(TESTS) - OWN == rooms(PACKAGE) - WITHOUT


def test_no_test_file_is_imported() -> None:
    assert importers(TESTS.rglob("*.py")) == {}


@pytest.mark.parametrize(
    "line",
    [
        "from tests.spectrum.test_values import rows",
        "from tests.spectrum import test_values",
        "import tests.test_layout",
        "def f():\n    from .test_values import rows",
    ],
)
def test_an_import_of_a_test_file_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(line)
    assert len(importers([tmp_path / "a.py"])) == 1
