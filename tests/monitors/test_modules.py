"""Which module a parameter belongs to, and what is said of names that fit none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_curvature import HessianSpectrumMonitor
from lightning_curvature.monitors.modules import ModuleTable, matching, modules_of
from lightning_curvature.reporting.bars import bars


class Nested(nn.Module):
    """Modules three deep, one parameter of two modules, one that is in none but the outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"first": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))})
        self.head = nn.Linear(3, 3)
        self.head.weight = self.encoder["first"][2].weight  # type: ignore[index]
        self.scale = nn.Parameter(torch.ones(()))


FIRST, SECOND = "encoder.first.0", "encoder.first.2"
PARTITIONS: list[tuple[Any, list[str]]] = [
    (True, ["scale", FIRST, FIRST, SECOND, SECOND, "head"]),
    (3, ["scale", FIRST, FIRST, SECOND, SECOND, "head"]),
    (2, ["scale", *["encoder.first"] * 4, "head"]),
    (1, ["scale", *["encoder"] * 4, "head"]),
    (("encoder", SECOND), ["(rest)", "encoder", "encoder", SECOND, SECOND, "(rest)"]),
    (("head",), [*["(rest)"] * 5, "head"]),
]


@pytest.mark.parametrize(("by_module", "expected"), PARTITIONS)
def test_partition(by_module: Any, expected: list[str]) -> None:
    module = Nested()
    parameters = list(module.parameters())
    modules = modules_of(module, parameters, by_module)
    assert [modules.names[i] for i in modules.labels(parameters)] == expected
    assert set(modules.names) == set(expected)
    sizes = torch.tensor([float(p.numel()) for p in parameters])
    assert dict(zip(modules.names, modules.sums(parameters, sizes).tolist(), strict=True)) == {
        name: sum(float(p.numel()) for p, own in zip(parameters, expected, strict=True) if own == name)
        for name in expected
    }
    # Some of the parameters, in another order.
    few = [parameters[5], parameters[1]]
    assert [modules.names[i] for i in modules.labels(few)] == [expected[5], expected[1]]


def test_what_is_left_over_comes_last() -> None:
    module = Nested()
    outside = nn.Parameter(torch.ones(2))
    modules = modules_of(module, [outside, *module.parameters()], ["head"])
    assert modules.names == ("head", "(outside)", "(rest)")


def test_names_are_those_without_wrappers() -> None:
    module = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))  # type: ignore[arg-type]
    parameters = list(module.parameters())
    assert modules_of(module, parameters, True).names == ("0", "1")
    assert modules_of(module, parameters, ["0"]).names == ("0", "(rest)")
    assert matching(module, parameters, "0.*") == parameters[:2]


def test_names_that_fit_nothing() -> None:
    module = Nested()
    for parameter in module.head.parameters():
        parameter.requires_grad_(False)
    moved = [p for p in module.parameters() if p.requires_grad]
    for wrong, sentence in (
        ("hed", "by_module must be names out of named_modules(), got 'hed': the nearest are ['head', "),
        ("head", "by_module must name modules with parameters that the optimizer moves, got 'head' without: leave"),
        ("encoder.first.1", "by_module must name modules with parameters that the optimizer moves, got 'encoder.f"),
    ):
        with pytest.raises(MisconfigurationException) as caught:
            modules_of(module, moved, [wrong])
        assert str(caught.value).startswith(sentence)
    for pattern in ("hed.*", "head.*"):
        with pytest.raises(MisconfigurationException) as caught:
            matching(module, moved, ["encoder.*", pattern])
        assert str(caught.value).startswith(
            f"parameters must match names of parameters that the optimizer moves, got {pattern!r}: the nearest are ['"
        )


def test_patterns() -> None:
    module = Nested()
    parameters = list(module.parameters())
    assert [p.shape for p in matching(module, parameters, "encoder.*")] == [p.shape for p in parameters[1:5]]
    chosen = matching(module, parameters[::-1], ["*.bias", "scale"])
    assert [id(p) for p in chosen] == [id(parameters[i]) for i in (5, 4, 2, 0)]  # in their own order


WANTED = "must be True, False, a depth of at least 1, or names out of named_modules()"
REMEDY = "True takes each module that holds parameters, 1 those at the top."


@pytest.mark.parametrize("wrong", [0, -1, 1.5, [], [1], None])
def test_bad_depths(wrong: Any) -> None:
    with pytest.raises(ValueError) as caught:
        HessianSpectrumMonitor(by_module=wrong)
    assert str(caught.value).startswith(f"by_module {WANTED}, got ")
    assert str(caught.value).endswith(REMEDY)


@pytest.mark.parametrize("wrong", [0, "", [], [""]])
def test_bad_patterns(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"parameters must be patterns of parameters' names, got .*encoder"):
        HessianSpectrumMonitor(parameters=wrong)


def test_bars_show_every_value_and_its_error() -> None:
    names = [f"layer.{i}" for i in range(40)]
    columns = {
        "share": [i / 40 for i in range(40)],
        "trace": [-1e6 if i == 0 else 1.0 for i in range(40)],
        "trace_stderr": [0.5] * 40,
    }
    figure = bars("title", names, columns)
    assert figure is not None
    share, trace = figure.axes
    assert figure.get_suptitle() == "title (30 of 40 modules)"
    # The largest of either column, in their order from top to bottom.
    shown = ["layer.0", *names[11:]]
    assert [label.get_text() for label in share.get_yticklabels()] == shown
    assert share.yaxis_inverted()
    assert [bar.get_width() for bar in share.patches] == [columns["share"][names.index(n)] for n in shown]
    assert trace.patches[0].get_width() == -1e6
    (errors,) = [one for one in trace.collections if len(one.get_segments()) == 30]
    assert all(right - left == pytest.approx(1.0) for (left, _), (right, _) in errors.get_segments())


def test_table_is_written_in_columns() -> None:
    table = ModuleTable(("a", "longer"), {"share": (0.25, 0.75), "hessian_trace": (1e-9, 123456.0)})
    assert str(table).splitlines() == [
        "module  share  hessian_trace",
        "a        0.25          1e-09",
        "longer   0.75      1.235e+05",
    ]
