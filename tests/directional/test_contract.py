"""DirectionalCurvatureMonitor keeps what every monitor promises."""

from tests.testers.agreement import AgreementTester
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester
from tests.testers.effects import EffectTester
from tests.testers.evaluations import EvaluationTester
from tests.testers.families.directional import DIRECTIONAL
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = DIRECTIONAL


class TestEffects(EffectTester):
    family = DIRECTIONAL


class TestReports(ReportTester):
    family = DIRECTIONAL


class TestAgreement(AgreementTester):
    family = DIRECTIONAL


class TestCallback(CallbackTester):
    family = DIRECTIONAL


class TestEvaluations(EvaluationTester):
    family = DIRECTIONAL
