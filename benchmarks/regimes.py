"""Regimes against what is known of the runs, and how many catapults are announced: held-out networks and seeds.

python benchmarks/regimes.py --write docs/regimes.md

Replaces what follows the heading "Measured" of the page. ``--seeds 0 9`` gives the runs on which limits were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from regimes_runs import AFTER, SETTINGS, STEPS, Series, known_regimes, quadratic, train

from lightning_curvature.functional import REGIMES

FACTORS = (1.3, 1.5, 2.0, 3.0)
TIMES = {"within 2 steps": 2, "within 3 to 5": 5, "later, or never": AFTER}
HEADING = "## Measured"


@dataclass
class Detection:
    """Interventions whose loss doubles, and quiet runs, under one rule.

    Attributes:
        doubled: interventions after which the loss doubles.
        announced: those of them with an alarm before it has.
        leads: steps from the alarm to the doubling.
        quiet, false: runs whose loss never doubles, and those of them with an alarm.
        calm, needless: interventions after which it does not double, and those of them with an alarm.
    """

    doubled: int = 0
    announced: int = 0
    leads: list[int] = field(default_factory=list)
    quiet: int = 0
    false: int = 0
    calm: int = 0
    needless: int = 0

    def add(self, quiet: Series, raised: Series, at: int, rule: str) -> None:
        """Add a run without intervention, and the same one with it."""
        if not any(quiet.doubles(step) for step in range(30, len(quiet.loss))):
            self.quiet += 1
            self.false += any(quiet.alarms(rule)[30:])
        if any(raised.doubles(step) for step in range(at - 20, at)):
            return  # a catapult of its own is under way
        alarms = raised.alarms(rule)
        doubled = next((step for step in range(at, len(raised.loss)) if raised.doubles(step)), None)
        if doubled is None:
            self.calm += 1
            self.needless += any(alarms[at:])
            return
        first = next((step for step in range(at, doubled) if alarms[step]), None)
        self.doubled += 1
        self.announced += first is not None
        self.leads += [] if first is None else [doubled - first]

    def row(self) -> str:
        """Return the row of a table."""
        early = f"{sum(lead > 1 for lead in self.leads)} of {self.doubled}"
        parts = (self.announced, self.doubled), (self.false, self.quiet), (self.needless, self.calm)
        announced, false, needless = (f"{some} of {all_}" for some, all_ in parts)
        return f"{announced} | {early} | {false} | {needless} |"


def peak(run: Series, at: int) -> float:
    """Return how large the loss gets after an intervention, in units of the least before; infinite if it is lost."""
    largest = max(loss if math.isfinite(loss) else math.inf for loss in run.loss[at:])
    return largest / min(run.loss[at - 20 : at]) if largest < 1e8 else math.inf


def lines(seeds: Sequence[int], tuned_only: bool) -> Iterator[str]:
    """Yield the lines of the page."""
    confusion: Counter[tuple[str, str]] = Counter()
    by_setting: dict[str, Detection] = {}
    by_factor: dict[str, Detection] = {}
    by_time = {name: Detection() for name in TIMES}
    peaks: list[tuple[float, float]] = []
    rises: list[float] = []
    at_edge = 0
    by_rule: dict[str, Detection] = {"default": Detection(), "three steps": Detection()}
    for (place, setting), seed in itertools.product(enumerate(SETTINGS), seeds):
        if tuned_only and not setting.tuned:
            continue
        rng = random.Random(1000 * place + seed)
        factor, at = rng.choice(FACTORS), rng.randrange(150, 450)
        quiet, raised = train(setting, seed, STEPS), train(setting, seed, at + AFTER, {at: factor})
        for run in (quiet, raised):
            confusion.update((t, f) for t, f in zip(known_regimes(run), run.regimes(), strict=True) if t is not None)
        by_setting.setdefault(setting.name, Detection()).add(quiet, raised, at, "default")
        by_factor.setdefault(f"η × {factor:g}", Detection()).add(quiet, raised, at, "default")
        until = next((step - at for step in range(at, len(raised.loss)) if raised.doubles(step)), AFTER)
        time = next(name for name, most in TIMES.items() if until <= most)
        by_time[time].add(quiet, raised, at, "default")
        alarm = next((step for step in range(at, at + until) if raised.alarms()[step]), None)
        if alarm is not None and until < AFTER:
            lowered = train(setting, seed, at + AFTER, {at: factor, alarm + 1: 0.5})
            peaks.append((peak(raised, at), peak(lowered, at)))
        if not any(map(quiet.doubles, range(30, STEPS))):
            at_edge += any(ratio > 0.95 for ratio in quiet.ratio[30:])
            if any(quiet.alarms()[30:]):
                rises.append(max(quiet.loss[i] / min(quiet.loss[i - 20 : i]) for i in range(30, STEPS)))
        for rule, detection in by_rule.items():
            detection.add(quiet, raised, at, rule)
    for seed, kind in itertools.product(seeds, ("stable", "noise", "unstable")):
        run, truth = quadratic(seed, kind)
        confusion.update((t, f) for t, f in zip(truth, run.regimes(), strict=True) if t is not None)
    made = f"benchmarks/regimes.py --seeds {seeds[0]} {seeds[-1]}{' --tuned' * tuned_only}"
    yield f"Made by `{made}`, torch {torch.__version__}, {platform.machine()}."
    yield from ("", "### Alarms", "")
    head = "announced before the loss has doubled | two steps or more before | false alarms in quiet runs | "
    head += "alarms where the loss did not double |"
    tables = {"network": by_setting, "intervention": dict(sorted(by_factor.items()))}
    tables |= {"loss doubles after the intervention": by_time, "rule": by_rule}
    for title, table in tables.items():
        yield from (f"| {title} | {head}", "|---|---|---|---|---|")
        for name, detection in table.items():
            yield f"| {name} | {detection.row()}"
        yield ""
    plain, halved = ([pair[i] for pair in peaks] for i in (0, 1))
    lower, higher = sum(b < a for a, b in peaks), sum(b > a for a, b in peaks)
    lost, lost_plain = (sum(map(math.isinf, one)) for one in (halved, plain))
    yield f"* Learning rate halved at the alarm, {len(peaks)} interventions: in the median the loss rises to"
    yield f"  {median(halved):.3g} times the one before, otherwise to {median(plain):.3g}; {lost} runs are lost,"
    yield f"  otherwise {lost_plain}; the peak is lower in {lower}, higher in {higher}."
    yield f"* Of the quiet runs {at_edge} reach the edge of stability. In those with a false alarm, the loss rises at"
    yield f"  most to {', '.join(f'{one:.2f}' for one in sorted(rises))} times the least one of twenty steps."
    yield from (
        "",
        "### Regimes",
        "",
        f"| known, of steps | {' | '.join(REGIMES)} |",
        "|---" * (len(REGIMES) + 1) + "|",
    )
    for truth in REGIMES:
        total = sum(confusion[truth, found] for found in REGIMES)
        if total:
            shares = [f"{100.0 * confusion[truth, found] / total:.1f} %" for found in REGIMES]
            yield f"| {truth}, {total} | {' | '.join(shares)} |"


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 111), help="the first and the last")
    parser.add_argument("--tuned", action="store_true", help="only the networks on which limits were chosen")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, last = options.seeds
    text = "\n".join(lines(range(first, last + 1), options.tuned)) + "\n"
    print(text)
    if options.write:
        before, heading, _ = options.write.read_text(encoding="utf-8").partition(HEADING)
        options.write.write_text(f"{before}{heading}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
