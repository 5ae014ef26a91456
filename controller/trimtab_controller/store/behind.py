"""Whether the database is behind the fleet, in SQL: the state that every replica obeys, and the mark that hosts are told.

The state is a row of `failover_control` named `behind`: `is_paused` while it is in force, `frozen` the sentence that operators read,
`released` the evidence by host, `confirmed_off` the hosts whose word an operator holds for wrong. The row `recovered` has the time of the
last `trimtab-controller recover`. The mark is the turn of the subject `database`: it only grows and survives everything.

Three statements obey it, so that no loop, worker or route has to: `leases.assert_leader` (whatever the leader writes), the claim and the
writes of drivers in `store/operations.py`, and `refuse` before each mutation. A host's session, its lease and its reports go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.core.behind import NUMBERS_AHEAD, Evidence, refusal, told
from trimtab_controller.store import schema

_control, _turn = schema.failover_control, schema.turn
_BEHIND, _RECOVERED = "behind", "recovered"
MARKED = "database"
EVIDENCE_MAX = 20
"""Hosts whose evidence is kept: a thousand that come back at once would write the same row anew a thousand times."""

IS_BEHIND: sa.ColumnElement[bool] = sa.exists(
    sa.select(sa.literal_column("1"))
    .select_from(_control)
    .where(_control.c.name == sa.literal_column(f"'{_BEHIND}'"), _control.c.is_paused.is_(sa.true()))
)
"""Plan: one row by the primary key."""
_STATE = sa.select(_control).where(_control.c.name == sa.bindparam("named"))
_MARK = sa.select(_turn.c.value).where(_turn.c.subject_id == MARKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """`message`: '' where the database is not known to be behind. `evidence`: host -> words, and who is not believed."""

    message: str = ""
    since: datetime | None = None
    evidence: Mapping[str, str]
    disbelieved: Mapping[str, Any]

    @property
    def is_in_force(self) -> bool:
        return bool(self.message)


def state(session: Session) -> Behind:
    row = session.execute(_STATE, {"named": _BEHIND}).one_or_none()
    if row is None:
        return Behind(evidence={}, disbelieved={})
    return Behind(
        message=row.frozen if row.is_paused else "",
        since=row.updated_at if row.is_paused else None,
        evidence=dict(row.released),
        disbelieved=dict(row.confirmed_off),
    )


def refuse(session: Session) -> None:
    """Raise Conflict("database-behind") where nothing may be changed."""
    if present := state(session).message:
        raise refusal(present)


def declare(session: Session, evidence: Sequence[Evidence], *, now: datetime) -> tuple[Evidence, ...]:
    """Write down proof; return what is new of it. Of a host that an operator holds for wrong nothing is taken."""
    present = state(session)
    fresh = [one for one in evidence if one.host_id not in present.disbelieved and one.host_id not in present.evidence]
    if not fresh or len(present.evidence) >= EVIDENCE_MAX:
        return ()
    words = {**present.evidence, **{one.host_id: one.words for one in reversed(fresh)}}
    values: dict[str, Any] = {"is_paused": True, "released": words}
    if not present.is_in_force:
        values |= {"frozen": told(fresh)[:500], "updated_at": now}
    _write(session, _BEHIND, values, now=now)
    return tuple(fresh)


def end(session: Session, *, disbelieved: Mapping[str, Any], now: datetime) -> None:
    """Let everything be done again; from `disbelieved` nothing is taken for proof from now on."""
    values = {"is_paused": False, "frozen": "", "released": {}, "confirmed_off": dict(disbelieved), "updated_at": now}
    _write(session, _BEHIND, values, now=now)


def believe(session: Session, host_id: str, *, now: datetime) -> None:
    """Take the word of a host that was made anew again."""
    present = state(session)
    if host_id in present.disbelieved:
        others = {key: word for key, word in present.disbelieved.items() if key != host_id}
        _write(session, _BEHIND, {"confirmed_off": others}, now=now)


def note_recovery(session: Session, *, now: datetime) -> None:
    _write(session, _RECOVERED, {"updated_at": now}, now=now)


def recovered_at(session: Session) -> datetime | None:
    """Return when the database was last brought up to what hosts hold; None: never."""
    row = session.execute(_STATE, {"named": _RECOVERED}).one_or_none()
    return row.updated_at if row is not None else None


def _write(session: Session, name: str, values: Mapping[str, Any], *, now: datetime) -> None:
    update = _control.update().where(_control.c.name == name).values(**values)
    if getattr(session.execute(update), "rowcount", 0):
        return
    fresh = {"is_paused": False, "frozen": "", "released": {}, "confirmed_off": {}, "updated_at": now}
    try:
        with session.begin_nested():
            session.execute(_control.insert().values(name=name, **{**fresh, **values}))
    except IntegrityError:  # two gateways hear of it at once
        session.execute(update)


# --- numbers -------------------------------------------------------------------------------------------------------------------


def mark(session: Session) -> int:
    """Return the mark of this database, 0 before the first. Everybody who is told it reads it committed: it is written durably."""
    return int(session.execute(_MARK).scalar_one_or_none() or 0)


def raise_mark(session: Session) -> None:
    raised = session.execute(_turn.update().where(_turn.c.subject_id == MARKED).values(value=_turn.c.value + 1))
    if getattr(raised, "rowcount", 0) == 0:
        session.execute(_turn.insert().values(subject_id=MARKED, value=1))


def raise_numbers(session: Session) -> None:
    """Raise the mark, every turn and every host's lease number above all that can have been given: hosts know no higher ones then."""
    host = schema.host
    raise_mark(session)
    session.execute(_turn.update().values(value=_turn.c.value + NUMBERS_AHEAD))
    session.execute(host.update().values(lease_number=host.c.lease_number + NUMBERS_AHEAD))
