"""Where a vm runs, and why. Pure: the fleet and the requests in, decisions out; see `engine.py`.

    snapshot.py   what is told about hosts, pools, groups     fleet.py    it as columns and masks, for a whole batch
    request.py    what is asked (needs.py: its parts)         books.py    what is free now (space.py: what a request takes)
    filters/      the rules               sieve.py     all filters over all hosts
    scorers/      the wishes              policies.py  how much each wish counts     scoring.py, ranking.py  the best hosts
    shapes.py     which requests share an answer that is kept: standing.py by shape, families.py (tiles.py, ladders.py) whatever their sizes
    verdict.py    the answer, with a reason or a score per host
    unblock.py    for a refusal, the smallest change that would fit          replay.py  a history, under any policy

A new rule is a `Filter`, a new wish a `Scorer`; what they have to count along a batch is booked in `Books`.
"""

from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import decide, explain, explain_host, in_fair_order, place, scan, why_not
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.needs import DiskNeed, GroupNeed, GroupRule, NetworkNeed, Relation, Toleration
from trimtab_controller.core.placement.policies import BEST_FIT, POLICIES, Policy, policy_named
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.snapshot import (
    CellSnapshot,
    GroupSnapshot,
    HostSnapshot,
    NetworkReach,
    PoolPlace,
    PoolSnapshot,
    Stock,
    Taint,
    TaintEffect,
)
from trimtab_controller.core.placement.unblock import Change, Move, Unblock, unblock
from trimtab_controller.core.placement.verdict import Decision, HostVerdict, Refusal

__all__ = [
    "BEST_FIT",
    "POLICIES",
    "Books",
    "CellSnapshot",
    "Change",
    "Decision",
    "DiskNeed",
    "FleetSnapshot",
    "GroupNeed",
    "GroupRule",
    "GroupSnapshot",
    "HostSnapshot",
    "HostVerdict",
    "Move",
    "NetworkNeed",
    "NetworkReach",
    "PlacementKind",
    "PlacementRequest",
    "Policy",
    "PoolPlace",
    "PoolSnapshot",
    "Refusal",
    "Relation",
    "Stock",
    "Taint",
    "TaintEffect",
    "Toleration",
    "Unblock",
    "decide",
    "explain",
    "explain_host",
    "in_fair_order",
    "place",
    "policy_named",
    "scan",
    "unblock",
    "why_not",
]
