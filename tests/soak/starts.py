"""How often a campaign's guests may have been started, by what their operations' journals say they reached."""

from collections import Counter
from collections.abc import Iterable

import sqlalchemy as sa

from trimtab_controller.store import schema
from trimtab_controller.store.database import Session

BEFORE_THE_START = {"vm.create": "define", "vm.start": "define", "vm.migrate": "prepare"}
"""What starts a guest, and the step whose success its starting step waits for. One that was undone before has started nothing."""


def most_starts(session: Session, operation_ids: Iterable[str]) -> Counter[str]:
    """Return of each vm how many of these operations may have started a guest: it is one each, however often a step was repeated."""
    operation, journal = schema.operation, schema.journal
    reached = [
        sa.and_(operation.c.kind == kind, journal.c.step == step, journal.c.direction == "do", journal.c.outcome == "succeeded")
        for kind, step in BEFORE_THE_START.items()
    ]
    query = (
        sa.select(operation.c.id, operation.c.subject_id, operation.c.params)
        .join(journal, journal.c.operation_id == operation.c.id)
        .where(sa.or_(*reached))
    )
    asked = set(operation_ids)
    return Counter(
        row.subject_id for row in session.execute(query) if row.id in asked and row.params.get("start", True) is not False
    )


def repeated(started: Counter[str], allowed: Counter[str]) -> list[str]:
    """Return the vms that were started more often than anybody asked for, in words."""
    return [
        f"{vm_id} was started {count} times, by {allowed[vm_id]} operations that came so far"
        for vm_id, count in started.items()
        if count > allowed[vm_id]
    ]
