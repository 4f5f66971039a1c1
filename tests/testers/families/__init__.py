"""The families of monitors, each in one description."""

from tests.testers.families.batch_sharpness import BATCH_SHARPNESS
from tests.testers.families.spectrum import SPECTRUM
from tests.testers.families.stabilization import STABILIZATION
from tests.testers.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SPECTRUM, BATCH_SHARPNESS, STABILIZATION)}
