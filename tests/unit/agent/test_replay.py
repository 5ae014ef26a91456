"""The command journal: what acts, what is answered from the record, what is refused; and what it knows after a restart."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.agent.factories import command_key
from tests.unit.agent.manual_clock import ManualClock
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.journal import JournalFile, open_or_replace
from trimtab_agent.lease import LeaseState
from trimtab_agent.replay import ANSWERS_KEPT_MS, Act, Admission, Answered, Refused, Replay
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import CommandKey, Direction

HASH = b"h" * 32
Open = Callable[..., Replay]


class Bench:
    """A journal file that is opened again and again, as agents start and stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = ManualClock()
        self.lease = LeaseState(1, 1e9, is_live=True)
        self.given = 0
        self.file = JournalFile(path)

    def open(self, *, boot_id: str = "boot-1", agent_id: str = "host-1", rebuilt: bool = True) -> Replay:
        replay = Replay(
            self.file,
            agent_id,
            boot_id=boot_id,
            clock=self.clock,
            lease=lambda: self.lease,
            given_lease_number=lambda: self.given,
        )
        if rebuilt and not replay.is_rebuilt:
            replay.rebuild([]).result()
        return replay

    def restart(self, **given: str) -> Replay:
        self.file.close()
        self.file = JournalFile(self.path)
        return self.open(**given)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "journal.db")
    yield bench
    bench.file.close()


def admit(replay: Replay, key: CommandKey, *, request_hash: bytes = HASH, needs_lease: bool = False) -> Admission:
    return replay.admit(key, request_hash, needs_lease=needs_lease).result()


def refusal(replay: Replay, key: CommandKey, *, request_hash: bytes = HASH, needs_lease: bool = False) -> TrimtabError:
    try:
        admission = admit(replay, key, request_hash=request_hash, needs_lease=needs_lease)
    except TrimtabError as error:
        return error
    assert isinstance(admission, Refused), admission
    return admission.error


