"""Redrive: the backstop of every nudge. Due operations are nudged; where the broker is dead they are driven here, slowly."""

from trimtab_controller.clock import Clock
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import Engine
from trimtab_controller.store import operations
from trimtab_controller.store.database import Database

# With a dead broker the leader drains by itself, a little at a time, so that its other jobs keep their pace.
IN_PROCESS_LIMIT = 4
IN_PROCESS_BUDGET_S = 1.0
# Due operations that no worker took for this many rounds are driven here too: workers may be gone while the broker lives.
PATIENCE_ROUNDS = 8


class Redrive:
    def __init__(self, *, db: Database, clock: Clock, engine: Engine, nudger: Nudger) -> None:
        self._db, self._clock, self._engine, self._nudger = db, clock, engine, nudger
        self._rounds_due = 0

    def run(self, _term: int) -> None:
        """Nudge if anything is due; drive in process when nudges do not help."""
        due = self._db.read(lambda session: operations.count_due(session, self._clock.now()))
        self._rounds_due = self._rounds_due + 1 if due else 0
        if not due:
            return
        self._nudger.nudge()
        if self._nudger.is_broken or self._rounds_due >= PATIENCE_ROUNDS:
            self._engine.drive_due(limit=IN_PROCESS_LIMIT, budget_s=IN_PROCESS_BUDGET_S)
