"""The leader's batch loop: answers placement requests with hosts and claims, or with refusals and their reasons.

One round: read the pending requests, the fleet and the vms on one snapshot; decide in memory (`core.placement`, pure, requests of a
batch see each other); then commit the decisions, many in one transaction (`placement_writes.py`). A decision that lost a race (a
claim refused by the database) stays pending for the next round.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, mint
from trimtab_controller.core.model import Claim, PlacementAsk
from trimtab_controller.core.placement.books import Books
from trimtab_controller.core.placement.engine import PolicyOf, place
from trimtab_controller.core.placement.journal import InputDigest
from trimtab_controller.core.placement.lifetimes import Occupancy
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.verdict import KEPT_HOSTS, LISTED_HOSTS, Decision
from trimtab_controller.loops.placement_writes import RACED, Answer, Batch, write_answers
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations import lifetimes, placement_cures, placement_snapshot
from trimtab_controller.operations.admission import Gatekeeper
from trimtab_controller.operations.lifetimes import LifetimeKeeper
from trimtab_controller.store import claims, events, fleet, leases, operations, placements, vms
from trimtab_controller.store.database import Database, Session

log = structlog.get_logger(__name__)

BATCH = 500
# More requests than this at once are answered with short lists.
BURST = 20
# Refusals of one round for which a way in is searched; the others are asked about with `--dry-run`.
SEARCHES = 5
# While drivers have work a round takes a fifth of its lane's time: what it reads does not grow with what it answers, so the rounds
# get larger instead of more.
REST = 4.0
# Bounds how long one transaction keeps others from the database's write lock, and drivers from the first vms of a large round.
COMMITTED_TOGETHER = 64


class PlacementLoop:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger, rng: random.Random, rest: float = REST) -> None:
        """`rest`: the pause after a round while drivers have work, in times of its length."""
        self._db, self._clock, self._nudger, self._rng = db, clock, nudger, rng
        self._rest = rest
        self._gatekeeper = Gatekeeper()
        self._lifetimes = LifetimeKeeper()
        self._rests_until_s = 0.0

    def run(self, term: int) -> None:
        """Answer everything that is pending; nothing pending costs one indexed query."""
        if not self._db.read(self._is_wanted):
            return
        began_s = self._clock.boottime_s()
        self._answer_pending(term)
        ended_s = self._clock.boottime_s()
        self._rests_until_s = ended_s + self._rest * (ended_s - began_s)

    def _is_wanted(self, session: Session) -> bool:
        """After a round the next waits for more to ask, unless drivers have run out of work: nobody may wait for nothing."""
        if not placements.is_any_pending(session):
            return False
        is_rested = self._clock.boottime_s() >= self._rests_until_s
        return is_rested or not operations.is_any_due(session, self._clock.now())

    def _answer_pending(self, term: int) -> None:
        asks = self._db.read(lambda session: placements.pending(session, limit=BATCH))
        batch = self._db.read(lambda session: _read(session, asks))
        at_home = [ask for ask in batch.asks if ask.kind == "start" and ask.vm_id in batch.homes]
        for ask in at_home:
            self._answer_at_home(term, ask, batch.homes[ask.vm_id])
        to_place = [ask for ask in batch.asks if ask not in at_home and ask.vm_id in batch.needs]
        answers = self._decide(to_place, batch)
        generations: Mapping[str, int] = {group.id: group.generation for group in batch.rows.groups.values()}
        for start in range(0, len(answers), COMMITTED_TOGETHER):
            generations = self._commit(term, answers[start : start + COMMITTED_TOGETHER], batch, generations)
            self._nudger.nudge()

    def _decide(self, asks: Sequence[PlacementAsk], batch: Batch) -> list[Answer]:
        requests = [_request(ask, batch) for ask in asks]
        started_s = self._clock.boottime_s()
        books, policy_of = Books(batch.snapshot, occupancy=self._occupancy(batch)), placement_snapshot.policy_of(batch.rows)
        decisions = place(
            batch.snapshot,
            requests,
            books=books,
            policy_of=policy_of,
            # A burst of hundreds would keep a verdict on every host for every vm: the best ones say enough, the rest is asked again.
            listed_hosts=LISTED_HOSTS if len(requests) <= BURST else KEPT_HOSTS,
        )
        metrics.PLACEMENT_SECONDS.observe(self._clock.boottime_s() - started_s)
        metrics.PLACEMENT_BATCH.observe(len(requests))
        by_operation, digest = {ask.operation_id: ask for ask in asks}, InputDigest(batch.snapshot)
        answers = []
        admitted = self._admitted(decisions, batch)
        for decision in self._cured(admitted, books, policy_of, batch):
            stored = decision.as_json()
            ask = by_operation[decision.request.request_id]
            answers.append(Answer(ask, decision, mint("dec"), stored, digest.next(stored)))
        return answers

    def _occupancy(self, batch: Batch) -> Occupancy | None:
        if not lifetimes.is_needed(batch.rows):
            return None
        now = self._clock.now()
        return self._db.read(lambda session: self._lifetimes.occupancy(session, batch.snapshot, now=now))

    def _admitted(self, decisions: Sequence[Decision], batch: Batch) -> Sequence[Decision]:
        """Return the decisions, with refusals where a class accepts only what survives the loss of a host."""
        if not Gatekeeper.is_needed(batch.rows):
            return decisions
        self._db.read(lambda session: self._gatekeeper.follow(session, batch.rows, batch.snapshot))
        return self._gatekeeper.judge(decisions, batch.needs)

    def _cured(self, decisions: Sequence[Decision], books: Books, policy_of: PolicyOf, batch: Batch) -> Iterator[Decision]:
        """Yield the decisions, the first refusals with what would let them in."""
        searches = 0
        for decision in decisions:
            if decision.chosen_host_id is not None or searches >= SEARCHES:
                yield decision
                continue
            searches += 1
            policy = policy_of(decision.request)
            yield self._db.read(
                lambda session, decision=decision, policy=policy: placement_cures.cured(  # type: ignore[misc]
                    session, decision, books, policy=policy, rows=batch.rows
                )
            )

    def _commit(self, term: int, answers: Sequence[Answer], batch: Batch, generations: Mapping[str, int]) -> Mapping[str, int]:
        """Write these answers in one transaction; one whose claim the database refuses stays pending.

        `generations`: of the groups, as known; returned as they are after these members joined.
        """
        outcomes, generations = self._db.write(
            lambda session: write_answers(session, answers, batch, generations, term=term, now=self._clock.now())
        )
        for answer in answers:
            outcome = outcomes[answer.ask.operation_id]
            metrics.PLACEMENTS.labels(answer.ask.kind, outcome).inc()
            if outcome == RACED:
                log.info("placement raced", operation_id=answer.ask.operation_id, host_id=answer.decision.chosen_host_id)
        return generations

    def _answer_at_home(self, term: int, ask: PlacementAsk, home: Claim) -> None:
        """A vm that holds compute already is where it is: start it there under the epoch it has."""

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            now = self._clock.now()
            placements.settle(
                session,
                ask.operation_id,
                state="placed",
                decision_id="",
                chosen_host_id=home.host_id,
                epoch=vms.get(session, ask.vm_id).epoch,
                now=now,
            )
            operations.wake(session, ask.operation_id, now)

        self._db.write(work)


def _read(session: Session, asks: tuple[PlacementAsk, ...]) -> Batch:
    vm_ids = [ask.vm_id for ask in asks]
    revision = events.newest(session)  # first: PostgreSQL reads what is committed at each statement
    rows = fleet.read_rows(session)
    baselines = placement_snapshot.baselines_of(rows)
    return Batch(
        asks=asks,
        rows=rows,
        needs=fleet.needs_of(session, vm_ids),
        homes=claims.homes_of(session, vm_ids),
        hosts={host.id: host for host in rows.hosts},
        baselines=baselines,
        snapshot=placement_snapshot.snapshot_of(rows, baselines),
        revision=revision,
    )


def _request(ask: PlacementAsk, batch: Batch) -> PlacementRequest:
    needs = batch.needs[ask.vm_id]
    source = batch.hosts.get(needs.vm.host_id)
    inventory = source.inventory if source else None
    return placement_snapshot.request_of(ask, needs, source=inventory, groups=batch.rows.groups)
