"""Batch sharpness of SGD rises to 2/η and stays there, while λ_max of the whole data stays below.

A network that is trained with mini-batches stops sharpening before the largest eigenvalue of its Hessian reaches 2/η.
Batch sharpness rises to 2/η and hovers there: the mean over mini-batches of the curvature of a mini-batch's own loss
along its own gradient, g_BᵀH_Bg_B / ‖g_B‖² (Edge of stochastic stability 2025, figure 6).

    python examples/edge_of_stochastic_stability.py                              # scikit-learn's digits, on a CPU
    python examples/edge_of_stochastic_stability.py --change lr=0.8@5000         # a catapult: figures 5 and 7
    python examples/edge_of_stochastic_stability.py --change batch_size=8@5000
    python examples/edge_of_stochastic_stability.py --index --momentum 0.9 --lr 0.05   # 2/η says nothing here
    python examples/edge_of_stochastic_stability.py --dataset cifar10            # the paper's setting
"""

import argparse
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from changes import Change, Changes
from curves import Curve, CurveLogger
from data import DIGITS_SAMPLES, MiniBatchData
from edge_of_stability import DATASETS
from lightning.pytorch.loggers import TensorBoardLogger
from models import MLP
from plotting_index import Index, draw_index, index_table
from plotting_sharpness import Phase, Run, draw, table
from showing import tensorboard
from torch import Tensor, nn

from lightning_curvature import BatchSharpnessMonitor, HessianSpectrumMonitor, StabilityMonitor

QUANTITIES = ("gni", "ias", "modified_batch_sharpness", "lambda_max_b", "lambda_gen")
HIDDEN_LAYERS = 2


@dataclass(frozen=True)
class Setting:
    """Training settings of a data set; both use two hidden layers with ReLU.

    Batch sharpness rises as long as the network learns. Clean digits are fitted before the edge, so half of them get
    a random label, which the network has to memorize; fewer digits are memorized sooner. Weights smaller than
    Kaiming's make the rise begin low.
    """

    width: int
    weight_scale: float
    learning_rate: float
    batch_size: int
    max_steps: int
    label_noise: float
    samples: int


SETTINGS = {
    "digits": Setting(192, 0.3, 0.5, 16, 8000, 0.5, 1000),
    "cifar10": Setting(512, 0.2, 0.02, 16, 24_000, 0.0, 8000),
}
# The short form: fewer digits are learned by heart in fewer steps.
FAST_STEPS, FAST_SAMPLES = 2000, 300

# In a run: measurements of batch sharpness and λ_max; of step sharpness, which is one product, ten times as many.
MEASUREMENTS, FAST_MEASUREMENTS = 50, 20
STEP_MEASUREMENTS = 10

# Mini-batches for one value, and samples differentiated at once for λ_max.
NUM_BATCHES = 64
MICRO_BATCH = 2048
# Eigenvalues are off by the square of the residual, so that this is more than the eye can see.
TOLERANCE = 1e-2


