"""Keeps OVN's northbound database as SQL says: overlay networks, the cards on them, which host each vm is on, and the way out.

Nothing is remembered between rounds and nothing waits for it: whatever happened since, the next round writes what differs, all of it
where the database was lost. One that does not answer stops changes of overlay networks only; what runs goes on as OVN last knew it.
"""

from dataclasses import dataclass

import structlog

from trimtab_controller import metrics
from trimtab_controller.clock import Clock
from trimtab_controller.core.overlay import Row, desired
from trimtab_controller.core.overlay_groups import group_rows
from trimtab_controller.core.overlay_outside import with_outside
from trimtab_controller.northbound import Northbound
from trimtab_controller.store import overlays
from trimtab_controller.store.database import Database, Session
from trimtab_controller.store.overlays import OverlayState
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Picture:
    rows: tuple[Row, ...]
    state: OverlayState


class OverlayLoop:
    def __init__(self, *, db: Database, northbound: Northbound, clock: Clock) -> None:
        self._db, self._northbound, self._clock = db, northbound, clock

    def run(self, _term: int) -> None:
        """Write what differs. One who leads no more writes what SQL says too, and the next leader's round what it says by then."""
        picture = self._db.read(self._read)
        try:
            changes = self._northbound.apply(picture.rows)
        except Unavailable as error:
            self._tell(picture.state, problem=error.message)
            return
        self._tell(picture.state, problem="")
        if changes:
            counts = {"created": len(changes.create), "updated": len(changes.update), "deleted": len(changes.delete)}
            log.info("overlay networks changed", **counts)

    def _read(self, session: Session) -> _Picture:
        # First: what is asked for has been written before it is asked for.
        state = overlays.state(session)
        networks, cards = overlays.read(session)
        if not networks:
            return _Picture((), state)
        rows = with_outside(desired(networks, cards), networks, cards, overlays.read_outside(session))
        groups, moving = overlays.read_groups(session, now=self._clock.now())
        return _Picture((*rows, *group_rows(groups, cards, moving=moving)), state)

    def _tell(self, state: OverlayState, *, problem: str) -> None:
        """Note what changed since the last round; a round that changes nothing writes nothing."""
        metrics.OVERLAY_UP.labels("northbound").set(0 if problem else 1)
        if problem and state.is_up:
            log.warning("overlay networks cannot be changed", error=problem)
        if bool(problem) is state.is_up:
            self._db.write(lambda session: overlays.tell_state(session, problem=problem, now=self._clock.now()))
        if not problem and state.answered < state.asked:
            self._db.write(lambda session: overlays.answer(session, state.asked))
