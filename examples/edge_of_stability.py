"""The curvature along the steps of gradient descent and AdamW rises to 2/η and stays there.

In a full-batch run, the curvature along the optimizer's steps rises until it reaches 2/η, where a step just stops
lowering the loss. It hovers there while the loss continues to fall, no longer monotonically. The threshold of AdamW is
that of gradient descent, since the step already contains momentum and preconditioning.

The example fits the digits by squared error to one-hot labels. Cross-entropy (--loss cross_entropy) has no curvature
left when its labels are fitted, which takes a small network a few hundred steps on clean digits; λ then falls from the
edge. It stays longer where the labels are hard to fit, as with --label-noise 0.7.

    python examples/edge_of_stability.py                                       # scikit-learn's digits, on a CPU
    python examples/edge_of_stability.py --oscillation                         # with momentum: λ_osc beside λ_max
    python examples/edge_of_stability.py --model resnet9 --dataset cifar10     # the papers' setting, on a GPU
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from curves import CurveLogger
from data import FullBatchData
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from models import build_network
from plotting import Run, draw, table
from plotting_oscillation import Shares, draw_shares, shares_table
from showing import tensorboard
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor

KEYS = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
TITLES = {"gd": "GD", "momentum": "heavy ball 0.9", "adamw": "AdamW"}
BOTH = ("gd", "adamw")
NETWORKS = {"mlp": "MLP", "resnet9": "ResNet-9", "vgg11": "VGG-11"}
DATASETS = {"digits": "digits", "cifar10": "CIFAR-10 images"}

# Learning rates at which 2/η lies within reach of the curvature. Too small, and the run has fitted its data before
# it gets there; too large, and it is there from the first step. Those of CIFAR-10 are the papers'.
LEARNING_RATES = {
    ("digits", "squared_error"): {"gd": [1.0], "momentum": [1.0], "adamw": [3e-2]},
    ("digits", "cross_entropy"): {"gd": [0.4], "momentum": [0.2], "adamw": [3e-3]},
    ("cifar10", "cross_entropy"): {
        "gd": [2 / 50, 2 / 100, 2 / 200],
        "momentum": [2 / 100],
        "adamw": [6e-5, 2e-4, 6e-4],
    },
}
DEFAULT_LOSS = {"digits": "squared_error", "cifar10": "cross_entropy"}

# Steps after which the picture is complete.
MAX_STEPS = {
    "digits": {"gd": 1000, "momentum": 600, "adamw": 600},
    "cifar10": {"gd": 2000, "momentum": 1000, "adamw": 1000},
}

# The short form: enough steps to get to the edge, fewer measurements.
FAST_STEPS = {"gd": 600, "momentum": 300, "adamw": 300}
INTERVAL, FAST_INTERVAL = 5, 10

LOSSES = {"squared_error": F.mse_loss, "cross_entropy": F.cross_entropy}
LOSS_TITLES = {"squared_error": "squared error", "cross_entropy": "cross-entropy"}


class FullBatchClassifier(pl.LightningModule):
    """An ordinary classifier, without any code for the measurement.

    Args:
        network: module from inputs to logits.
        optimizer: "gd" (no momentum), "momentum" (a heavy ball, β = 0.9) or "adamw" (β = (0.9, 0.999)).
        learning_rate: η, constant.
        loss: "squared_error" (targets are one-hot vectors) or "cross_entropy" (class indices).
    """

    def __init__(self, network: nn.Module, *, optimizer: str, learning_rate: float, loss: str) -> None:
        super().__init__()
        self.network = network
        self.loss = LOSSES[loss]
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of the full batch, which is an epoch: its mean over the epoch is the loss of the step."""
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Constant learning rate: 2/η is a horizontal line."""
        if self.optimizer_name == "gd":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        if self.optimizer_name == "momentum":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.999))


def train(
    optimizer: str, learning_rate: float, data: FullBatchData, args: argparse.Namespace
) -> tuple[Run, Shares | None]:
    """Train once, always from the same initialization, and return the curves."""
    pl.seed_everything(args.seed, verbose=False)
    max_steps = args.max_steps or (FAST_STEPS if args.fast else MAX_STEPS[args.dataset])[optimizer]
    network = build_network(args.model, input_shape=data.input_shape)
    model = FullBatchClassifier(network, optimizer=optimizer, learning_rate=learning_rate, loss=args.loss)

    curves, every = CurveLogger(), args.every_n_train_steps
    estimators = (*args.estimators, "oscillation") if args.oscillation else args.estimators
    callbacks: list[Callback] = [DirectionalCurvatureMonitor(estimators=estimators, every_n_train_steps=every)]
    if args.oscillation:
        largest = "preconditioned_lambda_max" if optimizer == "adamw" else "lambda_max"
        callbacks.append(HessianSpectrumMonitor(quantities=[largest], every_n_train_steps=every))
    if args.target_loss is not None:
        # Patience is no part of the rule; it must only never be the reason to stop.
        callbacks.append(EarlyStopping("train_loss", stopping_threshold=args.target_loss, patience=max_steps))
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=max_steps,
        max_epochs=max_steps,  # never reached before max_steps; the progress bar counts epochs
        accumulate_grad_batches=data.batches_per_step,
        logger=[TensorBoardLogger(args.out, name=f"{optimizer}_lr{learning_rate:.3g}"), curves],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=1,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    print(
        f"{TITLES[optimizer]}, η = {learning_rate:.3g}: {trainer.global_step} steps in "
        f"{time.perf_counter() - start:.0f} s, training loss {trainer.callback_metrics['train_loss']:.3g}",
        flush=True,
    )
    curvature = {KEYS[estimator]: curves.curve(f"curvature/{KEYS[estimator]}") for estimator in args.estimators}
    run = Run(TITLES[optimizer], learning_rate, curves.curve("train_loss"), curvature)
    if not args.oscillation:
        return run, None
    keys = ("stability_headroom", "oscillation_ratio", "oscillation_cosine", "headroom")
    return run, Shares(run, *(curves.curve(f"curvature/{key}") for key in keys))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults that depend on other options are filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The papers' setting: ResNet-9 and VGG-11 without BatchNorm on the first 5,000 images of CIFAR-10, full "
        "batch,\nGD with η = 2/50, 2/100, 2/200, AdamW with η = 6e-5, 2e-4, 6e-4, each run until --target-loss.",
    )
    parser.add_argument(
        "--optimizer", choices=[*TITLES, "both", "all"], help="(both: GD and AdamW; all with --oscillation)"
    )
    parser.add_argument("--oscillation", action="store_true", help="measure λ_osc and λ_max as shares of the edge too")
    parser.add_argument(
        "--lr", type=float, nargs="+", help="η, one run each (digits: 1 for GD, 0.03 for AdamW; cifar10: the papers')"
    )
    parser.add_argument("--max-steps", type=int, help="(digits: 1000 for GD, 600 for AdamW; cifar10: 2000 and 1000)")
    parser.add_argument("--target-loss", type=float, help="stop when the training loss first reaches this")
    parser.add_argument("--every-n-train-steps", type=int, help="steps between measurements (5; 10 with --fast)")
    parser.add_argument("--loss", choices=list(LOSSES), help="(digits: squared_error; cifar10: cross_entropy)")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of the labels that are redrawn at random")
    parser.add_argument("--estimators", nargs="+", choices=list(KEYS), default=["hvp", "finite_difference", "kl"])
    parser.add_argument("--model", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--dataset", choices=list(DATASETS), default="digits")
    parser.add_argument("--samples", type=int, default=5000, help="full batch, from the start of the training set")
    parser.add_argument("--micro-batch", type=int, help="samples per forward, accumulated to the full batch")
    parser.add_argument("--npz", type=Path, help="CIFAR-10 as a file with x_train (N, 32, 32, 3) uint8 and y_train")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is downloaded to")
    parser.add_argument("--out", type=Path, default=Path("runs/edge_of_stability"))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="fewer steps and measurements, digits only")
    args = parser.parse_args(arguments)
    if args.npz is not None and args.dataset != "cifar10":
        parser.error(f"--npz holds CIFAR-10, got --dataset {args.dataset}: add --dataset cifar10.")
    args.loss = args.loss or DEFAULT_LOSS[args.dataset]
    if args.model != "mlp" and args.dataset == "digits":
        parser.error(f"--model {args.model} reads 32×32 images: add --dataset cifar10")
    if args.fast and args.dataset != "digits":
        parser.error("--fast is a short form of the run on digits: use --max-steps")
    args.optimizer = args.optimizer or ("all" if args.oscillation else "both")
    if args.lr and args.optimizer in ("both", "all"):
        parser.error("--lr belongs to one optimizer: add --optimizer gd or --optimizer adamw")
    if not args.lr and (args.dataset, args.loss) not in LEARNING_RATES:
        parser.error(f"--loss {args.loss} on {args.dataset} has no learning rate of its own: add --lr and --optimizer")
    if args.every_n_train_steps is None:
        args.every_n_train_steps = FAST_INTERVAL if args.fast else INTERVAL
    args.estimators = tuple(args.estimators)
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train with each optimizer; print the table, draw the picture."""
    args = parse_arguments(arguments)
    # One batch is all the data there is, so that workers have nothing to prefetch.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    if args.model == "mlp":
        torch.set_num_threads(1)  # its matrix products are too small to be worth sharing

    data = FullBatchData(
        dataset=args.dataset,
        samples=args.samples,
        micro_batch=args.micro_batch,
        data_dir=args.data_dir,
        npz=args.npz,
        one_hot=args.loss == "squared_error",
        label_noise=args.label_noise,
    )
    # Ahead of the Trainer, which would do both too: the network is built for the shape of the data.
    data.prepare_data()
    data.setup()
    noise = f", {args.label_noise:.0%} of the labels random" if args.label_noise else ""
    setting = f"{NETWORKS[args.model]} on {data.samples} {DATASETS[args.dataset]}{noise}"
    subject = f"{setting}, full batch, {LOSS_TITLES[args.loss]}"
    print(subject, flush=True)
    trained = [
        train(optimizer, learning_rate, data, args)
        for optimizer in {"all": tuple(TITLES), "both": BOTH}.get(args.optimizer, (args.optimizer,))
        for learning_rate in args.lr or LEARNING_RATES[args.dataset, args.loss][optimizer]
    ]

    runs, picture = [run for run, _ in trained], args.out / "edge_of_stability.png"
    draw(runs, picture, subject=subject, loss_label="training loss", log_loss=args.loss == "squared_error")
    print(f"\n{table(runs)}\n\npicture: {picture}")
    if shares := [one for _, one in trained if one is not None]:
        draw_shares(shares, args.out / "oscillation.png", subject=subject, log_loss=args.loss == "squared_error")
        print(f"\n{shares_table(shares)}\n\npicture: {args.out / 'oscillation.png'}")
    print(f"{tensorboard(args.out)}")


if __name__ == "__main__":
    main()
