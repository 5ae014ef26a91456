"""Drives operations: claim what is due, run `plan, effect, record` per step, give the row back.

Invariants
- Only the holder of (driver, turn) writes; each write is fenced (`store.operations.hold`). A driver that lost its row stops.
- A transaction step and its record are one transaction; those that follow a record at once share its commit, each in a savepoint
  of its own. An effect is keyed: a crash between it and its record repeats it and gets the agent's recorded answer.
- A timeout means unknown: the same key is sent again, or the step observes; nothing is concluded from it.
- Nothing here lives longer than `BUDGET_S`; longer work is waited for as a row.

Nudges (`tasks.py`) and the leader's redrive loop both end in `drive_due`; neither carries work, so losing one costs time only.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
import tenacity

from trimtab_controller.agents.client import AgentClient
from trimtab_controller.clock import Clock
from trimtab_controller.core.lifecycle import OperationState
from trimtab_controller.core.model import JournalEntry, Operation, OperationError
from trimtab_controller.operations.journal import Finished, Forward, Position, Recorded, Undo, end_of, fold
from trimtab_controller.operations.registry import saga_named
from trimtab_controller.operations.saga import Effect, Json, Saga, Step, Stopped, TookPlace, Transaction, Wait
from trimtab_controller.operations.turning import cancelled, may_turn, what_has_passed
from trimtab_controller.store import operations as store
from trimtab_controller.store.database import Database, Session
from trimtab_protos.errors import Conflict, Internal, TrimtabError
from trimtab_protos.messages import Direction

log = structlog.get_logger(__name__)

BUDGET_S = 20.0
# The longest single RPC is 10 s; a driver that took longer than this over one step is presumed dead.
# Fault campaigns shorten it, to see many takeovers.
DRIVER_LEASE_S = float(os.environ.get("TRIMTAB_DRIVER_LEASE_S", "30"))
# Quick tries inside one drive, for a blip; beyond them the row waits with a growing pause.
QUICK_RETRY_S = 3.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 60.0
# A step that never gets through: forward it is then undone, an undo or a step past the pivot asks for an operator.
ATTEMPTS_FORWARD, ATTEMPTS_COMMITTED = 8, 40

# Tests kill the process at a named point: `before:<step>`, `after:<step>`, `recorded:<step>` (see tests/operations).
CRASH_AT = os.environ.get("TRIMTAB_CRASH_AT", "")


def _ignore(*_measured: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Engine:
    """One driver. Thread-safe: each thread drives rows of its own; `driver` names the process and must be unique."""

    db: Database
    agents: AgentClient
    clock: Clock
    driver: str
    rng: random.Random
    # Called with (kind, step, outcome, seconds) after each try: the metrics.
    on_step: Callable[[str, str, str, float], None] = _ignore
    # Called with (kind, state, seconds since acceptance) when an operation ends here.
    on_end: Callable[[str, str, float], None] = _ignore
    # Finds the saga of a kind; tests give sagas whose steps fail or run twice.
    saga_of: Callable[[str], Saga[Any]] = saga_named
    # Whether steps that need no agent share the commit before them; tests that look at each record alone say no.
    shares_commits: bool = True

    def drive_due(self, *, limit: int = 4, budget_s: float = BUDGET_S, on_more: Callable[[], None] = _ignore) -> int:
        """Claim up to `limit` due operations at a time and drive each until it waits or ends; return how many were driven.

        `on_more` is called where more may be due than were claimed: another driver may begin at once.
        """
        started = self.clock.boottime_s()
        driven = 0
        while self.clock.boottime_s() - started < budget_s:
            claimed = self.db.write(
                lambda session: store.claim_due(
                    session, driver=self.driver, now=self.clock.now(), lease_s=DRIVER_LEASE_S, limit=limit
                )
            )
            if len(claimed) == limit:
                on_more()
            for operation in claimed:
                self.drive(operation, until=started + budget_s)
                driven += 1
            if len(claimed) < limit:
                break
        return driven

    def drive(self, operation: Operation, *, until: float) -> None:
        """Advance one claimed operation step by step; never raises for what an operation can do wrong."""
        bound = log.bind(operation_id=operation.id, kind=operation.kind, subject_id=operation.subject_id, turn=operation.turn)
        try:
            self._advance(operation, until)
        except store.Fenced:
            bound.info("operation moved on")
        except TrimtabError as error:
            bound.warning("operation put back", code=error.code, error=error.message)
            self._put_back_quietly(operation, error)
        except Exception:  # noqa: BLE001
            # A defect must park one operation, never stop the driver of all others.
            bound.exception("operation driver failed")
            self._put_back_quietly(operation, Internal("driver-failed", "a defect stopped this step; the log has it"))

    def _advance(self, operation: Operation, until: float) -> None:
        """Take one step after the other. The journal is read once: only the holder of the turn appends to it."""
        saga = self.saga_of(operation.kind)
        entries = list(self._journal(operation))
        is_forward_only = saga.is_forward_only(saga.params_from_json(operation.params))
        while True:
            is_compensating = operation.state is OperationState.COMPENSATING
            position = fold(saga, entries, is_compensating=is_compensating, is_forward_only=is_forward_only)
            following = position.next
            if isinstance(following, Finished):
                self._close_without_step(operation, position, is_compensating)
                return
            if self.clock.boottime_s() >= until:
                self._give_back(operation, operation.state, seconds=0.0, waiting_for="a driver")
                return
            if may_turn(following) and not following.step.is_transaction:
                operation = self._ask_for_cancel(operation)  # a transaction sees it by itself
            recorded = self._turn_round(operation, position, following) or self._perform(saga, operation, position, following)
            if recorded is None:
                return
            entries.extend(recorded.entries)
            operation = recorded.operation
            if recorded.failure is not None:
                reached, failing, error = recorded.failure
                self.on_step(operation.kind, failing.step.name, error.code, 0.0)
                turned = self._after_error(operation, reached, failing, error)
                if turned is None:
                    return
                entries.extend(turned.entries)
                operation = turned.operation

    def _ask_for_cancel(self, operation: Operation) -> Operation:
        is_cancel_requested = self.db.read(lambda session: store.is_cancel_requested(session, operation.id))
        return replace(operation, is_cancel_requested=is_cancel_requested)

    def _journal(self, operation: Operation) -> tuple[JournalEntry, ...]:
        return self.db.read(lambda session: store.journal_of(session, operation.id))

    # --- one step ------------------------------------------------------------------------------------------------------

    def _perform(self, saga: Saga[Any], operation: Operation, position: Position, following: Forward | Undo) -> Recorded | None:
        """Run the step and record it; return the record to go on from, or None when it waits or has ended."""
        step = following.step
        direction = Direction.DO if isinstance(following, Forward) else Direction.UNDO
        started = self.clock.boottime_s()
        try:
            if step.is_transaction:
                result: Recorded | Wait | Stopped | TookPlace = self._run_transaction(saga, operation, position, following)
            else:
                result = self._run_effect(saga, operation, position, following)
        except store.Fenced:
            raise
        except TrimtabError as error:
            self.on_step(operation.kind, step.name, error.code, self.clock.boottime_s() - started)
            return self._after_error(operation, position, following, error)
        except Exception:
            # A defect in a step is that operation's failure: it is undone, not repeated for ever.
            log.exception("step failed by a defect", operation_id=operation.id, step=step.name)
            self.on_step(operation.kind, step.name, "step-defect", self.clock.boottime_s() - started)
            defect = Internal("step-defect", f"a defect stopped {step.name}; the controller's log has it")
            return self._after_error(operation, position, following, defect)
        self.on_step(
            operation.kind, step.name, "waited" if isinstance(result, Wait) else "succeeded", self.clock.boottime_s() - started
        )
        if isinstance(result, Wait):
            if not step.is_transaction:
                self._give_back(
                    operation,
                    operation.state,
                    seconds=result.seconds,
                    waiting_for=result.waiting_for,
                    progress=result.progress,
                    step=step.name,
                    **what_has_passed(operation),
                )
            return None
        if isinstance(result, TookPlace):
            return self._turn_forward(operation, position, step, result)
        if isinstance(result, Stopped):
            return self._turn(operation, position, step, cancelled())
        for entry in result.entries[1:]:
            self.on_step(operation.kind, entry.step, "succeeded", 0.0)
        steps = [entry.step for entry in result.entries]
        log.debug("steps recorded", operation_id=operation.id, steps=steps, direction=direction.value)
        for name in steps:
            self._crash_point(f"recorded:{name}")
        if result.end is not None:
            self._tell_end(operation, result.end)
            return None
        return result

    def _run_transaction(
        self, saga: Saga[Any], operation: Operation, position: Position, following: Forward | Undo
    ) -> Recorded | Wait:
        step = following.step
        is_forward = isinstance(following, Forward)
        run = step.do if is_forward else step.undo
        assert run is not None
        now = self.clock.now()
        params = saga.params_from_json(operation.params)

        def work(session: Session) -> Recorded | Wait:
            held = self._hold(session, operation, step.name, now)
            if held.is_cancel_requested and may_turn(following):
                raise cancelled()
            context = Transaction(
                operation=held, params=params, results=position.results, undone=position.undone, now=now, session=session
            )
            result = run(context)
            assert not isinstance(result, TookPlace), "a transaction knows what it did"
            if isinstance(result, Wait):
                self._release(session, operation, operation.state, result, step=step.name, now=now)
                return result
            recorded = self._append(session, saga, held, position, following, result, now=now)
            return self._go_on(session, saga, position, recorded, now=now)

        self._crash_point(f"before:{step.name}")
        return self.db.write(work)

    def _run_effect(
        self, saga: Saga[Any], operation: Operation, position: Position, following: Forward | Undo
    ) -> Recorded | Wait | Stopped | TookPlace:
        step = following.step
        is_forward = isinstance(following, Forward)
        run: Callable[[Any], Any] | None = step.do if is_forward else step.undo
        if operation.is_cancel_requested and step.cancel is not None and may_turn(following):
            run = step.cancel
        assert run is not None
        context = Effect(
            operation=operation,
            params=saga.params_from_json(operation.params),
            results=position.results,
            now=self.clock.now(),
            agents=self.agents,
            read=self.db.read,
            step=step.name,
            direction=Direction.DO if is_forward else Direction.UNDO,
            waited_s=(self.clock.now() - (position.since or operation.created_at)).total_seconds(),
        )
        self._crash_point(f"before:{step.name}")
        # Only what certainly did nothing is tried again here; an unknown outcome goes back to the row, whose next drive observes.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, TrimtabError) and error.code in QUICKLY_RETRIED),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=1.0),
            stop=tenacity.stop_after_delay(QUICK_RETRY_S),
            reraise=True,
        )
        result: Json | Wait | Stopped | TookPlace | None = retrying(run, context)
        if isinstance(result, Wait | Stopped | TookPlace):
            return result
        self._crash_point(f"after:{step.name}")
        return self._record_effect(saga, operation, position, following, result)

    # --- recording -----------------------------------------------------------------------------------------------------

    def _record_effect(
        self, saga: Saga[Any], operation: Operation, position: Position, following: Forward | Undo, result: Json | None
    ) -> Recorded:
        now = self.clock.now()

        def work(session: Session) -> Recorded:
            held = self._hold(session, operation, following.step.name, now)
            recorded = self._append(session, saga, held, position, following, result, now=now)
            return self._go_on(session, saga, position, recorded, now=now)

        return self.db.write(work)

    def _hold(self, session: Session, operation: Operation, step: str, now: datetime) -> Operation:
        """Fence this transaction and return the operation with what users want of it by now."""
        passed = what_has_passed(operation)
        is_cancelled = store.hold(session, operation, now=now, lease_s=DRIVER_LEASE_S, step=step, **passed)
        return replace(operation, is_cancel_requested=is_cancelled, **passed)

    def _go_on(self, session: Session, saga: Saga[Any], position: Position, recorded: Recorded, *, now: datetime) -> Recorded:
        """Take the steps that need no agent in the same transaction; one that waits is undone alone and taken again."""
        operation = recorded.operation
        if not self.shares_commits or operation.state is OperationState.COMPENSATING or operation.is_cancel_requested:
            return recorded
        while recorded.end is None:
            entries = (*position.entries, *recorded.entries)
            reached = fold(saga, entries, is_compensating=False, is_forward_only=position.is_forward_only)
            following = reached.next
            if not isinstance(following, Forward):
                break
            savepoint = session.begin_nested()
            try:
                result = self._result_at_hand(session, saga, operation, reached, following.step, now)
                if result is None:
                    break
                one = self._append(session, saga, operation, reached, following, result, now=now)
                savepoint.commit()
            except TrimtabError as error:
                return replace(recorded, failure=(reached, following, error))
            except Exception:  # noqa: BLE001 a defect, or the database's: taken again by itself, that is where it is judged
                break
            finally:
                if savepoint.is_active:
                    savepoint.rollback()
            recorded = replace(one, entries=(*recorded.entries, *one.entries))
        return recorded

    def _result_at_hand(
        self, session: Session, saga: Saga[Any], operation: Operation, position: Position, step: Step, now: datetime
    ) -> Json | None:
        """Return what the step comes to without an agent; None where it takes one, or waits."""
        if not step.is_transaction:
            known = step.known(position.results) if step.known is not None else None
            if known is not None:
                self._crash_point(f"before:{step.name}")
                self._crash_point(f"after:{step.name}")
            return known
        self._crash_point(f"before:{step.name}")
        params = saga.params_from_json(operation.params)
        result = step.do(Transaction(operation=operation, params=params, results=position.results, now=now, session=session))
        return None if isinstance(result, Wait) else result or {}

    def _append(
        self,
        session: Session,
        saga: Saga[Any],
        operation: Operation,
        position: Position,
        following: Forward | Undo,
        result: Json | None,
        *,
        now: datetime,
    ) -> Recorded:
        """Journal a success and, with the last step, end the operation in the same transaction."""
        is_forward = isinstance(following, Forward)
        direction = Direction.DO if is_forward else Direction.UNDO
        entry = store.append_journal(
            session,
            operation,
            position=position.length,
            step=following.step.name,
            direction=direction,
            result=result or {},
            error=None,
            now=now,
        )
        if not following.is_last:
            return Recorded(operation, (entry,))
        state = end_of(position, is_forward=is_forward)
        if is_forward:
            results = {**position.results, following.step.name: result or {}}
            store.close(session, operation, state=state, now=now, result=saga.result(results))
        else:
            store.close(session, operation, state=state, now=now, error=position.failure)
        return Recorded(operation, (entry,), end=state)

    def _close_without_step(self, operation: Operation, position: Position, is_compensating: bool) -> None:
        """End an operation whose journal is already complete (nothing to undo, or a saga that lost its last step)."""
        now = self.clock.now()
        state = end_of(position, is_forward=not is_compensating)

        def work(session: Session) -> None:
            store.hold(session, operation, now=now, lease_s=0)
            store.close(session, operation, state=state, now=now, error=position.failure)

        self.db.write(work)
        self._tell_end(operation, state)

    # --- turning round, waiting, giving up --------------------------------------------------------------------------------

    def _turn_round(self, operation: Operation, position: Position, following: Forward | Undo) -> Recorded | None:
        """Return the operation as compensating if a cancel or the deadline asks for it now, else None."""
        if not may_turn(following):
            return None
        has_begun_waiting = operation.step == following.step.name and following.step.cancel is not None
        if operation.is_cancel_requested and not has_begun_waiting:
            return self._turn(operation, position, following.step, cancelled())
        if operation.deadline is not None and self.clock.now() > operation.deadline:
            late = Conflict("deadline-passed", f"not done by its deadline; it stood at {following.step.name}")
            return self._turn(operation, position, following.step, late)
        return None

    def _turn(self, operation: Operation, position: Position, step: Step, error: TrimtabError) -> Recorded:
        """Journal why the step failed and go into reverse, in one transaction."""
        now = self.clock.now()
        recorded = OperationError.of(error)

        def work(session: Session) -> JournalEntry:
            state = OperationState.COMPENSATING.value
            store.hold(session, operation, now=now, lease_s=DRIVER_LEASE_S, state=state, attempts=0, error=recorded.as_json())
            return store.append_journal(
                session,
                operation,
                position=position.length,
                step=step.name,
                direction=Direction.DO,
                result=None,
                error=recorded,
                now=now,
            )

        entry = self.db.write(work)
        log.info("operation turns round", operation_id=operation.id, step=step.name, code=error.code)
        return Recorded(replace(operation, state=OperationState.COMPENSATING, attempts=0, error=recorded), (entry,))

    def _turn_forward(self, operation: Operation, position: Position, step: Step, found: TookPlace) -> Recorded:
        """Journal that the step took place after all and go on from it."""
        now = self.clock.now()

        def work(session: Session) -> JournalEntry:
            store.hold(
                session, operation, now=now, lease_s=DRIVER_LEASE_S, state=OperationState.RUNNING.value, attempts=0, error=None
            )
            return store.append_journal(
                session,
                operation,
                position=position.length,
                step=step.name,
                direction=Direction.DO,
                result=found.result,
                error=None,
                now=now,
            )

        entry = self.db.write(work)
        log.info("operation goes forward again", operation_id=operation.id, step=step.name)
        return Recorded(replace(operation, state=OperationState.RUNNING, attempts=0, error=None), (entry,))

    def _after_error(
        self, operation: Operation, position: Position, following: Forward | Undo, error: TrimtabError
    ) -> Recorded | None:
        """Decide by class: try again later, go into reverse, or ask for an operator."""
        may_pass = error.retryable or error.code in DECIDED_AGAIN
        attempts = operation.attempts + 1
        if may_turn(following) and (not may_pass or attempts >= ATTEMPTS_FORWARD):
            return self._turn(operation, position, following.step, error)
        if attempts >= ATTEMPTS_COMMITTED:
            self._park(operation, error)
            return None
        pause = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempts, 10)) * self.rng.uniform(0.5, 1.0)
        self._give_back(
            operation,
            operation.state,
            seconds=pause,
            waiting_for=f"another try of {following.step.name}: {error.message}"[:200],
            attempts=attempts,
            error=OperationError.of(error).as_json(),
            step=following.step.name,
        )
        return None

    def _park(self, operation: Operation, error: TrimtabError) -> None:
        now = self.clock.now()

        def work(session: Session) -> None:
            store.hold(session, operation, now=now, lease_s=0)
            store.close(session, operation, state=OperationState.NEEDS_ATTENTION, now=now, error=OperationError.of(error))

        self.db.write(work)
        self._tell_end(operation, OperationState.NEEDS_ATTENTION)

    def _give_back(
        self, operation: Operation, state: OperationState, *, seconds: float, waiting_for: str, **changes: Any
    ) -> None:
        now = self.clock.now()
        wait = Wait(seconds, waiting_for, progress=changes.pop("progress", None))
        self.db.write(lambda session: self._release(session, operation, state, wait, now=now, **changes), durable=False)

    def _release(
        self, session: Session, operation: Operation, state: OperationState, wait: Wait, *, now: datetime, **changes: Any
    ) -> None:
        if wait.progress is not None:
            changes["progress"] = dict(wait.progress)
        waiting = state if state is OperationState.COMPENSATING else OperationState.WAITING
        store.release(
            session,
            operation,
            state=waiting,
            next_run=now + timedelta(seconds=wait.seconds),
            now=now,
            waiting_for=wait.waiting_for[:200],
            **changes,
        )

    def _put_back_quietly(self, operation: Operation, error: TrimtabError) -> None:
        """Give the row back after trouble outside of a step; if that fails too, its lease ends by itself."""
        attempts = operation.attempts + 1
        try:
            if attempts >= ATTEMPTS_COMMITTED:
                self._park(operation, error)
            else:
                pause = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempts, 10))
                self._give_back(operation, operation.state, seconds=pause, waiting_for=error.message[:200], attempts=attempts)
        except (store.Fenced, TrimtabError) as second:
            log.warning("operation left to its lease", operation_id=operation.id, error=str(second))

    def _tell_end(self, operation: Operation, state: OperationState) -> None:
        self.on_end(operation.kind, state.value, (self.clock.now() - operation.created_at).total_seconds())

    @staticmethod
    def _crash_point(name: str) -> None:
        if CRASH_AT and name == CRASH_AT:
            os._exit(9)


# A busy agent says that nothing was done by this call.
QUICKLY_RETRIED = frozenset({"agent-busy"})
# Refusals of a command that was decided on what is no longer so: the host opened a new session, its agent is another incarnation, or
# another driver was faster. Nothing was done; the next drive reads the host's row anew, with a turn of its own.
DECIDED_AGAIN = frozenset({"no-lease", "other-incarnation", "stale-turn"})


def driver_name(process: str) -> str:
    """Return a name that no other driver ever has."""
    return f"{process}-{os.getpid()}-{time.time_ns():x}"
