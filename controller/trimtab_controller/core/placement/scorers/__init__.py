"""The wishes. A policy weighs them; see `policies.py`."""

from trimtab_controller.core.placement.scorers.base import Scorer
from trimtab_controller.core.placement.scorers.fragments import FRAGMENTATION
from trimtab_controller.core.placement.scorers.lifetimes import LIFETIME
from trimtab_controller.core.placement.scorers.locality import HOME, IMAGE_LOCALITY
from trimtab_controller.core.placement.scorers.packing import BALANCED, BEST_FIT, SPREAD
from trimtab_controller.core.placement.scorers.wishes import GROUP, PROTECTED, SPARE, TAINTS

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (BEST_FIT, SPREAD, BALANCED, FRAGMENTATION, LIFETIME, IMAGE_LOCALITY, HOME, GROUP, TAINTS, PROTECTED, SPARE)
}

__all__ = ["LIFETIME", "SCORERS", "Scorer"]
