"""The second channel: a slot on shared storage that renews a lease until an intent forbids it."""

import json
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.agent.waiting import until_now
from trimtab_agent import beacon_state
from trimtab_agent.beacon import Beacon
from trimtab_agent.beacon_state import Task
from trimtab_agent.warden_guests import boottime_s
from trimtab_protos import beacon_slots
from trimtab_protos.beacon_slots import BEAT, Beat, Intent

HOST = "host-a"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    pool = tmp_path / "pool"
    pool.mkdir()
    return Task(host_id=HOST, boot_id="b", lease_number=7, pool_id="pool-a", pool_path=str(pool), ttl_s=15.0, every_s=0.01)


def slot_of(task: Task) -> Path:
    return beacon_slots.path_of(Path(task.pool_path), task.host_id)


def beat(task: Task) -> Beat:
    with beacon_slots.opened(slot_of(task)) as slot:
        found = beacon_slots.beat_of(beacon_slots.read_block(slot, BEAT))
    assert found is not None
    return found


def forbid(task: Task, *, lease_number: int, term: int = 4) -> None:
    intent = Intent(term=term, number=1, lease_number=lease_number)
    assert beacon_slots.intent_of(beacon_slots.place_intent(slot_of(task), intent)) == intent


def test_a_round_renews_from_before_the_slot_was_written_and_counts_in_it(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    before_s = boottime_s()
    deadline_s = rounds.round(task)
    assert deadline_s is not None
    assert before_s + 15.0 <= deadline_s <= boottime_s() + 15.0
    rounds.round(task)
    assert beat(task) == Beat(host_id=HOST, boot_id="b", lease_number=7, counter=2, ttl_ms=15000)


def test_an_intent_ends_renewing_until_the_host_has_a_newer_lease(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    assert rounds.round(task) is not None
    forbid(task, lease_number=7)
    assert rounds.round(task) is None
    assert rounds.round(replace(task, lease_number=8)) is not None, "its session after the return: nobody has to clear anything"


def test_an_intent_written_before_the_host_ever_showed_itself_counts(task: Task, tmp_path: Path) -> None:
    forbid(task, lease_number=9)
    assert Beacon(tmp_path).round(task) is None


def test_a_torn_intent_is_an_intent(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    rounds.round(task)
    content = bytearray(slot_of(task).read_bytes())
    content[4096:4104] = b"deadbeef"
    slot_of(task).write_bytes(content)
    assert rounds.round(task) is None


def test_storage_that_fails_renews_nothing(task: Task, tmp_path: Path) -> None:
    (Path(task.pool_path) / beacon_slots.DIRECTORY).write_text("in the way")
    with pytest.raises(OSError, match=r"."):
        Beacon(tmp_path).round(task)


def test_a_pool_that_is_not_mounted_any_more_renews_nothing_until_it_is_again(task: Task, tmp_path: Path) -> None:
    """The directory under the mount takes every beat and never shows an intent."""
    rounds, pool, away = Beacon(tmp_path), Path(task.pool_path), tmp_path / "away"
    assert rounds.round(task) is not None
    pool.rename(away)
    pool.mkdir()
    for anew in (rounds, rounds):
        with pytest.raises(OSError, match="mounted"):
            anew.round(task)
    (pool / beacon_slots.DIRECTORY / HOST).unlink()
    (pool / beacon_slots.DIRECTORY).rmdir()
    pool.rmdir()
    away.rename(pool)
    assert rounds.round(task) is not None


def run_until(directory: Path, condition: object) -> None:
    """Let a beacon run until the condition holds."""
    stopping = threading.Event()
    thread = threading.Thread(target=Beacon(directory).run, args=(stopping,))
    thread.start()
    try:
        until_now(condition)  # type: ignore[arg-type]
    finally:
        stopping.set()
        thread.join()


def test_what_it_renewed_is_left_for_a_warden_that_starts_anew_and_goes_on_after_its_own_restart(
    task: Task, tmp_path: Path
) -> None:
    beacon_state.write_task(tmp_path, task)
    run_until(tmp_path, lambda: beacon_state.read_state(tmp_path).deadline_s > boottime_s())
    was = beacon_state.read_state(tmp_path)
    run_until(tmp_path, lambda: beacon_state.read_state(tmp_path).counter > was.counter)
    assert beacon_state.read_state(tmp_path).problem == ""


def test_a_slot_is_tried_before_any_lease_depends_on_it(task: Task, tmp_path: Path) -> None:
    beacon_state.write_task(tmp_path, replace(task, lease_number=0))
    run_until(tmp_path, lambda: beacon_state.read_state(tmp_path).counter > 0)
    assert beacon_state.read_state(tmp_path).deadline_s == 0.0


def test_a_forbidden_lease_is_told(task: Task, tmp_path: Path) -> None:
    forbid(task, lease_number=7)
    beacon_state.write_task(tmp_path, task)
    run_until(tmp_path, lambda: beacon_state.read_state(tmp_path).forbidden_lease == 7)
    assert beacon_state.read_state(tmp_path).deadline_s == 0.0


def test_the_task_is_what_the_agent_left_and_nothing_without_it(task: Task, tmp_path: Path) -> None:
    assert beacon_state.read_task(tmp_path) is None
    beacon_state.write_task(tmp_path, task)
    assert beacon_state.read_task(tmp_path) == task
    beacon_state.write_task(tmp_path, None)
    assert beacon_state.read_task(tmp_path) is None


# --- the format ----------------------------------------------------------------------------------------------------------------


def test_the_format_is_two_pages_of_a_checksum_and_a_line_that_any_reader_can_parse(task: Task) -> None:
    """Read by hand: a controller and agents of other releases, and whoever looks with `head -c 4096`, see the same."""
    forbid(task, lease_number=7)
    content = slot_of(task).read_bytes()
    assert len(content) == 8192
    assert content[:4096] == bytes(4096)
    text = content[4096:].rstrip(b"\0")
    assert int(text[:8], 16) == zlib.crc32(text[9:])
    assert json.loads(text[9:]) == {"term": 4, "number": 1, "lease_number": 7}


@pytest.mark.parametrize("block", [b"deadbeef {}", b"no", b"a3830348 []"], ids=["checksum", "short", "not-an-object"])
def test_what_cannot_be_read_as_a_block_is_never_taken_for_an_empty_one(block: bytes) -> None:
    with pytest.raises(ValueError, match="block"):
        beacon_slots.intent_of(block)


def test_a_block_that_lacks_a_field_is_refused_and_one_with_more_is_read(tmp_path: Path) -> None:
    def block(said: dict[str, object]) -> bytes:
        line = json.dumps(said).encode()
        return b"%08x " % zlib.crc32(line) + line + bytes(10)

    whole: dict[str, object] = {"term": 1, "number": 2, "lease_number": 3}
    assert beacon_slots.intent_of(block({**whole, "later": "release"})) == Intent(term=1, number=2, lease_number=3)
    for broken in ({"term": 1, "number": 2}, {**whole, "term": "1"}, {**whole, "number": None}):
        with pytest.raises(ValueError, match="block"):
            beacon_slots.intent_of(block(broken))


@pytest.mark.parametrize(("term", "number"), [(3, 9), (4, 0)])
def test_an_intent_of_an_older_leader_or_attempt_does_not_replace_a_newer_one(task: Task, term: int, number: int) -> None:
    forbid(task, lease_number=7)
    late = Intent(term=term, number=number, lease_number=5)
    standing = beacon_slots.intent_of(beacon_slots.place_intent(slot_of(task), late))
    assert standing == Intent(term=4, number=1, lease_number=7)
