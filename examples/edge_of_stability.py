"""Gradient descent and AdamW walk up to 2/η and stay there.

A full-batch run is the cleanest place to see it: the curvature along the steps that the optimizer takes rises until
it reaches 2/η, where a step just stops to lower the loss, and hovers there while the loss goes on falling, not
monotonically any more. The threshold is the same for AdamW as for gradient descent, since momentum and
preconditioning are already in the step.

    python examples/edge_of_stability.py                    # scikit-learn's digits, on a CPU
    python examples/edge_of_stability.py --model resnet9 --dataset cifar10 --target-loss 0.1    # the papers' setting
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
from data import FullBatchData
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from models import build_network
from plotting import CurveLogger, Run, draw, table
from torch import Tensor, nn

from lightning_curvature import DirectionalCurvatureMonitor

KEYS = {
    "hvp": "lambda_dir",
    "finite_difference": "lambda_fd",
    "kl": "lambda_kl",
    "gauss_newton": "lambda_gn",
    "critical": "critical_sharpness",
}
TITLES = {"gd": "GD", "adamw": "AdamW"}

# Learning rates at which 2/η lies within reach of the curvature. Too small, and the run has fitted its data before
# it gets there; too large, and it is there from the first step.
LEARNING_RATES = {"digits": {"gd": 0.8, "adamw": 3e-3}, "cifar10": {"gd": 2 / 100, "adamw": 2e-4}}

# Steps after which the picture is complete. AdamW needs fewer, and some hundred steps later it has fitted the
# digits, noise and all: the curvature then falls away from the edge, as cross-entropy makes it do at the end.
MAX_STEPS = {"digits": {"gd": 1000, "adamw": 500}, "cifar10": {"gd": 2000, "adamw": 1000}}

# The short form: enough steps to get to the edge, fewer measurements.
FAST_STEPS = {"gd": 600, "adamw": 300}
FAST_INTERVAL = 10


class FullBatchClassifier(pl.LightningModule):
    """An ordinary classifier; nothing in it knows that it is being measured.

    Args:
        network: module from inputs to logits.
        optimizer: "gd" (no momentum) or "adamw" (β = (0.9, 0.999)).
        learning_rate: η, constant.
    """

    def __init__(self, network: nn.Module, *, optimizer: str, learning_rate: float) -> None:
        super().__init__()
        self.network = network
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy. An epoch is one full batch, so that its mean is the loss of the step."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Constant learning rate: 2/η is a horizontal line."""
        if self.optimizer_name == "gd":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.999))


def train(optimizer: str, data: FullBatchData, args: argparse.Namespace) -> Run:
    """Train once from the same initialization and return the curves."""
    pl.seed_everything(args.seed, verbose=False)
    learning_rate = args.lr or LEARNING_RATES[args.dataset][optimizer]
    max_steps = args.max_steps or (FAST_STEPS if args.fast else MAX_STEPS[args.dataset])[optimizer]
    network = build_network(args.model, input_shape=data.input_shape)
    model = FullBatchClassifier(network, optimizer=optimizer, learning_rate=learning_rate)

    curves = CurveLogger()
    callbacks: list[Callback] = [
        DirectionalCurvatureMonitor(estimators=args.estimators, every_n_train_steps=args.every_n_train_steps)
    ]
    if args.target_loss is not None:
        # Patience is no part of the rule; it must only never be the reason to stop.
        callbacks.append(EarlyStopping("train_loss", stopping_threshold=args.target_loss, patience=max_steps))
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=max_steps,
        max_epochs=max_steps,  # never reached before max_steps; the progress bar counts epochs
        accumulate_grad_batches=data.batches_per_step,
        logger=[TensorBoardLogger(args.out, name=optimizer), curves],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=1,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    print(
        f"{TITLES[optimizer]}: {trainer.global_step} steps, {time.perf_counter() - start:.0f} s, "
        f"training loss {trainer.callback_metrics['train_loss']:.4f}"
    )
    curvature = {KEYS[estimator]: curves.curve(f"curvature/{KEYS[estimator]}") for estimator in args.estimators}
    return Run(TITLES[optimizer], learning_rate, curves.curve("train_loss"), curvature)


def parse_arguments() -> argparse.Namespace:
    """Command line; values left out are filled in where they depend on others."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The papers' setting: ResNet-9 and VGG-11 without BatchNorm on the first 5,000 images of CIFAR-10, full "
        "batch,\nGD with --lr 0.04, 0.02, 0.01 (2/η = 50, 100, 200), AdamW with --lr 6e-5, 2e-4, 6e-4, each run until "
        "--target-loss.",
    )
    parser.add_argument("--optimizer", choices=["gd", "adamw", "both"], default="both")
    parser.add_argument("--lr", type=float, help="η (digits: 0.8 for GD, 3e-3 for AdamW; cifar10: 2/100 and 2e-4)")
    parser.add_argument("--max-steps", type=int, help="(digits: 1000 for GD, 500 for AdamW; cifar10: 2000 and 1000)")
    parser.add_argument("--target-loss", type=float, help="stop when the training loss first reaches this")
    parser.add_argument("--every-n-train-steps", type=int, help="steps between measurements (5; 10 with --fast)")
    parser.add_argument("--estimators", nargs="+", choices=list(KEYS), default=["hvp", "finite_difference", "kl"])
    parser.add_argument("--model", choices=["mlp", "resnet9", "vgg11"], default="mlp")
    parser.add_argument("--dataset", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--samples", type=int, default=5000, help="full batch, from the start of the training set")
    parser.add_argument("--micro-batch", type=int, help="samples per forward, accumulated to the full batch")
    parser.add_argument("--npz", type=Path, help="CIFAR-10 as a file with x_train (N, 32, 32, 3) uint8 and y_train")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is downloaded to")
    parser.add_argument("--out", type=Path, default=Path("runs/edge_of_stability"))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="fewer steps and measurements, digits only")
    args = parser.parse_args()
    if args.model != "mlp" and args.dataset == "digits":
        parser.error(f"--model {args.model} reads 32×32 images: add --dataset cifar10")
    if args.fast and args.dataset != "digits":
        parser.error("--fast is a short form of the run on digits: use --max-steps")
    if args.every_n_train_steps is None:
        args.every_n_train_steps = FAST_INTERVAL if args.fast else 5
    args.estimators = tuple(args.estimators)
    return args


def main() -> None:
    """Train with each optimizer; print the table, draw the picture."""
    args = parse_arguments()
    # One batch is all the data there is, so that workers have nothing to prefetch.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    data = FullBatchData(
        dataset=args.dataset,
        samples=args.samples,
        micro_batch=args.micro_batch,
        data_dir=args.data_dir,
        npz=args.npz,
    )
    # Ahead of the Trainer, which would do both too: the network is built for the shape of the data.
    data.prepare_data()
    data.setup()
    runs = [train(name, data, args) for name in (TITLES if args.optimizer == "both" else [args.optimizer])]

    picture = args.out / "edge_of_stability.png"
    draw(runs, picture)
    print(f"\n{table(runs)}\n\npicture: {picture}\ntensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
