"""The leader's batch loop: answers placement requests with hosts and claims, or with refusals and their reasons.

One round: read the pending requests, the fleet and the vms on one snapshot; decide in memory (`core.placement`, pure, requests of a
batch see each other); then commit each decision in a transaction of its own: leader's term, claim by conditional UPDATE, epoch,
decision record, answer, wake. A decision that lost a race (a claim refused by the database) stays pending for the next round.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock, mint
from trimtab_controller.core.baseline import Baseline
from trimtab_controller.core.model import Claim, Host, PlacementAsk
from trimtab_controller.core.placement.engine import place
from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.request import PlacementRequest
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.loops import placement_snapshot
from trimtab_controller.nudge import Nudger
from trimtab_controller.store import claims, events, fleet, leases, operations, placements, vms, volume_claims
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

BATCH = 500
# Decisions that share a commit, each in a savepoint of its own; bounds how long the drivers wait for SQLite's only write lock.
COMMITTED_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class _Batch:
    """Everything that one round decides on, as of one snapshot."""

    asks: tuple[PlacementAsk, ...]
    rows: fleet.FleetRows
    needs: Mapping[str, fleet.VmNeeds]
    homes: Mapping[str, Claim]
    hosts: Mapping[str, Host]
    baselines: Mapping[str, Baseline]
    snapshot: FleetSnapshot


class PlacementLoop:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger, rng: random.Random) -> None:
        self._db, self._clock, self._nudger, self._rng = db, clock, nudger, rng

    def run(self, term: int) -> None:
        """Answer everything that is pending; nothing pending costs one indexed query."""
        asks = self._db.read(lambda session: placements.pending(session, limit=BATCH))
        if not asks:
            return
        batch = self._db.read(lambda session: _read(session, asks))
        at_home = [ask for ask in batch.asks if ask.kind == "start" and ask.vm_id in batch.homes]
        for ask in at_home:
            self._answer_at_home(term, ask, batch.homes[ask.vm_id])
        to_place = [ask for ask in batch.asks if ask not in at_home and ask.vm_id in batch.needs]
        requests = [_request(ask, batch) for ask in to_place]
        started_s = self._clock.boottime_s()
        decisions = place(batch.snapshot, requests, policy_of=placement_snapshot.policy_of(batch.rows))
        metrics.PLACEMENT_SECONDS.observe(self._clock.boottime_s() - started_s)
        metrics.PLACEMENT_BATCH.observe(len(requests))
        by_operation = {ask.operation_id: ask for ask in to_place}
        answers = [(by_operation[decision.request.request_id], decision) for decision in decisions]
        for i in range(0, len(answers), COMMITTED_TOGETHER):
            self._commit(term, answers[i : i + COMMITTED_TOGETHER], batch)
            self._nudger.nudge()

    def _commit(self, term: int, answers: Sequence[tuple[PlacementAsk, Decision]], batch: _Batch) -> None:
        """Write decisions; a claim that the database refuses leaves its request pending. A defect in one keeps no other back."""

        def work(session: Session) -> list[str]:
            leases.assert_leader(session, term)
            return [self._write(session, ask, decision, batch) for ask, decision in answers]

        try:
            results = self._db.write(work)
        except TrimtabError:
            raise
        except Exception:
            if len(answers) == 1:
                raise
            for answer in answers:
                try:
                    self._commit(term, (answer,), batch)
                except Exception:
                    log.exception("placement not written", operation_id=answer[0].operation_id)
            return
        for (ask, decision), result in zip(answers, results, strict=True):
            metrics.PLACEMENTS.labels(ask.kind, result).inc()
            if result == "raced":
                log.info("placement raced", operation_id=ask.operation_id, host_id=decision.chosen_host_id)

    def _write(self, session: Session, ask: PlacementAsk, decision: Decision, batch: _Batch) -> str:
        """Write one decision in a savepoint; return what came of it."""
        try:
            with session.begin_nested():
                if decision.chosen_host_id is None:
                    self._refuse(session, ask, decision, decision.summary())
                elif (lacking := _lacks_baseline(decision.chosen_host_id, batch)) and ask.kind == "create":
                    self._refuse(session, ask, decision, lacking)
                else:
                    self._place(session, ask, decision, decision.chosen_host_id, batch)
        except claims.ClaimRefused:
            return "raced"
        return "placed" if decision.chosen_host_id else "refused"

    def _refuse(self, session: Session, ask: PlacementAsk, decision: Decision, refusal: str) -> None:
        decision_id = self._record(session, ask, decision)
        placements.settle(
            session,
            ask.operation_id,
            state="refused",
            decision_id=decision_id,
            refusal=refusal,
            now=self._clock.now(),
        )
        operations.wake(session, ask.operation_id, self._clock.now())

    def _place(
        self,
        session: Session,
        ask: PlacementAsk,
        decision: Decision,
        host_id: str,
        batch: _Batch,
    ) -> None:
        now = self._clock.now()
        vm = vms.get(session, ask.vm_id)
        epoch = vm.epoch + 1
        decision_id = self._record(session, ask, decision)
        is_answered = placements.settle(
            session, ask.operation_id, state="placed", decision_id=decision_id, chosen_host_id=host_id, epoch=epoch, now=now
        )
        if not is_answered:
            return  # withdrawn while we decided
        claims.take(
            session,
            vm_id=vm.id,
            host_id=host_id,
            role="target" if ask.kind == "migrate" else "home",
            epoch=epoch,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            operation_id=ask.operation_id,
            generation=None,
            now=now,
        )
        needs = batch.needs[ask.vm_id]
        local_ids = [volume.id for volume in needs.volumes if not batch.rows.pools[volume.pool_id].is_shared]
        _take_space(session, needs, host_id, batch)
        if ask.kind == "migrate":
            claims.begin_migration(
                session,
                vm_id=vm.id,
                operation_id=ask.operation_id,
                source_host_id=vm.host_id,
                target_host_id=host_id,
                epoch=vm.epoch,
                copied_volume_ids=local_ids,
                now=now,
            )
        else:
            vms.update(session, vm.id, host_id=host_id, epoch=epoch)
            volume_claims.bind(session, local_ids, host_id)
            _fix_machine(session, vm.id, host_id, batch)
        self._tell(session, ask, host_id, decision_id)
        operations.wake(session, ask.operation_id, now)

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

    def _record(self, session: Session, ask: PlacementAsk, decision: Decision) -> str:
        decision_id = mint("dec")
        placements.record_decision(
            session,
            decision_id=decision_id,
            vm_id=ask.vm_id,
            operation_id=ask.operation_id,
            kind=ask.kind,
            chosen_host_id=decision.chosen_host_id or "",
            policy=decision.policy,
            verdicts=decision.as_json(),
            now=self._clock.now(),
        )
        return decision_id

    def _tell(self, session: Session, ask: PlacementAsk, host_id: str, decision_id: str) -> None:
        events.append(
            session,
            kind="vm.placed",
            project_id=ask.project_id,
            subject_id=ask.vm_id,
            operation_id=ask.operation_id,
            actor="system:placement",
            message=f"placed on {fleet.name_of(session, host_id)} for {ask.kind}",
            context={"host_id": host_id, "decision_id": decision_id},
            now=self._clock.now(),
        )


def _take_space(session: Session, needs: fleet.VmNeeds, host_id: str, batch: _Batch) -> None:
    for volume in needs.volumes:
        pool = batch.snapshot.pools[volume.pool_id]
        claims.take_space(
            session,
            volume_id=volume.id,
            pool_id=pool.pool_id,
            host_id="" if pool.is_shared else host_id,
            size_bytes=volume.size_bytes,
            limit_bytes=pool.claim_limit_bytes(host_id),
        )


def _fix_machine(session: Session, vm_id: str, host_id: str, batch: _Batch) -> None:
    """Fix the class's baseline and the vm's concrete machine type and CPU model, once each."""
    class_id = batch.hosts[host_id].host_class_id
    baseline, known = batch.baselines[class_id], batch.rows.classes[class_id]
    if not (known.machine and known.cpu_model):
        fleet.fix_class_baseline(session, class_id, machine=baseline.machine, cpu_model=baseline.cpu_model)
    fleet.fix_machine(session, vm_id, machine=baseline.machine, cpu_model=baseline.cpu_model)


def _lacks_baseline(host_id: str, batch: _Batch) -> str:
    """Return why no vm can be given a machine type and CPU model in this host's class, '' where one can."""
    class_id = batch.hosts[host_id].host_class_id
    baseline, name = batch.baselines[class_id], batch.rows.classes[class_id].name
    if baseline.machine and baseline.cpu_model:
        return ""
    return (
        f"the hosts of class {name} share no machine type and CPU model; "
        f"set them with `trimtab host-class update {name}`, or put unlike hosts into classes of their own"
    )


def _read(session: Session, asks: tuple[PlacementAsk, ...]) -> _Batch:
    vm_ids = [ask.vm_id for ask in asks]
    rows = fleet.read_rows(session)
    baselines = placement_snapshot.baselines_of(rows)
    return _Batch(
        asks=asks,
        rows=rows,
        needs=fleet.needs_of(session, vm_ids),
        homes=claims.homes_of(session, vm_ids),
        hosts={host.id: host for host in rows.hosts},
        baselines=baselines,
        snapshot=placement_snapshot.snapshot_of(rows, baselines),
    )


def _request(ask: PlacementAsk, batch: _Batch) -> PlacementRequest:
    needs = batch.needs[ask.vm_id]
    source = batch.hosts.get(needs.vm.host_id)
    accelerator = source.inventory.accelerator if source and source.inventory else ""
    return placement_snapshot.request_of(ask, needs, accelerator=accelerator)
