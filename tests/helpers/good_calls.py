"""One good call of everything public, and the unusual values that its documentation allows."""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_curvature as lc
from lightning_curvature import functional, linalg, metrics, operators
from lightning_curvature.functional import noise

# What a number that was measured may be: a loss, a product of vectors.
ANY = frozenset({"NaN", "infinity", "minus infinity", "negative", "zero", "huge"})
NOT_NEGATIVE = frozenset({"zero", "huge"})
POSITIVE = frozenset({"huge"})
ANY_SIGN = frozenset({"zero", "huge", "negative"})
# Shapes that broadcast, or that give an empty result.
_MEASURED_SQUARE = frozenset({"NaN", "infinity", "zero", "huge"})
SHAPES = frozenset({"scalar", "empty", "one row more", "one column more", "one dimension more"})
WIDER, ROWS = frozenset({"one dimension more"}), frozenset({"one row more", "empty"})
ITEMS = frozenset({"a negative item", "a list of NaN", "a list of infinity", "a zero item"})


@dataclass(frozen=True)
class Good:
    """A good call.

    Attributes:
        function: what is called.
        arguments: makes its arguments anew.
        allowed: kinds of wrong values that the documentation allows, by argument.
    """

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __call__(self, **changed: Any) -> Any:
        return self.function(**(self.arguments() | changed))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2, bias=False)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3), torch.tensor([0, 1, 1, 0])


def matrix(size: int = 4) -> Tensor:
    return torch.diag(torch.linspace(1.0, 2.0, size)) + 0.1


def space() -> linalg.VectorSpace:
    return linalg.VectorSpace([torch.zeros(6)])


def matvec(vector: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, 6) * vector


def parts() -> dict[str, Any]:
    model = net()
    return {
        "parts": operators.micro_batches(model, F.cross_entropy, [batch()]),
        "parameters": list(model.parameters()),
    }


def hessian() -> operators.HessianOperator:
    return operators.HessianOperator(**parts())


def stepped() -> lc.ParameterUpdate:
    update = lc.ParameterUpdate(optimizer())
    update.complete()
    return update


def optimizer() -> torch.optim.Optimizer:
    model = net()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    return torch.optim.SGD(model.parameters(), lr=0.1)


def cubic() -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    return {"loss": (x**3).sum(), "parameters": [x], "direction": [torch.ones(2)]}


Z = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.2, 0.7]])
MOMENTS = torch.tensor([2.0, 2.0, 1.0, 2.0, 0.5, 0.1], dtype=torch.float64)
SPECTRA = functools.partial(noise.SampleSpectra, torch.ones(2, 2), torch.ones(2, 2, 6))
TERMS = functional.NoiseTerms(1.0, 2.0, 0.5, 4.0, samples=3)


def increment_model() -> functional.QuadraticIncrement:
    return functional.QuadraticIncrement(torch.ones(2), torch.ones(2, 3), torch.ones(2, 3, 3))


def density() -> linalg.SpectralDensity:
    return linalg.spectral_density(matvec, space(), starts=2, steps=3)


def outputs(**more: Any) -> dict[str, Any]:
    return {"outputs": Z, "likelihood": "categorical", "weights": torch.ones(2), **more}


def linear() -> dict[str, Any]:
    layer, (x, _) = nn.Linear(3, 2).double(), batch()
    return {"layer": layer, "evaluate": lambda: layer(x).square().mean(), "samples": 4, "processes": 1, "check": True}


def fit_free(**more: Any) -> dict[str, Any]:
    return {"model": net(), "loss_function": F.cross_entropy, **more}


# A step that was not recorded has NaN for both.
_STEP = {"descent": ANY, "lr": NOT_NEGATIVE | {"NaN", "infinity"}}
_LOSSES = {"loss_plus": ANY, "loss": ANY, "loss_minus": ANY, "epsilon": POSITIVE}
_MASK = {"weights": frozenset({"bool"}), "mask": frozenset({"bool"}), "scale": POSITIVE, "weight": NOT_NEGATIVE}
_LOSSLESS = {"loss_plus": 1.5, "loss": 1.0, "loss_minus": 0.75, "epsilon": 0.5}
_SQUARE = {"covariance": WIDER | {"empty"}}
f, n, m, o = functional, noise, metrics, operators

