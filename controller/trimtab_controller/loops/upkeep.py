"""Small periodic jobs of the leader: prepare hosts, purge deleted vms, clean up images, delete what is past its retention."""

from datetime import timedelta
from functools import partial

from trimtab_controller.clock import Clock
from trimtab_controller.core.model import Actor
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.accept import accept
from trimtab_controller.store import (
    behind,
    certificates,
    consoles,
    events,
    fleet,
    host_tokens,
    image_replicas,
    leases,
    operations,
    placements,
    plans,
    secgroups,
    snapshots,
    upkeep,
    usage,
    vms,
    volume_claims,
    volume_moves,
)
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict

SYSTEM = Actor(name="system:upkeep")
BATCH = 500
KEEP_EVENTS = timedelta(days=30)
KEEP_OPERATIONS = timedelta(days=90)
KEEP_DECISIONS = timedelta(days=14)
KEEP_PLANS = timedelta(days=90)
KEEP_USAGE = timedelta(days=8)
KEEP_AUDIT = timedelta(days=400)
SEAL_AFTER = timedelta(seconds=60)
"""Longer than any transaction lives: by then every row with a smaller number is there, or never comes."""
KEEP_IDEMPOTENCY = timedelta(days=2)
KEEP_IDLE_REPLICAS = timedelta(days=7)
EVICTIONS_PER_ROUND = 20
KEEP_HOST_TOKENS = timedelta(days=30)
# A lapsed host proves itself with its last certificate when it rejoins, however late.
KEEP_CERTIFICATES = timedelta(days=400)
KEEP_CONSOLES = timedelta(days=7)


class Upkeep:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger) -> None:
        self._db, self._clock, self._nudger = db, clock, nudger

    def prepare_hosts(self, term: int) -> None:
        """Accept a host.prepare for every host that is up and has a pool or network nobody looked at yet."""
        for host_id, name in self._db.read(fleet.hosts_to_prepare):
            self._accept(term, "host.prepare", subject_id=host_id, subject_name=name, params={"host_id": host_id})

    def purge(self, term: int) -> None:
        """Accept a vm.purge for every vm that has been deleted for longer than its grace."""
        now = self._clock.now()
        for vm in self._db.read(lambda session: upkeep.vms_to_purge(session, now, limit=BATCH)):
            self._accept(
                term, "vm.purge", subject_id=vm.id, subject_name=vm.name, project_id=vm.project_id, params={"vm_id": vm.id}
            )

    def purge_volumes(self, term: int) -> None:
        """Accept a volume.purge for every volume that has been deleted for longer than its grace."""
        now = self._clock.now()
        for volume in self._db.read(lambda session: volume_claims.to_purge(session, now, limit=BATCH)):
            self._accept(
                term,
                "volume.purge",
                subject_id=volume.id,
                subject_name=volume.name,
                project_id=volume.project_id,
                params={"volume_id": volume.id},
            )

    def tidy_snapshots(self, term: int) -> None:
        """Accept a snapshot.delete for every snapshot that was cut short, or that nothing is made of any more."""
        for snapshot in self._db.read(lambda session: snapshots.unfinished(session, limit=BATCH)):
            vm = self._db.read(partial(vms.get, vm_id=snapshot.vm_id))
            self._accept(
                term,
                "snapshot.delete",
                subject_id=vm.id,
                subject_name=vm.name,
                project_id=vm.project_id,
                params={"vm_id": vm.id, "snapshot_id": snapshot.id},
            )

    def settle_moves(self, term: int) -> None:
        """Accept a volume.settle_move for every volume that moves while nothing sees to it."""
        for volume in self._db.read(lambda session: volume_moves.unsettled(session, limit=BATCH)):
            self._accept(
                term,
                "volume.settle_move",
                subject_id=volume.vm_id or volume.id,
                subject_name=volume.name,
                project_id=volume.project_id,
                params={"volume_id": volume.id, "vm_id": volume.vm_id or ""},
            )

    def apply_firewalls(self, term: int) -> None:
        """Accept a firewall.apply for every vm whose host missed a change of its security groups and is up."""
        for vm in self._db.read(lambda session: secgroups.behind(session, limit=BATCH)):
            params = {"vm_id": vm.vm_id}
            self._accept(
                term,
                "firewall.apply",
                subject_id=vm.vm_id,
                subject_name=vm.name,
                project_id=vm.project_id,
                params=params,
            )

    def evict_images(self, term: int) -> None:
        """Accept an image.evict for copies of images on local pools that nothing has used for a week."""
        before = self._clock.now() - KEEP_IDLE_REPLICAS
        for replica, name, project_id in self._db.read(
            lambda session: image_replicas.idle(session, before=before, limit=EVICTIONS_PER_ROUND)
        ):
            self._accept(
                term,
                "image.evict",
                subject_id=replica.image_id,
                subject_name=name,
                project_id=project_id,
                params={"image_id": replica.image_id, "pool_id": replica.pool_id, "host_id": replica.host_id},
            )

    def retain(self, term: int) -> None:
        """Delete old rows in small batches, each a transaction of its own."""
        now = self._clock.now()

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            events.delete_before(session, now - KEEP_EVENTS, limit=BATCH)
            operations.delete_ended_before(session, now - KEEP_OPERATIONS, limit=BATCH)
            placements.delete_decisions_before(session, now - KEEP_DECISIONS, limit=BATCH)
            plans.delete_before(session, now - KEEP_PLANS, limit=BATCH)
            usage.delete_before(session, now - KEEP_USAGE, limit=BATCH)
            upkeep.delete_audit_before(session, now - KEEP_AUDIT, limit=BATCH)
            upkeep.delete_idempotency_before(session, now - KEEP_IDEMPOTENCY, limit=BATCH)
            host_tokens.delete_expired_before(session, now - KEEP_HOST_TOKENS, limit=BATCH)
            certificates.delete_expired_before(session, now - KEEP_CERTIFICATES, limit=BATCH)
            consoles.delete_before(session, now - KEEP_CONSOLES, limit=BATCH)

        self._db.write(work, durable=False)

    def mark_database(self, term: int) -> None:
        """Raise the mark by which hosts tell this database from an older copy of it."""

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            behind.raise_mark(session)

        self._db.write(work)

    def seal_audit(self, term: int) -> None:
        """Chain the audit rows that are not sealed yet, once no other can come before them."""
        before = self._clock.now() - SEAL_AFTER

        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            upkeep.seal_audit(session, before=before, limit=BATCH)

        self._db.write(work)

    def _accept(
        self, term: int, kind: str, *, subject_id: str, subject_name: str, params: dict[str, str], project_id: str = ""
    ) -> None:
        def work(session: Session) -> None:
            leases.assert_leader(session, term)
            if operations.page(session, limit=1, subject_id=subject_id, kind=kind, is_done=False):
                return
            accept(
                session,
                kind,
                subject_id=subject_id,
                subject_name=subject_name,
                project_id=project_id,
                params=params,
                actor=SYSTEM,
                now=self._clock.now(),
            )

        try:
            self._db.write(work)
        except Conflict as busy:
            if busy.code != "operation-in-progress":
                raise
            return  # somebody works on it; the next round looks again
        self._nudger.nudge()
