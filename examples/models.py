"""The networks of the examples: a small MLP, and the two convolutional networks of the full-batch CIFAR-10 setting."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected network.

    The default activation is smooth: with ReLU the Hessian at a point says less of the loss around it, which has kinks.

    Args:
        in_features: size of a flattened input.
        classes: number of logits.
        width: units of each hidden layer.
        depth: number of hidden layers. With only two layers of this width the curvature hardly rises.
        activation: after each hidden layer.
    """

    def __init__(
        self,
        *,
        in_features: int,
        classes: int = 10,
        width: int = 48,
        depth: int = 4,
        activation: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        sizes = [in_features] + depth * [width]
        hidden = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), activation())]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes), of inputs (B, …)."""
        return self.layers(x)


def convolution(in_channels: int, out_channels: int, *, pool: bool = False) -> nn.Sequential:
    """Return a 3×3 convolution and ReLU, with optional 2×2 max pooling, without BatchNorm.

    BatchNorm would make the loss of one sample depend on the others and rescale the measured curvature.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class Residual(nn.Module):
    """x + f(x), f two convolutions of equal width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Feature map of the shape of the input, (B, C, H, W)."""
        return x + self.branch(x)


class ResNet9(nn.Module):
    """ResNet-9 without BatchNorm for 32×32 images, default PyTorch initialization."""

    def __init__(self, *, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3, 64),
            convolution(64, 128, pool=True),
            Residual(128),
            convolution(128, 256, pool=True),
            convolution(256, 512, pool=True),
            Residual(512),
            nn.MaxPool2d(4),
            nn.Flatten(),
            nn.Linear(512, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, 3, 32, 32)."""
        return self.layers(x)


class VGG11(nn.Module):
    """VGG-11 (configuration A) without BatchNorm for 32×32 images, default PyTorch initialization.

    Five poolings leave one pixel of 512 channels for the one linear layer.
    """

    def __init__(self, *, classes: int = 10) -> None:
        super().__init__()
        channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
        pooled = [True, True, False, True, False, True, False, True]
        features = [
            convolution(fan_in, fan_out, pool=pool)
            for (fan_in, fan_out), pool in zip(pairwise(channels), pooled, strict=True)
        ]
        self.layers = nn.Sequential(*features, nn.Flatten(), nn.Linear(channels[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, classes), of images (B, 3, 32, 32)."""
        return self.layers(x)


def build_network(name: str, *, input_shape: torch.Size) -> nn.Module:
    """Return the network called ``name`` ("mlp", "resnet9" or "vgg11") for samples of ``input_shape``.

    Raises:
        ValueError: if ``input_shape`` of a convolutional network is not 3×32×32.
    """
    if name == "mlp":
        return MLP(in_features=input_shape.numel())
    if tuple(input_shape) != (3, 32, 32):
        raise ValueError(
            f"model={name!r} reads images of shape (3, 32, 32), got {tuple(input_shape)}: use --model mlp or "
            "--dataset cifar10."
        )
    return ResNet9() if name == "resnet9" else VGG11()
