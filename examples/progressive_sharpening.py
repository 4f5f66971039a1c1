"""Sharpness rises to the stability threshold of the optimizer and stays there.

While a network trains with a full batch, the largest eigenvalue of the Hessian rises (progressive sharpening) until the
optimizer's steps become unstable on a quadratic of that curvature: at 2/η for gradient descent, at (2+2β)/η for heavy
ball momentum. There it stays (edge of stability). For AdamW the largest eigenvalue of the preconditioned Hessian,
P^{-1/2} H P^{-1/2}, rises to (2+2β₁)/((1−β₁)η) instead. Sources: Cohen et al. 2021 and 2022.

Two monitors measure each run: one the eigenvalues, the other, less often, the trace and the density.

    python examples/progressive_sharpening.py                                         # scikit-learn's digits, on a CPU
    python examples/progressive_sharpening.py --dataset cifar10 --optimizers gd       # the paper's setting, on a GPU
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
from data import CLASSES, FullBatchData
from edge_of_stability import DATASETS, FullBatchClassifier
from lightning.pytorch.loggers import TensorBoardLogger
from models import MLP
from plotting_spectrum import Run, Spectrum, Track, draw, table
from showing import tensorboard

from lightning_curvature import HessianSpectrumMonitor
from lightning_curvature.linalg import eigenpairs, spectral_density, trace
from lightning_curvature.operators import HessianOperator

MOMENTUM = 0.9
TITLES = {"gd": "GD", "heavy_ball": "heavy ball", "adamw": "AdamW"}
FORMULAS = {"gd": "2/η", "heavy_ball": "(2+2β)/η", "adamw": r"$\dfrac{2+2β_1}{(1-β_1)\,η}$"}

# What is followed, and beside it: the next two eigenvalues of gradient descent; λ_max(H) of AdamW, which has no
# threshold.
KEYS = {
    "gd": ("lambda_max", "lambda_2", "lambda_3"),
    "heavy_ball": ("lambda_max",),
    "adamw": ("preconditioned_lambda_max", "lambda_max"),
}

# Two hidden layers of 200 are the paper's; its activation is tanh.
NETWORKS = {"digits": {"width": 48, "depth": 4}, "cifar10": {"width": 200, "depth": 2}}

# Learning rates whose threshold λ reaches before the data are fitted, when it stops rising: on the digits λ of heavy
# ball gets to about 7. The loss of the paper's code, half the sum of squares, is five times the mean over ten classes:
# 0.05 here is 0.01 there, its first example.
LEARNING_RATES = {
    "digits": {"gd": 1.0, "heavy_ball": 0.6, "adamw": 3e-2},
    "cifar10": {"gd": 5e-2},
}
MAX_STEPS = {
    "digits": {"gd": 600, "heavy_ball": 1000, "adamw": 400},
    "cifar10": dict.fromkeys(TITLES, 10_000),
}
# The short form: just far enough to see the edge, with fewer measurements.
FAST_STEPS = {"gd": 400, "heavy_ball": 600, "adamw": 200}
# Odd, since at the edge every other step of gradient descent is on the same side of the valley.
INTERVALS = {"digits": 5, "cifar10": 101}
FAST_INTERVAL = 15

# Measurements of the trace and the density in a run, each as dear as ten of eigenvalues.
SELDOM, FAST_SELDOM = 10, 3

# Eigenvalues are off by the square of the residual, so that this is more than the eye can see.
TOLERANCE = 1e-3

# The spectrum at the end: one eigenvalue for each class stands out.
OUTLIERS = CLASSES
DENSITY_STEPS = 80
TRACE_ERROR = 0.02


class Classifier(FullBatchClassifier):
    """The classifier of the other example, with heavy ball momentum among its optimizers."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Constant learning rate: the threshold is a horizontal line."""
        if self.optimizer_name == "heavy_ball":
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=MOMENTUM)
        return super().configure_optimizers()


