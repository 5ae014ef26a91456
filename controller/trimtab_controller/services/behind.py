"""A controller whose database is older than the fleet notices it by itself, and from then on changes nothing.

    current -> (a host proves it: core/behind.py) -> behind -> (`trimtab-controller recover --apply`, or an operator's word) -> current

Proof is written in the transaction in which the host is heard, so that it is in force before the host has a lease under the new session.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from trimtab_controller.core import behind as core
from trimtab_controller.core.behind import Evidence
from trimtab_controller.core.model import Actor, Host
from trimtab_controller.store import behind, events, hosts
from trimtab_controller.store.database import Session
from trimtab_protos.errors import Conflict

ALARM = f"alarm.{core.CODE}"
REASON_MAX = 400


def notice(session: Session, evidence: Sequence[Evidence], *, now: datetime) -> None:
    """Stop whatever would act on the past; tell of each host that proves it, once."""
    for one in behind.declare(session, evidence, now=now):
        events.append(
            session,
            kind=ALARM,
            subject_id=one.host_id,
            message=core.told([one]),
            context={"witness": one.witness.value, "seen": one.seen, "known": one.known},
            now=now,
        )


def notice_hello(session: Session, host: Host, *, lease_number: int, mark: int, now: datetime) -> None:
    """Compare what a host was given with what the database has. InvalidRequest where it cannot have been given that."""
    evidence = core.of_hello(
        host.id,
        host.name,
        lease_number=lease_number,
        known_lease_number=host.lease_number,
        mark=mark,
        known_mark=behind.mark(session),
    )
    notice(session, evidence, now=now)


def notice_turns(session: Session, host_id: str, found: Iterable[tuple[str, int, int]], *, now: datetime) -> None:
    """`found`: (name of a vm, turn that its domain has, turn that the database knows)."""
    ahead = [(name, seen, known) for name, seen, known in found if known < seen <= core.NUMBER_MAX]
    if not ahead:
        return
    host_name = hosts.get(session, host_id).name
    evidence = [
        Evidence(host_id=host_id, host_name=host_name, witness=core.Witness.TURN, seen=seen, known=known, subject=name)
        for name, seen, known in ahead[:1]
    ]
    notice(session, evidence, now=now)


def overtake(session: Session, host_id: str, *, lease_number: int, session_number: int, now: datetime) -> int | None:
    """Give the session of a host that holds a higher lease a number above it; None where a newer session speaks for the host.

    Of agents whose Hello does not say what they hold: an agent takes no lease under a lower number, and would lose its own.
    """
    host = hosts.get(session, host_id)
    if host.lease_number != session_number or lease_number <= session_number:
        return None
    notice_hello(session, host, lease_number=lease_number, mark=0, now=now)
    return hosts.raise_lease_number(session, host_id, held=lease_number)


def trust(session: Session, *, reason: str, actor: Actor, now: datetime) -> None:
    """End it on an operator's word: the hosts that proved it are wrong. Conflict where nothing proves it.

    Numbers are raised as `recover` raises them, so that other hosts' copies of the same error prove nothing; the word of the hosts
    that were named counts for nothing until they rejoin.
    """
    present = behind.state(session)
    if not present.is_in_force:
        raise Conflict("database-not-behind", "nothing says that the database is older than the fleet")
    said = {"by": actor.name, "reason": reason[:REASON_MAX]}
    behind.raise_numbers(session)
    behind.end(session, disbelieved={**present.disbelieved, **dict.fromkeys(present.evidence, said)}, now=now)
    told = f"{actor.name} trusts the database although {'; '.join(present.evidence.values())}: {reason}"
    events.append(session, kind="database.trusted", subject_id="database", actor=actor.name, message=told[:1000], now=now)
