"""Measures the cost of a mini-batch in batch sharpness, and of an estimate, beside other methods.

python benchmarks/batch_sharpness.py --fast                                   # half a minute: does it run?
python benchmarks/batch_sharpness.py --npz cifar10.npz --clock processor
python benchmarks/batch_sharpness.py --device cuda --batch-sizes 8 32
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from directional import hardware
from sharpness_recipes import RECIPES
from sharpness_small import NETWORKS, SMALL_LEGEND, small
from spectrum import Page
from spectrum_cost import in_turns
from spectrum_nets import Batch, Net, subject
from timing import Clock, Spread

from lightning_curvature.functional import add_to_moments, ratio_of_means, ratio_standard_error
from lightning_curvature.operators import HessianOperator, MiniBatch

SECTIONS = ("cost", "small", "estimates")
FAST = {
    "workloads": ["mlp"],
    "small": ["MLP, 64–32"],
    "samples": 64,
    "draws": 4,
    "train_steps": 4,
    "repeats": 2,
    "batch_sizes": [8],
}
TARGET = 0.05  # relative standard error of the estimates
Draw = Callable[[int], tuple[float, float]]

COST_LEGEND = """\
gᵀHg and ‖g‖² of one mini-batch, in forward+backwards of the same mini-batch in the network's own kernels, timed in
turns; median of the ratios [quartiles]. *Plain recipe*: one gradient with its graph and one product with the flattened
gradient, one mini-batch at a time. *vmap*: `torch.func` over eight mini-batches at once, time per mini-batch. *Pair*:
two mini-batches and the product of each with the gradient of the other (IAS, GNI), time per mini-batch. *Limit*: a
gradient with its graph and a product, nothing packed.
"""
ESTIMATE_LEGEND = f"""\
IAS to a relative standard error of {TARGET:.0%}, on {{samples}} samples, in mini-batches of {{size}}. *Pairs*: with the
Hessian of the other of two independent mini-batches. *Full*: a product with the Hessian of all samples for each
mini-batch, graphs kept. Spread of one draw relative to the value, seconds of one draw, and the draws and seconds that
the target takes.
"""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=["mlp", "resnet9", "gpt"], default=["mlp", "resnet9", "gpt"])
    parser.add_argument(
        "--sections", nargs="+", choices=["cost", "small", "estimates"], default=["cost", "small", "estimates"]
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16], help="samples of a mini-batch")
    parser.add_argument("--small", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="small networks")
    parser.add_argument("--samples", type=int, default=256, help="samples of the whole set")
    parser.add_argument("--draws", type=int, default=12, help="draws of which the spread is taken")
    parser.add_argument("--train-steps", type=int, default=100, help="steps before anything is measured")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--npz", type=Path, help="real images: x_train (N, 32, 32, 3) uint8, y_train (N,)")
    parser.add_argument("--fast", action="store_true", help="a small MLP alone")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    if arguments.fast:
        parser.set_defaults(
            workloads=["mlp"], small=["MLP, 64–32"], samples=64, draws=4, train_steps=4, repeats=2, batch_sizes=[8]
        )
        arguments = parser.parse_args()
    return arguments


def forward_backward(net: Net, batch: Batch) -> None:
    """What a plain step costs."""
    torch.autograd.grad(F.cross_entropy(net.rows(batch[0]), batch[1]), net.parameters)


def cost(net: Net, clock: Clock, repeats: int) -> list[str]:
    """Rows of the first table."""
    batches = net.batches[:8]
    reference = RECIPES["plain recipe"].measure(net, batches[:1])[0]
    rows = []
    actions: dict[str, Callable[[], object]] = {"": lambda: [forward_backward(net, batch) for batch in batches]}
    for name, recipe in RECIPES.items():
        actions[name] = lambda recipe=recipe: recipe.measure(net, batches)
    usable, failed = {}, {}
    for name, action in actions.items():
        try:
            action()
            usable[name] = action
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0][:60]
    seconds = in_turns(clock, usable, repeats)
    base = seconds.pop("")
    for name, values in seconds.items():
        ratios = Spread.of([value / unit for value, unit in zip(values, base, strict=True)])
        own = RECIPES[name].measure(net, batches)[0]
        apart = abs(own[0] / reference[0] - 1.0)
        rows.append(
            f"| {name} | {1e3 * median(values) / len(batches):.1f} | {ratios.middle:.2f} "
            f"[{ratios.low:.2f}, {ratios.high:.2f}] | {apart:.0e} |"
        )
    rows += [f"| {name} | – | {reason} | |" for name, reason in failed.items()]
    return [
        f"A forward+backward takes {1e3 * median(base) / len(batches):.1f} ms.",
        "",
        "| way | ms a mini-batch | forward+backwards | gᵀHg, apart from the plain recipe |",
        "|---|---|---|---|",
        *rows,
    ]


def estimates(net: Net, clock: Clock, draws: int) -> list[str]:
    """Rows of the second table."""
    whole = HessianOperator.of(net.rows, F.cross_entropy, net.batches)
    assert isinstance(whole, HessianOperator)

    def opened(index: int) -> MiniBatch:
        return MiniBatch(HessianOperator.of(net.rows, F.cross_entropy, [net.batches[index % len(net.batches)]]))

    def full(number: int) -> tuple[float, float]:
        with closing(opened(number)) as one:
            space = whole.space
            return space.dot(one.gradient, whole(one.gradient)), one.squared_norm

    def paired(number: int) -> tuple[float, float]:
        # Another partner than in the other draws: batches of one partition are not quite independent.
        with closing(opened(number)) as one, closing(opened(number + 1 + number // len(net.batches))) as other:
            crossed = other.curvature_along(one.gradient) + one.curvature_along(other.gradient)
            return crossed / 2.0, (one.squared_norm + other.squared_norm) / 2.0

    rows = ["| way | IAS | spread of a draw | seconds a draw | draws | seconds |", "|---|---|---|---|---|---|"]
    whole(whole.space.random(torch.Generator(net.device).manual_seed(0)))  # its graphs, once
    ways: dict[str, Draw] = {"pairs": paired, "full": full}
    for name, draw in ways.items():
        moments, seconds = torch.zeros(6, dtype=torch.float64), []
        for number in range(draws):
            start = clock.now()
            numerator, denominator = draw(number)
            seconds.append(clock.now() - start)
            moments = add_to_moments(moments, numerator, denominator)
        value = float(ratio_of_means(moments))
        spread = float(ratio_standard_error(moments)) * draws**0.5 / abs(value)
        needed = max(2.0, (spread / TARGET) ** 2)
        each = median(seconds)
        rows.append(f"| {name} | {value:.4g} | {spread:.0%} | {each:.3g} | {needed:.0f} | {needed * each:.3g} |")
    whole.close()
    return rows


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = Clock(device, time.process_time if arguments.clock == "processor" else time.perf_counter)
    page = Page(arguments.out)
    page.add("# Cost of mini-batch sharpness", "")
    page.add(f"Made by `benchmarks/batch_sharpness.py`: {hardware(device)}; {arguments.clock} time.", "")
    nets = {}
    for key in arguments.workloads if set(arguments.sections) - {"small"} else []:
        for size in arguments.batch_sizes:
            nets[key, size] = subject(key, arguments.npz, arguments.samples, size).trained(
                device, arguments.train_steps
            )
    if "cost" in arguments.sections:
        page.add("## One mini-batch", "", *COST_LEGEND.splitlines(), "")
        for net in nets.values():
            page.add(f"### {net.title}", "", *cost(net, clock, arguments.repeats), "")
    if "small" in arguments.sections:
        page.add("## Small models", "", *SMALL_LEGEND.splitlines(), "")
        page.add(*small(clock, arguments.batch_sizes, arguments.repeats, arguments.small), "")
    if "estimates" in arguments.sections:
        for (key, size), net in nets.items():
            legend = ESTIMATE_LEGEND.format(samples=net.samples, size=size)
            page.add(
                f"## One estimate: {key}", "", *legend.splitlines(), "", *estimates(net, clock, arguments.draws), ""
            )


if __name__ == "__main__":
    main()
