"""HessianSpectrumMonitor keeps what every monitor promises."""

from tests.testers.agreement import AgreementTester
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester
from tests.testers.effects import EffectTester
from tests.testers.evaluations import EvaluationTester
from tests.testers.families.spectrum import SPECTRUM
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = SPECTRUM


class TestEffects(EffectTester):
    family = SPECTRUM


class TestReports(ReportTester):
    family = SPECTRUM


class TestAgreement(AgreementTester):
    family = SPECTRUM


class TestCallback(CallbackTester):
    family = SPECTRUM


class TestEvaluations(EvaluationTester):
    family = SPECTRUM
