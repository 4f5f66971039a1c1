"""Modules as users of other packages write them: tiny, drawn at random, on random data. What monitors find on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from tests.compatibility.integrations import language, structured, vision
from tests.compatibility.integrations.sizes import BATCH


@dataclass(frozen=True)
class Integration:
    """A module of another package.

    Attributes:
        packages: what it imports.
        make: the module.
        data: its loader, of 16 samples in batches of 4.
        parameter: one of its weights.
        without: what has no value, a monitor or a key, and words of the sentence that says why.
        told: words of what monitors say beside.
    """

    packages: tuple[str, ...]
    make: Callable[[], pl.LightningModule]
    data: Callable[[], Any]
    parameter: str
    without: dict[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()


NORMED = "BatchNorm in training mode couples samples"
DECAYED = "of Adam acts as H"
EVEN = "AssertionError: Batch size should be even when using this"
INTEGRATIONS: dict[str, Integration] = {
    "transformers, GPT-2": Integration(
        ("transformers",), language.gpt2, language.texts, "model.transformer.h.0.mlp.c_fc.weight"
    ),
    "transformers, BERT, warm-up from 0": Integration(
        ("transformers",),
        lambda: language.Language(language.bert(), warmup=True),
        language.sentences,
        "model.classifier.weight",
        told=("the step did not move the parameters",),
    ),
    "transformers, BERT, checkpointing": Integration(
        ("transformers",), language.checkpointed, language.sentences, "model.classifier.weight"
    ),
    "peft, LoRA on BERT": Integration(
        ("transformers", "peft"),
        language.lora,
        language.sentences,
        "model.base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.default.weight",
    ),
    "timm, ResNet": Integration(
        ("timm",), vision.resnet, lambda: vision.pictures(32), "model.fc.weight", told=(NORMED,)
    ),
    "timm, ViT, mixup, LAMB": Integration(
        ("timm",),
        vision.vit,
        lambda: vision.pictures(16),
        "model.head.weight",
        # Samples are paired, and have no loss alone.
        {"stabilization": EVEN, "noise": EVEN},
        ("Lamb is not known",),
    ),
    "torch-geometric, GCN": Integration(
        ("torch_geometric",), structured.Graphs, structured.graphs, "head.weight", told=(DECAYED,)
    ),
    "lightly, SimCLR": Integration(
        ("lightly",),
        vision.SimCLR,
        vision.photos,
        "projection_head.layers.0.weight",
        {"noise_gamma": "got 0 of", "noise": "the gradients of all samples are alike"},
        (NORMED, "one more sample changes nothing", "the loss of a batch is not the mean of those of its samples"),
    ),
    "segmentation-models-pytorch, U-Net": Integration(
        ("segmentation_models_pytorch", "timm"),
        vision.Segmentation,
        vision.masks,
        "model.segmentation_head.0.weight",
        told=(NORMED,),
    ),
    "diffusers, UNet": Integration(("diffusers",), vision.Diffusion, vision.drawings, "model.conv_out.weight"),
    "pytorch-forecasting, TFT": Integration(
        ("pytorch_forecasting",),
        structured.tft,
        lambda: structured.in_context().to_dataloader(batch_size=BATCH),
        "pos_wise_ff.fc1.weight",
        {"lambda_gn": "lambda_gn needs forward-mode derivatives of the step"},
    ),
    "pytorch-forecasting, N-BEATS": Integration(
        ("pytorch_forecasting",),
        structured.nbeats,
        lambda: structured.series().to_dataloader(batch_size=BATCH),
        "net_blocks.0.fc.0.weight",
        # Absolute errors of a ReLU network: piecewise linear in the weight of one layer.
        {"noise_gamma": "got 0 of", "noise": "the Hessian is zero"},
        (DECAYED,),
    ),
}
