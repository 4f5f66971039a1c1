"""Models of transformers and peft, on tokens."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.compatibility.integrations.sizes import BATCH, SAMPLES

Items = list[dict[str, Tensor]]


class Language(pl.LightningModule):
    """A model of transformers, which computes its loss itself."""

    def __init__(self, model: nn.Module, warmup: bool = False) -> None:
        super().__init__()
        self.model, self.warmup = model, warmup

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        from transformers import get_linear_schedule_with_warmup

        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.01)
        if not self.warmup:
            return optimizer
        schedule = get_linear_schedule_with_warmup(optimizer, 1, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def gpt2() -> Language:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Language(GPT2LMHeadModel(GPT2Config(vocab_size=29, n_positions=12, n_embd=16, n_layer=2, n_head=2)))


def bert(**kwargs: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=29, max_position_embeddings=12, num_labels=3, **sizes))


def checkpointed() -> Language:
    model: Any = bert()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for handle in model._require_grads_hooks:
        handle.id = 0  # a number that counts on from run to run
    return Language(model)


def lora() -> Language:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(TaskType.SEQ_CLS, r=2, lora_alpha=8, lora_dropout=0.1, target_modules=["query", "value"])
    return Language(get_peft_model(bert(), config))


def texts() -> DataLoader[Any]:
    """Sequences of eight tokens, some of them padded, to be continued."""
    tokens, mask = torch.randint(29, (SAMPLES, 8)), torch.ones(SAMPLES, 8, dtype=torch.long)
    mask[::3, 6:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    rows = zip(tokens, mask, labels, strict=True)
    items: Items = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in rows]
    return DataLoader(items, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]


def sentences() -> DataLoader[Any]:
    """The same, to be classified; batches of transformers' own kind."""
    from transformers import BatchEncoding

    def collate(items: Items) -> Any:
        return BatchEncoding({key: torch.stack([item[key] for item in items]) for key in items[0]})

    items: Items = [item | {"labels": torch.randint(3, ())} for item in texts().dataset]
    return DataLoader(items, batch_size=BATCH, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
