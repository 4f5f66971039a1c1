"""The example of noise against curvature, in its short form: what it prints, draws and logs."""

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def demo(load: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Narrow layers, two epochs, two seeds, four of the classes."""
    out: Path = tmp_path_factory.mktemp("noise") / "run"
    options = ["--fast", "--epochs", "2", "--width", "8", "--classes", "4"]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        example = load("noise_and_curvature")
        example.main([*options, "--out", str(out), "--accelerator", "cpu"])
    return SimpleNamespace(out=out, printed="\n".join(lines))


def test_the_table_has_a_row_for_each_loss(demo: SimpleNamespace) -> None:
    rows = [line.split() for line in demo.printed.splitlines() if line.startswith("digits MLP")]
    assert [row[2:4] for row in rows] == [["4", "ce"], ["4", "mse"]]
    for row in rows:
        measured, duality, raw = map(float, row[4:7])
        # Two epochs are far from a minimum: where γ can be, and no more.
        assert 0.5 < measured < 2.0
        assert 0.5 < duality < 2.0
        assert 0.0 < raw < 2.0


def test_eigenvalues_that_are_all_alike_leave_no_exponent(demo: SimpleNamespace) -> None:
    """With one eigenvalue κ for every stiff sample C_ii is κ H_ii: what is suppressed is 1e-3 of it, and less."""
    lines = [line for line in demo.printed.splitlines() if "all alike" in line]
    assert len(lines) == 2
    for line in lines:
        assert float(line.split()[-1]) == pytest.approx(1.0, abs=0.011)  # printed with two digits


def test_pictures_and_logs(demo: SimpleNamespace) -> None:
    for name in ("noise_and_curvature", "suppression"):
        assert (demo.out / f"{name}.png").stat().st_size > 20_000
    for loss in ("ce", "mse"):
        (folder,) = demo.out.glob(f"{loss}_4_classes_seed_0")
        log = EventAccumulator(str(folder))
        log.Reload()
        assert {"curvature/noise_scatter", "curvature/noise_matrices"} <= set(log.Tags()["images"])
        # On the way, and at the end; two of the early shares of so few steps may be one step.
        assert 6 <= len(log.Scalars("curvature/noise_gamma")) <= 7


def test_the_networks_are_those_of_the_source(load: Any) -> None:
    example = load("noise_and_curvature")
    for network, channels, name, shape in (
        (example.mlp(784, 50), 1, "network.3.weight", (50, 50)),
        (example.cnn(1), 1, "network.6.weight", (20, 128)),
        (example.cnn(3), 3, "network.6.weight", (20, 128)),
    ):
        found, layer = example.Classifier(network, "ce").weight
        assert (found, tuple(layer.weight.shape)) == (name, shape)
        assert all(not key.endswith("bias") for key, _ in network.named_parameters())
        size = 28 if channels == 1 else 32
        assert network(torch.zeros(2, channels, size, size)).shape == (2, 10)


def _idx(path: Path, values: torch.Tensor) -> None:
    """Write a tensor of bytes as MNIST's archives have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + bytes(values.flatten().tolist())))


def test_the_test_set_of_mnist_alone_is_read(load: Any, tmp_path: Path) -> None:
    data = load("data")
    images = torch.arange(3 * 28 * 28).remainder(256).reshape(3, 28, 28)
    _idx(tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz", images)
    _idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz", torch.tensor([7, 2, 1]))
    found = data.FullBatchData(dataset="mnist", samples=2, data_dir=tmp_path)
    found.prepare_data()
    found.setup()
    x, y = found.batches[0]
    assert y.tolist() == [7, 2]
    torch.testing.assert_close(x[:, 0], (images[:2] / 255 - data.MNIST_MEAN) / data.MNIST_STD)
    plain = data.FullBatchData(dataset="mnist", samples=3, data_dir=tmp_path, standardize=False)
    plain.setup()
    torch.testing.assert_close(plain.batches[0][0][:, 0], images / 255)


@pytest.mark.skipif(not (SHARED / "MNIST").exists(), reason="no MNIST")
def test_real_digits(load: Any) -> None:
    """The real test set: ten classes of about a thousand, standardized."""
    data = load("data").FullBatchData(dataset="mnist", samples=10_000, data_dir=SHARED)
    data.prepare_data()
    data.setup()
    x, y = data.batches[0]
    assert x.shape == (10_000, 1, 28, 28)
    assert y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # Mean and deviation are those of the training set: of the same pixels to a few thousandths of a deviation.
    assert abs(float(x.mean())) < 0.02
    assert float(x.std()) == pytest.approx(1.0, abs=0.02)
