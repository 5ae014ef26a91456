"""Brings vms back whose disks are lost with their host, where their backup policy says so. Beside failover, which leaves them alone."""

from datetime import datetime, timedelta

import structlog

from trimtab_controller.clock import Clock
from trimtab_controller.core.lost_disks import AFTER
from trimtab_controller.core.model import Actor
from trimtab_controller.core.model.failover import FailoverRow
from trimtab_controller.nudge import Nudger
from trimtab_controller.services import lost_disks
from trimtab_controller.store import failover, leases, operations, vms
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:backups")
# After one that failed: no room, no repository.
RETRY = timedelta(minutes=2)


class LostDisksLoop:
    def __init__(self, *, db: Database, clock: Clock, nudger: Nudger, after: timedelta = AFTER) -> None:
        """`after`: how long beyond the proof that a host is off its vms are brought back."""
        self._after = after
        self._db, self._clock, self._nudger = db, clock, nudger
        self._not_before: dict[str, datetime] = {}

    def run(self, term: int) -> None:
        """Look at the vms of every host that is proven off, and say of each what it waits for."""
        for record in self._db.read(failover.open_records):
            if record.state == "fenced":
                for vm in self._db.read(lambda session, of=record.host_id: failover.vms_at_home(session, of)):  # type: ignore[misc]
                    if vm.has_local_disk:
                        self._look_at(term, record, vm.id)

    def _look_at(self, term: int, record: FailoverRow, vm_id: str) -> None:
        now = self._clock.now()

        def work(session: Session) -> bool:
            leases.assert_leader(session, term)
            vm = vms.get(session, vm_id)
            is_held = failover.control(session).is_paused or vm.host_id != record.host_id
            if is_held or operations.live_of(session, vm.id):
                return False
            answer, backup = lost_disks.look(session, vm, record, now=now, after=self._after)
            if answer.why:
                vms.update(session, vm.id, problem=answer.why[:1000])
            if not answer.is_due or backup is None or self._not_before.get(vm.id, now) > now:
                return False
            lost_disks.bring_back(session, vm, backup, actor=SYSTEM, now=now)
            self._not_before[vm.id] = now + RETRY
            return True

        try:
            if self._db.write(work):
                self._nudger.nudge()
        except TrimtabError as error:
            self._not_before[vm_id] = now + RETRY
            log.info("not brought back", vm_id=vm_id, code=error.code, error=error.message)
