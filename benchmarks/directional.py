"""Measures the cost of the directional curvature monitor: time in forwards, memory in parameter sizes, against peers.

Measured and plain steps of a real Trainer alternate in one run, each followed by one forward under ``no_grad``. The
benchmark reports the median of the ratios between neighbours, which see the same noise. It compares the values with
float64 derivatives, so that no method is fast by being wrong.

    python benchmarks/directional.py                                     # MLP, ResNet-9 and GPT on the CPU
    python benchmarks/directional.py --models gpt --repeats 50
    python benchmarks/directional.py --device cuda --large --write docs/benchmark_directional.md
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import time
import warnings
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from measure import ESTIMATORS, Cost, estimator_cost, idle_cost, peer_costs, plain_memory
from memory import Memory
from references import References
from timing import Clock, Spread
from workloads import WORKLOADS, Workload

# Published cost in forwards. Directional curvature (2026): two for the finite difference, one for the KL estimate with
# cached outputs, two for both when they share them, up to about ten for a line search (it cites Kalra et al. 2026). No
# paper counts "gauss_newton" and "hvp" in forwards: others measured them on two CPU cores.
PUBLISHED: dict[str, tuple[float, float]] = {
    "kl": (1.0, 1.0),
    "finite_difference": (2.0, 2.0),
    "kl + finite_difference": (2.0, 2.0),
    "kl + finite_difference, crossed": (2.0, 2.0),
    "gauss_newton": (2.1, 3.6),
    "hvp": (6.6, 10.6),
    "critical": (2.0, 10.0),
}

# The goals: forward-only estimators within this factor of the published count, where a forward is work enough for
# anything else to be small beside it; a step that is not measured within this share of one without the monitor.
COUNT_GOAL = 1.25
COUNT_GOAL_ROWS = ("kl", "finite_difference", "kl + finite_difference")
COUNT_GOAL_MODELS = ("resnet9", "gpt", "large")
IDLE_GOAL = 0.01

# 1 % of a step takes more pairs to be seen than a whole forward does: that many for each timed repeat.
_IDLE_PAIRS = 3

_LEGEND = """\
* *Forward*: one forward and loss under `no_grad`, timed after each step of the same run.
* *Extra time* of a measured step beyond the plain step next to it, in forwards: median, and quartiles in brackets.
  *× published*: its ratio to the published count, to the upper end of a range.
* *Calls* of the network on a measured step beyond those of a plain one.
* *Off by*: largest relative difference over the checked steps from the float64 value of the estimated quantity (dᵀGd
  for kl and gauss_newton, dᵀHd for finite_difference, hvp and the peers, the bisected step length for critical), and in
  brackets the error that the monitor logs with its value. nan: the monitor logged NaN, because rounding hides the
  value, or no checked step went downhill.
