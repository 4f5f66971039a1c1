"""Regimes of training, the alarm before a catapult, and the one number that tells the distance from the edge."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_curvature.arguments import MANY, Rule, checked, sentence, shaped, whole
from lightning_curvature.functional.oscillation import COSINE_LIMIT
from lightning_curvature.functional.regime_tracker import (
    REGIMES,
    AlarmTracker,
    RegimeTracker,
)

__all__ = ["REGIMES", "EdgeRatio", "catapult_alarm", "edge_ratio", "regime"]

Source = Literal["lambda_osc", "lambda_max", "stability_index"]

_SERIES = shaped("steps!", "pass the logged values, NaN where nothing was measured")
WINDOW = whole(8, "20 losses tell a trend from noise", MANY)
STEPS = whole(1, "2 measured steps in a row are enough", MANY)
HORIZON = whole(0, "2 looks two steps ahead", MANY)
_RATIO = Rule("pass NaN for what is not known", finite=False)


@checked(loss=_SERIES, edge_ratio=_SERIES, sharpness=_SERIES, threshold=_SERIES, cosine=_SERIES, window=WINDOW)
def regime(
    loss: Tensor,
    *,
    edge_ratio: Tensor | None = None,
    sharpness: Tensor | None = None,
    threshold: Tensor | None = None,
    cosine: Tensor | None = None,
    window: int = 20,
) -> Tensor:
    r"""Return the regime of each step of a run, as indices into ``REGIMES``.

    Causal: the regime of a step depends on this step and those before it. Values other than the loss may be NaN where
    nothing was measured; the last measured one then counts. In this order:

    * 7 "diverging": the loss is not finite; or a spike has risen in the last three steps, to more than ten times the
      loss before it while the sharpness has not fallen by 2 %, or to 10⁴ times it.
    * 6 "catapult": a spike. It begins where the loss is twice the least one of the window, and log L is 6 standard
      deviations of its scatter above the median; it ends where the loss is back at 1.5 times that least one. Only
      falling sharpness tells a catapult from a divergence, and it falls late: the first steps of a divergence are
      called a catapult.
    * 5 "edge of stability": the edge ratio has reached 0.95, and has not fallen below 0.9 since.
    * 3 "progressive sharpening": the last of five measured values of the sharpness is the largest, and more than 0.5 %
      above the first.
    * 2 "descent": the loss falls, by more than 0.1 % and three standard errors in a window.
    * 1 "flat": neither a trend nor scatter of more than 0.1 % in a window.
    * 4 "noise-driven oscillation": none of these, and the edge ratio is below 0.95, or the path does not oscillate
      with period two (cosine above −0.9).
    * 0 "unknown": fewer than eight losses, or none of these.

    Losses that are not positive have no spikes.

    Args:
        loss: training loss of each step, (steps,).
        edge_ratio: distance from the edge, 1 at the edge, (steps,); default: sharpness / threshold.
        sharpness: λ_max or its like, whose rise is progressive sharpening, (steps,); default: the edge ratio.
        threshold: of the optimizer, (steps,).
        cosine: cosine of successive second differences of the path, (steps,).
        window: number of losses that are looked at.

    Returns:
        Indices into ``REGIMES``, (steps,), int64.

    Raises:
        ValueError: for arguments outside their rules, or a threshold without a sharpness.

    Source: Cohen et al. 2021 (arXiv 2103.00065), progressive sharpening and the edge of stability; Lewkowycz et al.
    2020 (arXiv 2003.02218), catapults. The limits are ours (docs/regimes.md).

    Example:
        >>> steps = torch.arange(40)
        >>> names = [REGIMES[i] for i in regime(0.9**steps, sharpness=1.01**steps, threshold=torch.full((40,), 1.3))]
        >>> names[3], names[4], names[39]  # 1.01³⁹ is beyond the threshold
        ('unknown', 'progressive sharpening', 'edge of stability')
    """
    if threshold is not None and sharpness is None:
        raise sentence("threshold", "come with sharpness", "it alone", "give both, or edge_ratio")
    if edge_ratio is None and sharpness is not None and threshold is not None:
        edge_ratio = sharpness / threshold
    if sharpness is None:
        sharpness = edge_ratio
    tracker = RegimeTracker(window)
    rows = zip(*(_listed(one, loss) for one in (loss, edge_ratio, sharpness, cosine)), strict=True)
    return torch.tensor([tracker.update(*row) for row in rows], dtype=torch.int64)


@checked(
    loss=_SERIES,
    cosine=_SERIES,
    growth=_SERIES,
    steps=STEPS,
    horizon=HORIZON,
    window=WINDOW,
)
def catapult_alarm(
    loss: Tensor,
    *,
    cosine: Tensor | None = None,
    growth: Tensor | None = None,
    steps: int = 2,
    horizon: int = 2,
    window: int = 20,
) -> Tensor:
    r"""Return at which steps a catapult is announced.

    Full batch: with :math:`s_t` the second difference of the steps, :math:`c_t = \cos(s_t, s_{t-1})` and
    :math:`\rho_t = \|s_t\| / \|s_{t-1}\|`, the alarm of step t is

    .. math:: c < -0.9 \text{ and } \rho > 1 \text{ in the last measured steps}, \qquad
        (L_t - L_0)\,\rho_t^{2h} > L_0, \qquad L_0 = \min(\text{the window before } t).

    An oscillation of amplitude x adds ½λx² to the loss and grows by ρ a step: by the second condition the loss doubles
    within h steps. Without it, each cycle of self-stabilization at the edge of stability would give the alarm, in which
    the oscillation grows for some steps and shrinks again.

    A loss that is not finite gives the alarm in any case. Of mini-batches it is the only one: their path does not flip,
    and the stability index does not tell a catapult (docs/edge.md). Causal; NaN stands for what was not measured.

    Args:
        loss: training loss of each step, before it is made, (steps,).
        cosine: c_t of each step, (steps,).
        growth: ρ_t, (steps,).
        steps: number of measured steps in a row that must oscillate and grow.
        horizon: h.
        window: number of losses before t.

    Returns:
        True where the alarm is given, (steps,).

    Raises:
        ValueError: for arguments outside their rules.

    Example:
        >>> x = 1.2 ** torch.arange(12)  # grows by 1.2 a step
        >>> loss = 1.0 + 0.01 * x**2
        >>> alarm = catapult_alarm(loss, cosine=torch.full((12,), -1.0), growth=torch.full((12,), 1.2))
        >>> int(alarm.nonzero()[0]), bool(loss[-1] < 2.0)
        (11, True)
    """
    tracker = AlarmTracker(steps, horizon, window)
    rows = zip(*(_listed(one, loss) for one in (loss, cosine, growth)), strict=True)
    return torch.tensor([tracker.update(*row) for row in rows], dtype=torch.bool)


class EdgeRatio(NamedTuple):
    """Distance from the edge of stability.

    Attributes:
        value: 1 at the edge; NaN where it is not known.
        source: which measurement it comes from; None where it is not known.
        reason: why it is NaN; empty where it is known.
    """

    value: float
    source: Source | None
    reason: str


@checked(lambda_osc=_RATIO, cosine=_RATIO, lambda_max=_RATIO, threshold=_RATIO, stability_index=_RATIO)
def edge_ratio(
    *,
    full_batch: bool,
    lambda_osc: float = math.nan,
    cosine: float = math.nan,
    lambda_max: float = math.nan,
    threshold: float = math.nan,
    stability_index: float = math.nan,
) -> EdgeRatio:
    r"""Return the one number that tells how far a run is from the edge of stability, and where it comes from.

    Of a full batch, :math:`\max(\lambda_\mathrm{osc}, \lambda_\max) / \text{threshold}`: λ_osc, which counts where the
    cosine is below −0.9, is a lower bound of λ_max. Of mini-batches the stability index. Where there is none, λ_osc
    stands in: a cosine below −0.9 is not that of noise, which is −2/3.

    Args:
        full_batch: whether a step sees all the data.
        lambda_osc: curvature along the oscillation.
        cosine: cosine of successive second differences of the path.
        lambda_max: largest eigenvalue, of the preconditioned Hessian for adaptive optimizers.
        threshold: of the optimizer, on that matrix.
        stability_index: 1 at the edge in mean square.

    Raises:
        ValueError: for arguments that are no numbers.

    Example:
        >>> edge_ratio(full_batch=True, lambda_osc=19.0, cosine=-0.99, lambda_max=18.0, threshold=20.0)
        EdgeRatio(value=0.95, source='lambda_osc', reason='')
        >>> edge_ratio(full_batch=False, lambda_max=18.0, threshold=20.0).reason
        'mini-batches leave the edge below λ_max = threshold, and no stability index was measured'
    """
    if not full_batch and not math.isnan(stability_index):
        return EdgeRatio(stability_index, "stability_index", "")
    oscillates = cosine < COSINE_LIMIT and not math.isnan(lambda_osc)
    if not full_batch and not oscillates:
        return _no_ratio("mini-batches leave the edge below λ_max = threshold, and no stability index was measured")
    if math.isnan(threshold) or threshold <= 0.0:
        return _no_ratio("the optimizer has no threshold that is positive")
    candidates: dict[Source, float] = {}
    if oscillates:
        candidates["lambda_osc"] = lambda_osc / threshold
    if full_batch and not math.isnan(lambda_max):
        candidates["lambda_max"] = lambda_max / threshold
    if not candidates:
        return _no_ratio("neither λ_max nor the curvature of an oscillation was measured")
    source = max(candidates, key=lambda name: candidates[name])
    return EdgeRatio(candidates[source], source, "")


def _no_ratio(reason: str) -> EdgeRatio:
    return EdgeRatio(math.nan, None, reason)


def _listed(series: Tensor | None, like: Tensor) -> list[float]:
    return [math.nan] * len(like) if series is None else series.tolist()