FUNCTIONAL: dict[str, Good] = {
    "adaptive_threshold": Good(
        f.adaptive_threshold,
        lambda: {"lr": 0.1, "beta1": 0.9, "decoupled_weight_decay": 0.1, "bias_correction": 1.0},
        {"lr": NOT_NEGATIVE, "beta1": frozenset({"zero"}), "decoupled_weight_decay": NOT_NEGATIVE},
    ),
    "momentum_threshold": Good(
        f.momentum_threshold,
        lambda: {"lr": 0.1, "momentum": 0.5, "dampening": 0.5, "nesterov": False, "weight_decay": 0.1},
        {"lr": NOT_NEGATIVE, "momentum": frozenset({"zero"}), "weight_decay": NOT_NEGATIVE}
        | {"dampening": frozenset({"zero", "negative"})},
    ),
    "catapult_alarm": Good(
        f.catapult_alarm,
        lambda: {"loss": torch.ones(3), "cosine": -torch.ones(3), "growth": torch.ones(3)}
        | {"steps": 2, "horizon": 2, "window": 20},
        {"horizon": frozenset({"zero"})},
    ),
    "edge_ratio": Good(
        f.edge_ratio,
        lambda: {"full_batch": True, "lambda_osc": 19.0, "cosine": -0.95, "lambda_max": 18.0, "threshold": 20.0}
        | {"stability_index": 0.5},
        dict.fromkeys(("lambda_osc", "cosine", "lambda_max", "threshold", "stability_index"), ANY),
    ),
    "regime": Good(
        f.regime,
        lambda: dict.fromkeys(("loss", "edge_ratio", "sharpness", "threshold", "cosine"), torch.ones(3))
        | {"window": 20},
    ),
    "sharpness_plateaus": Good(
        f.sharpness_plateaus,
        lambda: {"lr": 0.1, "momentum": 0.5, "dampening": 0.5, "nesterov": False},
        {"lr": NOT_NEGATIVE, "momentum": frozenset({"zero"}), "dampening": frozenset({"zero", "negative"})},
    ),
    "add_to_moments": Good(
        f.add_to_moments,
        lambda: {"moments": MOMENTS, "numerator": 1.0, "denominator": 2.0},
        {"numerator": ANY, "denominator": ANY},
    ),
    "merge_moments": Good(
        f.merge_moments, lambda: {"stacked": torch.stack([MOMENTS, MOMENTS])}, {"stacked": frozenset({"one row more"})}
    ),
    "ratio_of_means": Good(f.ratio_of_means, lambda: {"moments": MOMENTS}, {"moments": WIDER}),
    "ratio_standard_error": Good(f.ratio_standard_error, lambda: {"moments": MOMENTS}, {"moments": WIDER}),
    "batch_factor": Good(f.batch_factor, lambda: {"batch_size": 2, "samples": 5, "replacement": False}),
    "choose_epsilon": Good(
        f.choose_epsilon,
        lambda: {"epsilon": 1.0, "models": [f.ErrorModel(1e-6, 1e-2)]},
        {"epsilon": POSITIVE, "models": frozenset({"empty"})},
    ),
    "critical_sharpness": Good(f.critical_sharpness, lambda: {"critical_factor": 4.0, "lr": 0.1}, {
        "critical_factor": frozenset({"NaN", "infinity", "zero", "huge"}), "lr": _STEP["lr"]}),
    "decay_slope": Good(
        f.decay_slope, lambda: {"sample_sizes": [1, 3, 7], "values": [1.0, 0.25, 0.1]}, {"values": ITEMS}
    ),
    "directional_curvature": Good(
        f.directional_curvature, lambda: {"quadratic": 0.5, "descent": 1.0, "lr": 0.1}, {"quadratic": ANY, **_STEP}
    ),
    "headroom": Good(f.headroom, lambda: {"quadratic": 0.5, "descent": 1.0}, {"quadratic": ANY, "descent": ANY}),
    "mean_square_index": Good(
        f.mean_square_index,
        lambda: {"curvature": 0.1, "variance": 0.02, "lr": 0.5, "momentum": 0.9},
        {"curvature": ANY, "variance": _MEASURED_SQUARE, "lr": frozenset({"zero", "huge"}),
         "momentum": frozenset({"zero"})},
    ),
    "oscillation": Good(
        f.oscillation,
        lambda: {"update": torch.ones(3), "before": -torch.ones(3), "earlier": torch.ones(3)},
        dict.fromkeys(("update", "before", "earlier"), SHAPES),
    ),
    "oscillation_cosine": Good(
        f.oscillation_cosine,
        lambda: {"product": -1.0, "square": 1.0, "square_before": 2.0},
        {"product": ANY, **dict.fromkeys(("square", "square_before"), _MEASURED_SQUARE)},
    ),
    "oscillation_curvature": Good(
        f.oscillation_curvature,
        lambda: {"quadratic": 3.0, "square": 1.0, "cosine": -0.95},
        {"quadratic": ANY, "square": _MEASURED_SQUARE, "cosine": ANY},
    ),
    "oscillation_secant": Good(
        f.oscillation_secant,
        lambda: {"parameters": torch.eye(3), "gradients": torch.eye(3), "diagonal": torch.ones(3)},
    ),
    "finite_difference_quadratic": Good(f.finite_difference_quadratic, lambda: dict(_LOSSLESS), _LOSSES),
    "finite_difference_descent": Good(
        f.finite_difference_descent, lambda: {"loss_plus": 1.5, "loss_minus": 0.75, "epsilon": 0.5}, _LOSSES
    ),
    "finite_difference_curvature": Good(
        f.finite_difference_curvature, lambda: {**_LOSSLESS, "lr": 0.1, "descent": 0.2}, _LOSSES | _STEP
    ),
    "divergence_statistics": Good(f.divergence_statistics, lambda: outputs(shifted_outputs=Z + 0.1), _MASK),
    "kl_divergence": Good(f.kl_divergence, lambda: outputs(shifted_outputs=Z + 0.1), _MASK),
    "output_quadratic_form": Good(f.output_quadratic_form, lambda: outputs(change=Z), _MASK),
    "output_noise_gain": Good(
        f.output_noise_gain, lambda: {"outputs": Z}, {"outputs": SHAPES - {"scalar"}}
    ),
    "pair_statistics": Good(f.pair_statistics, lambda: outputs(outputs_plus=Z + 0.1, outputs_minus=Z - 0.1), _MASK),
    "kl_curvature": Good(
        f.kl_curvature,
        lambda: outputs(shifted_outputs=Z + 0.1, epsilon=1.0, descent=0.1, lr=0.1, scale=1.0),
        _LOSSES | _STEP | _MASK,
    ),
    "gauss_newton_curvature": Good(
        f.gauss_newton_curvature, lambda: outputs(tangent=Z, descent=0.1, lr=0.1, scale=1.0), _STEP | _MASK
    ),
    "hessian_quadratic_form": Good(f.hessian_quadratic_form, cubic),
    "increment": Good(
        f.increment,
        lambda: {"sample": torch.ones(2, 3), "mean": torch.zeros(2, 3), "k": 2},
        {"sample": WIDER | {"scalar"}, "mean": WIDER | {"scalar"}},
    ),
    "QuadraticIncrement": Good(
        f.QuadraticIncrement, lambda: {"a": torch.ones(2), "c": torch.ones(2, 3), "b": torch.ones(2, 3, 3)}
    ),
    "QuadraticIncrement.first": Good(lambda dimension: _increment_first(dimension), lambda: {"dimension": 2}),
    "QuadraticIncrement.at": Good(lambda z: _increment_at(z), lambda: {"z": torch.ones(4, 3)}, {"z": ROWS}),
    "gaussian_moment": Good(
        f.gaussian_moment, lambda: {"model": increment_model(), "sigma": 0.1}, {"sigma": POSITIVE}
    ),
    "sampled_gaussian_moment": Good(
        f.sampled_gaussian_moment,
        lambda: {"a": torch.ones(2), "c_square": torch.ones(2), "forms": torch.ones(4, 2)}
        | {"squares": torch.ones(4, 2), "sigma": 0.1},
        {"sigma": POSITIVE},
    ),
    "rate_bound": Good(
        f.rate_bound,
        lambda: {"loss": 1.0, "gradient": 1.0, "hessian": 1.0, "k": 1, "dimension": 1, "sigma": 1.0},
        dict.fromkeys(("loss", "gradient", "hessian"), NOT_NEGATIVE) | {"sigma": POSITIVE},
    ),
    "relative_model_error": Good(
        f.relative_model_error,
        lambda: {"true": torch.tensor([3.0, 4.0]), "model": torch.tensor([3.0, 3.5]), "rounding": 0.1},
        {"rounding": NOT_NEGATIVE | {"NaN", "infinity"}},
    ),
    "validated_sigma": Good(
        f.validated_sigma,
        lambda: {"sigmas": [1e-4, 1e-3], "errors": [0.001, 0.02], "tolerance": 0.1},
        {"errors": frozenset({"a list of NaN", "a list of infinity", "a zero item"}), "tolerance": POSITIVE},
    ),
    "ErrorModel": Good(
        f.ErrorModel,
        lambda: {"noise": 1e-6, "truncation": 1e-2, "order": 2, "weight": 1.0, "crossed": 0.1},
        dict.fromkeys(("noise", "truncation", "crossed"), frozenset({"NaN", "infinity", "zero", "huge"}))
        | {"weight": NOT_NEGATIVE},
    ),
    "NoiseTerms": Good(
        f.NoiseTerms,
        lambda: {"gradient_curvature": 1.0, "noise_curvature": 2.0, "gradient_square": 0.5}
        | {"noise_square": 4.0, "samples": 3},
        dict.fromkeys(("gradient_curvature", "noise_curvature", "gradient_square", "noise_square"), ANY),
    ),
    "NoiseTerms.from_batches": Good(
        f.NoiseTerms.from_batches,
        lambda: {"batch_curvature": 1.0, "batch_square": 2.0, "gradient_curvature": 0.5, "gradient_square": 1.0}
        | {"batch_size": 2.0, "samples": 5, "replacement": False},
        dict.fromkeys(("batch_curvature", "batch_square", "gradient_curvature", "gradient_square"), ANY),
    ),
    "NoiseTerms.gni": Good(TERMS.gni, lambda: {"batch_size": 2, "replacement": False}, {
        "batch_size": frozenset({"empty"})}),
    "NoiseTerms.ias": Good(TERMS.ias, lambda: {"batch_size": [1, 2], "replacement": False}, {
        "batch_size": frozenset({"empty"})}),
}  # fmt: skip


