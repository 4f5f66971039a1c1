"""Models of timm, lightly, segmentation-models-pytorch and diffusers, on images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.compatibility.integrations.sizes import BATCH, SAMPLES


class Images(pl.LightningModule):
    """A classifier of timm, with its mixup."""

    def __init__(self, model: nn.Module, mixup: bool = False) -> None:
        super().__init__()
        from timm.data import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        self.model = model
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=3) if mixup else None
        self.loss = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if self.mixup is None else self.mixup(*batch)
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        optimizer = create_optimizer_v2(self, opt="lamb" if self.mixup else "sgd", lr=0.02, weight_decay=0.05)
        return [optimizer], [{"scheduler": CosineLRScheduler(optimizer, t_initial=5), "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch)  # timm's counts epochs


def resnet() -> Images:
    import timm

    return Images(timm.create_model("resnet18", num_classes=3, channels=(4, 4, 8, 8), stem_width=4, drop_rate=0.1))


def vit() -> Images:
    import timm

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return Images(timm.create_model("vit_tiny_patch16_224", num_classes=3, drop_path_rate=0.2, **sizes), mixup=True)


def pictures(size: int) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(SAMPLES, 3, size, size), torch.randint(3, (SAMPLES,)))
    return DataLoader(data, batch_size=BATCH, shuffle=True)


class SimCLR(pl.LightningModule):
    """Contrastive learning as lightly's tutorial has it."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.backbone = nn.Sequential(*layers)
        self.projection_head, self.criterion = SimCLRProjectionHead(8, 8, 4), NTXentLoss()
        self.criterion.memory_bank.bank_ptr.zero_()  # it is memory that nobody has written

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1), _ = batch
        loss = self.criterion(self(x0), self(x1))
        self.log("train_loss_ssl", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


class Photos(Dataset[Any]):
    """Images of noise, each seen in two ways."""

    def __init__(self) -> None:
        from lightly.transforms import SimCLRTransform

        self.pixels = np.random.default_rng(0).integers(256, size=(SAMPLES, 16, 16, 3), dtype=np.uint8)
        self.transform = SimCLRTransform(input_size=16, rr_prob=0.5)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), index % 3


def photos() -> DataLoader[Any]:
    return DataLoader(Photos(), batch_size=BATCH, shuffle=True, drop_last=True)


class Segmentation(pl.LightningModule):
    """A U-Net of segmentation-models-pytorch with the Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        self.model = smp.Unet(
            "tu-resnet18",
            encoder_weights=None,
            encoder_depth=3,
            decoder_channels=(16, 8, 4),
            channels=(4, 4, 8, 8),
            stem_width=4,
        )
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, mask = batch
        logits = self(image)
        loss = self.loss_fn(logits, mask)
        accuracy = ((logits.sigmoid() > 0.5).float() == mask).float().mean()
        self.log_dict({"train_loss": loss, "train_accuracy": accuracy})
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def masks() -> DataLoader[Any]:
    images = torch.randn(SAMPLES, 3, 16, 16)
    data = TensorDataset(images, (images.sum(1, keepdim=True) > 0).float())
    return DataLoader(data, batch_size=BATCH, shuffle=True)


class Diffusion(pl.LightningModule):
    """A UNet of diffusers that predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel

        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        sizes = {"sample_size": 8, "block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 4}
        self.model = UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, **blocks, **sizes)
        self.scheduler = DDPMScheduler(num_train_timesteps=100)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (images,) = batch
        noise = torch.randn_like(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=self.device)
        noisy = self.scheduler.add_noise(images, noise, steps)
        loss = F.mse_loss(self.model(noisy, steps).sample, noise)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def drawings() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(SAMPLES, 1, 8, 8)), batch_size=BATCH, shuffle=True)
