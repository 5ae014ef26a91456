"""What proves that the controller's database is older than the fleet: a copy of yesterday was put back. Pure.

A host knows more than the database where it holds a number that the database gave out and does not have. Three numbers are proof,
since each only grows, is committed durably (fsync; on PostgreSQL synchronous_commit=on) *before* anybody outside is told of it, and is
compared with a read that began after the host's word had arrived:

- **the session's lease number** (`host.lease_number`): raised and committed before the agent is welcomed;
- **the database's mark** (`store/behind.py`): raised by the leader once a minute, told to every agent with its heartbeats' answers
  once it is committed. So a copy that is older than a few minutes (each leader raises it once as it begins, too) is noticed by
  whichever host speaks first, though nothing was done since;
- **a vm's turn**: raised and committed by the driver that claims an operation, before its first command. An agent stamps it into the
  domain. A vm that the database knows, deleted ones too, can be compared.

What was looked at and is no proof: **epochs** (a migration takes its target's epoch back when it is undone, and the half copy that is
left behind carries it; each command that gives an epoch carries a turn, so nothing is lost); **a vm that the database has never known**
(purged, or of another fleet); **observations, beats and progress** (written without fsync: a power cut takes the last of them).

Why nothing honest looks like proof: two replicas share one database, and a gateway's late copy of a number is only ever lower; an agent
that goes to another gateway while its first session is being committed does not know that session's number yet; a host that joins anew
after `host remove` has a new id, under which its agent remembers nothing; one that rejoins or was reinstalled remembers what it was
given, or zero. A PostgreSQL standby that was promoted without the last commits *is* older than the fleet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from trimtab_protos.errors import Conflict, InvalidRequest

NUMBERS_AHEAD = 1_000_000
"""More sessions of a host, minutes of service, turns of a subject, or leaders, than there can have been since any backup."""
NUMBER_MAX = 1 << 53
"""No host was ever given a number as high; one that says so is broken, and what it says must not overflow ours."""
CODE = "database-behind"
CURE = "stop every controller and run `trimtab-controller recover`"


class Witness(StrEnum):
    SESSION = "session"
    MARK = "mark"
    TURN = "turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One number that a host holds and the database does not have. `subject`: the vm whose turn it is."""

    host_id: str
    host_name: str
    witness: Witness
    seen: int
    known: int
    subject: str = ""

    @property
    def words(self) -> str:
        match self.witness:
            case Witness.SESSION:
                return f"host {self.host_name} has session {self.seen}, the database {self.known}"
            case Witness.MARK:
                return f"host {self.host_name} was told mark {self.seen}, the database has {self.known}"
            case Witness.TURN:
                return f"host {self.host_name} has turn {self.seen} of vm {self.subject}, the database {self.known}"


def of_hello(
    host_id: str, host_name: str, *, lease_number: int, known_lease_number: int, mark: int, known_mark: int
) -> tuple[Evidence, ...]:
    """Return what a host's Hello proves; 0 of its numbers says nothing. InvalidRequest where they cannot be."""
    for field, number in (("lease_number", lease_number), ("database_mark", mark)):
        if not 0 <= number <= NUMBER_MAX:
            raise InvalidRequest("number-implausible", f"{field}: 0 to {NUMBER_MAX}, not {number}", field=field)
    found = []
    if lease_number > known_lease_number:
        found.append((Witness.SESSION, lease_number, known_lease_number))
    if mark > known_mark:
        found.append((Witness.MARK, mark, known_mark))
    return tuple(
        Evidence(host_id=host_id, host_name=host_name, witness=witness, seen=seen, known=known) for witness, seen, known in found
    )


def told(evidence: Sequence[Evidence]) -> str:
    """Return the sentence that operators read, whatever they asked."""
    return f"this controller's database is older than the fleet ({evidence[0].words}): {CURE}"


def refusal(message: str) -> Conflict:
    """Return the error of whatever would change something while the database is behind."""
    return Conflict(CODE, message)
