"""The families of monitors, each in one description."""

from tests.testers.families.spectrum import SPECTRUM
from tests.testers.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SPECTRUM,)}
