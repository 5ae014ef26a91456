"""Decides for each command whether to act, to answer from the record, or to refuse; written to disk before acting.

    unknown ── admit ──► begun ── answer ──► answered      (a repeat gets the recorded response)
                           │
                           ├──── fail ─────► failed        (a repeat under the same turn gets the recorded error)
                           └── agent restarts, or the error was retryable: a repeat acts again, since every verb means "ensure"

Refused, whatever is recorded: another incarnation, an earlier session's lease number, a lower turn than the subject's highest, a
lower epoch; then, for a command that would act: a lease this host does not hold, a key under which another request came
(`key-reused`), and an effect whose own undo came before it (`already-undone`: a message that was late on the wire).

A recorded *error* binds only the turn it was given to: a driver with a higher turn asks afresh, so that an operator's retry can
succeed after the cause is gone. Recorded successes bind for as long as they are kept.

The incarnation is new when the file is, or when the host booted: what the record says of a guest is then no longer true, so
entries of an earlier incarnation are acted on again. Highest turns and epochs outlive it. When the file was lost they are rebuilt
from the domains' metadata before the first command is admitted.
"""

import secrets
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from trimtab_agent.clock import Clock
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.journal import JournalFile
from trimtab_agent.lease import LeaseState
from trimtab_protos import status
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.errors.v1 import error_pb2
from trimtab_protos.messages import CommandKey, Direction

ANSWERS_KEPT_MS = 7 * 24 * 3_600_000
SUBJECTS_KEPT_MS = 400 * 24 * 3_600_000
"""As long as the controller keeps its audit: no command can be that late."""
_MAX_KEY_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Act:
    """The command is on disk as begun; run it, then record its outcome."""

    stamp: Stamp
    """Highest epoch and turn of the subject, this command included; for the domain's metadata."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The recorded response, serialised."""

    response: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """Raise this. The turn counts nevertheless: an older driver must not act after a newer one was told no."""

    error: TrimtabError


Admission = Act | Answered | Refused


