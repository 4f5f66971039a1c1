"""Settings of every test."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.graphs import Marked

# Two processes share the cores in the distributed tests; one thread each keeps sums in one order, too.
torch.set_num_threads(1)

# What `make check` runs beside tests that are marked so: formulas, linear algebra, operators, the order of imports.
# Files of statistical tests, which take longer, are left to `make test`.
CHECKED = (
    "functional/",
    "linalg/test_basis.py",
    "linalg/test_eigenpairs.py",
    "linalg/test_space.py",
    "operators/test_exact.py",
    "operators/test_gradients.py",
    "operators/test_linear_layer.py",
    "test_architecture.py",
)
FAMILIES = ("batch_sharpness", "directional", "noise", "spectrum", "stabilization", "stability")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that is named is wanted, whatever its number.
    thin = not config.option.keyword and not any("::" in argument for argument in config.args)
    numbers: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if name.startswith(CHECKED):
            item.add_marker("check")
        if thin and (marker := item.get_closest_marker("thinned")) is not None:
            function, _, _ = item.nodeid.partition("[")
            # Each family takes other cases of what the testers run for all of them.
            room = name.partition("/")[0]
            shift = FAMILIES.index(room) if room in FAMILIES else 0
            if (numbers[function] - shift) % marker.args[0]:
                item.add_marker("slow")
            numbers[function] += 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def informed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the package has said about its ways."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    return lambda: [m for m in caplog.messages if m.startswith("noise covariance of")]


TEN = 10


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    Marked.tokens.clear()
    gc.disable()
    yield
    gc.enable()
