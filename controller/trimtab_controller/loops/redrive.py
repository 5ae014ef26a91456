"""Redrive: the backstop of every nudge. Due operations are nudged; where the broker is dead they are driven here, slowly."""

from trimtab_controller.clock import Clock
from trimtab_controller.nudge import Nudger
from trimtab_controller.operations.engine import Engine
from trimtab_controller.store import operations
from trimtab_controller.store.database import Database, Session

# With a dead broker the leader drains by itself, a little at a time, so that its other jobs keep their pace.
IN_PROCESS_LIMIT = 4
IN_PROCESS_BUDGET_S = 1.0
# Due operations that no worker took for this many rounds are driven here too: workers may be gone while the broker lives.
PATIENCE_ROUNDS = 8
# Drivers that have work go on until nothing is due, and wake each other: who waits behind them needs no nudge, or only now and then.
NUDGED_ROUNDS = 4


class Redrive:
    def __init__(self, *, db: Database, clock: Clock, engine: Engine, nudger: Nudger) -> None:
        self._db, self._clock, self._engine, self._nudger = db, clock, engine, nudger
        self._rounds_due = self._rounds_idle = 0

    def run(self, _term: int) -> None:
        """Nudge if anything is due; drive in process when nudges do not help."""
        due, is_driven = self._db.read(self._look)
        self._rounds_due = self._rounds_due + 1 if due else 0
        self._rounds_idle = self._rounds_idle + 1 if due and not is_driven else 0
        if not due:
            return
        if not is_driven or self._rounds_due % NUDGED_ROUNDS == 0:
            self._nudger.nudge()
        if self._nudger.is_broken or self._rounds_idle >= PATIENCE_ROUNDS:
            self._engine.drive_due(limit=IN_PROCESS_LIMIT, budget_s=IN_PROCESS_BUDGET_S)

    def _look(self, session: Session) -> tuple[int, bool]:
        now = self._clock.now()
        due = operations.count_due(session, now)
        return due, bool(due) and operations.is_any_driven(session, now, but_by=self._engine.driver)