def _increment_first(dimension: int) -> Any:
    return increment_model().first(dimension)


def _increment_at(z: Tensor) -> Any:
    return increment_model().at(z)


def pair(one: str, other: str) -> Callable[[], dict[str, Any]]:
    return lambda: {one: matrix(), other: matrix()}


NOISE: dict[str, Good] = {
    "coupling_matrix": Good(n.coupling_matrix, lambda: {"covariance": matrix()}),
    "mean_coupling": Good(n.mean_coupling, lambda: {"coupling": matrix()}),
    "leading_couplings": Good(n.leading_couplings, lambda: {"coupling": matrix()}),
    "effective_spikes": Good(n.effective_spikes, lambda: {"covariance": matrix()}),
    "eigen_alignment": Good(n.eigen_alignment, lambda: {"covariance": matrix()}),
    "random_coupling": Good(n.random_coupling, lambda: {"spikes": 20.0}, {"spikes": POSITIVE | {"NaN"}}),
    "coupling_test": Good(
        n.coupling_test,
        lambda: {"coupling": 0.066, "spikes": 20.0, "directions": 2560},
        {"coupling": ANY, "spikes": POSITIVE | {"NaN"}},
    ),
    "haar_rotated": Good(n.haar_rotated, lambda: {"covariance": matrix(), "directions": 2, "generator": None}),
    "haar_coupling": Good(
        n.haar_coupling, lambda: {"covariance": matrix(), "directions": 2, "draws": 2, "generator": None}
    ),
    "noise_covariance": Good(
        n.noise_covariance,
        lambda: {"gradients": torch.eye(3)[:, :2], "batch_size": 2},
        {"gradients": frozenset({"one row more", "one column more"})},
    ),
    "covariance_of_sums": Good(
        n.covariance_of_sums,
        lambda: {"products": matrix(), "gradient": torch.ones(4), "samples": 5, "batch_size": 2},
    ),
    "default_top": Good(n.default_top, lambda: {"size": 10}),
    "curvature_basis": Good(n.curvature_basis, lambda: {"hessian": matrix(), "top": 2}),
    "in_basis": Good(
        n.in_basis, lambda: {"matrix": matrix(), "vectors": torch.eye(4)[:2]}, {"vectors": ROWS}
    ),
    "matched_pairs": Good(
        n.matched_pairs,
        lambda: {"inputs": torch.ones(3, 2), "labels": torch.tensor([0, 1, 1])}
        | {"other_inputs": torch.ones(2, 2), "other_labels": torch.tensor([0, 1])},
        {"labels": frozenset({"bool"}), "other_labels": frozenset({"bool"})},
    ),
    "duality_terms": Good(
        n.duality_terms,
        lambda: {"weight": torch.ones(2, 3), "activations": torch.ones(4, 3), "gradients": torch.ones(4, 2)}
        | {"curvatures": torch.ones(4, 2, 2), "shifts": torch.ones(4, 3)},
    ),
    "DualitySums": Good(n.DualitySums, lambda: {"out": 2, "into": 3}),
    "KroneckerSum": Good(n.KroneckerSum, lambda: {"kinds": 1, "out": 2, "into": 3}),
    "KroneckerSum.add": Good(
        lambda blocks, activations: _kronecker_add(blocks, activations),
        lambda: {"blocks": torch.ones(4, 1, 2, 2), "activations": torch.ones(4, 3)},
    ),
    "kronecker_sums": Good(
        n.kronecker_sums,
        lambda: {"blocks": torch.ones(4, 1, 2, 2), "activations": torch.ones(4, 3)}
        | {"total": torch.zeros(1, 3, 6, dtype=torch.float64)},
    ),
    "unpacked": Good(
        n.unpacked, lambda: {"sums": torch.ones(2, 3, 6), "out": 2, "into": 3}, {"sums": frozenset({"one row more"})}
    ),
    "linear_blocks": Good(
        n.linear_blocks,
        lambda: {"activations": torch.ones(4, 3), "gradients": torch.ones(4, 2), "curvatures": torch.ones(4, 2, 2)},
        {"activations": frozenset({"one column more"})},
    ),
    "power_law": Good(
        n.power_law,
        lambda: {"curvatures": torch.tensor([1.0, 2.0, 4.0]), "variances": torch.tensor([3.0, 6.0, 13.0])}
        | {"floor": 0.1},
        {"floor": frozenset({"zero", "negative", "huge"})},
    ),
    "commutativity_error": Good(n.commutativity_error, pair("covariance", "hessian")),
    "commutator_norms": Good(n.commutator_norms, pair("covariance", "hessian")),
    "relative_commutativity_error": Good(n.relative_commutativity_error, pair("covariance", "hessian")),
    "random_commutativity_error": Good(n.random_commutativity_error, pair("covariance", "hessian")),
    "spearman_correlation": Good(
        n.spearman_correlation, lambda: {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 8.0, 27.0])}
    ),
    "linear_sample_spectra": Good(
        n.linear_sample_spectra,
        lambda: {"activations": torch.ones(4, 3), "curvatures": torch.ones(4, 2, 2), "vectors": torch.ones(5, 6)},
        {"vectors": ROWS},
    ),
    "spectral_moments": Good(n.spectral_moments, lambda: {"spectra": SPECTRA()}),
    "cumulative_contribution": Good(n.cumulative_contribution, lambda: {"spectra": SPECTRA()}),
    "suppressed": Good(
        n.suppressed,
        lambda: {"values": torch.tensor([[4.0, 1.0], [2.0, 1.0]]), "threshold": 0.1, "tail": 1e-5}
        | {"background": 1e-3, "homogenize": True},
        {"threshold": frozenset({"zero", "negative"}), "tail": NOT_NEGATIVE, "background": NOT_NEGATIVE}
        | {"values": frozenset({"one row more", "one column more"})},
    ),
}  # fmt: skip


