"""BatchSharpnessMonitor keeps what every monitor promises."""

from tests.testers.agreement import AgreementTester
from tests.testers.arguments import ArgumentTester
from tests.testers.callbacks import CallbackTester
from tests.testers.effects import EffectTester
from tests.testers.evaluations import EvaluationTester
from tests.testers.families.batch_sharpness import BATCH_SHARPNESS
from tests.testers.reports import ReportTester


class TestArguments(ArgumentTester):
    family = BATCH_SHARPNESS


class TestEffects(EffectTester):
    family = BATCH_SHARPNESS


class TestReports(ReportTester):
    family = BATCH_SHARPNESS


class TestAgreement(AgreementTester):
    family = BATCH_SHARPNESS


class TestCallback(CallbackTester):
    family = BATCH_SHARPNESS


class TestEvaluations(EvaluationTester):
    family = BATCH_SHARPNESS
