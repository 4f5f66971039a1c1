r"""Activity–weight duality: the noise between two mini-batches as a change of the weight for each sample.

Each sample p of one mini-batch is paired with the nearest sample p' of its class in another one. The change of the
input of the layer, Δa = a' − a, has the same effect on z = W a as ΔW* = (W Δa) aᵀ/‖a‖², the smallest change of the
weight that has it (Zhang, Yang and Tu, 2026, eqs. 8 and 9). To first order,

.. math:: g_{p'} - g_p \approx \underbrace{h_p\, \Delta w_p}_{\text{I}}
    + \underbrace{(\nabla \Delta w_p)^\top \nabla \ell_p}_{\text{II}}
    = (S W \Delta a)\, a^\top + \delta\, \Delta a^\top,

since h = S ⊗ a aᵀ and ∇ℓ = δ aᵀ: the norm of a cancels in both terms.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import checked, shaped
from lightning_curvature.functional.noise.kronecker import SIZE, kronecker_sums, unpacked

_INPUTS, _OTHERS = shaped("n ...", "give one row a sample"), shaped("m ...", "give one row a sample")
_LABELS, _OTHER_LABELS = (shaped(size, "give one class a sample", bools=True) for size in ("n", "m"))

# Approximations of C in the order in which the source makes them.
CHAIN = ("raw", "hh", "hh_sd", "hh_sd_wd", "hh_sd_wd_li")


@checked(inputs=_INPUTS, labels=_LABELS, other_inputs=_OTHERS, other_labels=_OTHER_LABELS)
def matched_pairs(inputs: Tensor, labels: Tensor, other_inputs: Tensor, other_labels: Tensor) -> Tensor:
    r"""Return for each sample the nearest sample of its class in another mini-batch.

    .. math:: p' = \arg\min_{k:\, y_k = y_p} \lVert x_k - x_p\rVert_2

    Inputs are x_p, (n, …), and x_k, (n', …), of the other mini-batch; labels are y_p, (n,), and y_k, (n',).

    Returns:
        Indices into the other mini-batch, (n,), the first of several at the same distance; −1 if it has no sample of
        the class. Two samples can have the same partner.

    Source: Zhang, Yang and Tu (2026), section 3.1.

    Example:
        >>> inputs, others = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.1], [0.2]])
        >>> matched_pairs(inputs, torch.tensor([0, 1]), others, torch.tensor([1, 1]))
        tensor([-1,  1])
    """
    if not len(other_labels):
        return torch.full_like(labels, -1, dtype=torch.long)
    one, other = (x.double()[..., None].flatten(1) for x in (inputs, other_inputs))
    distances = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.masked_fill(labels[:, None] != other_labels[None, :], torch.inf)
    nearest, index = distances.min(1)
    return torch.where(nearest.isfinite(), index, -1)


class DualityTerms(NamedTuple):
    """The two terms of the change of each sample's gradient, each a matrix of rank one in the shape of W.

    Attributes:
        hessian: S W Δa, (n, out): term I is hessian · aᵀ.
        activations: a, (n, in).
        gradients: δ = ∂ℓ/∂z, (n, out): term II is gradients · Δaᵀ.
        shifts: Δa, (n, in).
        moved: W Δa, (n, out).
        curvatures: S = ∂²ℓ/∂z∂zᵀ, (n, out, out).
    """

    hessian: Tensor
    activations: Tensor
    gradients: Tensor
    shifts: Tensor
    moved: Tensor
    curvatures: Tensor

    def term_one(self) -> Tensor:
        """Return the Hessian–weight terms h_p Δw_p, (n, out, in)."""
        return self.hessian[:, :, None] * self.activations[:, None, :]

    def term_two(self) -> Tensor:
        """Return the gradient–activity terms, (n, out, in)."""
        return self.gradients[:, :, None] * self.shifts[:, None, :]


@checked(
    weight=shaped("out in"),
    activations=shaped("n in"),
    gradients=shaped("n out"),
    curvatures=shaped("n out out"),
    shifts=shaped("n in"),
)
def duality_terms(
    weight: Tensor, activations: Tensor, gradients: Tensor, curvatures: Tensor, shifts: Tensor
) -> DualityTerms:
    """Return :class:`DualityTerms` of n samples, for a weight W, (out, in); other arguments as in that class.

    Source: Zhang, Yang and Tu (2026), eqs. 11, 12 and 57.

    Example:
        >>> one, two = torch.ones(1, 1), torch.full((1, 1), 2.0)
        >>> terms = duality_terms(3.0 * one, activations=two, gradients=one, curvatures=one[None], shifts=one)
        >>> terms.term_one(), terms.term_two()  # S W Δa a = 3 · 2, δ Δa
        (tensor([[[6.]]], dtype=torch.float64), tensor([[[1.]]], dtype=torch.float64))
    """
    shifts, s = shifts.double(), curvatures.double()
    moved = shifts @ weight.double().mT
    s = 0.5 * (s + s.mT)
    hessian = (s @ moved[:, :, None]).squeeze(-1)
    return DualityTerms(hessian, activations.double(), gradients.double(), shifts, moved, s)


class DualitySums:
    """Sums over pairs of mini-batches for W, (``out``, ``into``), from which the approximations of C follow.

    A pair of mini-batches of B samples has g_μν = (1/B) Σ_p (I_p + II_p) and adds B/2 g_μν g_μνᵀ, which makes C that of
    single samples at every B. The sums of several sets of pairs merge by addition.
    """

    # Gradients of this many mini-batches are multiplied in one product: each product writes all of D × D.
    _BATCHED = 64

    @checked(out=SIZE, into=SIZE)
    def __init__(self, out: int, into: int, device: torch.device | str = "cpu") -> None:
        self.out, self.into = out, into
        size, packed = out * into, out * (out + 1) // 2 * into * (into + 1) // 2
        self._sizes = (3 * size * size, 2 * packed, 3)
        self._state = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def state(self) -> Tensor:
        """All sums in one float64 vector; the vectors of several sets of pairs add up. Setting it does not copy."""
        self._multiply()
        return self._state

    @state.setter
    def state(self, state: Tensor) -> None:
        self._waiting.clear()
        self._state = state

    def _multiply(self) -> None:
        if not self._waiting:
            return
        one, two = (torch.stack(side) for side in zip(*self._waiting, strict=True))
        self._waiting.clear()
        for total, left, right in zip(self._views()[0], (one, one, two), (one, two, two), strict=True):
            total.addmm_(left.mT, right)

    def _views(self) -> tuple[Tensor, Tensor, Tensor]:
        size = self.out * self.into
        batches, samples, counts = self._state.split(self._sizes)
        return batches.view(3, size, size), samples.view(2, self.out * (self.out + 1) // 2, -1), counts

    def add(self, terms: DualityTerms) -> None:
        """Add the samples of one mini-batch, paired with those of another."""
        _, samples, counts = self._views()
        count = len(terms.moved)
        if not count:
            return
        # B/2 g gᵀ with g the mean over B.
        scale = (0.5 / count) ** 0.5
        one = (terms.hessian.mT @ terms.activations).flatten() * scale
        two = (terms.gradients.mT @ terms.shifts).flatten() * scale
        self._waiting.append((one, two))
        if len(self._waiting) == self._BATCHED:
            self._multiply()
        sigma, directions = torch.linalg.eigh(terms.curvatures)
        along = (directions.mT @ terms.moved[:, :, None]).squeeze(-1)
        rotated = directions * (sigma * along)[:, None, :]
        blocks = torch.stack([terms.hessian[:, :, None] * terms.hessian[:, None, :], rotated @ rotated.mT], dim=1)
        kronecker_sums(0.5 / count * blocks, terms.activations, samples)
        length = terms.activations.square().sum(-1)
        alive = length > 0.0
        squares = (terms.moved.square().sum(-1)[alive] / length[alive]).sum()
        counts += torch.stack([squares, alive.sum().double(), torch.ones_like(squares)])

    @property
    def batches(self) -> int:
        """Number of ordered pairs of mini-batches."""
        return int(self._views()[2][2])

    @property
    def weight_variance(self) -> float:
        r"""σ_w² = E‖ΔW*‖²/out, the mean square of Δw along the directions s ⊗ a/‖a‖, in which all of Δw lies."""
        squares, count, _ = self._views()[2].tolist()
        return squares / count / self.out if count else float("nan")

    def matrices(self, second_moment: Tensor | None = None) -> dict[str, Tensor]:
        r"""Return the approximations of the covariance of single samples, (D, D) float64 each.

        "raw" = "hh" + "hg" + "gg" with both cross terms in "hg"; "hh_sd" drops products of different samples,
        "hh_sd_wd" also those of different eigendirections of h_p; "hh_sd_wd_li" = σ_w²/2 E_p[h_p²], for a
        ``second_moment`` E_p[h_p²], takes σ_w² for the variance of Δw in every direction. NaN if nothing was added.

        Source: Zhang, Yang and Tu (2026), eqs. 58, 59, 61, 64, 67 and 70.
        """
        self._multiply()
        batches, samples, counts = self._views()
        hh, cross, gg = batches / counts[2]
        sd, wd = unpacked(samples / counts[2], self.out, self.into)
        hg = cross + cross.mT
        matrices = {"raw": hh + hg + gg, "hh": hh, "hg": hg, "gg": gg, "hh_sd": sd, "hh_sd_wd": wd}
        if second_moment is not None:
            matrices["hh_sd_wd_li"] = 0.5 * self.weight_variance * second_moment
        return matrices