def test_an_unknown_key_acts_and_a_known_one_is_answered(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    assert isinstance(admit(replay, key), Act)
    replay.answer(key, b"response").result()
    assert admit(replay, key) == Answered(b"response")
    assert admit(replay, replace(key, turn=key.turn + 1)) == Answered(b"response")


def test_directions_and_steps_are_keys_of_their_own(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    replay.answer(key, b"").result()
    admit(replay, key)
    replay.answer(key, b"done").result()
    assert isinstance(admit(replay, replace(key, direction=Direction.UNDO)), Act)
    assert isinstance(admit(replay, replace(key, step="other")), Act)


def test_answers_survive_a_restart_of_the_agent(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    admit(replay, key)
    replay.answer(key, b"response").result()
    again = bench.restart()
    assert again.incarnation == replay.incarnation
    assert admit(again, key) == Answered(b"response")


def test_a_command_that_was_cut_acts_again_after_a_restart(bench: Bench) -> None:
    key = command_key()
    admit(bench.open(), key)
    assert isinstance(admit(bench.restart(), key), Act)


def test_a_boot_makes_a_new_incarnation_in_which_answers_are_void_and_turns_are_not(bench: Bench) -> None:
    replay, key = bench.open(), command_key(turn=5, epoch=3)
    admit(replay, key)
    replay.answer(key, b"running").result()
    booted = bench.restart(boot_id="boot-2")
    assert booted.incarnation != replay.incarnation
    assert refusal(booted, replace(key, incarnation=replay.incarnation)).code == "other-incarnation"
    assert isinstance(admit(booted, replace(key, incarnation=booted.incarnation)), Act)
    assert refusal(booted, replace(key, turn=4)).code == "stale-turn"
    assert refusal(booted, replace(key, epoch=2)).code == "stale-epoch"


def test_two_files_are_two_incarnations(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "other.db")
    assert bench.open().incarnation != other.open().incarnation
    other.file.close()


def test_a_lower_turn_is_refused_even_for_an_answered_key(bench: Bench) -> None:
    replay, key = bench.open(), command_key(turn=5)
    admit(replay, key)
    replay.answer(key, b"response").result()
    admit(replay, command_key(turn=6))
    error = refusal(replay, key)
    assert (type(error), error.code, error.context["highest"]) == (Conflict, "stale-turn", "6")


def test_turns_are_of_one_subject(bench: Bench) -> None:
    replay = bench.open()
    admit(replay, command_key(turn=9))
    assert isinstance(admit(replay, command_key(subject_id="vm-2", turn=1)), Act)


def test_a_lower_epoch_is_refused_and_no_epoch_is_not(bench: Bench) -> None:
    replay = bench.open()
    admit(replay, command_key(epoch=4))
    assert refusal(replay, command_key(epoch=3)).code == "stale-epoch"
    admission = admit(replay, command_key(epoch=0))
    assert admission == Act(Stamp(epoch=4, turn=1))


def test_the_turn_of_a_refused_command_counts(bench: Bench) -> None:
    replay = bench.open()
    bench.lease = LeaseState(0, 0.0, is_live=False)
    assert refusal(replay, command_key(turn=8), needs_lease=True).code == "no-lease"
    assert refusal(replay, command_key(turn=7)).code == "stale-turn"


@pytest.mark.parametrize(
    "held", [LeaseState(0, 0.0, is_live=False), LeaseState(2, 1.0, is_live=False), LeaseState(3, 1e9, is_live=True)]
)
def test_a_command_that_needs_a_lease_needs_this_one(bench: Bench, held: LeaseState) -> None:
    replay = bench.open()
    bench.lease = held
    assert refusal(replay, command_key(lease_number=2), needs_lease=True).code == "no-lease"
    assert isinstance(admit(replay, command_key(lease_number=2)), Act)


def test_a_command_of_an_earlier_session_is_refused_though_it_needs_no_lease_and_its_turn_is_the_highest(bench: Bench) -> None:
    """So a controller on a copy of yesterday's database ends and deletes nothing before it has heard this host."""
    replay = bench.open()
    bench.given = 41
    assert refusal(replay, command_key(lease_number=37, turn=99)).code == "no-lease"
    with pytest.raises(Conflict, match="session of before"):
        replay.check(command_key(lease_number=37, turn=99)).result()
    assert replay.highest(command_key().subject_id).turn == 0, "its turn does not count"
    assert isinstance(admit(replay, command_key(lease_number=41)), Act)


def test_an_answer_is_given_without_a_lease(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    admit(replay, key, needs_lease=True)
    replay.answer(key, b"response").result()
    bench.lease = LeaseState(0, 0.0, is_live=False)
    assert admit(replay, key, needs_lease=True) == Answered(b"response")


def test_another_request_under_a_known_key_is_refused(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    admit(replay, key)
    assert refusal(replay, key, request_hash=b"x" * 32).code == "key-reused"
    replay.answer(key, b"response").result()
    assert refusal(replay, key, request_hash=b"x" * 32).code == "key-reused"


def test_a_final_error_binds_the_turn_it_was_given_to(bench: Bench) -> None:
    replay, key = bench.open(), command_key(turn=3)
    admit(replay, key)
    replay.fail(key, Conflict("image-locked", "in use", volume="vol-1")).result()
    error = refusal(replay, key)
    assert (type(error), error.code, error.message, error.context) == (Conflict, "image-locked", "in use", {"volume": "vol-1"})
    assert isinstance(admit(replay, replace(key, turn=4)), Act)


def test_a_retryable_error_is_not_an_answer(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    admit(replay, key)
    replay.fail(key, Unavailable("hypervisor-down", "no answer")).result()
    assert isinstance(admit(replay, key), Act)


def test_an_effect_after_its_own_undo_is_refused(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    admit(replay, replace(key, direction=Direction.UNDO))
    assert refusal(replay, key).code == "already-undone"
    assert isinstance(admit(replay, replace(key, operation_id="op-other")), Act)


def test_a_verb_that_is_acted_on_each_time_still_guards_its_key(bench: Bench) -> None:
    replay, key = bench.open(), command_key()
    for _repetition in range(2):
        assert isinstance(replay.admit(key, HASH, needs_lease=False, remembers=False).result(), Act)
    admission = replay.admit(key, b"x" * 32, needs_lease=False, remembers=False).result()
    assert isinstance(admission, Refused)
    assert admission.error.code == "key-reused"


def test_nothing_is_admitted_before_a_fresh_journal_was_rebuilt(bench: Bench) -> None:
    replay = bench.open(rebuilt=False)
    assert refusal(replay, command_key()).code == "journal-rebuilding"
    replay.rebuild([("vm-1", Stamp(epoch=4, turn=9))]).result()
    assert refusal(replay, command_key(turn=8, epoch=4)).code == "stale-turn"
    assert refusal(replay, command_key(turn=9, epoch=3)).code == "stale-epoch"
    assert isinstance(admit(replay, command_key(turn=9, epoch=4)), Act)


def test_a_rebuilt_journal_need_not_be_rebuilt_after_a_restart(bench: Bench) -> None:
    bench.open()
    assert bench.restart().is_rebuilt


def test_agents_that_share_a_file_do_not_see_each_other(bench: Bench) -> None:
    first, second, key = bench.open(), bench.open(agent_id="host-2"), command_key(turn=7)
    admit(first, key)
    first.answer(key, b"response").result()
    assert isinstance(admit(second, replace(key, turn=1)), Act)
    assert first.incarnation != second.incarnation


def test_answers_are_forgotten_after_a_week_and_turns_are_not(bench: Bench) -> None:
    replay, key = bench.open(), command_key(turn=5)
    admit(replay, key)
    replay.answer(key, b"response").result()
    bench.clock.advance(ANSWERS_KEPT_MS / 1000 - 1)
    assert replay.prune().result() == 0
    bench.clock.advance(2)
    assert replay.prune().result() == 1
    assert isinstance(admit(replay, key), Act)
    assert refusal(replay, command_key(turn=4)).code == "stale-turn"


@pytest.mark.parametrize(
    "wrong", [{"operation_id": ""}, {"step": ""}, {"subject_id": "x" * 201}, {"turn": 0}, {"epoch": -1}], ids=str
)
def test_a_key_that_identifies_nothing_is_refused(bench: Bench, wrong: dict[str, object]) -> None:
    assert isinstance(refusal(bench.open(), command_key(**wrong)), InvalidRequest)


def test_a_command_is_on_disk_before_it_may_act(bench: Bench) -> None:
    key = command_key()
    admit(bench.open(), key)
    rows = sqlite3.connect(bench.path).execute("SELECT operation_id, state FROM command").fetchall()
    assert rows == [(key.operation_id, "begun")]


def test_a_disk_that_cannot_be_written_refuses_commands_and_recovers(bench: Bench) -> None:
    replay = bench.open()
    blocked = sqlite3.connect(bench.path, timeout=0)
    bench.file.submit(lambda connection: connection.execute("PRAGMA busy_timeout = 1")).result()
    blocked.execute("BEGIN IMMEDIATE")
    error = refusal(replay, command_key())
    assert (type(error), error.code) == (Unavailable, "journal-not-writable")
    blocked.rollback()
    assert isinstance(admit(replay, command_key()), Act)


@pytest.mark.parametrize("damage", [b"nonsense" * 1000, b"SQLite format 3\0" + b"x" * 8000], ids=["text", "torn"])
def test_a_damaged_journal_is_put_aside_and_begun_anew(bench: Bench, damage: bytes) -> None:
    before = bench.open().incarnation
    bench.file.close()
    for path in bench.path.parent.glob("journal.db-*"):
        path.unlink()
    bench.path.write_bytes(damage)
    bench.file = open_or_replace(bench.path)
    replay = bench.open(rebuilt=False)
    assert (replay.incarnation != before, replay.is_rebuilt) == (True, False)
    (aside,) = bench.path.parent.glob("journal.db.damaged-*")
    assert aside.read_bytes() == damage


def test_a_closed_journal_answers_at_once(bench: Bench) -> None:
    replay = bench.open()
    bench.file.close()
    assert refusal(replay, command_key()).code == "journal-closed"


def test_an_error_of_one_command_does_not_undo_its_neighbours_in_the_batch(bench: Bench) -> None:
    replay = bench.open()
    keys = [command_key(subject_id=f"vm-{number}") for number in range(20)]
    futures = []
    for number, key in enumerate(keys):
        stale = replace(key, incarnation="inc-other") if number % 2 else key
        futures.append(replay.admit(stale, HASH, needs_lease=False))
    for number, future in enumerate(futures):
        assert (future.exception() is None) == (number % 2 == 0)
    (count,) = sqlite3.connect(bench.path).execute("SELECT count(*) FROM command").fetchone()
    assert count == 10