def _kronecker_add(blocks: Tensor, activations: Tensor) -> None:
    noise.KroneckerSum(1, 2, 3).add(blocks, activations)


def search(**more: Any) -> dict[str, Any]:
    return {"matvec": matvec, "space": space(), "generator": None, **more}


_SMALLEST = {"largest": frozenset({"zero"}), "smallest": frozenset({"zero"}), "magnitude": frozenset({"zero"})}
LINALG: dict[str, Good] = {
    "eigenpairs": Good(
        linalg.eigenpairs,
        lambda: search(largest=1, smallest=1, magnitude=1, tolerance=1e-3, max_matvecs=20, max_basis=64)
        | {"start": [torch.ones(6)], "block_size": 2, "residual_tolerance": 1e-2, "before": None},
        _SMALLEST | {"start": frozenset({"empty"})},
    ),
    "spectral_density": Good(linalg.spectral_density, lambda: search(starts=1, steps=2, deflation=None)),
    "trace": Good(
        linalg.trace,
        lambda: search(relative_error=0.05, max_matvecs=40, min_samples=6, deflation=None, sketch=2),
        {"sketch": frozenset({"zero"})},
    ),
    "VectorSpace": Good(
        linalg.VectorSpace,
        lambda: {"tensors": [torch.zeros(2), torch.zeros(1)], "reduce": lambda t: t, "shares": [1.0, 0.5]}
        | {"shapes": [torch.Size([2]), torch.Size([1])], "cut": [lambda t: t] * 2},
        dict.fromkeys(("shapes", "cut"), frozenset({"empty"})),
    ),
    "EigenTracker": Good(linalg.EigenTracker, lambda: {"recheck_every": 3}),
    "KrylovSpace": Good(linalg.KrylovSpace, lambda: {"matvec": matvec, "space": space()}),
    "SpectralDensity.moment": Good(density().moment, lambda: {"power": 2}, {"power": frozenset({"zero"})}),
    "SpectralDensity.grid": Good(
        density().grid, lambda: {"width": 0.1, "points": 10}, {"width": POSITIVE}
    ),
    "SpectralDensity.evaluate": Good(
        density().evaluate,
        lambda: {"grid": torch.linspace(0, 1, 5), "width": 0.1},
        {"width": POSITIVE, "grid": frozenset({"empty", "one row more", "one column more"})},
    ),
    "SpectralDensity.histogram": Good(density().histogram, lambda: {"bins": 10}),
}  # fmt: skip

