"""Trains the networks whose Hessian is measured, and provides the samples for every tool."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import fit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import WORKLOADS, Batch, Workload, _example

from lightning_curvature.linalg import Eigenpairs, VectorSpace, eigenpairs

# Characters of a sequence: 512 sequences take no longer on a CPU than 512 images do.
CONTEXT, LARGE_CONTEXT = 64, 256
# GPT-2's smallest size gets this share of the samples.
LARGE_SHARE = 8
# The training set is so many times the probe set.
_TRAINING_SETS = 4


class Rows(nn.Module):
    """A network with one row of logits a target, (P, V), as every tool and its criterion understand it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (P, V) of inputs (B, …)."""
        return self.network(x).flatten(0, -2)


@dataclass(frozen=True)
class Net:
    """A network and the loss whose Hessian is measured.

    Attributes:
        title: its name.
        rows: the network, logits (P, V).
        batches: the probe set in micro-batches: inputs (B, …), targets (P,).
    """

    title: str
    rows: Rows
    batches: list[Batch]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, each once."""
        return list(self.rows.parameters())

    @property
    def bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    @property
    def samples(self) -> int:
        """Samples of the probe set."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.parameters[0].device


@dataclass(frozen=True)
class Subject:
    """A workload with the data of this benchmark.

    Attributes:
        name: of the network, and what the samples are.
        workload: the module, and its training batches.
        probe: micro-batches as ``training_step`` receives them.
    """

    name: str
    workload: Workload
    probe: list[Batch]

    def net(self, module: nn.Module) -> Net:
        """A copy of the module as it is now, and the probe set beside it."""
        device = next(module.parameters()).device
        twin = self.workload.make().to(device)
        twin.load_state_dict(module.state_dict())
        own = Rows(twin)
        batches = [(x.to(device), y.to(device).flatten()) for x, y in self.probe]
        return Net(f"{self.name}, {sum(p.numel() for p in own.parameters()):,} parameters", own, batches)

    def trained(self, device: torch.device, steps: int) -> Net:
        """The network after a number of steps of its own training."""
        return self.net(fit(self.workload, device, steps, []).lightning_module)


def subject(key: str, npz: Path | None, samples: int, micro_batch: int) -> Subject:
    """The workload of that key, with training and probe batches."""
    base = WORKLOADS[key](npz)
    if key == "large":
        samples, micro_batch = max(1, samples // LARGE_SHARE), max(1, micro_batch // LARGE_SHARE)
    x, y = _data(key, npz, _TRAINING_SETS * samples, base)
    batches = list(zip(x.split(micro_batch), y.split(micro_batch), strict=True))
    probe = list(zip(x[:samples].split(micro_batch), y[:samples].split(micro_batch), strict=True))
    images = "CIFAR-10" if npz is not None else "random"
    name = {
        "mlp": f"MLP, {samples} random inputs",
        "resnet9": f"ResNet-9, {samples} {images} images",
        "gpt": f"GPT, {samples} sequences of {CONTEXT} characters",
        "large": f"GPT-2 small, {samples} sequences of {LARGE_CONTEXT} random tokens",
    }[key]
    title = f"{name} in micro-batches of {micro_batch}"
    return Subject(title, replace(base, batches=batches, precision="32-true"), probe)


def _data(key: str, npz: Path | None, count: int, base: Workload) -> Batch:
    if key == "gpt":
        example = _example("char_transformer")
        text = example.Characters(example.default_text(), context=CONTEXT)
        items = [text[i] for i in range(count)]
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
    if key == "resnet9" and npz is not None:
        data = _example("data").FullBatchData(dataset="cifar10", samples=count, npz=npz)
        data.setup()
        return data.batches[0]
    g = torch.Generator().manual_seed(1)
    if key == "mlp":
        xs, ys = zip(*base.batches, strict=True)
        return torch.cat(xs)[:count], torch.cat(ys)[:count]
    if key == "resnet9":
        return torch.randn(count, 3, 32, 32, generator=g), torch.randint(10, (count,), generator=g)
    codes = torch.cat([x for x, _ in base.batches])
    codes = torch.randint(int(codes.max()) + 1, (count, LARGE_CONTEXT + 1), generator=g)
    return codes[:, :-1].contiguous(), codes[:, 1:].contiguous()


class Reference:
    """Products with H in float64, by double backward, without the operators of the package."""

    def __init__(self, net: Net) -> None:
        self._rows = copy.deepcopy(net.rows).double()
        self._batches = [(x.double() if x.is_floating_point() else x, y) for x, y in net.batches]
        self._parameters = list(self._rows.parameters())
        self._total = sum(len(x) for x, _ in net.batches)
        self.space = VectorSpace(self._parameters)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return Hv."""
        total, views = self.space.zeros(), self.space.views(vector)
        for x, y in self._batches:
            with sdpa_kernel(SDPBackend.MATH):
                loss = F.cross_entropy(self._rows(x), y)
                gradients = torch.autograd.grad(loss, self._parameters, create_graph=True)
                products = torch.autograd.grad(gradients, self._parameters, views)
            self.space.add_(total, products, len(x) / self._total)
        return total

    def largest(self, near: Sequence[Tensor], tolerance: float) -> Eigenpairs:
        """λ_max to a relative residual, from vectors near its own. It is off by about the square of the residual."""
        return eigenpairs(self, self.space, largest=1, start=[v.double() for v in near], tolerance=tolerance)

    def residual(self, vector: Tensor) -> float:
        """‖Hv − θv‖/|θ| of a vector, θ its Rayleigh quotient."""
        v = vector.double() / self.space.norm(vector.double())
        product = self(v)
        quotient = self.space.dot(v, product)
        return self.space.norm(product - quotient * v) / abs(quotient)
