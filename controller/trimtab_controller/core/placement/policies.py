"""Policies: which wishes count, and how much. Filters are not among them: a policy never bends a rule."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.placement.scorers import SCORERS
from trimtab_protos.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """Weights by scorer name. A host's score is their weighted mean over the scorers that have something to say."""

    name: str
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        unknown = sorted(self.weights.keys() - SCORERS.keys())
        if unknown:
            raise InvalidRequest("scorer-unknown", f"policy {self.name} weighs {unknown[0]}; scorers are {', '.join(SCORERS)}")
        if not self.weights or any(weight <= 0 for weight in self.weights.values()):
            raise InvalidRequest("weight-not-positive", f"policy {self.name} needs weights above 0, for example best-fit = 1.0")


# A copied image costs seconds, a poorly packed host costs for months: locality only decides between hosts that pack alike.
_IMAGE_LOCALITY = 0.05
# A start elsewhere must first reach the previous host and undefine there, so home wins wherever it fits.
_HOME = 3.0

BEST_FIT = Policy("best-fit", {"best-fit": 1.0, "image-locality": _IMAGE_LOCALITY, "home": _HOME})

POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        BEST_FIT,
        Policy("spread", {"spread": 1.0, "image-locality": _IMAGE_LOCALITY, "home": _HOME}),
        # Even use of both resources first; among equals the fuller host, or new hosts would always win.
        Policy("balanced", {"balanced": 1.0, "best-fit": 0.5, "image-locality": _IMAGE_LOCALITY, "home": _HOME}),
    )
}


def policy_named(name: str) -> Policy:
    """Return a policy that comes with the product. InvalidRequest where there is none of that name."""
    policy = POLICIES.get(name)
    if policy is None:
        raise InvalidRequest("policy-unknown", f"there is no placement policy {name}; policies are {', '.join(POLICIES)}")
    return policy
