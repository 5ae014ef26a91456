"""Where a vm runs, and why. Pure: the fleet and the requests in, decisions out; see `engine.py`.

    request.py    what is asked           fleet.py     what does not change during a batch, as columns and masks
    books.py      what is free now
    filters/      the rules               sieve.py     all filters over all hosts
    scorers/      the wishes              policies.py  how much each wish counts     scoring.py, ranking.py  the best hosts
    verdict.py    the answer, with a reason or a score per host

A new rule is a `Filter`, a new wish a `Scorer`; what they have to count along a batch is booked in `Books`.
"""

from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import decide, explain, explain_host, in_fair_order, place, why_not
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot, NetworkReach, PoolPlace, PoolSnapshot
from trimtab_controller.core.placement.policies import BEST_FIT, POLICIES, Policy, policy_named
from trimtab_controller.core.placement.request import DiskNeed, NetworkNeed, PlacementKind, PlacementRequest
from trimtab_controller.core.placement.verdict import Decision, HostVerdict, Refusal

__all__ = [
    "BEST_FIT",
    "POLICIES",
    "Books",
    "Decision",
    "DiskNeed",
    "FleetSnapshot",
    "HostSnapshot",
    "HostVerdict",
    "NetworkNeed",
    "NetworkReach",
    "PlacementKind",
    "PlacementRequest",
    "Policy",
    "PoolPlace",
    "PoolSnapshot",
    "Refusal",
    "decide",
    "explain",
    "explain_host",
    "in_fair_order",
    "place",
    "policy_named",
    "why_not",
]
