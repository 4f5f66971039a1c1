"""One tester for every metric class, in the manner of torchmetrics' ``MetricTester``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import matplotlib
import matplotlib.pyplot as plt
import pytest
from torchmetrics import MetricCollection

from tests.testers.metric_case import MetricCase, Mistake, call, feed
from tests.testers.metric_states import StateChecks
from tests.testers.metric_values import ValueChecks
from tests.testers.metric_wrappers import WrapperChecks

matplotlib.use("Agg")


def marks(reason: str) -> Any:
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


def drawn(axes: Any) -> list[list[float]]:
    """Return the heights of every line, or the entries of an image."""
    images = [image.get_array().flatten().tolist() for image in axes.images]
    return images or [[float(y) for y in line.get_ydata()] for line in axes.lines]


class MetricTester(ValueChecks, StateChecks, WrapperChecks):
    """Subclasses name the descriptions in ``cases``; each check runs for each description to which it applies."""

    cases: ClassVar[Sequence[MetricCase]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        check = metafunc.function.__name__.removeprefix("test_")
        if "mistake" in metafunc.fixturenames:
            mistakes = [(f"{case.name}-{i}", one) for case in self.cases for i, one in enumerate(case.mistakes)]
            metafunc.parametrize(
                "mistake", [pytest.param(one, id=name, marks=marks(one.xfail)) for name, one in mistakes]
            )
        elif "case" in metafunc.fixturenames:
            given = [case for case in self.cases if check not in case.absent]
            metafunc.parametrize(
                "case", [pytest.param(case, id=case.name, marks=marks(case.xfails.get(check, ""))) for case in given]
            )

    def test_descriptions_name_checks(self) -> None:
        checks = {name.removeprefix("test_") for name in dir(self) if name.startswith("test_")}
        for case in self.cases:
            assert {*case.absent, *case.xfails} <= checks
            assert not {*case.absent} & {*case.xfails}

    def test_mistakes_are_explained(self, mistake: Mistake) -> None:
        with pytest.raises(ValueError, match=f"^{mistake.sentence}"):
            mistake.act()

    def test_collection(self, case: MetricCase) -> None:
        collection = MetricCollection({"one": case.made()})
        cloned = collection.clone(prefix="train_")

        def value(found: dict[str, Any], prefix: str) -> Any:
            # A collection spreads the values of a dict over keys of its own.
            bare = {key.removeprefix(prefix): number for key, number in found.items()}
            return bare.get("one", bare)

        for one, prefix in ((collection, ""), (cloned, "train_")):
            for index, update in enumerate(case.updates[:2]):
                given = value(call(one, update), prefix)
                case.assert_value(given, case.after(case.updates[: index + 1]))
            case.assert_value(value(one.compute(), prefix), case.expected(case.updates[:2]))
            one.reset()
            late = case.updates[-2:]
            case.assert_value(value(feed(one, late).compute(), prefix), case.expected(late))

    def test_plot(self, case: MetricCase) -> None:
        metric, given = case.fed(case.updates[-2:]), case.expected(case.updates[:2])
        figure, axes = metric.plot()
        assert isinstance(figure, matplotlib.figure.Figure)
        shown = drawn(axes)
        assert [number for line in shown for number in line] == case.drawn(metric.compute())
        low, high = axes.get_ylim()
        # Negative curvature is in the picture, too; a logarithm has no place for the smallest numbers there are.
        open_ended = axes.get_yscale() == "log" or axes.images
        assert open_ended or all(low < number < high for line in shown for number in line)
        # A value that is given, into axes that are.
        axes.clear()
        assert metric.plot(given, axes)[1] is axes
        assert [number for line in drawn(axes) for number in line] == case.drawn(given)
        plt.close("all")

    def test_plot_of_several_values(self, case: MetricCase) -> None:
        values = [case.expected(part) for part in (case.updates[:2], case.updates[-2:], case.updates)]
        _, axes = case.made().plot(values)
        assert drawn(axes) == [list(curve) for curve in zip(*map(case.drawn, values), strict=True)]
        plt.close("all")