_SUM = {"reduce": None}
_GRAPH = {"keep_graph": "auto", "processes": 1}
# A micro-batch of a rank without samples: none.
_NO_PARTS = {"parts": frozenset({"empty"})}
OPERATORS: dict[str, Good] = {
    "CurvatureOperator": Good(o.CurvatureOperator, lambda: parts() | _SUM, _NO_PARTS),
    "HessianOperator": Good(o.HessianOperator, lambda: parts() | _SUM | _GRAPH, _NO_PARTS),
    "HessianOperator.of": Good(
        o.HessianOperator.of, lambda: fit_free(batches=[batch()]), {}
    ),
    "GaussNewtonOperator": Good(o.GaussNewtonOperator, parts, _NO_PARTS),
    "GradientDifferenceOperator": Good(
        o.GradientDifferenceOperator,
        lambda: parts() | _SUM | {"sharding": None, "history": None, "processes": 1},
        _NO_PARTS,
    ),
    "SecondMomentOperator": Good(
        o.SecondMomentOperator,
        lambda: parts() | {"lr": 0.5, "groups": [0], "spread": 1},
        _NO_PARTS | {"lr": NOT_NEGATIVE, "groups": frozenset({"a zero item"})},
    ),
    "PreconditionedOperator": Good(
        o.PreconditionedOperator, lambda: {"operator": hessian(), "diagonal": [torch.ones(2, 3)]}
    ),
    "HessianOperator.product": Good(hessian().__call__, lambda: {"vector": torch.ones(6).double()}),
    "HessianOperator.quadratic_form": Good(hessian().quadratic_form, lambda: {"vector": torch.ones(6).double()}),
    "PreconditionedOperator.product": Good(
        o.PreconditionedOperator(hessian(), [torch.ones(2, 3)]).__call__, lambda: {"vector": torch.ones(6).double()}
    ),
    "SecondMomentOperator.product": Good(
        o.SecondMomentOperator(**parts(), lr=0.5).__call__, lambda: {"vector": torch.ones(6).double()}
    ),
    "MiniBatch.curvature_along": Good(
        o.MiniBatch(hessian()).curvature_along, lambda: {"vector": torch.ones(6).double()}
    ),
    "MiniBatch": Good(o.MiniBatch, lambda: {"operator": hessian()}),
    "MicroBatch": Good(
        o.MicroBatch,
        lambda: {"evaluate": lambda: None, "weight": 0.5, "stepwise": None},
        {"weight": NOT_NEGATIVE},
    ),
    "micro_batches": Good(o.micro_batches, lambda: fit_free(batches=[batch()])),
    "linear_statistics": Good(o.linear_statistics, linear),
    "operator_type": Good(o.operator_type, lambda: {"curvature": "hessian"}),
    "DifferenceHistory": Good(
        o.DifferenceHistory,
        lambda: {"distance": 0.1, "error": 0.1, "smooth": None},
        {"distance": POSITIVE, "error": NOT_NEGATIVE | {"infinity", "NaN"}},
    ),
}  # fmt: skip

