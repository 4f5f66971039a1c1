"""NoiseCovarianceMonitor keeps what every monitor promises."""

from tests.testers.agreement import AgreementTester
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester
from tests.testers.effects import EffectTester
from tests.testers.evaluations import EvaluationTester
from tests.testers.families.noise import NOISE
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = NOISE


class TestEffects(EffectTester):
    family = NOISE


class TestReports(ReportTester):
    family = NOISE


class TestAgreement(AgreementTester):
    family = NOISE


class TestCallback(CallbackTester):
    family = NOISE


class TestEvaluations(EvaluationTester):
    family = NOISE