class MiniBatchClassifier(pl.LightningModule):
    """SGD on half the squared error, without any code for the measurement.

    Args:
        network: module from inputs to outputs.
        learning_rate: η.
        momentum: β of a heavy ball; 0 is plain SGD.
    """

    def __init__(self, network: nn.Module, *, learning_rate: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.momentum = learning_rate, momentum

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, (B, classes)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """½‖z − y‖², y a one-hot vector, in the mean over samples."""
        x, y = batch
        loss = 0.5 * (self(x) - y).square().sum(dim=1).mean()
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """No weight decay."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=self.momentum)


def initialize(network: nn.Module, scale: float) -> None:
    """Kaiming-normal weights times ``scale``, biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.weight.data *= scale


def train(data: MiniBatchData, args: argparse.Namespace) -> tuple[Run, Index | None]:
    """Train once and return the curves."""
    pl.seed_everything(args.seed, verbose=False)
    setting = SETTINGS[args.dataset]
    network = MLP(in_features=data.input_shape.numel(), width=setting.width, depth=HIDDEN_LAYERS, activation=nn.ReLU)
    initialize(network, args.weight_scale)
    model = MiniBatchClassifier(network, learning_rate=args.lr, momentum=args.momentum)

    phases = [Phase(0, args.lr, args.batch_size)]
    curves = CurveLogger()
    every = args.every_n_train_steps
    step_interval = max(1, every // STEP_MEASUREMENTS)
    index = [StabilityMonitor(every_n_train_steps=step_interval)] if args.index else []
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.max_steps,
        max_epochs=args.max_steps,  # never reached before max_steps; the progress bar counts epochs
        # Rebuilding the loader costs an epoch some time.
        reload_dataloaders_every_n_epochs=int(any(change.name == "batch_size" for change in args.change)),
        logger=[TensorBoardLogger(args.out, name=f"lr{args.lr:.3g}_b{args.batch_size}"), curves],
        callbacks=[
            Changes(args.change, data, phases),
            BatchSharpnessMonitor(
                quantities=("batch_sharpness", *args.quantities),
                every_n_train_steps=every,
                num_batches=NUM_BATCHES,
                probe_samples=None,  # batches of all that is trained on
                micro_batch_size=MICRO_BATCH,
            ),
            BatchSharpnessMonitor(
                quantities=("step_sharpness",), every_n_train_steps=step_interval, probe_samples=None, prefix="step"
            ),
            HessianSpectrumMonitor(
                every_n_train_steps=every, probe_samples=None, micro_batch_size=MICRO_BATCH, tolerance=TOLERANCE
            ),
            *index,
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=step_interval,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    drawn = ("batch_sharpness", *args.quantities)
    run = Run(
        steps=args.max_steps,
        phases=phases,
        curvature={key: curves.curve(f"curvature/{key}") for key in (*drawn, "lambda_max")}
        | {"step_sharpness": curves.curve("step/step_sharpness")},
        errors={key: curves.curve(f"curvature_diagnostics/{key}_stderr") for key in drawn},
        loss=whole_epochs(curves.curve("train_loss_epoch")),
        step_loss=curves.curve("train_loss_step"),
    )
    seconds = time.perf_counter() - start
    print(f"{trainer.global_step} steps in {seconds:.0f} s, training loss {run.loss[1][-1]:.3g}", flush=True)
    if not index:
        return run, None
    groups = {"": "curvature", "_stderr": "curvature_diagnostics", "_drift": "curvature", "_noise": "curvature"}
    return run, Index(*(curves.curve(f"{group}/stability_index{end}") for end, group in groups.items()))


def whole_epochs(curve: Curve) -> Curve:
    """Return one point an epoch, without an incomplete last one: the mean of few batches is not informative."""
    steps, values = curve
    cut = len(steps) > 2 and steps[-1] - steps[-2] < steps[-2] - steps[-3]
    return (steps[:-1], values[:-1]) if cut else curve


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults that depend on other options are filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The paper's setting: a fully connected network with two hidden layers of 512 and ReLU on the first "
        "8,000 images\nof CIFAR-10, squared error, SGD without momentum.",
    )
    parser.add_argument("--lr", type=float, help="η (digits 0.5; cifar10 0.02)")
    parser.add_argument("--batch-size", type=int, help="(16)")
    parser.add_argument("--max-steps", type=int, help="(digits 8000; --fast 2000; cifar10 24,000)")
    parser.add_argument("--every-n-train-steps", type=int, help="between measurements (50 in a run; --fast 20)")
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=[], help="shown beside batch sharpness")
    parser.add_argument(
        "--change",
        type=Change.parse,
        action="append",
        default=[],
        metavar="NAME=VALUE@STEP",
        help="lr or batch_size from a step on, the latter from the first epoch that begins then; may be given again",
    )
    parser.add_argument("--index", action="store_true", help="also measure and draw the stability index")
    parser.add_argument("--momentum", type=float, default=0.0, help="β of a heavy ball (0)")
    parser.add_argument("--label-noise", type=float, help="share of random labels (digits 0.5; cifar10 0)")
    parser.add_argument("--weight-scale", type=float, help="of Kaiming's weights (digits 0.3; cifar10 0.2)")
    parser.add_argument("--dataset", choices=list(DATASETS), default="digits")
    parser.add_argument("--samples", type=int, help="of the training set (digits 1000; --fast 300; cifar10 8000)")
    parser.add_argument("--npz", type=Path, help="CIFAR-10 as a file with x_train (N, 32, 32, 3) uint8 and y_train")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is downloaded to")
    parser.add_argument("--out", type=Path, default=Path("runs/edge_of_stochastic_stability"))
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="fewer samples, steps and measurements, digits only")
    args = parser.parse_args(arguments)
    if args.npz is not None and args.dataset != "cifar10":
        parser.error(f"--npz holds CIFAR-10, got --dataset {args.dataset}: add --dataset cifar10.")
    if args.fast and args.dataset != "digits":
        parser.error("--fast is a short form of the run on digits: use --max-steps")
    setting = SETTINGS[args.dataset]
    defaults = {
        "lr": setting.learning_rate,
        "batch_size": setting.batch_size,
        "max_steps": FAST_STEPS if args.fast else setting.max_steps,
        "label_noise": setting.label_noise,
        "weight_scale": setting.weight_scale,
        "samples": FAST_SAMPLES if args.fast else setting.samples,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset == "digits":
        args.samples = min(args.samples, DIGITS_SAMPLES)
    if args.every_n_train_steps is None:
        args.every_n_train_steps = max(1, args.max_steps // (FAST_MEASUREMENTS if args.fast else MEASUREMENTS))
    for size in [args.batch_size, *(change.value for change in args.change if change.name == "batch_size")]:
        if not 1 <= size <= args.samples:
            parser.error(f"the batch size must be from 1 to the {args.samples} samples, got {size}")
    for change in args.change:
        if not 0 < change.step < args.max_steps:
            parser.error(f"--change must be at a step between 0 and --max-steps {args.max_steps}, got {change.step}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train; print the table, draw the picture."""
    args = parse_arguments(arguments)
    # The data is in memory: workers would only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # An epoch of large batches may be shorter than what lies between two points of the picture.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the matrix products of a mini-batch are not worth sharing

    data = MiniBatchData(
        batch_size=args.batch_size,
        dataset=args.dataset,
        samples=args.samples,
        data_dir=args.data_dir,
        npz=args.npz,
        one_hot=True,
        label_noise=args.label_noise,
    )
    # Ahead of the Trainer, which would do both too: the network is built for the shape of the data.
    data.prepare_data()
    data.setup()
    noise = f", {args.label_noise:.0%} of the labels random" if args.label_noise else ""
    subject = (
        f"MLP on {data.samples} {DATASETS[args.dataset]}{noise}, squared error, η = {args.lr:g}, b = {args.batch_size}"
    )
    print(subject, flush=True)
    run, index = train(data, args)

    picture = args.out / "edge_of_stochastic_stability.png"
    draw(run, picture, subject=subject)
    print(f"\n{table(run)}\n\npicture: {picture}")
    if index is not None:
        draw_index(index, run, args.out / "stability_index.png", subject=f"{subject}, β = {args.momentum:g}")
        print(f"\n{index_table(index, run)}\n\npicture: {args.out / 'stability_index.png'}")
    print(f"{tensorboard(args.out)}")


if __name__ == "__main__":
    main()
