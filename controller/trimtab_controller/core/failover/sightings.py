"""What was seen of a host's slot on shared storage, and from when on the wait for its lease is counted. Pure.

A beacon writes a beat, then reads the fence intent, then its lease lasts a ttl from before it began to write. So once the intent is
durable and the slot is read after that, every lease that was or will be given there stems from the beat that is found, or an
earlier one: a later beat would have been found, or its beacon reads the intent. Whoever saw that very beat at an instant before
knows that its lease began before that instant, and counts from there instead of from the intent. That saves the seconds between a
host's last beat and the moment at which its silence means that it is lost.

What is counted on must have been seen counting: a slot in which nothing ever moved may be a directory where the pool is not mounted.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """The newest beat of a slot that was read, as (boot, lease, counter)."""

    boot_id: str
    lease_number: int
    counter: int
    seen_s: float
    """When the answer that first showed it was there; the beat was begun before."""
    has_moved: bool
    """Whether a lower counter of the same boot was seen in the slot before."""

    def is_same(self, boot_id: str, lease_number: int, counter: int) -> bool:
        return (self.boot_id, self.lease_number, self.counter) == (boot_id, lease_number, counter)


def sighted(before: Sighting | None, *, boot_id: str, lease_number: int, counter: int, now: float) -> Sighting:
    """Return what is known of the slot after a beat was read there; `now`: when the answer had come."""
    if before is not None and before.is_same(boot_id, lease_number, counter):
        return before
    has_moved = before is not None and before.boot_id == boot_id and before.counter < counter
    return Sighting(boot_id=boot_id, lease_number=lease_number, counter=counter, seen_s=now, has_moved=has_moved)


def counted_from_s(known: Sighting | None, after: Sighting | None, *, written_s: float) -> float:
    """Return from when the lease's bound is counted.

    `known`: what had been seen when the intent was written; `after`: what the slot held when it was read after that; `written_s`: when
    the intent was durable.
    """
    if known is None or after is None or not known.has_moved:
        return written_s
    is_last = known.is_same(after.boot_id, after.lease_number, after.counter)
    return min(known.seen_s, written_s) if is_last else written_s
