"""Every public name is on a page of the API; pictures of the pages are in the gallery."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
# Pictures that no example draws.
OF_TOOLS = {"tensorboard.png", "report.png", "evaluate.png"}
MODULES = ("", ".metrics", ".functional", ".functional.noise", ".linalg", ".operators")

pytestmark = pytest.mark.check


def documented() -> dict[str, list[str]]:
    """Names on the pages of the API by module, in the lists of which Sphinx makes a page for each."""
    found: dict[str, list[str]] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for module, names in re.findall(
            r"currentmodule:: (\S+)\n\n\.\. autosummary::\n(?:   :.*\n)+\n((?:   \w+\n)+)", page.read_text("utf-8")
        ):
            found.setdefault(module, []).extend(names.split())
    return found


@pytest.mark.parametrize("module", [f"lightning_curvature{name}" for name in MODULES])
def test_public_names_are_on_a_page(module: str) -> None:
    assert sorted(documented()[module]) == sorted(importlib.import_module(module).__all__)


def test_pictures_are_in_the_gallery() -> None:
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    pictures = {path.name for path in DOCS.glob("*.png")}
    assert pictures - OF_TOOLS == set(re.findall(r"\{image\} (\S+)", gallery))


def test_pages_are_on_the_site() -> None:
    """All but those that say that they stand behind another page."""
    listed = "\n".join(
        block
        for page in DOCS.glob("*.md")
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ).split()
    pages = {path.stem for path in DOCS.glob("*.md") if "orphan: true" not in path.read_text(encoding="utf-8")}
    assert pages - {"index"} == {name for name in listed if (DOCS / f"{name}.md").exists() and "/" not in name}
