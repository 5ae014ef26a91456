"""Up to which number no event can appear any more: what readers that follow the numbers need where commits come in another order.

On PostgreSQL an event gets its number before its transaction commits: a reader that has seen 7 may later find a 6 that committed
late. Numbers of transactions that are still open are therefore held back, with everything after them.

Whoever appends holds the table's ROW EXCLUSIVE lock from before the number is drawn until the transaction has ended. So: read the
newest number drawn, *then* who holds that lock. Once none of those holders is left, every number up to that one has appeared or
never will. SQLite has one writer at a time: its numbers appear in order.

Rejected: hiding rows by their transaction's number (xmin) while ordering by `seq`: an older transaction may draw the higher number
and commit first, and the lower one was then lost. Ordering by (transaction, seq): a database that was dumped and restored counts
its transactions from the beginning. A lock around each append: one fsync after the other would bound the rate of creates.
"""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_NEWEST_DRAWN = sa.text("SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('event', 'seq')::regclass), 0)")
# The virtual transaction's number, since one that has written nothing yet has no other.
_WRITERS = sa.text(
    "SELECT virtualtransaction FROM pg_locks WHERE relation = 'event'::regclass AND mode = 'RowExclusiveLock' AND granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What was to be seen at one moment."""

    # The newest number that was drawn; its event may not be there yet.
    newest: int
    # Transactions that may still add an event with a number up to that.
    writers: frozenset[str]

    def is_settled_at(self, later: "Sighting") -> bool:
        """Tell whether all numbers up to ours are decided, given what was seen at the same moment or later."""
        return self.writers.isdisjoint(later.writers)


def sight(session: Session) -> Sighting:
    """Return what is to be seen now. The order of the two reads is what makes it right."""
    if session.get_bind().dialect.name != "postgresql":
        newest = session.scalar(sa.select(sa.func.max(schema.event.c.seq)))
        return Sighting(newest=int(newest or 0), writers=frozenset())
    newest = session.scalar(_NEWEST_DRAWN)
    return Sighting(newest=int(newest or 0), writers=frozenset(session.scalars(_WRITERS)))
