"""The rooms of the package import downwards only; examples, benchmarks and pages import public names only."""

import ast
import graphlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_curvature"

FAMILIES = ("directional", "spectrum", "batch_sharpness", "stability", "stabilization", "noise", "regimes")
GROUND = ("functional", "linalg", "distributed", "reporting")
# From the roof down: a room imports from lower floors only. Rooms of the ground floor may import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__", "autoload"),
    ("command",),
    ("report",),
    ("callbacks", "metrics"),
    FAMILIES,
    ("monitors",),
    ("losses",),
    ("data", "optimizers"),
    ("replay",),
    ("operators",),
    GROUND,
    ("arguments",),
)
PUBLIC = ("", ".callbacks", ".metrics", ".functional", ".functional.noise", ".linalg", ".operators")
HEAVY = ("lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")


class Arrow(NamedTuple):
    """One import, by the paths of both files in the package."""

    source: str
    target: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source} → {self.target} ({', '.join(self.names) or 'the module'})"


def arrows_of(package: Path) -> list[Arrow]:
    """Return all imports between files of a package, also those inside functions and for type checkers."""
    arrows = []
    for file in sorted(package.rglob("*.py")):
        source = file.relative_to(package)
        code = ast.parse(file.read_text(encoding="utf-8"))
        if source == Path("__init__.py"):
            code.body = [node for node in code.body if not _lists_public_names(node)]
        for module, names in imports(code, [package.name, *source.parent.parts]):
            top, *folders = module.split(".")
            if top != package.name:
                continue
            # ``from room import name`` imports a file of that name or takes the name from the room's __init__.
            files = {name: _file(package, *folders, name) for name in names}
            arrows += [Arrow(source.as_posix(), path, (name,)) for name, path in files.items() if path]
            taken = tuple(name for name, path in files.items() if not path)
            if taken or not names:
                arrows.append(Arrow(source.as_posix(), _file(package, *folders) or module, taken))
    return arrows


