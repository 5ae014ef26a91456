"""Looks for what somebody changed by hand: asks hosts how they define a vm, compares, and writes the fields beside the vm.

It shows and changes nothing: `trimtab vm diff` tells the values, `trimtab vm reconcile` settles them. A look costs a host two
definitions of one domain, so each round takes some vms, and the rounds go through the fleet in turn.
"""

from concurrent.futures import ThreadPoolExecutor

import structlog

from trimtab_controller.agents.client import AgentClient
from trimtab_controller.clock import Clock
from trimtab_controller.core.drift_fields import differences
from trimtab_controller.core.model import Actor
from trimtab_controller.store import events, hand_changes, leases
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.hand_changes import Wanted
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)

SYSTEM = Actor(name="system:drift")
VMS_PER_ROUND, PARALLEL = 100, 4
FIELDS_MAX = 20
"""Of one vm; a domain that differs in more is named by these."""


class HandChanges:
    def __init__(self, *, db: Database, clock: Clock, agents: AgentClient) -> None:
        self._db, self._clock, self._agents = db, clock, agents
        self._looked_up_to = ""

    def look(self, term: int) -> None:
        """Look at the next vms in line."""
        after = self._looked_up_to
        found = self._db.read(lambda session: hand_changes.settled(session, after=after, limit=VMS_PER_ROUND))
        self._looked_up_to = found[-1] if len(found) == VMS_PER_ROUND else ""
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="hand-changes") as pool:
            list(pool.map(lambda vm_id: self._look_at(term, vm_id), found))

    def _look_at(self, term: int, vm_id: str) -> None:
        wanted = self._db.read(lambda session: hand_changes.wanted(session, vm_id))
        if wanted is None:
            return
        try:
            seen = self._agents.describe_domain(wanted.host_id, vm_id=vm_id)
        except TrimtabError as error:
            # Silent, or without a definition: the one is told of the host, the other is `core.drift`'s matter.
            log.debug("definition not seen", vm_id=vm_id, code=error.code)
            return
        found = differences(wanted.spec, seen.live, seen.stored, is_original_in_force=wanted.is_original_in_force)
        fields = tuple(one.field for one in found)[:FIELDS_MAX]
        if fields != wanted.known:
            self._db.write(lambda session: self._record(session, term, wanted, fields), durable=False)

    def _record(self, session: Session, term: int, wanted: Wanted, fields: tuple[str, ...]) -> None:
        leases.assert_leader(session, term)
        # What was compared must still be so: an operation that came between has made domain and vm differ for a moment.
        if hand_changes.wanted(session, wanted.vm_id) != wanted:
            return
        hand_changes.record(session, wanted.vm_id, fields)
        changed = f"vm {wanted.name} was changed by hand: {', '.join(fields)}; see `trimtab vm diff {wanted.name}`"
        events.append(
            session,
            kind="vm.changed_by_hand" if fields else "vm.hand_changes_ended",
            project_id=wanted.project_id,
            subject_id=wanted.vm_id,
            actor=SYSTEM.name,
            message=changed[:500] if fields else f"the domain of vm {wanted.name} is as it shall be again",
            context={"fields": list(fields)},
            now=self._clock.now(),
        )