MODEL_METRICS: dict[type, dict[str, Any]] = {
    m.BatchSharpness: {"curvature": "hessian"},
    m.StepSharpness: {"curvature": "hessian"},
    m.ModifiedBatchSharpness: {"curvature": "hessian"},
    m.BatchLambdaMax: {"curvature": "hessian", "tolerance": 0.01},
    m.InteractionAwareSharpness: {"curvature": "hessian", "keep_graph": "auto", "data": [batch()]},
    m.GradientNoiseInteraction: {"curvature": "hessian", "keep_graph": "auto", "data": [batch()]},
    m.HessianEigenvalues: {"k": 1, "tolerance": 1e-3, "curvature": "hessian", "keep_graph": "auto"},
    m.HessianTrace: {"relative_error": 0.05, "curvature": "hessian", "keep_graph": "auto"},
    m.HessianDensity: {"starts": 1, "steps": 2, "curvature": "hessian", "keep_graph": "auto"},
    m.NoiseCurvatureRelation: {
        "parameter": "0.weight", "batch_size": 2, "quantities": ("noise_gamma",), "top": 3, "haar_draws": 2
    },
}  # fmt: skip
KL_UPDATE = {"outputs": Z, "epsilon": 1.0, "descent": 0.1, "lr": 0.1, "mask": torch.ones(2), "weight": 1.0}


