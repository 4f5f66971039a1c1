"""The data of the examples: one full batch, so that an epoch is one optimizer step, or shuffled mini-batches."""

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

# Per-channel mean and standard deviation of the 50,000 training images of CIFAR-10, pixels in [0, 1].
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

DIGITS_SAMPLES = 1797
DIGITS_MAX_PIXEL = 16.0

# Mean and standard deviation of all pixels of the digits, in [0, 1].
DIGITS_MEAN = 0.3053
DIGITS_STD = 0.3760

# Mean and standard deviation of all pixels of MNIST's training images, in [0, 1].
MNIST_MEAN = 0.1307
MNIST_STD = 0.3081

CLASSES = 10
LABEL_NOISE_SEED = 0


class FullBatchData(pl.LightningDataModule):
    """Serves a fixed subset as one full batch, or as equal micro-batches to be accumulated into one step.

    The batch is built once and reused without workers or collation, so that an epoch of one step costs little
    more than the step.

    Args:
        dataset: "digits" (embedded in scikit-learn), "mnist" or "cifar10".
        samples: number of samples, from the start of the training set.
        micro_batch: samples that go through the network at once; None for all. Must divide ``samples``, because
            accumulated gradients are averaged over micro-batches, which is the full-batch gradient only for
            micro-batches of one size.
        data_dir: where torchvision downloads MNIST or CIFAR-10 to.
        npz: file with ``x_train`` (N, 32, 32, 3) uint8 and ``y_train`` (N,), read instead of a download.
        one_hot: targets as float vectors (N, classes) for a squared error, instead of class indices (N,).
        label_noise: share of the labels that are redrawn at random.
        standardize: pixels of mean 0 and deviation 1; else between 0 and 1.

    Raises:
        ValueError: if ``micro_batch`` does not divide the number of samples, ``label_noise`` is no share, or there are
            fewer samples than asked for.
    """

    def __init__(
        self,
        *,
        dataset: str = "digits",
        samples: int = 5000,
        micro_batch: int | None = None,
        data_dir: Path = Path("data"),
        npz: Path | None = None,
        one_hot: bool = False,
        label_noise: float = 0.0,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_noise <= 1.0:
            raise ValueError(f"label_noise must be a share between 0 and 1, got {label_noise}.")
        self.dataset = dataset
        self.samples = min(samples, DIGITS_SAMPLES) if dataset == "digits" else samples
        self.micro_batch = micro_batch or self.samples
        if self.samples % self.micro_batch:
            raise ValueError(
                f"micro_batch must divide the {self.samples} samples, got {micro_batch}: choose one of its divisors."
            )
        self.data_dir = data_dir
        self.npz = npz
        self.one_hot = one_hot
        self.label_noise = label_noise
        self.standardize = standardize
        self.batches: list[tuple[Tensor, Tensor]] = []

    @property
    def batches_per_step(self) -> int:
        """Number of micro-batches in the full batch: the Trainer's ``accumulate_grad_batches``."""
        return self.samples // self.micro_batch

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one sample; known after ``setup``."""
        return self.batches[0][0].shape[1:]

    def prepare_data(self) -> None:
        """Download MNIST or CIFAR-10 if they are selected and missing."""
        if self.dataset == "mnist" and not self._mnist_test_files():
            from torchvision.datasets import MNIST

            MNIST(self.data_dir, train=True, download=True)
        if self.dataset == "cifar10" and self.npz is None:
            from torchvision.datasets import CIFAR10

            CIFAR10(self.data_dir, train=True, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Build the batch, once."""
        if self.batches:
            return
        x, y = {"digits": self._digits, "mnist": self._mnist, "cifar10": self._cifar10}[self.dataset]()
        x, y = x[: self.samples], y[: self.samples]
        if len(x) < self.samples:
            raise ValueError(f"samples must be at most the {len(x)} in the data, got {self.samples}.")
        if self.label_noise:
            generator = torch.Generator().manual_seed(LABEL_NOISE_SEED)
            redrawn = torch.rand(len(y), generator=generator) < self.label_noise
            y = torch.where(redrawn, torch.randint(CLASSES, (len(y),), generator=generator), y)
        if self.one_hot:
            y = F.one_hot(y, CLASSES).to(x.dtype)
        self.batches = list(zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True))

    def train_dataloader(self) -> DataLoader:
        """The full batch, as one item per micro-batch; ``batch_size=None`` because each item is a batch already."""
        return DataLoader(self.batches, batch_size=None, shuffle=False)

    def _digits(self) -> tuple[Tensor, Tensor]:
        """8×8 digits as (N, 64)."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.tensor(digits.data, dtype=torch.float32) / DIGITS_MAX_PIXEL
        if self.standardize:
            pixels = (pixels - DIGITS_MEAN) / DIGITS_STD
        return pixels, torch.tensor(digits.target)

    def _mnist_test_files(self) -> list[Path]:
        """Return images and labels of MNIST's test set, if its archives exist and the training set does not."""
        raw = self.data_dir / "MNIST" / "raw"
        files = [raw / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        alone = not (raw / "train-images-idx3-ubyte").exists()
        return files if alone and all(file.exists() for file in files) else []

    def _mnist(self) -> tuple[Tensor, Tensor]:
        """Return images as (N, 1, 28, 28): the training set, or the test set if only its archives exist."""
        from torchvision.datasets import MNIST
        from torchvision.datasets.mnist import read_image_file, read_label_file
        from torchvision.datasets.utils import extract_archive

        files = self._mnist_test_files()
        if files:
            with tempfile.TemporaryDirectory() as folder:
                images, labels = (extract_archive(str(file), folder) for file in files)
                pixels, y = read_image_file(images), read_label_file(labels)
        else:
            train = MNIST(self.data_dir, train=True)
            pixels, y = train.data, train.targets
        x = pixels[: self.samples, None].float() / 255
        return (x - MNIST_MEAN) / MNIST_STD if self.standardize else x, y[: self.samples]

    def _cifar10(self) -> tuple[Tensor, Tensor]:
        """Images as (N, 3, 32, 32), normalized by channel, no augmentation."""
        if self.npz is not None:
            with np.load(self.npz) as arrays:
                images, labels = arrays["x_train"], arrays["y_train"]
        else:
            from torchvision.datasets import CIFAR10

            train = CIFAR10(self.data_dir, train=True)
            images, labels = train.data, np.asarray(train.targets)
        # Only what is used becomes float: the whole training set would take 600 MB.
        pixels = images[: self.samples].astype(np.float32) / 255
        if self.standardize:
            pixels = (pixels - np.float32(CIFAR10_MEAN)) / np.float32(CIFAR10_STD)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels, dtype=torch.long)


class MiniBatchData(FullBatchData):
    """Serves the same subset in shuffled mini-batches of one size.

    Args:
        batch_size: samples of a mini-batch. Can be changed; the Trainer's next loader uses the new value.
        **options: of :class:`FullBatchData`, except ``micro_batch``.
    """

    def __init__(self, *, batch_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Return mini-batches in a new order every epoch, without the last samples that do not fill one."""
        return DataLoader(TensorDataset(*self.batches[0]), batch_size=self.batch_size, shuffle=True, drop_last=True)
