"""How does the noise of SGD's gradient relate to the curvature of the loss, and does the loss function matter?

The example uses the networks and the setting of Zhang, Yang and Tu (2026): an MLP or a CNN of ReLU layers without bias,
plain SGD with η = 0.1, cross-entropy or squared error after a softmax. On one weight matrix it compares the covariance
C of the gradient noise with the Hessian H in the eigenvectors of H: C_ii ∝ H_ii^γ. In the paper γ is near 1 for squared
error and above 1 for cross-entropy.

    python examples/noise_and_curvature.py                                   # digits, on a CPU
    python examples/noise_and_curvature.py --dataset mnist --classes 3 6 10  # torchvision downloads it
    python examples/noise_and_curvature.py --dataset cifar10 --npz cifar10.npz --model cnn
"""

import argparse
import logging
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from data import CLASSES, FullBatchData
from lightning.pytorch.loggers import TensorBoardLogger
from models import convolution
from plotting_noise import draw, draw_suppression
from showing import tensorboard
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import NoiseCovarianceMonitor, NoiseCurvature
from lightning_curvature.functional.noise import cumulative_contribution, power_law, spectral_moments, suppressed
from lightning_curvature.operators import linear_statistics

LEARNING_RATE = 0.1
# All that the monitor can measure.
QUANTITIES = (
    "noise_gamma",
    "noise_gamma_awd",
    "noise_commutativity",
    "noise_alignment",
    "noise_spearman",
    "noise_coupling",
    "noise_awd_chain",
)
LOSSES = {"ce": "cross-entropy", "mse": "squared error after softmax"}
# Steps at which the first run of each loss is also measured, as shares of the whole.
ON_THE_WAY = (0.0, 0.03, 0.1, 0.2, 0.4, 0.7)
SUPPRESSION_SAMPLES = 200
# Directions for three classes, whose Hessian has fewer that are more than rounding: table 2 of the source.
FEW_CLASSES_TOP = 300


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Three layers of ReLU units without bias; the monitor measures the weight between the hidden ones."""
    sizes = [inputs, width, width]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES, bias=False))


def cnn(channels: int) -> nn.Sequential:
    """[32, M, 64, M, 128, 128, M], average pooling, 128 → 20 → 10, without bias; the monitor measures 128 → 20."""
    features = [
        convolution(channels, 32, pool=True),
        convolution(32, 64, pool=True),
        convolution(64, 128),
        convolution(128, 128, pool=True),
    ]
    for block in features:
        convolutional = block[0]
        assert isinstance(convolutional, nn.Conv2d)
        convolutional.bias = None
    head = [nn.Linear(128, 20, bias=False), nn.ReLU(), nn.Linear(20, CLASSES, bias=False)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class Classifier(pl.LightningModule):
    """A network with one of the two losses, trained by plain SGD.

    Args:
        network: inputs → logits.
        loss: "ce" or "mse".
    """

    def __init__(self, network: nn.Sequential, loss: str) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        if self.loss == "ce":
            return F.cross_entropy(logits, labels)
        return F.mse_loss(logits.softmax(-1), F.one_hot(labels, logits.shape[-1]).to(logits.dtype))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a mini-batch."""
        inputs, labels = batch
        return self.objective(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    @property
    def weight(self) -> tuple[str, nn.Linear]:
        """Name and layer of the measured weight: the last but one of the linear layers."""
        layers = [(f"network.{name}.weight", m) for name, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        return layers[-2]


def subset(args: argparse.Namespace, classes: int) -> TensorDataset:
    """The first classes, as many samples of each as there are, up to a limit."""
    options = {"dataset": args.dataset, "data_dir": args.data_dir, "npz": args.npz, "standardize": False}
    data = FullBatchData(samples=args.samples, **options)
    data.prepare_data()
    data.setup()
    inputs, labels = data.batches[0]
    chosen = torch.cat([(labels == label).nonzero().flatten()[: args.per_class] for label in range(classes)])
    return TensorDataset(inputs[chosen], labels[chosen])


def train(
    args: argparse.Namespace, data: TensorDataset, classes: int, loss: str, seed: int
) -> tuple[Classifier, list[tuple[int, NoiseCurvature]]]:
    """Train one network; return it with its measurements by step, the last of them at the end."""
    pl.seed_everything(seed, verbose=False)
    shape = data.tensors[0].shape[1:]
    network = cnn(shape[0]) if args.model == "cnn" else mlp(shape.numel(), args.width)
    model = Classifier(network, loss)
    steps = args.epochs[loss] * -(-len(data) // args.batch_size)
    monitor = NoiseCovarianceMonitor(
        parameter=model.weight[0],
        quantities=QUANTITIES,
        at_steps=tuple(round(share * steps) for share in ON_THE_WAY) if seed == args.seed else (),
        probe_samples=None,
        top=args.top or (FEW_CLASSES_TOP if classes <= 3 and args.model == "mlp" and args.width >= 50 else None),
        seed=seed,
    )
    history = History(monitor)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=steps,
        logger=TensorBoardLogger(args.out.parent, name=args.out.name, version=f"{loss}_{classes}_classes_seed_{seed}"),
        callbacks=[monitor, history],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    trainer.fit(model, DataLoader(data, batch_size=args.batch_size, shuffle=True))
    return model.cpu().eval(), history.found


class History(pl.Callback):
    """Keeps the results of a monitor that precedes it in the list of callbacks.

    Args:
        monitor: the monitor.
    """

    def __init__(self, monitor: NoiseCovarianceMonitor) -> None:
        self.monitor = monitor
        self.found: list[tuple[int, NoiseCurvature]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Keep a new result before a step."""
        self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a new result after the last step."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        result = self.monitor.result
        if result is not None and (not self.found or self.found[-1][1] is not result):
            self.found.append((trainer.global_step, result))


def accuracy(model: Classifier, data: TensorDataset) -> float:
    """Return the share of the training samples that are classified correctly."""
    inputs, labels = data.tensors
    with torch.no_grad():
        found = torch.cat([model.network(part).argmax(-1) for part in inputs.split(1000)])
    return float((found == labels).float().mean())


def suppression(
    model: Classifier, data: TensorDataset, relation: NoiseCurvature
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Return H_ii and C_ii (up to a factor) from original and changed eigenvalues of single samples.

    The second value is the share of C_ii that the first k eigenvalues contribute, (k, directions).
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data), generator=generator)[:SUPPRESSION_SAMPLES]
    inputs, labels = (tensor[chosen] for tensor in data.tensors)
    found = linear_statistics(
        model.weight[1], lambda: model.objective(model.network(inputs), labels), len(inputs), check=True
    )
    spectra = relation.sample_spectra(found.activations, found.curvatures)
    changed = {
        "all eigenvalues": spectra.values,
        "the largest alone": suppressed(spectra.values, threshold=-1.0, homogenize=False).values,
        "… of stiff samples": suppressed(spectra.values, threshold=0.001, homogenize=False).values,
        "… all alike": suppressed(spectra.values, threshold=0.001).values,
    }
    moments = {name: spectral_moments(spectra._replace(values=values)) for name, values in changed.items()}
    return moments, cumulative_contribution(spectra)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def row(name: str, classes: int, loss: str, runs: list[NoiseCurvature], accuracies: list[float]) -> str:
    """One row of the table."""
    gammas = [[r.gamma.exponent for r in runs if r.gamma], [r.gamma_awd.exponent for r in runs if r.gamma_awd]]
    gammas.append([link.gamma.exponent for r in runs if (link := r.chain.get("raw")) and link.gamma])
    columns = "".join(f"{spread(values) if values else '–':>15}" for values in gammas)
    return f"{name:<18}{classes:>7}  {loss:<5}{columns}{mean(accuracies):>11.1%}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "mnist", "cifar10"], default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="for torchvision's files")
    parser.add_argument("--npz", type=Path, help="CIFAR-10 as arrays x_train and y_train, in place of a download")
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--width", type=int, default=50, help="units of a hidden layer of the MLP")
    parser.add_argument("--classes", type=int, nargs="+", default=[10], help="the first so many, one after the other")
    parser.add_argument("--loss", choices=list(LOSSES), nargs="+", default=list(LOSSES))
    parser.add_argument("--samples", type=int, help="samples to choose from (default: all there are)")
    parser.add_argument("--per-class", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--epochs", type=int, help="of training (default: 100, on digits 150 and 300)")
    parser.add_argument("--top", type=int, help="directions of the fit (default: 40 %%, for 3 classes 300)")
    parser.add_argument("--seeds", type=int, default=2, help="runs for each row")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/noise_and_curvature"))
    parser.add_argument("--fast", action="store_true", help="half a minute: narrow layers, few epochs, one seed")
    args = parser.parse_args(arguments)
    if args.fast:
        args.width, args.seeds, args.epochs = min(args.width, 16), 1, args.epochs or 5
    whole = {"digits": 1797, "mnist": 60_000, "cifar10": 50_000}[args.dataset]
    if args.npz is not None and args.samples is None:
        parser.error("--samples must say how many --npz holds, got none: give their number")
    args.samples = args.samples or whole
    # So many as squared error needs to get more than 95 % right, as the source's.
    default = {"ce": 150, "mse": 300} if args.dataset == "digits" else {"ce": 100, "mse": 100}
    args.epochs = {loss: args.epochs or count for loss, count in default.items()}
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print the table, draw the pictures."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    start = time.perf_counter()
    lines: list[str] = []
    for classes in args.classes:
        data = subset(args, classes)
        name = f"{args.dataset} {args.model.upper()}"
        histories, experiments, shares = {}, {}, {}
        for loss in args.loss:
            runs, accuracies = [], []
            for seed in range(args.seed, args.seed + args.seeds):
                model, history = train(args, data, classes, loss, seed)
                runs.append(history[-1][1])
                accuracies.append(accuracy(model, data))
                if seed == args.seed:
                    histories[loss] = history
                    experiments[loss], shares[loss] = suppression(model, data, history[-1][1])
                    print(f"\n{LOSSES[loss]}, {classes} classes, {len(data):,} samples\n{history[-1][1]}", flush=True)
            lines.append(row(name, classes, loss, runs, accuracies))
        subject = f"{name}, {classes} classes, {len(data):,} samples, first of {args.seeds} runs"
        suffix = f"_{classes}" if len(args.classes) > 1 else ""
        draw(histories, args.out / f"noise_and_curvature{suffix}.png", subject=subject)
        draw_suppression(experiments, shares, args.out / f"suppression{suffix}.png", subject=subject)
        for loss, experiment in experiments.items():
            exponents = [f"{how} {power_law(h, c).exponent:.2f}" for how, (h, c) in experiment.items()]
            lines.append(f"    {loss}, γ of {SUPPRESSION_SAMPLES} samples' spectra: {', '.join(exponents)}")
    head = f"{'':<18}{'classes':>7}  {'loss':<5}{'γ_emp':>15}{'γ_AWD':>15}{'γ_AWD, raw':>15}{'accuracy':>11}"
    print("\n" + "\n".join([head, *lines]))
    print(f"\n{time.perf_counter() - start:.0f} s\npictures: {args.out}/*.png\n{tensorboard(args.out)}")


if __name__ == "__main__":
    main()
