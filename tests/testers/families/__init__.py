"""The families of monitors, each in one description."""

from tests.testers.families.batch_sharpness import BATCH_SHARPNESS
from tests.testers.families.directional import DIRECTIONAL
from tests.testers.families.noise import NOISE
from tests.testers.families.spectrum import SPECTRUM
from tests.testers.families.stability import STABILITY
from tests.testers.families.stabilization import STABILIZATION
from tests.testers.family import Family

ALL = (DIRECTIONAL, SPECTRUM, BATCH_SHARPNESS, STABILITY, STABILIZATION, NOISE)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}
