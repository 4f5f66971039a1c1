"""Models of torch-geometric on graphs, and of pytorch-forecasting on series."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compatibility.integrations.sizes import BATCH, SAMPLES


class Graphs(pl.LightningModule):
    """A classifier of whole graphs by torch-geometric."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv1, self.conv2, self.head = GCNConv(5, 8), GCNConv(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.conv1(x, edges).relu()
        x = global_mean_pool(self.conv2(x, edges), batch)
        return self.head(F.dropout(x, 0.5, self.training))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch.x.to(self.dtype)  # Lightning leaves batches of this kind in float32
        loss = F.cross_entropy(self(x, batch.edge_index, batch.batch), batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)


def graphs() -> Any:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as Loader

    def graph(nodes: int) -> Any:
        edges = torch.randint(nodes, (2, 3 * nodes))
        return Data(torch.randn(nodes, 5), edges, y=torch.randint(3, (1,)))

    return Loader([graph(4 + i % 3) for i in range(SAMPLES)], batch_size=BATCH, shuffle=True)


def series(**more: Any) -> Any:
    """Four series of nine values, cut into sixteen pieces of six, of which the last two are predicted."""
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    value = np.random.default_rng(0).normal(size=36) + 3.0
    columns = {"time": np.tile(np.arange(9), 4), "value": value, "group": np.repeat(list("abcd"), 9)}
    names = {"time_idx": "time", "target": "value", "group_ids": ["group"], "time_varying_unknown_reals": ["value"]}
    lengths = {"min_encoder_length": 4, "max_encoder_length": 4, "max_prediction_length": 2}
    return TimeSeriesDataSet(pd.DataFrame(columns), **names, **lengths, **more)


def in_context() -> Any:
    """With what is known beside the values."""
    return series(static_categoricals=["group"], time_varying_known_reals=["time"], add_relative_time_idx=True)


def tft() -> Any:
    from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer

    sizes = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.1}
    options = {"learning_rate": 0.01, "loss": QuantileLoss(), "optimizer": "adam"}
    return TemporalFusionTransformer.from_dataset(in_context(), **sizes, **options)


def nbeats() -> Any:
    from pytorch_forecasting import NBeats

    sizes = {"widths": [8, 16], "num_blocks": [1, 1], "num_block_layers": [2, 2], "backcast_loss_ratio": 0.1}
    return NBeats.from_dataset(series(), learning_rate=0.01, optimizer="adam", **sizes)
