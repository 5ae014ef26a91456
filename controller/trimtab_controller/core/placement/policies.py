"""Policies: which wishes count, and how much. Filters are not among them: a policy never bends a rule."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_controller.core.placement.scorers import LIFETIME, SCORERS
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

# What somebody wished for in words goes before how well a host packs, and not before home.
_WISHES = 2.0
# Enough to leave a scarce host alone while another fits nearly as well.
_SPARE = 0.5


# Two hours longer in use weigh as much as a whole host's room left over: on a cloud's trace the best, and flat around it.
_LIFETIME, _ROOM = 2.4, 0.2
LIFETIME_AWARE = "lifetime-aware"


def _policy(name: str, **shape: float) -> Policy:
    """Return a policy of these weights for the shape of the fleet, with what all policies share."""
    weights = {scorer.replace("_", "-"): weight for scorer, weight in shape.items()}
    wishes = {"group": _WISHES, "taints": _WISHES, "protected": _WISHES, "spare": _SPARE}
    return Policy(name, weights | {"image-locality": _IMAGE_LOCALITY, "home": _HOME} | wishes)


BEST_FIT = _policy("best-fit", best_fit=1.0)

POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        BEST_FIT,
        _policy("spread", spread=1.0),
        # Even use of both resources first; among equals the fuller host, or new hosts would always win.
        _policy("balanced", balanced=1.0, best_fit=0.5),
        # What gets lost to others first; its figures lie close together, so that with more weight the fuller host would always win.
        _policy("fragmentation-aware", fragmentation=1.0, best_fit=0.1),
        # Hosts that empty sooner, by how long vms of this kind have lived (`lifetimes.py`); the fuller host where that says little.
        _policy(LIFETIME_AWARE, lifetime=_LIFETIME, best_fit=_ROOM),
    )
}


def knows_lifetimes(policy: Policy) -> bool:
    """Tell whether the policy asks how long vms live; books without `occupancy` do not know it."""
    return LIFETIME.name in policy.weights


_ALSO_CALLED = {"pack": "best-fit"}


def policy_named(name: str) -> Policy:
    """Return a policy that comes with the product; `pack` is best-fit. InvalidRequest where there is none of that name."""
    policy = POLICIES.get(_ALSO_CALLED.get(name, name))
    if policy is None:
        raise InvalidRequest("policy-unknown", f"there is no placement policy {name}; policies are {', '.join(POLICIES)}")
    return policy
