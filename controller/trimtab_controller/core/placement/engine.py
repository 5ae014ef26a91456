"""Places: filter, score, choose; for a whole batch, each request seeing what the earlier ones were given. Pure.

`place` is the leader's batch, `decide` one request on books that the caller keeps (a plan, a replay, a what-if), `explain` a
question that claims nothing. The same request on the same fleet always gets the same answer: hosts stand in order of name, and of
equal scores the first is taken.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from trimtab_controller.core.placement.books import Books, Trial
from trimtab_controller.core.placement.families import family_decision
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.policies import BEST_FIT, Policy
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.scoring import scored_verdict, shortlist
from trimtab_controller.core.placement.shapes import Asked
from trimtab_controller.core.placement.sieve import Sieve, refused_verdict
from trimtab_controller.core.placement.standing import standing_decision
from trimtab_controller.core.placement.verdict import KEPT_HOSTS, LISTED_HOSTS, Decision, HostVerdict

PolicyOf = Callable[[PlacementRequest], Policy]


def by_best_fit(_request: PlacementRequest) -> Policy:
    """The policy of requests about which nobody said anything else."""
    return BEST_FIT


def place(
    fleet: FleetSnapshot,
    requests: Iterable[PlacementRequest],
    *,
    policy_of: PolicyOf = by_best_fit,
    listed_hosts: int = LISTED_HOSTS,
    books: Books | None = None,
) -> list[Decision]:
    """Return one decision per request, in the order in which they were made (`in_fair_order`).

    Every host is named in a fleet of up to `listed_hosts`; of a larger one the best, or those that came closest.
    `books` of the same fleet are written where they are given, for who wants to ask more afterwards.

    The caller claims what was chosen, by conditional writes, and asks again about what such a write refused.
    """
    books = Books(fleet) if books is None else books
    decisions = []
    for request in in_fair_order(requests):
        decision = decide(books, request, policy=policy_of(request), listed_hosts=listed_hosts)
        if decision.chosen_host_id is not None:
            books.claim(request, decision.chosen_host_id)
        decisions.append(decision)
    return decisions


def in_fair_order(requests: Iterable[PlacementRequest]) -> list[PlacementRequest]:
    """Return the requests in rounds: one of each project per round, within a project by priority, then by age.

    So a project with a thousand requests delays another's only one by at most one decision per project.
    """
    by_project: dict[str, list[PlacementRequest]] = defaultdict(list)
    for request in sorted(requests, key=_urgency):
        by_project[request.project_id].append(request)
    turns = [(turn, *_urgency(request), request) for own in by_project.values() for turn, request in enumerate(own)]
    return [turn[-1] for turn in sorted(turns, key=lambda turn: turn[:-1])]


def _urgency(request: PlacementRequest) -> tuple[int, int, str]:
    return -request.priority, request.order, request.request_id


def explain(
    fleet: FleetSnapshot,
    request: PlacementRequest,
    *,
    policy: Policy = BEST_FIT,
    listed_hosts: int = LISTED_HOSTS,
) -> Decision:
    """Return what `place` would decide now, claiming nothing; every host is named in a fleet of up to `listed_hosts`.

    The request of a vm that runs already finds its own claim in the fleet: release it on books of your own and use `decide`.
    """
    return decide(Books(fleet), request, policy=policy, listed_hosts=listed_hosts)


def explain_host(fleet: FleetSnapshot, request: PlacementRequest, host_id: str, *, policy: Policy = BEST_FIT) -> HostVerdict:
    """Return the verdict on one host as things are now, with every reason against it. KeyError where it is not in the fleet."""
    trial, row = Trial.of(Books(fleet), request), fleet.row_of[host_id]
    return refused_verdict(trial, row) or scored_verdict(trial, row, policy)


def why_not(fleet: FleetSnapshot, request: PlacementRequest, host_id: str, *, policy: Policy = BEST_FIT) -> str:
    """Return in a sentence why this host would not be chosen now, or that it would. KeyError where it is not in the fleet."""
    decision = explain(fleet, request, policy=policy)
    verdict = decision.verdict_of(host_id) or explain_host(fleet, request, host_id, policy=policy)
    return decision.why_not(verdict)


def decide(books: Books, request: PlacementRequest, *, policy: Policy, listed_hosts: int = LISTED_HOSTS) -> Decision:
    """Return the decision on what is free in `books`, and leave them as they are.

    In a large fleet the best hosts for a shape of request are kept along with the books (`standing.py`), and what requests of other
    sizes share (`families.py`): the same answer, sooner.
    """
    if len(books.fleet) > listed_hosts:
        decision = _kept_decision(books, request, policy)
        if decision is not None:
            return decision
    return scan(books, request, policy=policy, listed_hosts=listed_hosts)


def _kept_decision(books: Books, request: PlacementRequest, policy: Policy) -> Decision | None:
    asked = Asked.of(books, request, policy)
    if asked is None:
        return None
    standing = standing_decision(asked, count=KEPT_HOSTS)
    return standing if standing is not None else family_decision(asked, count=KEPT_HOSTS)


def scan(books: Books, request: PlacementRequest, *, policy: Policy, listed_hosts: int = LISTED_HOSTS) -> Decision:
    """Return the decision by looking at every host: what `decide` says, always."""
    trial = Trial.of(books, request)
    sieve = Sieve.of(trial)
    fleet = books.fleet
    is_complete = len(fleet) <= listed_hosts
    kept = len(fleet) if is_complete else KEPT_HOSTS
    fitting = shortlist(trial, sieve, policy, count=kept)
    # Of a large fleet a success keeps no refusals but their number: asking again is cheaper than keeping ten thousand.
    refused = sieve.refused_verdicts(trial, count=kept) if is_complete or not fitting else ()
    return Decision(
        request=request,
        policy=policy.name,
        fitting=fitting,
        refused=refused,
        host_count=len(fleet),
        fit_count=sieve.fit_count,
        refused_by=sieve.refused_by,
        cells=trial.cells_on(fleet.row_of[fitting.host_ids[0]]) if fitting else (),
    )
