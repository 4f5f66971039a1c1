"""How much does one more sample change the loss around a trained network, and in which directions?

The example trains a small character transformer. Then it compares the mean loss of the first k sequences with that of
k + 1, for k from 1 to some hundreds: at the parameters (Δ₁), around them in all directions (Δ₂) and in the D sharpest
ones (Δ₂ of the subspace), as in figures 2, 3 and 5 of Curvature-aligned probing (2026).

    python examples/sample_growth.py               # Python's own standard library, on a CPU
    python examples/sample_growth.py --text my.txt --sigma 1e-4 1e-3
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from char_transformer import CLIP_NORM, Characters, CharTransformer, default_text
from lightning.pytorch.loggers import TensorBoardLogger
from plotting_growth import draw, shares
from showing import tensorboard
from torch.utils.data import DataLoader

from lightning_curvature import SampleGrowth, StabilizationMonitor

CONTEXT, WIDTH, LAYERS, HEADS = 32, 48, 2, 4
BATCH_SIZE = 32
# The last panel: k of its own, and numbers of draws.
CONVERGENCE_K, CONVERGENCE_DRAWS = 8, (4, 16, 64, 256)


def monitor(args: argparse.Namespace, **options: object) -> StabilizationMonitor:
    """Return the monitor with all three estimators, on the training samples."""
    defaults: dict[str, object] = {
        "sample_sizes": args.sample_sizes,
        "subspace_dim": args.subspace_dim,
        "sigma": args.sigma,
        "estimators": ("gaussian_moment", "quadratic", "direct"),
        "candidates": args.candidates,
        "draws": args.draws,
        "tolerance": 1e-2,
        "micro_batch_size": 64,
        "seed": args.seed,
    }
    return StabilizationMonitor(**(defaults | options))  # type: ignore[arg-type]


def converging(args: argparse.Namespace, model: CharTransformer, loader: DataLoader) -> dict[int, SampleGrowth]:
    """Measure one k, a middle σ and the largest D with increasing numbers of draws."""
    sigma = sorted(args.sigma)[(len(args.sigma) - 1) // 2]
    found = {}
    for draws in CONVERGENCE_DRAWS:
        one = monitor(
            args,
            sample_sizes=(CONVERGENCE_K,),
            subspace_dim=max(args.subspace_dim),
            sigma=sigma,
            draws=draws,
            quantities=("delta_2_subspace",),
        )
        found[draws] = one.evaluate(model, loader).result
    return found


def ratios(growth: SampleGrowth) -> str:
    """Return a table of Δ₂ of the subspace over Δ₂ by σ and D, mean over k, both by direct Monte Carlo."""
    curves = growth.curves()
    direct = {name: rows for name, rows in curves.items() if name[1] == "direct"}
    full = {sigma: rows for (criterion, _, _, sigma), rows in direct.items() if criterion == "delta_2"}
    heads = f"{'Δ₂ of the subspace / Δ₂':>26}{'lowest':>9}{'highest':>9}{'of the deformation':>21}"
    lines = [f"{'σ':>8}{'D':>6}{heads}"]
    for (criterion, _, dimension, sigma), rows in direct.items():
        if criterion == "delta_2_subspace":
            values = [rows[k].value / full[sigma][k].value for k in rows]
            beyond = list(shares(growth, dimension, sigma).values())
            lines.append(
                f"{sigma:>8g}{dimension:>6}{sum(values) / len(values):>26.3f}{min(values):>9.3f}{max(values):>9.3f}"
                f"{sum(beyond) / len(beyond):>21.2%}"
            )
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: Python's standard library)")
    parser.add_argument("--max-steps", type=int, default=300, help="training steps before the measurement")
    parser.add_argument("--sample-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256], help="k")
    parser.add_argument("--subspace-dim", type=int, nargs="+", default=[1, 4, 16], help="D")
    parser.add_argument("--sigma", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--candidates", type=int, default=16, help="samples that stand for the next one")
    parser.add_argument("--draws", type=int, default=24, help="S, of Monte Carlo")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_growth"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="half a minute: fewer steps, k up to 16")
    args = parser.parse_args(arguments)
    if args.fast:
        args.max_steps, args.sample_sizes, args.draws = min(args.max_steps, 60), [1, 2, 4, 8, 16], 8
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print the table, draw the picture."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(args.seed, verbose=False)
    torch.set_num_threads(1)  # the matrix products of so small a model are not worth sharing
    text = args.text.read_text(encoding="utf-8") if args.text else default_text()
    characters = Characters(text, context=CONTEXT)
    loader = DataLoader(characters, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    model = CharTransformer(
        vocabulary_size=len(characters.vocabulary), context=CONTEXT, width=WIDTH, heads=HEADS, layers=LAYERS
    )
    growth_monitor = monitor(args)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.max_steps,
        gradient_clip_val=CLIP_NORM,
        logger=TensorBoardLogger(args.out.parent, name=args.out.name),
        callbacks=[growth_monitor],  # at the end of fit
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    size = sum(p.numel() for p in model.parameters())
    print(f"transformer of {size:,} parameters, sequences of {CONTEXT} characters", flush=True)
    start = time.perf_counter()
    trainer.fit(model, loader)
    growth = growth_monitor.result
    assert growth is not None
    print(f"\n{growth}\n\n{ratios(growth)}\n", flush=True)
    draws = converging(args, model, loader)
    picture = args.out / "sample_growth.png"
    draw(growth, draws, picture, subject=f"character transformer, {size:,} parameters, {args.max_steps} steps")
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s\npicture: {picture}\n{tensorboard(args.out)}")


if __name__ == "__main__":
    main()