def updating(kind: Callable[[], Any]) -> Callable[..., Any]:
    """Return what updates a new metric, with the signature of its ``update``."""

    def update(**arguments: Any) -> None:
        kind().update(**arguments)

    method = kind().update
    update.__wrapped__ = inspect.unwrap(method)  # type: ignore[attr-defined]
    update.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    update.__annotations__ = inspect.unwrap(method).__annotations__
    return update


METRICS: dict[str, Good] = {
    **{kind.__name__: Good(kind, functools.partial(fit_free, **more)) for kind, more in MODEL_METRICS.items()},
    **{
        kind.__name__: Good(kind, dict)
        for kind in (m.DirectionalCurvature, m.FiniteDifferenceCurvature, m.CriticalSharpness, m.RatioOfMeans)
    },
    **{
        kind.__name__: Good(kind, lambda: {"likelihood": "gaussian", "scale": 1.0}, {"scale": POSITIVE})
        for kind in (m.KLCurvature, m.GaussNewtonCurvature)
    },
    "GradientNoiseInteraction.over_batch_sizes": Good(
        lambda sizes, replacement: _interaction().over_batch_sizes(sizes, replacement),
        lambda: {"sizes": 2, "replacement": False},
        {"sizes": frozenset({"empty"})},
    ),
    "StabilizationCriterion": Good(m.StabilizationCriterion, lambda: {"order": 2.0}, {"order": POSITIVE}),
    "NoiseCovariance": Good(m.NoiseCovariance, lambda: {"size": 2, "batch_size": 2}),
    "DirectionalCurvature.update": Good(
        updating(m.DirectionalCurvature),
        lambda: {"quadratic": 0.5, "descent": 1.0, "lr": 0.1, "weight": 1.0},
        {"quadratic": ANY} | _STEP | _MASK,
    ),
    "FiniteDifferenceCurvature.update": Good(
        updating(m.FiniteDifferenceCurvature),
        lambda: {**_LOSSLESS, "lr": 0.1, "descent": 0.2, "weight": 1.0},
        _LOSSES | _STEP | _MASK,
    ),
    "KLCurvature.update": Good(
        updating(m.KLCurvature), lambda: KL_UPDATE | {"shifted_outputs": Z + 0.1}, _LOSSES | _STEP | _MASK
    ),
    "GaussNewtonCurvature.update": Good(
        updating(m.GaussNewtonCurvature),
        lambda: {k: v for k, v in KL_UPDATE.items() if k != "epsilon"} | {"tangent": Z},
        _STEP | _MASK,
    ),
    "CriticalSharpness.update": Good(
        updating(m.CriticalSharpness),
        lambda: {"critical_factor": 4.0, "lr": 0.1, "weight": 1.0},
        {"critical_factor": frozenset({"NaN", "infinity", "zero", "huge"})} | _STEP | _MASK,
    ),
    "RatioOfMeans.update": Good(
        updating(m.RatioOfMeans),
        lambda: {"numerator": 1.0, "denominator": 2.0},
        {"numerator": ANY, "denominator": ANY},
    ),
    "StabilizationCriterion.update": Good(
        updating(m.StabilizationCriterion),
        lambda: {"increments": torch.ones(3, 2)},
        {"increments": SHAPES - {"scalar"} | {"scalar in name only"}},
    ),
    "NoiseCovariance.update": Good(
        updating(lambda: m.NoiseCovariance(2)), lambda: {"gradients": torch.eye(3)[:, :2]}, {"gradients": ROWS}
    ),
}


def _interaction() -> metrics.GradientNoiseInteraction:
    metric = metrics.GradientNoiseInteraction(**fit_free(data=[batch()]))
    x, y = batch()
    metric.update(x[:2], y[:2])
    return metric