def _lists_public_names(node: ast.stmt) -> bool:
    """Whether this is the block for type checkers; ``__getattr__`` imports its names when they are used."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(code: ast.AST, place: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return each imported module with the names taken from it; ``import module`` takes none.

    Args:
        code: syntax tree of a file.
        place: package that the file stands in, for relative imports.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = place[: len(place) - node.level + 1] if node.level else []
            found.append((".".join([*above, *filter(None, [node.module])]), tuple(alias.name for alias in node.names)))
    return found


def _file(package: Path, *parts: str) -> str | None:
    path = package.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file.relative_to(package).as_posix() for file in candidates if file.is_file()), None)


def room(file: str) -> str:
    """Return the folder of a file, or its name where it stands at the top of the package."""
    return file.split("/")[0].removesuffix(".py")


def circle(arrows: Iterable[Arrow], by_room: bool) -> list[Arrow]:
    """Return the arrows that close one circle between rooms or between files, none if there is no circle."""
    edges: dict[tuple[str, str], Arrow] = {}
    for arrow in arrows:
        ends = (room(arrow.source), room(arrow.target)) if by_room else (arrow.source, arrow.target)
        if ends[0] != ends[1] or not by_room:
            edges.setdefault(ends, arrow)
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        graph.setdefault(source, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        ring = error.args[1]
        return [edges[after, before] for before, after in itertools.pairwise(ring)]
    return []


def upward(arrows: Iterable[Arrow]) -> list[Arrow]:
    """Return the arrows that do not lead to a lower floor, and those of rooms that stand on none."""
    floors = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    found = []
    for arrow in arrows:
        source, target = room(arrow.source), room(arrow.target)
        known = source in floors and target in floors
        level = known and (source == target or (source in GROUND and target in GROUND))
        if not level and not (known and floors[source] < floors[target]):
            found.append(arrow)
    return found


def between_families(arrows: Iterable[Arrow]) -> list[Arrow]:
    """Return the arrows from one family to another."""
    ends = [(room(arrow.source), room(arrow.target), arrow) for arrow in arrows]
    return [arrow for source, target, arrow in ends if source in FAMILIES and target in FAMILIES and source != target]


def listed(arrows: Iterable[Arrow]) -> str:
    return "\n".join(map(str, arrows))


def test_no_circle_between_rooms() -> None:
    found = circle(arrows_of(PACKAGE), by_room=True)
    assert not found, listed(found)


def test_no_circle_between_files() -> None:
    found = circle(arrows_of(PACKAGE), by_room=False)
    assert not found, listed(found)


def test_imports_lead_downwards() -> None:
    found = upward(arrows_of(PACKAGE))
    assert not found, listed(found)


def test_families_do_not_import_each_other() -> None:
    found = between_families(arrows_of(PACKAGE))
    assert not found, listed(found)


def test_the_report_imports_names_and_formulas_alone() -> None:
    """It reads logs of any run; no code that measures is needed for it."""
    targets = {arrow.target for arrow in arrows_of(PACKAGE) if room(arrow.source) == "report"}
    assert {room(target) for target in targets} <= {"report", "functional", "reporting", "arguments"}
    assert {target for target in targets if room(target) == "reporting"} == {"reporting/names.py"}


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room(file.relative_to(PACKAGE).as_posix()) for file in PACKAGE.rglob("*.py")}
    assert rooms == {name for floor in FLOORS for name in floor}


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    """Write a package."""
    package = folder / "house"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
        for parent in (package / name).relative_to(package).parents:
            (package / parent / "__init__.py").touch()
    return package


def test_a_circle_between_rooms_is_named(tmp_path: Path) -> None:
    """Also where no two files of it import each other, and the imports are late or for types alone."""
    late = "def f():\n    from house.linalg.second import name\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..functional import third\n"
    package = tree(
        tmp_path, {"functional/first.py": late, "functional/third.py": "", "linalg/second.py": "", "linalg/x.py": typed}
    )
    found = circle(arrows_of(package), by_room=True)
    assert sorted(map(str, found)) == [
        "functional/first.py → linalg/second.py (name)",
        "linalg/x.py → functional/third.py (third)",
    ]
    assert circle(arrows_of(package), by_room=False) == []


def test_a_circle_between_files_is_named(tmp_path: Path) -> None:
    """A file that asks its own room for a name which the room takes from that file."""
    package = tree(tmp_path, {"linalg/one.py": "from house.linalg import f\n"})
    (package / "linalg" / "__init__.py").write_text("from house.linalg.one import f\n", encoding="utf-8")
    assert sorted(map(str, circle(arrows_of(package), by_room=False))) == [
        "linalg/__init__.py → linalg/one.py (f)",
        "linalg/one.py → linalg/__init__.py (f)",
    ]
    assert circle(arrows_of(package), by_room=True) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("replay/a.py", "import house.data.b\n", "replay/a.py → data/b.py (the module)"),
        ("optimizers/a.py", "from house.data import b\n", "optimizers/a.py → data/b.py (b)"),
        ("operators/a.py", "from house import monitors\n", "operators/a.py → monitors/__init__.py (monitors)"),
        ("losses/a.py", "from house import Monitor\n", "losses/a.py → __init__.py (Monitor)"),
        ("attic/a.py", "from house.data.b import c\n", "attic/a.py → data/b.py (c)"),
        ("metrics/a.py", "from house.data.b import c\n", None),
        ("reporting/a.py", "from house.linalg.b import c\n", None),
    ],
)
def test_an_arrow_that_leads_upwards_is_named(tmp_path: Path, file: str, text: str, expected: str | None) -> None:
    package = tree(tmp_path, {file: text, "data/b.py": "", "linalg/b.py": "", "monitors/b.py": ""})
    assert [str(arrow) for arrow in upward(arrows_of(package))] == [expected] * (expected is not None)


def test_the_public_names_at_the_top_are_no_arrows(tmp_path: Path) -> None:
    package = tree(tmp_path, {"monitors/b.py": "import house\n"})
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.monitors import b\n"
    (package / "__init__.py").write_text(lazy, encoding="utf-8")
    assert [str(arrow) for arrow in arrows_of(package)] == ["monitors/b.py → __init__.py (the module)"]


def test_a_family_that_imports_another_is_named(tmp_path: Path) -> None:
    package = tree(tmp_path, {"noise/a.py": "from house.spectrum.b import c\n", "spectrum/b.py": ""})
    assert listed(between_families(arrows_of(package))) == "noise/a.py → spectrum/b.py (c)"


def python_blocks(page: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def private_names(code: str, public: Mapping[str, Collection[str]], package: str = PACKAGE.name) -> list[str]:
    """Return what code imports from a package beside the public names of its public modules."""
    found = []
    for module, names in imports(ast.parse(code), []):
        if module.split(".")[0] != package:
            continue
        if module not in public:
            found.append(module)
            continue
        found += [f"{module}.{n}" for n in names if n not in public[module] and f"{module}.{n}" not in public]
    return found


def _outside() -> dict[str, str]:
    """Return the code that users copy: of scripts whole, of pages one text for each block."""
    scripts = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
    code = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in scripts}
    for page in pages:
        for number, block in enumerate(python_blocks(page.read_text(encoding="utf-8")), start=1):
            code[f"{page.relative_to(ROOT).as_posix()}, block {number}"] = block
    return code


def public_names(package: Path) -> dict[str, list[str]]:
    """Return ``__all__`` of each public module of a package."""
    names = {}
    for module in PUBLIC:
        code = ast.parse(package.joinpath(*module.split("."), "__init__.py").read_text(encoding="utf-8"))
        (value,) = (n.value for n in code.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        names[package.name + module] = ast.literal_eval(value)
    return names


@pytest.mark.parametrize(("place", "code"), _outside().items(), ids=_outside())
def test_examples_benchmarks_and_pages_import_public_names(place: str, code: str) -> None:
    found = private_names(code, public_names(PACKAGE))
    assert not found, f"{place}: {', '.join(found)}"


def test_a_name_that_is_not_public_is_named() -> None:
    public = {"house": ["Door"], "house.room": ["Chair"]}
    assert (
        private_names("from house import Door, room\nfrom house.room import Chair\nimport math\n", public, "house")
        == []
    )
    code = "def f():\n    from house import Cellar\nfrom house.room import Chair, nail\nimport house.attic\n"
    assert sorted(private_names(code, public, "house")) == ["house.Cellar", "house.attic", "house.room.nail"]
    assert python_blocks("text\n```python\nimport a\n```\n```bash\nls\n```\n") == ["import a\n"]


def heavy_modules(folder: Path, *modules: str) -> dict[str, list[str]]:
    """Return which of Lightning and torchmetrics are loaded once each module is imported; all in one new process."""
    loaded = f"*sorted({{name.split('.')[0] for name in sys.modules}} & set({HEAVY}))"
    script = "import sys\n" + "".join(f"import {module}\nprint({loaded})\n" for module in modules)
    command = [sys.executable, "-c", script]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True
    )
    return {module: line.split() for module, line in zip(modules, run.stdout.splitlines(), strict=True)}


def test_rooms_that_do_not_load_lightning() -> None:
    """The first that does is named, and those after it."""
    rooms = [f"lightning_curvature.{name}" for name in ("operators", "linalg", "functional")]
    assert heavy_modules(ROOT, *rooms) == {room: [] for room in rooms}


def test_a_module_that_loads_lightning_is_named(tmp_path: Path) -> None:
    (tmp_path / "lightning.py").touch()
    (tmp_path / "garden.py").touch()
    (tmp_path / "room.py").write_text("import lightning\n", encoding="utf-8")
    assert heavy_modules(tmp_path, "garden", "room") == {"garden": [], "room": ["lightning"]}