class Replay:
    """The command journal of one agent. Thread-safe; futures are done after the commit."""

    def __init__(
        self,
        file: JournalFile,
        agent_id: str,
        *,
        boot_id: str,
        clock: Clock,
        lease: Callable[[], LeaseState],
        given_lease_number: Callable[[], int] = lambda: 0,
    ) -> None:
        """`given_lease_number`: the highest that this host was ever given, under whichever agent process."""
        self._given_lease_number = given_lease_number
        self._file = file
        self._agent_id = agent_id
        self._clock = clock
        self._lease = lease
        self.incarnation, self._is_rebuilt = file.submit(self._open(boot_id)).result()

    @property
    def is_rebuilt(self) -> bool:
        """False for a fresh journal until `rebuild` was called; commands are refused until then."""
        return self._is_rebuilt

    def rebuild(self, stamps: Iterable[tuple[str, Stamp]]) -> Future[None]:
        """Raise the highest turns and epochs to those that the domains' metadata remembers, and begin to admit commands."""
        found = list(stamps)

        def work(connection: sqlite3.Connection) -> None:
            for vm_id, stamp in found:
                self._raise_subject(connection, vm_id, turn=stamp.turn, epoch=stamp.epoch)
            connection.execute("UPDATE agent SET is_rebuilt = 1 WHERE agent_id = ?", (self._agent_id,))

        future = self._file.submit(work)
        future.add_done_callback(self._note_rebuilt)
        return future

    def admit(
        self,
        key: CommandKey,
        request_hash: bytes,
        *,
        needs_lease: bool,
        remembers: bool = True,
        is_word_of_the_moment: bool = False,
    ) -> Future[Admission]:
        """Return whether to act; the future raises where the key's own numbers refuse.

        `remembers=False`: the verb is acted on at each repeat (offers, job starts); its key still guards turn, hash and undo.
        `is_word_of_the_moment`: of these, not the hash: see `Commands.run`.
        """
        check_key(key)

        def work(connection: sqlite3.Connection) -> Admission:
            self._check_standing(connection, key)
            self._raise_subject(connection, key.subject_id, turn=key.turn, epoch=key.epoch)
            try:
                recorded = self._recorded(connection, key, None if is_word_of_the_moment else request_hash)
                if recorded is not None and remembers:
                    return recorded
                if needs_lease:
                    self.require_lease(key)
                self._refuse_undone(connection, key)
            except TrimtabError as error:
                return Refused(error)
            connection.execute(
                "INSERT OR REPLACE INTO command VALUES (?, ?, ?, ?, ?, ?, ?, 'begun', x'', ?)",
                (*self._row_key(key), request_hash, self.incarnation, key.turn, self._clock.now_ms()),
            )
            turn, epoch = self._subject(connection, key.subject_id)
            return Act(Stamp(epoch=epoch, turn=turn))

        return self._file.submit(work)

    def check(self, key: CommandKey) -> Future[None]:
        """Raise what refuses a command that leaves no entry of its own (cancel); its turn and epoch count from now on."""
        check_key(key)

        def work(connection: sqlite3.Connection) -> None:
            self._check_standing(connection, key)
            self._raise_subject(connection, key.subject_id, turn=key.turn, epoch=key.epoch)

        return self._file.submit(work)

    def require_lease(self, key: CommandKey) -> None:
        """Raise Conflict(`no-lease`) unless the lease that the command was decided under is the one this host holds now."""
        held = self._lease()
        if not held.allows(key.lease_number):
            raise Conflict(
                "no-lease",
                "the host does not hold the lease that this command was decided under",
                held=held.number,
                is_live=held.is_live,
                given=key.lease_number,
            )

    def answer(self, key: CommandKey, response: bytes) -> Future[None]:
        """Record the response of a command that was acted on."""
        return self._finish(key, "answered", response)

    def fail(self, key: CommandKey, error: TrimtabError) -> Future[None]:
        """Record an error, unless it is retryable: then the entry stays `begun`."""
        if error.retryable:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._finish(key, "failed", status.to_detail(error).SerializeToString())

    def highest(self, subject_id: str) -> Stamp:
        """Return the highest epoch and turn seen for a subject; zeros where there was none."""

        def work(connection: sqlite3.Connection) -> Stamp:
            turn, epoch = self._subject(connection, subject_id)
            return Stamp(epoch=epoch, turn=turn)

        return self._file.submit(work).result()

    def prune(self) -> Future[int]:
        """Delete what nobody can ask for any more; return how many entries went."""
        now_ms = self._clock.now_ms()

        def work(connection: sqlite3.Connection) -> int:
            commands = connection.execute(
                "DELETE FROM command WHERE at_ms < ? AND state <> 'begun' AND agent_id = ?",
                (now_ms - ANSWERS_KEPT_MS, self._agent_id),
            )
            subjects = connection.execute(
                "DELETE FROM subject WHERE touched_at_ms < ? AND agent_id = ?", (now_ms - SUBJECTS_KEPT_MS, self._agent_id)
            )
            return commands.rowcount + subjects.rowcount

        return self._file.submit(work)

    # Inside the writer's transaction.

    def _open(self, boot_id: str) -> Callable[[sqlite3.Connection], tuple[str, bool]]:
        def work(connection: sqlite3.Connection) -> tuple[str, bool]:
            row = connection.execute(
                "SELECT incarnation, boot_id, is_rebuilt FROM agent WHERE agent_id = ?", (self._agent_id,)
            ).fetchone()
            if row is not None and row[1] == boot_id:
                return str(row[0]), bool(row[2])
            incarnation = "inc-" + secrets.token_hex(8)
            is_rebuilt = row is not None and bool(row[2])
            connection.execute(
                "INSERT OR REPLACE INTO agent VALUES (?, ?, ?, ?)", (self._agent_id, incarnation, boot_id, int(is_rebuilt))
            )
            return incarnation, is_rebuilt

        return work

    def _check_standing(self, connection: sqlite3.Connection, key: CommandKey) -> None:
        if key.incarnation and key.incarnation != self.incarnation:
            raise Conflict(
                "other-incarnation",
                "the agent lost its journal or its host booted since this command was decided",
                incarnation=self.incarnation,
            )
        given = self._given_lease_number()
        if 0 < key.lease_number < given:
            # Of a session that is over. A controller on a copy of yesterday's database sends nothing else before it hears us.
            raise Conflict("no-lease", "the command was decided under a session of before", given=key.lease_number, highest=given)
        if not self._is_rebuilt:
            raise Unavailable("journal-rebuilding", "the agent has not yet read the domains' metadata; try again")
        turn, epoch = self._subject(connection, key.subject_id)
        if key.turn < turn:
            raise Conflict("stale-turn", "another driver took over this subject", turn=key.turn, highest=turn)
        if 0 < key.epoch < epoch:
            raise Conflict("stale-epoch", "the vm was placed anew since this command was decided", epoch=key.epoch, highest=epoch)

    def _recorded(self, connection: sqlite3.Connection, key: CommandKey, request_hash: bytes | None) -> Answered | None:
        row = connection.execute(
            "SELECT request_hash, turn, state, answer FROM command"
            " WHERE agent_id = ? AND operation_id = ? AND step = ? AND direction = ? AND incarnation = ?",
            (*self._row_key(key), self.incarnation),
        ).fetchone()
        if row is None:
            return None
        known_hash, turn, state, answer = row
        if request_hash is not None and known_hash != request_hash:
            raise Conflict("key-reused", "another request came under this operation and step", step=key.step)
        if state == "answered":
            return Answered(answer)
        if state == "failed" and turn == key.turn:
            raise status.from_detail(error_pb2.ErrorDetail.FromString(answer))
        return None

    def _refuse_undone(self, connection: sqlite3.Connection, key: CommandKey) -> None:
        if key.direction is not Direction.DO:
            return
        undone = connection.execute(
            "SELECT 1 FROM command WHERE agent_id = ? AND operation_id = ? AND step = ? AND direction = ? AND incarnation = ?",
            (self._agent_id, key.operation_id, key.step, Direction.UNDO.value, self.incarnation),
        ).fetchone()
        if undone:
            raise Conflict("already-undone", "this step was undone before its command arrived", step=key.step)

    def _subject(self, connection: sqlite3.Connection, subject_id: str) -> tuple[int, int]:
        row = connection.execute(
            "SELECT turn, epoch FROM subject WHERE agent_id = ? AND subject_id = ?", (self._agent_id, subject_id)
        ).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def _raise_subject(self, connection: sqlite3.Connection, subject_id: str, *, turn: int, epoch: int) -> None:
        connection.execute(
            "INSERT INTO subject VALUES (?, ?, ?, ?, ?) ON CONFLICT (agent_id, subject_id) DO UPDATE SET"
            " turn = max(turn, excluded.turn), epoch = max(epoch, excluded.epoch), touched_at_ms = excluded.touched_at_ms",
            (self._agent_id, subject_id, turn, epoch, self._clock.now_ms()),
        )

    def _finish(self, key: CommandKey, state: str, answer: bytes) -> Future[None]:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE command SET state = ?, answer = ?, at_ms = ?"
                " WHERE agent_id = ? AND operation_id = ? AND step = ? AND direction = ?",
                (state, answer, self._clock.now_ms(), *self._row_key(key)),
            )

        return self._file.submit(work)

    def _row_key(self, key: CommandKey) -> tuple[str, str, str, str]:
        return self._agent_id, key.operation_id, key.step, key.direction.value

    def _note_rebuilt(self, future: Future[None]) -> None:
        if future.exception() is None:
            self._is_rebuilt = True


def check_key(key: CommandKey) -> None:
    """Raise InvalidRequest where the key cannot identify a command."""
    for name, text in (("operation_id", key.operation_id), ("step", key.step), ("subject_id", key.subject_id)):
        if not text or len(text) > _MAX_KEY_LENGTH:
            raise InvalidRequest("key-invalid", f"key.{name} must have 1 to {_MAX_KEY_LENGTH} characters", field=f"key.{name}")
    if key.turn < 1 or key.epoch < 0:
        raise InvalidRequest("key-invalid", "key.turn must be at least 1 and key.epoch at least 0", field="key.turn")
