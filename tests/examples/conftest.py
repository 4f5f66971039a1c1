"""The example's modules, and a file of images for them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.examples import EXAMPLES


@pytest.fixture(scope="module")
def load() -> Any:
    """Import one of the example's modules, which find each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A file in the layout of --npz: 12 images of noise."""
    generator = np.random.default_rng(0)
    path = tmp_path / "cifar.npz"
    images = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=generator.integers(0, 10, 12))
    return path
