"""Keeps OVN's northbound database as SQL says: overlay networks, the cards on them, and which host each vm is on.

Nothing is remembered between rounds and nothing waits for it: whatever happened since, the next round writes what differs. A database
that does not answer stops changes of overlay networks only; what runs goes on as OVN last knew it.
"""

import structlog

from trimtab_controller import metrics
from trimtab_controller.core.overlay import desired
from trimtab_controller.northbound import Northbound
from trimtab_controller.store import overlays
from trimtab_controller.store.database import Database
from trimtab_protos.errors import Unavailable

log = structlog.get_logger(__name__)


class OverlayLoop:
    def __init__(self, *, db: Database, northbound: Northbound) -> None:
        self._db, self._northbound = db, northbound
        self._was_down = False

    def run(self, _term: int) -> None:
        """Write what differs. One who leads no more writes what SQL says too, and the next leader's round what it says by then."""
        networks, cards = self._db.read(overlays.read)
        rows = desired(networks, cards)
        try:
            changes = self._northbound.apply(rows)
        except Unavailable as error:
            metrics.OVERLAY_UP.labels("northbound").set(0)
            if not self._was_down:
                log.warning("overlay networks cannot be changed", error=error.message)
            self._was_down = True
            return
        metrics.OVERLAY_UP.labels("northbound").set(1)
        self._was_down = False
        if changes:
            counts = {"created": len(changes.create), "updated": len(changes.update), "deleted": len(changes.delete)}
            log.info("overlay networks changed", **counts)
