"""One description for every class that ``lightning_curvature.metrics`` exports."""

from tests.testers.metric_case import MetricCase
from tests.testers.metric_cases import directional, means, noise, sharpness, spectrum

CASES: list[MetricCase] = [
    *directional.CASES,
    *means.CASES,
    *noise.CASES,
    *sharpness.CASES,
    *spectrum.CASES,
]
