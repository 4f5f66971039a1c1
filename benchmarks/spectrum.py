"""Measures cost and accuracy of λ_max and the trace of the Hessian beside PyHessian and curvlinops, in one run.

Every tool gets the same parameters of a partly trained network and the same samples in the same micro-batches. The
benchmark compares the values with float64, so that no tool is fast by being wrong.

    python benchmarks/spectrum.py --fast                     # a minute: do all sections run?
    python benchmarks/spectrum.py --npz cifar10.npz          # ResNet-9 and GPT, 512 samples
    python benchmarks/spectrum.py --sections cold tracking --workloads gpt --device cuda --large
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from pathlib import Path

import torch
from directional import hardware
from spectrum_cost import LINEAR_LEGEND, PRODUCT_LEGEND, linear, mlp_net, products
from spectrum_eigen import COLD_LEGEND, TRACKING_LEGEND, cold, tracking
from spectrum_memory import MEMORY_LEGEND, memory
from spectrum_nets import subject
from spectrum_trace import TRACE_LEGEND, traces
from timing import Clock

SECTIONS = ("cold", "tracking", "trace", "linear", "memory", "products")
TITLES = {
    "cold": "Largest eigenvalue, cold",
    "tracking": "Largest eigenvalue along training",
    "trace": "Trace",
    "memory": "Peak memory",
}
# Small settings in which everything runs in a minute.
FAST = {
    "workloads": ["mlp"],
    "samples": 64,
    "micro_batch": 32,
    "repeats": 2,
    "train_steps": 8,
    "first": 2,
    "every": 2,
    "measurements": 2,
    "trace_errors": [0.3, 0.2],
    "deflated": [1],
    "trace_samples": 6,
    "patience": 5.0,
}
_MLPS = (10_000, 1_800_000)
_LINEAR = (100_000, 400_000, 1_600_000, 6_400_000)
_FAST_SHARE = 16


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=["mlp", "resnet9", "gpt"], default=["resnet9", "gpt"])
    parser.add_argument("--large", action="store_true", help="also GPT-2's smallest size, 124 M parameters: for a GPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--samples", type=int, default=512, help="samples of the probe set")
    parser.add_argument("--micro-batch", type=int, default=64, help="samples differentiated at once")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each tool, and rounds of each timing")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds after which a tool gets no further start"
    )
    parser.add_argument("--train-steps", type=int, default=100, help="steps before anything but tracking is measured")
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements of tracking")
    parser.add_argument("--first", type=int, default=20, help="step of the first measurement of tracking that counts")
    parser.add_argument("--measurements", type=int, default=6, help="measurements of tracking that count")
    parser.add_argument("--tolerances", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="of the monitor")
    parser.add_argument("--trace-errors", nargs="+", type=float, default=[0.05, 0.02], help="standard errors to reach")
    parser.add_argument(
        "--deflated",
        nargs="+",
        type=int,
        default=[1, 10],
        help="eigenpairs that the trace may know: as the monitor's, one a class",
    )
    parser.add_argument("--trace-samples", type=int, default=20, help="samples of PyHessian's trace")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (all cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor: this process's processor time, for a CPU that other programs use too",
    )
    parser.add_argument("--npz", type=Path, help="real images for ResNet-9: x_train (N, 32, 32, 3) uint8, y_train (N,)")
    parser.add_argument("--fast", action="store_true", help="a minute's run of all sections on a small MLP")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    if arguments.fast:
        parser.set_defaults(**FAST)
        arguments = parser.parse_args()
    for name in ("repeats", "measurements", "trace_samples"):
        if getattr(arguments, name) < 2:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 2, got {getattr(arguments, name)}: "
                "a spread needs a sample."
            )
    if arguments.first < arguments.every or arguments.first % arguments.every:
        parser.error(
            f"--first must be a multiple of --every, got {arguments.first} and {arguments.every}: take --first "
            f"{arguments.every} for all but the cold one."
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can see, got none: use --device cpu.")
    if arguments.device == "cuda" and arguments.clock == "processor":
        parser.error("--clock processor counts only the CPU's time, got --device cuda: leave it out.")
    return arguments


class Page:
    """The lines of the result: printed as they come, and written at the end of every section."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        """Print and keep."""
        print("\n".join(lines), flush=True)
        self.lines += lines
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def run(arguments: argparse.Namespace, page: Page) -> list[str]:
    """Measure; returns the lines of the goals."""
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    clock = Clock(device, time.process_time if arguments.clock == "processor" else time.perf_counter)
    keys = [*arguments.workloads, *(["large"] if arguments.large else [])]
    subjects = {key: subject(key, arguments.npz, arguments.samples, arguments.micro_batch) for key in keys}
    nets = {}
    if set(arguments.sections) - {"tracking", "linear"}:
        nets = {key: one.trained(device, arguments.train_steps) for key, one in subjects.items()}
    legends = {
        "cold": COLD_LEGEND,
        "tracking": TRACKING_LEGEND.format(first=arguments.first, every=arguments.every, count=arguments.measurements),
        "trace": TRACE_LEGEND,
        "memory": MEMORY_LEGEND,
    }
    goals: list[str] = []
    for section in (name for name in SECTIONS if name in arguments.sections and name in TITLES):
        page.add(f"## {TITLES[section]}", "", *legends[section].splitlines(), "")
        for key, one in subjects.items():
            if section == "tracking":
                found, reached = tracking(
                    one, clock, arguments.first, arguments.every, arguments.measurements, arguments.tolerances
                )
                title = one.name
            else:
                net, reached = nets[key], []
                title = f"{net.title}, after {arguments.train_steps} steps"
                if section == "cold":
                    found, reached = cold(net, clock, arguments.repeats, arguments.patience)
                elif section == "trace":
                    found = traces(
                        net,
                        clock,
                        arguments.trace_errors,
                        arguments.deflated,
                        arguments.repeats,
                        arguments.trace_samples,
                        arguments.patience,
                    )
                else:
                    found = memory(net)
            page.add(f"### {title}", "", *found, "")
            goals += reached
    if "linear" in arguments.sections:
        sizes = [count // _FAST_SHARE if arguments.fast else count for count in _LINEAR]
        page.add("## Linear in parameters and samples", "", *LINEAR_LEGEND.splitlines(), "")
        page.add(*linear(clock, sizes, arguments.samples, arguments.micro_batch, arguments.repeats))
    if "products" in arguments.sections:
        page.add("## One product", "", *PRODUCT_LEGEND.splitlines(), "")
        mlps = [mlp_net(count, 2 * arguments.micro_batch, arguments.micro_batch, device) for count in _MLPS]
        page.add(*products([*mlps, *nets.values()], clock, arguments.repeats), "")
    return goals


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    # PyHessian's products make a graph by ``backward``; vmap has no kernel of its own for some second derivatives.
    warnings.filterwarnings("ignore", message=".*backward\\(\\) with create_graph=True.*")
    warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    page = Page(arguments.out)
    page.add(
        "# Cost of the Hessian's spectrum",
        "",
        f"Made by `benchmarks/spectrum.py`: {hardware(torch.device(arguments.device))}; {arguments.clock} time; "
        f"{arguments.samples} samples in micro-batches of {arguments.micro_batch}.",
        "",
    )
    goals = run(arguments, page)
    if goals:
        page.add("## Goals", "", *goals)


if __name__ == "__main__":
    main()
