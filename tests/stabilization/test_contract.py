"""StabilizationMonitor keeps what every monitor promises."""

from tests.testers.agreement import AgreementTester
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester
from tests.testers.effects import EffectTester
from tests.testers.evaluations import EvaluationTester
from tests.testers.families.stabilization import STABILIZATION
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = STABILIZATION


class TestEffects(EffectTester):
    family = STABILIZATION


class TestReports(ReportTester):
    family = STABILIZATION


class TestAgreement(AgreementTester):
    family = STABILIZATION


class TestCallback(CallbackTester):
    family = STABILIZATION


class TestEvaluations(EvaluationTester):
    family = STABILIZATION
