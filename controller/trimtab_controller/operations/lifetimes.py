"""What the fleet's own vms say about how long vms live, for policies that ask."""

from datetime import datetime, timedelta

from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.lifetimes import Kind, Lifetimes, Occupancy, family_of, span_of
from trimtab_controller.core.placement.policies import BEST_FIT, POLICIES, knows_lifetimes
from trimtab_controller.store import vm_lives
from trimtab_controller.store.database import Session
from trimtab_controller.store.fleet import FleetRows

# How long what was learned is used, and how far back it is learned from.
LEARNED_EVERY = timedelta(minutes=10)
LEARNED_FROM = timedelta(days=90)
_ENDED_MAX = 50_000


def is_needed(rows: FleetRows) -> bool:
    """Whether any class's policy asks for it."""
    return any(knows_lifetimes(POLICIES.get(known.policy, BEST_FIT)) for known in rows.classes.values())


class LifetimeKeeper:
    """Kept by the leader from batch to batch. A vm lives from its creation to its deletion, stopped or not."""

    __slots__ = ("_learned_at", "_lifetimes")

    def __init__(self) -> None:
        self._learned_at: datetime | None = None
        self._lifetimes = Lifetimes()

    def occupancy(self, session: Session, snapshot: FleetSnapshot, *, now: datetime) -> Occupancy:
        """Return who is where and for how long, as of this session's snapshot."""
        lives = vm_lives.living(session)
        if self._learned_at is None or now - self._learned_at >= LEARNED_EVERY:
            self._learn(session, lives, now)
        occupancy = Occupancy(len(snapshot), self._lifetimes)
        occupancy.pass_time(now.timestamp())
        for life in lives:
            row = snapshot.row_of.get(life.host_id)
            if row is not None:
                occupancy.put(row, life.vm_id, _kind(life), born_s=life.born_at.timestamp())
        return occupancy

    def _learn(self, session: Session, lives: tuple[vm_lives.Life, ...], now: datetime) -> None:
        self._lifetimes, self._learned_at = Lifetimes(), now
        for life in vm_lives.ended(session, since=now - LEARNED_FROM, limit=_ENDED_MAX):
            assert life.ended_at is not None  # asked for
            self._lifetimes.ended(_kind(life), (life.ended_at - life.born_at).total_seconds())
        for life in lives:  # else only the short-lived would be known
            self._lifetimes.lived(_kind(life), 0, span_of((now - life.born_at).total_seconds()))


def _kind(life: vm_lives.Life) -> Kind:
    return Kind(family_of(life.project_id, life.name), life.vcpus, life.memory_mib)
