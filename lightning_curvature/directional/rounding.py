"""Rounding of a forward pass: its size, known beforehand and corrected during the run.

Rounding of the outputs. A forward in a type with unit roundoff u returns z + n with n about κ·u·rms(z), independent
from one ε to the next. Measured on networks of 3 to 12 layers: κ between 1 and 2.3 in float32, where dot products
accumulate their own rounding, and between 0.3 and 0.8 in bf16 and fp16, where they accumulate in float32 and only
their result is rounded. The symmetric pair shows the same noise: 3/2 σ² of ``defect``, so defect/1.5 bounds it.

Rounding of the loss. Each position's value is rounded at unit scale (log(1 + small) loses what lies below u), the
mean over n positions at its own; and each position sees the noise of its outputs through ∂ℓ/∂z. Positions are
independent: δL = u·(|L| + 1/√n) + κ·u·√(E‖∂ℓ/∂z‖²z²/n).
"""

import math
from dataclasses import dataclass, field

import torch

Numbers = dict[str, float]

# κ above, at the upper end of what was measured.
_GROWTH = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# What kinks between the ends of a pair add to its second difference, in units of what they add to its slope, and the
# power of the distance with which that grows. Measured on ReLU networks, whose pairs meet other kinks at each step: the
# root mean square of the last eight says more than one.
_KINKS, _KINKS_GROW = 4.0, 1.5

# A number counts as a floor where, at less than 1/2.5 of the distance of one of the last eight measurements, it is more
# than half of what it was: the root of the defect would have fallen to 1/2.5² = 0.16, were it curvature of the outputs.
# Other batches differ by less than the factor of three between. A κ beyond eight times the expected one has not been
# seen (a transformer with tied embeddings in float32: 11): that large a defect is curvature, whatever it did before.
_FLOOR_CUT, _FLOOR_DROP, _HISTORY, _LARGEST_GROWTH = 2.5, 2.0, 8, 8.0


def forward_roundoff(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """Return the unit roundoff u of a module's products: that of ``dtype``, or of TF32 where they run in it."""
    coarse = False
    if device.type == "cuda" and dtype == torch.float32:
        convolutions = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in module.modules())
        coarse = torch.backends.cuda.matmul.allow_tf32 or (convolutions and torch.backends.cudnn.allow_tf32)
    return max(torch.finfo(dtype).eps / 2.0, 2.0**-11 if coarse else 0.0)


def pair_slope(values: Numbers) -> float:
    """Return εgᵀd of a symmetric pair."""
    return (values["loss_plus"] - values["loss_minus"]) / 2.0


@dataclass
class Floor:
    """The part of a number that does not fall with the distance, learned from the last measurements.

    Attributes:
        level: that part; 0 while none is known.
        history: distance ε‖d‖ and number of the last measurements.
    """

    level: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)

    def learn(self, distance: float, number: float, limit: float = math.inf) -> None:
        """Raise the level to a number below ``limit`` that did not fall with the distance; else lower it if smaller."""
        stays = any(distance * _FLOOR_CUT < far and number * _FLOOR_DROP > old for far, old in self.history)
        self.level = max(self.level, number) if stays and number < limit else min(self.level, number)
        self.history = [*self.history[1 - _HISTORY :], (distance, number)]


