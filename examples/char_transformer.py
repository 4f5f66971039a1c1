"""A complete training run of a small character-level transformer, with the monitor's default settings.

Weight decay on some parameters only, warm-up and cosine decay, gradient clipping, mini-batches and optionally bf16 need
no setting, since the monitor measures along the actual step. ``curvature/headroom`` is the factor by which the step
could have been longer before it stops lowering the loss.

    python examples/char_transformer.py                      # learns Python's own standard library
    python examples/char_transformer.py --text my.txt --precision bf16-mixed
    python examples/char_transformer.py --by-module 2        # also: which blocks hold λ_max and the trace
"""

import argparse
import logging
import math
import sys
import sysconfig
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from curves import CurveLogger
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from showing import tensorboard
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_curvature import DirectionalCurvatureMonitor, HessianSpectrumMonitor

MAX_DEFAULT_TEXT = 2_000_000  # characters: several epochs of the default run, read in a moment
MLP_EXPANSION = 4
FINAL_LR_SHARE = 0.1  # the cosine ends at a tenth of the peak
CLIP_NORM = 1.0
SPECTRUM_EVERY, SPECTRUM_SAMPLES = 100, 16

TABLE_ROWS = 12
COLUMNS = {
    "loss": "train_loss",
    "2/η": "curvature/two_over_lr",
    "λ_KL": "curvature/lambda_kl",
    "λ_FD": "curvature/lambda_fd",
    "headroom": "curvature/headroom",
}

# Shape letters below: B batch, T characters of context, V vocabulary, C model width, H heads.


def default_text() -> str:
    """Return the sources of the running Python's standard library, in the order of their names."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= MAX_DEFAULT_TEXT:
            break
    return text[:MAX_DEFAULT_TEXT]


class Characters(Dataset):
    """Consecutive windows of a text: T characters, and the T characters that follow each of them.

    Raises:
        ValueError: if the text is not longer than one window.
    """

    def __init__(self, text: str, *, context: int) -> None:
        if len(text) <= context:
            raise ValueError(f"the text must be longer than context={context}, got {len(text)} characters.")
        self.vocabulary = sorted(set(text))
        index = {character: i for i, character in enumerate(self.vocabulary)}
        self.codes = torch.tensor([index[character] for character in text])
        self.context = context

    def __len__(self) -> int:
        """Number of whole windows."""
        return (len(self.codes) - 1) // self.context

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Inputs (T,) and targets (T,) of window ``i``."""
        window = self.codes[i * self.context : (i + 1) * self.context + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_EXPANSION * width), nn.GELU(), nn.Linear(MLP_EXPANSION * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        split = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class CharTransformer(pl.LightningModule):
    """Decoder-only transformer over characters, with AdamW, warm-up and cosine decay.

    Args:
        vocabulary_size: V.
        context: longest sequence, T.
        width: C; must be a multiple of ``heads``.
        heads: attention heads.
        layers: number of blocks.
        tied: whether the output layer is the embedding's transpose.
        learning_rate: the peak, reached after ``warmup_steps``.
        weight_decay: of matrices; biases and norms are not decayed.
        warmup_steps: steps of linear warm-up.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        context: int = 128,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        tied: bool = True,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width=width, heads=heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        # A tied embedding with the default unit variance would give logits of size √C at the start.
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of characters (B, T)."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.embedding(x) + self.positions(places))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next character."""
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with two parameter groups of one learning rate, and a schedule that moves at every step."""
        decayed = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": self.hparams.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_share(self, step: int) -> float:
        """Return the share of the peak learning rate: linear up to 1, then a cosine down to ``FINAL_LR_SHARE``."""
        warmup = self.hparams.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, self.trainer.estimated_stepping_batches - warmup)
        return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def table(curves: CurveLogger) -> str:
    """Return the values along the run, at up to ``TABLE_ROWS`` of the measured steps."""
    columns = {title: dict(zip(*curves.curve(key), strict=True)) for title, key in COLUMNS.items()}
    measured = curves.curve("curvature/two_over_lr")[0]
    shown = measured[np.unique(np.linspace(0, len(measured) - 1, TABLE_ROWS).round().astype(int))]
    lines = [f"{'step':>6}" + "".join(f"{title:>10}" for title in columns)]
    lines += [f"{step:>6}" + "".join(f"{column[step]:>10.4g}" for column in columns.values()) for step in shown]
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text to learn (the sources of Python's standard library)")
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=128, help="characters that the model sees")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True, help="output layer = embedding")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--by-module", type=int, help="depth of the modules whose share in the curvature is measured")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/char_transformer"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, then print the values of the monitor."""
    args = parse_arguments(arguments)
    # The windows are slices of one tensor: a worker would only add its own cost.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks newer versions of PyTorch in a way that they warn about.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(args.seed, verbose=False)

    text = args.text.read_text(encoding="utf-8") if args.text else default_text()
    characters = Characters(text, context=args.context)
    loader = DataLoader(characters, batch_size=args.batch_size, shuffle=True, drop_last=True)
    model = CharTransformer(
        vocabulary_size=len(characters.vocabulary),
        context=args.context,
        width=args.width,
        heads=args.heads,
        layers=args.layers,
        tied=args.tied,
        learning_rate=args.lr,
        warmup_steps=args.warmup_steps,
    )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} characters, "
        f"vocabulary of {len(characters.vocabulary)}"
    )
    curves, monitors = CurveLogger(), [DirectionalCurvatureMonitor()]
    if args.by_module:
        spectrum = HessianSpectrumMonitor(
            quantities=("lambda_max", "hessian_trace"),
            every_n_train_steps=SPECTRUM_EVERY,
            probe_samples=SPECTRUM_SAMPLES,
            by_module=args.by_module,
        )
        monitors.append(spectrum)
    trainer = pl.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_steps=args.max_steps,
        gradient_clip_val=CLIP_NORM,
        logger=[TensorBoardLogger(args.out.parent, name=args.out.name), curves],
        callbacks=monitors,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)

    if args.by_module:
        print(f"\nwhere the curvature of {SPECTRUM_SAMPLES} windows sat when last measured:\n{spectrum.result.modules}")
    print(
        f"\n{table(curves)}\n\nheadroom = (2/η)/λ: by what factor the step could have been longer before it stops "
        f"lowering the loss.\n1 is the edge of stability; warm-up raises η, so 2/η comes down to meet λ.\n\n"
        f"{tensorboard(args.out)}"
    )


if __name__ == "__main__":
    main()
