"""Settings of every test."""

import logging

import pytest
import torch

# Two processes share the cores in the distributed tests; one thread each keeps sums in one order, too.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