@dataclass
class Rounding:
    """Rounding of the forward pass, as known before and during a run.

    Attributes:
        dtype: coarsest type of the forward pass.
        roundoff: its unit roundoff u.
        loss_roundoff: that of the loss.
        growth: κ, where the defect turned out not to fall with the distance.
        offset: relative difference between the pair's slope and gᵀd, where it does not fall with the distance: the
            gradient is not quite that of the loss (another optimizer stepped in between, or an objective is random).
        bends: distance of the last pairs, and what kinks added to their slope.
    """

    dtype: torch.dtype
    roundoff: float
    loss_roundoff: float
    growth: Floor
    offset: Floor
    bends: list[tuple[float, float]] = field(default_factory=list)

    @property
    def half(self) -> bool:
        """Whether the forward pass computes in a half-precision type."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def worst(self) -> float:
        """The larger u of outputs and loss."""
        return max(torch.finfo(self.dtype).eps / 2.0, self.loss_roundoff)

    @property
    def unit(self) -> float:
        """κ·u."""
        return max(_GROWTH.get(self.dtype, 1.0), self.growth.level) * self.roundoff

    def outputs_variance(self, values: Numbers) -> float:
        """Return σ² of the outputs in the units of the quadratic forms."""
        prior = self.unit**2 * values["noise_gain"]
        return min(prior, values["defect"] / 1.5) if "defect" in values else prior

    def loss_deviation(self, values: Numbers) -> float:
        """Return the standard deviation δL of the loss."""
        loss = abs(values["loss"])
        if "loss_noise_gain" not in values:
            # Many losses are logarithms of numbers near one, rounded at unit scale however small they are.
            return self.roundoff * (loss + 1.0)
        root = math.sqrt(max(values["positions"], 1.0))
        own = self.loss_roundoff * (loss + 1.0 / root)
        return own + self.unit * math.sqrt(max(values["loss_noise_gain"], 0.0)) / root

    def learn(self, values: Numbers, epsilon: float, distance: float) -> None:
        """Learn κ and the offset of the gradient from a symmetric pair.

        The defect of a smooth network falls with the fourth power of the distance, and the slope's third order with the
        square; rounding and a wrong gradient stay. Taken for truncation they would drive ε down for ever.
        """
        if values.get("signal", 0.0) > 0.0 and values["noise_gain"] > 0.0:
            bound = math.sqrt(values["defect"] / 1.5 / values["noise_gain"]) / self.roundoff
            self.growth.learn(distance, bound, limit=_LARGEST_GROWTH * _GROWTH.get(self.dtype, 1.0))
            self.growth.level = min(self.growth.level, bound)
        slope = pair_slope(values)
        if slope != 0.0 and math.isfinite(slope):
            off = abs(slope - epsilon * values["descent"])
            self.offset.learn(distance, off / abs(slope))
            smooth = abs(values.get("third", 0.0)) / 6.0 + self.loss_deviation(values)
            self.bends = [*self.bends[1 - _HISTORY :], (distance, max(off - smooth, 0.0))]

    def kinks(self) -> float:
        """Return what kinks between the ends of the last pair may have added to its second difference."""
        if not self.bends:
            return 0.0
        last, bend = self.bends[-1]
        usual = [(b * (last / distance) ** _KINKS_GROW) ** 2 for distance, b in self.bends]
        return _KINKS * max(bend, math.sqrt(sum(usual) / len(usual)))


# The first step is taken for one with a curvature of a twentieth of the edge, in a network that bends at a tenth of the
# size of its parameters. Off by ten either way they move the first ε by a factor of two to three.
_FIRST_RATIO, _FIRST_REACH = 0.1, 0.1


def first_epsilon(values: Numbers, unit: float, symmetric: bool) -> float:
    """Return ε of the first measurement, for which nothing is known but the step itself; ``unit`` is u.

    The second difference has rounding A/ε² with A = √6 u|L|/dᵀHd, and truncation (ε/ε_T)², ε_T the step number at which
    the network bends; they meet at √(ε_T √A). Where the loss is evaluated at θ − εd alone, not ``symmetric``, the
    truncation is ε/ε_T, and they meet at (A ε_T)^⅓.
    """
    loss, descent, squared_size = abs(values["loss"]), values["descent"], values["squared_size"]
    reach = _FIRST_REACH * math.sqrt(squared_size) / math.sqrt(values["squared_norm"]) if squared_size > 0.0 else 1.0
    slope = descent if descent > 0.0 else loss or 1.0
    noise = math.sqrt(6.0) * unit * max(loss, slope) / (_FIRST_RATIO * slope)
    return math.sqrt(reach * math.sqrt(noise)) if symmetric else (reach * noise) ** (1.0 / 3.0)


def balanced_epsilon(noise: float, size: float) -> float:
    """Return ε at which ``noise``/ε², the rounding of a second difference, meets (ε/ε_T)², ε_T a tenth of ``size``."""
    return math.sqrt(_FIRST_REACH * size * math.sqrt(noise))
