"""Rounding of a forward pass: how large it is, and how the run itself corrects that.

Rounding of the outputs. A forward in a type with unit roundoff u returns z + n with n about κ·u·rms(z), independent
from one ε to the next. Measured on networks of 3 to 12 layers: κ between 1 and 2.3 in float32, where dot products
accumulate their own rounding, and between 0.3 and 0.8 in bf16 and fp16, where they accumulate in float32 and only
their result is rounded. From the symmetric pair the same noise can be read: it makes up 3/2 σ² of ``defect``, so
defect/1.5 bounds it from above.

Rounding of the loss. Each position's value is rounded at unit scale (log(1 + small) loses what lies below u), the
mean over n positions at its own; and each position sees the noise of its outputs through ∂ℓ/∂z. Positions are
independent: δL = u·(|L| + 1/√n) + κ·u·√(E‖∂ℓ/∂z‖²z²/n).
"""

import math
from dataclasses import dataclass, field

import torch

# κ above, at the upper end of what was measured.
_GROWTH = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# The defect counts as rounding where, at less than 1/2.5 of the distance of one of the last eight measurements, its
# root is more than half of what it was: curvature of the outputs would have left 1/2.5² = 0.16 of it. Other batches
# differ by less than the factor of three between. A κ beyond eight times the expected one has not been seen (a
# transformer with tied embeddings in float32: 11): that large a defect is curvature, whatever it did before.
_FLOOR_CUT, _FLOOR_DROP, _HISTORY, _LARGEST_GROWTH = 2.5, 2.0, 8, 8.0


def unit_roundoff(dtype: torch.dtype, coarse: bool = False) -> float:
    """Relative rounding of one operation; ``coarse``: TF32, eleven bits in matrix products."""
    return max(torch.finfo(dtype).eps / 2.0, 2.0**-11 if coarse else 0.0)


def _stays(history: list[tuple[float, float]], distance: float, value: float) -> bool:
    """Whether a value that should fall with the distance did not, beside one of the last measurements."""
    return any(distance * _FLOOR_CUT < far and value * _FLOOR_DROP > old for far, old in history)


@dataclass
class Rounding:
    """Rounding of the forward pass, as known before and during a run.

    Attributes:
        dtype: coarsest type of the forward pass.
        loss_dtype: type of the loss.
        coarse: whether matrix products run in TF32.
        growth: κ; above its prior where the defect turned out not to fall with the distance.
        history: distance ε‖d‖ and the bound on κ that the defect gave, of the last measurements.
        offset: relative difference between the pair's slope and gᵀd that does not fall with the distance: the gradient
            is not quite that of the loss (another optimizer stepped in between, an objective with draws of its own).
        slopes: distance and that difference, of the last measurements.
    """

    dtype: torch.dtype
    loss_dtype: torch.dtype
    coarse: bool = False
    growth: float = 0.0
    history: list[tuple[float, float]] = field(default_factory=list)
    offset: float = 0.0
    slopes: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.growth = self.growth or self.prior

    @property
    def half(self) -> bool:
        """Whether the forward pass computes in a half-precision type."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def prior(self) -> float:
        """κ where nothing else is known."""
        return _GROWTH.get(self.dtype, 1.0)

    @property
    def unit(self) -> float:
        """κ·u."""
        return self.growth * unit_roundoff(self.dtype, self.coarse)

    def outputs_variance(self, values: dict[str, float]) -> float:
        """σ² of the outputs in the units of the quadratic forms."""
        prior = self.unit**2 * values["noise_gain"]
        return min(prior, values["defect"] / 1.5) if "defect" in values else prior

    def loss_deviation(self, values: dict[str, float]) -> float:
        """Standard deviation δL of the loss."""
        loss = abs(values["loss"])
        if "loss_noise_gain" not in values:
            # Many losses are logarithms of numbers near one, rounded at unit scale however small they are.
            return unit_roundoff(self.dtype, self.coarse) * (loss + 1.0)
        root = math.sqrt(max(values["positions"], 1.0))
        own = unit_roundoff(self.loss_dtype) * (loss + 1.0 / root)
        return own + self.unit * math.sqrt(max(values["loss_noise_gain"], 0.0)) / root

    def learn(self, values: dict[str, float], distance: float) -> None:
        """Raise κ where the defect stopped falling with the distance, lower it again where the defect is smaller.

        The defect of a smooth network falls with the fourth power of the distance; what stays is rounding. Taken for
        truncation it would drive ε down for ever.
        """
        if not values["signal"] > 0.0 or not values["noise_gain"] > 0.0:
            return
        unit = unit_roundoff(self.dtype, self.coarse)
        bound = math.sqrt(values["defect"] / 1.5 / values["noise_gain"]) / unit
        if _stays(self.history, distance, bound) and bound < _LARGEST_GROWTH * self.prior:
            self.growth = max(self.growth, bound)
        self.growth = max(self.prior, min(self.growth, bound))
        self.history = [*self.history[1 - _HISTORY :], (distance, bound)]

    def learn_offset(self, values: dict[str, float], epsilon: float, distance: float) -> None:
        """Find what of the difference between slope and gᵀd stays when the distance falls; a third order would not."""
        slope = (values["loss_plus"] - values["loss_minus"]) / 2.0
        if slope == 0.0 or not math.isfinite(slope):
            return
        difference = abs(slope - epsilon * values["descent"]) / abs(slope)
        stays = _stays(self.slopes, distance, difference)
        self.offset = max(self.offset, difference) if stays else min(self.offset, difference)
        self.slopes = [*self.slopes[1 - _HISTORY :], (distance, difference)]

    def beyond_offset(self, difference: float, slope: float) -> float:
        """Difference between slope and gᵀd less what the gradient's own offset explains."""
        return max(difference - self.offset * slope, 0.0)


def coarse_products(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the float32 products of a module run in TF32 on this device."""
    if device.type != "cuda" or dtype != torch.float32:
        return False
    convolutions = any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in module.modules())
    return torch.backends.cuda.matmul.allow_tf32 or (convolutions and torch.backends.cudnn.allow_tf32)


# Of the step whose distance is chosen first: a curvature of a twentieth of the edge, and a network that bends at a
# tenth of the size of its parameters. Off by ten either way they move the first ε by a factor of two to three.
_FIRST_RATIO, _FIRST_REACH = 0.1, 0.1


def first_epsilon(loss: float, descent: float, norm: float, size: float, dtype: torch.dtype, symmetric: bool) -> float:
    """ε of the first probe, before anything is known but the step itself.

    The second difference has rounding A/ε² with A = √6 u|L|/dᵀHd, and truncation (ε/ε_T)², ε_T the step number at which
    the network bends; they meet at √(ε_T √A). One-sided it is ε/ε_T, and (A ε_T)^⅓.

    Args:
        loss: L.
        descent: gᵀd.
        norm: ‖d‖.
        size: ‖θ‖.
        dtype: type of the forward pass.
        symmetric: whether the probes are a symmetric pair.
    """
    reach = _FIRST_REACH * size / norm if size > 0.0 else 1.0
    slope = descent if descent > 0.0 else abs(loss) or 1.0
    noise = math.sqrt(6.0) * unit_roundoff(dtype) * max(abs(loss), slope) / (_FIRST_RATIO * slope)
    return math.sqrt(reach * math.sqrt(noise)) if symmetric else (reach * noise) ** (1.0 / 3.0)