_OPTIONS: dict[str, frozenset[str]] = {
    "parameters": frozenset({"text"}),
    "by_module": frozenset({"text", "True", "a number"}),
    "seed": frozenset({"zero"}),
    "horizon": frozenset({"zero"}),
    "on_alarm": frozenset({"empty"}),
    "dirpath": frozenset({"text"}),
    "optimizer_index": frozenset({"zero"}),
    "validation_draws": frozenset({"zero"}),
    "at_steps": frozenset({"empty", "a zero item", "a number"}),
    "sample_sizes": frozenset({"a number"}),
    "order": POSITIVE,
    "epsilon": POSITIVE,
    "sigma": POSITIVE,
}
_REQUIRED = {lc.NoiseCovarianceMonitor: {"parameter": "0.weight"}}
# There is no closed form of other orders than 2.
_COUNTS = {
    lc.BatchSharpnessMonitor: {"batches_at_once": 2},
    lc.DirectionalCurvatureMonitor: {"epsilon": 1.0},
    lc.StabilizationMonitor: {"estimators": ("direct",)},
}


def defaults(kind: type) -> dict[str, Any]:
    """Return the default of each argument of a constructor."""
    parameters = inspect.signature(kind).parameters.items()
    found = {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}
    return found | _REQUIRED.get(kind, {}) | _COUNTS.get(kind, {})


MONITORS: dict[str, Good] = {
    kind.__name__: Good(kind, functools.partial(defaults, kind), _OPTIONS)
    for kind in (
        lc.BatchSharpnessMonitor,
        lc.DirectionalCurvatureMonitor,
        lc.HessianSpectrumMonitor,
        lc.NoiseCovarianceMonitor,
        lc.RegimeMonitor,
        lc.StabilityMonitor,
        lc.StabilizationMonitor,
    )
}
STEPS: dict[str, Good] = {
    "ParameterUpdate": Good(
        lc.ParameterUpdate,
        lambda: {"optimizer": optimizer(), "gradient_scale": 1.0, "gradients": None},
        {"gradient_scale": POSITIVE},
    ),
    "ParameterUpdate.at": Good(
        lambda position: _moved(position), lambda: {"position": 0.5}, {"position": ANY_SIGN}
    ),
}  # fmt: skip


@functools.cache
def checkpoint() -> str:
    """Make the checkpoint of a module."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path, module = f"{folder}/one.ckpt", Tiny()
    state = {"state_dict": module.state_dict(), "global_step": 2, "epoch": 0}
    torch.save(state | {"optimizer_states": [optimizer_of(module).state_dict()]}, path)
    return path


class Tiny(pl.LightningModule):
    """A module of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0].float()), batch[1])


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def of_checkpoints() -> dict[str, Any]:
    module = Tiny()
    return {
        "checkpoints": checkpoint(),
        "monitors": lc.BatchSharpnessMonitor(quantities=("step_sharpness",)),
        "module": module,
        "dataloader": [batch()],
        "optimizer": optimizer_of(module),
        "trainer": None,
        "weights_only": True,
    }


EVALUATIONS = {"evaluate_checkpoints": Good(lc.evaluate_checkpoints, of_checkpoints)}


def _moved(position: float) -> None:
    with stepped().at(position):
        pass


for _name, _method in (
    ("QuadraticIncrement.first", f.QuadraticIncrement.first),
    ("QuadraticIncrement.at", f.QuadraticIncrement.at),
):
    FUNCTIONAL[_name].function.__annotations__ = {k: v for k, v in _method.__annotations__.items() if k != "return"}
NOISE["KroneckerSum.add"].function.__annotations__ = {"blocks": Tensor, "activations": Tensor}
METRICS["GradientNoiseInteraction.over_batch_sizes"].function.__annotations__ = {
    "sizes": int | Sequence[int],
    "replacement": bool,
}
STEPS["ParameterUpdate.at"].function.__annotations__ = {"position": float}

CALLS: dict[str, Good] = {**FUNCTIONAL, **NOISE, **LINALG, **OPERATORS, **METRICS, **MONITORS, **STEPS, **EVALUATIONS}
# Made by the package and read by its users: results, errors, and names of types.
NOT_CALLED = {
    "REGIMES", "EdgeRatio", "RegimeChange",
    "DecaySlope", "DivergenceStatistics", "PairStatistics", "Likelihood", "LIKELIHOODS", "CHAIN", "CouplingTest",
    "CurvatureBasis", "DualityTerms", "PowerLaw", "SampleSpectra", "Suppressed", "Eigenpairs", "MatVec",
    "NonFiniteProductError", "SpectralDensity", "TraceEstimate", "Curvature", "LinearStatistics", "NotSeparableError",
    "Sharding", "CriterionRow", "CurvatureWarning", "NoiseCurvature", "SampleGrowth",
    "Evaluation", "Trajectory",
}  # fmt: skip