* *Crossed*: with `kinks="crossed"`. ResNet-9 has ReLU and max pooling: a difference then includes the kinks of the loss
  between its ends (so do the peers' full gradients), dᵀHd at one point does not, in float64 as well.
* *Peak of the step*: most bytes alive at any moment, with parameters, gradients and optimizer state. *Of the
  measurement*: most bytes alive while the step is measured, beyond those alive after it. Both in sizes of the
  parameters.
* The peers get θ_t and d; their time does not include storing these. `curvlinops` runs without its determinism check.
"""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["mlp", "resnet9", "gpt"]
    parser.add_argument("--models", nargs="+", choices=[*default, "deep"], default=default)
    parser.add_argument("--large", action="store_true", help="also a GPT of 124 M parameters, bf16-mixed: for a GPU")
    parser.add_argument("--repeats", type=int, help="timed measured steps an estimator (10 to 30 by model)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (all cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor: this process's processor time, for a CPU that other programs use too",
    )
    parser.add_argument("--npz", type=Path, help="real images for ResNet-9: x_train (N, 32, 32, 3) uint8, y_train (N,)")
    parser.add_argument("--write", type=Path, help="write the tables to this file too")
    arguments = parser.parse_args()
    if arguments.repeats is not None and arguments.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {arguments.repeats}: quartiles need a sample.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can see, got none: use --device cpu.")
    if arguments.device == "cuda" and arguments.clock == "processor":
        parser.error("--clock processor counts only the CPU's time, got --device cuda: leave it out.")
    return arguments


def hardware(device: torch.device) -> str:
    """Machine and versions, one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    parts = [f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return f"{'; '.join(parts)}; torch {torch.__version__}, lightning {pl.__version__}"


def _number(spread: Spread, digits: int = 2) -> str:
    return f"{spread.middle:.{digits}f} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"


def _errors(cost: Cost) -> str:
    names = {"lambda_kl": "kl ", "lambda_fd": "fd "} if len(cost.errors) > 1 else {}
    stated = {key: f" ({value:.0e})" for key, value in cost.stated.items()}
    return ", ".join(f"{names.get(key, '')}{value:.1e}{stated.get(key, '')}" for key, value in cost.errors.items())


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _sizes(memory: Memory | None, unit: int) -> tuple[str, str]:
    return ("", "") if memory is None else (f"{memory.peak / unit:.2f}", f"{memory.probe / unit:.2f}")


def _row(name: str, cost: Cost | None, unit: int) -> str:
    if cost is None:
        cells = ["", "", "not installed", "", "", "", ""]
    else:
        published = PUBLISHED.get(name)
        cells = [
            _range(*published) if published else "",
            f"{cost.calls:g}" if published else "",
            _number(cost.extra),
            f"{cost.extra.middle / published[1]:.2f}" if published else "",
            _errors(cost),
            *_sizes(cost.memory, unit),
        ]
    return f"| {' | '.join([name, *cells])} |"


def section(key: str, workload: Workload, clock: Clock, repeats: int) -> tuple[list[str], list[str]]:
    """Measure one workload: lines of its section, and lines of the goals."""
    parameters = list(workload.make().parameters())
    count, unit = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    references = References(workload)
    costs: dict[str, Cost | None] = {}
    plain = []
    for name in ESTIMATORS:
        costs[name], rows = estimator_cost(workload, clock, repeats, name, references)
        plain += rows
    costs |= peer_costs(workload, clock, repeats, references)
    ratio, difference = idle_cost(workload, clock, _IDLE_PAIRS * repeats)
    memory = plain_memory(workload, clock.device)
    forward = median(row.forward for row in plain)
    step = median(row.step / row.forward for row in plain)
    lines = [
        f"## {workload.title}",
        "",
        f"{count:,} parameters, {workload.precision}, {repeats} measured steps an estimator. One forward takes "
        f"{1e3 * forward:.2f} ms, a plain step {step:.2f} forwards and at its peak {memory.peak / unit:.2f} parameter "
        "sizes.",
        "",
        f"A step that is not measured takes {_number(ratio, 4)} of a step without the monitor, "
        f"{_number(difference.scaled(1e6), 0)} µs more ({ratio.count} pairs).",
        "",
        "| estimator | published | calls | extra time | × published | off by | peak of the step | of the measurement |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, cost, unit) for name, cost in costs.items()),
        "",
    ]
    return lines, _goals(key, workload, costs, ratio)


def _goals(key: str, workload: Workload, costs: dict[str, Cost | None], idle: Spread) -> list[str]:
    title = workload.title.partition(",")[0]
    lines = []
    for name in COUNT_GOAL_ROWS if key in COUNT_GOAL_MODELS else ():
        cost = costs[name]
        assert cost is not None
        ratio = cost.extra.middle / PUBLISHED[name][1]
        lines.append(f"* {title}, {name}: {ratio:.2f} × published, {_verdict(ratio <= COUNT_GOAL)} {COUNT_GOAL}.")
    above = idle.middle - 1.0
    verdict = _verdict(above <= IDLE_GOAL)
    return [*lines, f"* {title}, a step not measured: {100 * above:+.2f} %, {verdict} {100 * IDLE_GOAL:g} %."]


def _verdict(met: bool) -> str:
    return "within" if met else "**above**"


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")

    clock = Clock(device, time.process_time if arguments.clock == "processor" else time.perf_counter)

    lines = [
        "# Cost of the directional curvature",
        "",
        f"Made by `benchmarks/directional.py`: {hardware(device)}; {arguments.clock} time.",
        "",
    ]
    lines += [*_LEGEND.splitlines(), ""]
    print("\n".join(lines), flush=True)
    goals: list[str] = []
    for key in [*arguments.models, *(["large"] if arguments.large else [])]:
        workload = WORKLOADS[key](arguments.npz)
        found, reached = section(key, workload, clock, arguments.repeats or workload.repeats)
        print("\n".join(found), flush=True)
        lines, goals = lines + found, goals + reached
    ending = ["## Goals", "", *goals]
    print("\n".join(ending))
    if arguments.write is not None:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text("\n".join([*lines, *ending]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