def train(optimizer: str, data: FullBatchData, args: argparse.Namespace) -> tuple[Run, Classifier]:
    """Train once, always from the same initialization; return the curves and the module."""
    pl.seed_everything(args.seed, verbose=False)
    learning_rate, max_steps = args.lr[optimizer], args.max_steps[optimizer]
    network = MLP(in_features=data.input_shape.numel(), **NETWORKS[args.dataset])
    model = Classifier(network, optimizer=optimizer, learning_rate=learning_rate, loss="squared_error")

    curves = CurveLogger()
    every = args.every_n_train_steps
    seldom = max(every, max_steps // (FAST_SELDOM if args.fast else SELDOM))
    quantities = [key for key in KEYS[optimizer] if key.endswith("lambda_max")]
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=max_steps,
        max_epochs=max_steps,  # never reached before max_steps; the progress bar counts epochs
        accumulate_grad_batches=data.batches_per_step,
        logger=[TensorBoardLogger(args.out, name=f"{optimizer}_lr{learning_rate:.3g}"), curves],
        callbacks=[
            HessianSpectrumMonitor(
                quantities=quantities,
                k=sum(key not in quantities for key in KEYS[optimizer]) + 1,
                every_n_train_steps=every,
                probe_samples=None,  # the loss that is trained, not a sample of it
                tolerance=TOLERANCE,
            ),
            HessianSpectrumMonitor(
                quantities=("hessian_trace", "spectral_density"),
                every_n_train_steps=seldom,
                density_starts=1,
                probe_samples=None,
                prefix="spectrum",
            ),
        ],
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
    return collect(optimizer, learning_rate, curves), model


def collect(optimizer: str, learning_rate: float, curves: CurveLogger) -> Run:
    """Return the curves of a run; an eigenvalue without its own threshold is compared with 2/η."""
    tracks = []
    for key in KEYS[optimizer]:
        steps, values = curves.curve(f"curvature/{key}")
        own = "preconditioned_lambda_max" if key.startswith("preconditioned") else "lambda_max"
        _, thresholds = curves.curve(f"curvature/{own}_threshold")
        tracks.append(Track(key, steps, values, thresholds if thresholds.size else 0 * steps + 2 / learning_rate))
    trace = curves.curve("spectrum/hessian_trace"), curves.curve("spectrum_diagnostics/hessian_trace_stderr")
    return Run(TITLES[optimizer], learning_rate, FORMULAS[optimizer], curves.curve("train_loss"), tracks, trace)


def spectrum_of(run: Run, model: Classifier, data: FullBatchData) -> Spectrum:
    """Return the spectrum after the last step, without a Trainer: the monitors measure before steps."""
    hessian = HessianOperator.of(model.network, F.mse_loss, data.batches)
    top = eigenpairs(hessian, hessian.space, largest=OUTLIERS)
    spectrum = Spectrum(
        run,
        top,
        trace(hessian, hessian.space, relative_error=TRACE_ERROR, deflation=top),
        spectral_density(hessian, hessian.space, steps=DENSITY_STEPS, deflation=top),
    )
    hessian.close()
    return spectrum


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults that depend on other options are filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The paper's setting: a fully connected network with two hidden layers of 200 on the first 5,000 images "
        "of CIFAR-10,\nsquared error, full batch (here with GELU in place of tanh).",
    )
    parser.add_argument("--optimizers", nargs="+", choices=list(TITLES), help="(digits: all; cifar10: gd)")
    parser.add_argument("--lr", type=float, nargs="+", help="η of each (digits: 1, 0.6, 0.03; cifar10: 0.05 for gd)")
    parser.add_argument("--max-steps", type=int, help="(digits: 600, 1000, 400; cifar10: 10,000)")
    parser.add_argument("--every-n-train-steps", type=int, help="between measurements (5; --fast 15; cifar10 101)")
    parser.add_argument("--dataset", choices=list(DATASETS), default="digits")
    parser.add_argument("--samples", type=int, default=5000, help="full batch, from the start of the training set")
    parser.add_argument("--micro-batch", type=int, help="samples per forward, accumulated to the full batch")
    parser.add_argument("--npz", type=Path, help="CIFAR-10 as a file with x_train (N, 32, 32, 3) uint8 and y_train")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is downloaded to")
    parser.add_argument("--out", type=Path, default=Path("runs/progressive_sharpening"))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="fewer steps and measurements, digits only")
    args = parser.parse_args(arguments)
    if args.npz is not None and args.dataset != "cifar10":
        parser.error(f"--npz holds CIFAR-10, got --dataset {args.dataset}: add --dataset cifar10.")
    known = LEARNING_RATES[args.dataset]
    args.optimizers = list(dict.fromkeys(args.optimizers or known))
    if args.fast and args.dataset != "digits":
        parser.error("--fast is a short form of the run on digits: use --max-steps")
    if args.lr and len(args.lr) != len(args.optimizers):
        parser.error(f"--lr needs one η for each of {' '.join(args.optimizers)}, got {len(args.lr)}")
    unknown = [name for name in args.optimizers if name not in known]
    if unknown and not args.lr:
        parser.error(f"{unknown[0]} on {args.dataset} has no learning rate of its own: add --lr")
    args.lr = dict(zip(args.optimizers, args.lr or map(known.get, args.optimizers), strict=True))
    steps = FAST_STEPS if args.fast else MAX_STEPS[args.dataset]
    args.max_steps = dict.fromkeys(args.optimizers, args.max_steps) if args.max_steps else steps
    if args.every_n_train_steps is None:
        args.every_n_train_steps = FAST_INTERVAL if args.fast else INTERVALS[args.dataset]
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train with each optimizer; print the table, draw the picture."""
    args = parse_arguments(arguments)
    # One batch is all the data there is, so that workers have nothing to prefetch.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the matrix products of a small MLP are not worth sharing

    data = FullBatchData(
        dataset=args.dataset,
        samples=args.samples,
        micro_batch=args.micro_batch,
        data_dir=args.data_dir,
        npz=args.npz,
        one_hot=True,
    )
    # Ahead of the Trainer, which would do both too: the network is built for the shape of the data.
    data.prepare_data()
    data.setup()
    subject = f"MLP on {data.samples} {DATASETS[args.dataset]}, full batch, squared error"
    print(subject, flush=True)
    runs, models = zip(*(train(optimizer, data, args) for optimizer in args.optimizers), strict=True)
    spectrum = spectrum_of(runs[0], models[0], data)

    picture = args.out / "progressive_sharpening.png"
    draw(runs, spectrum, picture, subject=subject)
    print(f"\n{table(runs)}\n{spectrum}\n\npicture: {picture}\n{tensorboard(args.out)}")


if __name__ == "__main__":
    main()
