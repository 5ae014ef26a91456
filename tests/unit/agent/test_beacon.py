"""The second channel: a slot on shared storage that renews a lease until an intent forbids it."""

from pathlib import Path

import pytest

from trimtab_agent import beacon, beacon_slots
from trimtab_agent.beacon import Beacon, Task
from trimtab_agent.warden_guests import boottime_s

HOST = "host-a"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(host_id=HOST, boot_id="b", pool_path=str(tmp_path), ttl_s=15.0, every_s=3.0)


def write_intent(task: Task, said: dict[str, int] | None) -> None:
    with beacon_slots.opened(beacon_slots.path_of(Path(task.pool_path), HOST)) as slot:
        beacon_slots.write_block(slot, 1, said)


def test_a_round_renews_from_before_the_slot_was_written_and_counts_in_it(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    before_s = boottime_s()
    deadline_s = rounds.round(task)
    assert deadline_s is not None
    assert before_s + 15.0 <= deadline_s <= boottime_s() + 15.0
    rounds.round(task)
    with beacon_slots.opened(beacon_slots.path_of(tmp_path, HOST)) as slot:
        said = beacon_slots.read_block(slot, 0)
    assert said is not None
    assert (said["host"], said["counter"], said["ttl_ms"]) == (HOST, 2, 15000)


def test_an_intent_ends_renewing_until_it_is_cleared(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    assert rounds.round(task) is not None
    write_intent(task, {"intent": 1, "term": 4})
    assert rounds.round(task) is None
    write_intent(task, None)
    assert rounds.round(task) is not None


def test_an_intent_written_before_the_host_ever_showed_itself_counts(task: Task, tmp_path: Path) -> None:
    write_intent(task, {"intent": 1, "term": 4})
    assert Beacon(tmp_path).round(task) is None


def test_a_torn_intent_is_an_intent(task: Task, tmp_path: Path) -> None:
    rounds = Beacon(tmp_path)
    rounds.round(task)
    path = beacon_slots.path_of(tmp_path, HOST)
    content = bytearray(path.read_bytes())
    content[4096:4104] = b"deadbeef"
    path.write_bytes(content)
    assert rounds.round(task) is None


def test_storage_that_fails_renews_nothing(task: Task, tmp_path: Path) -> None:
    (tmp_path / beacon_slots.DIRECTORY).write_text("in the way")
    with pytest.raises(OSError, match=r"."):
        Beacon(tmp_path).round(task)


def test_the_task_is_what_the_agent_left_and_nothing_without_it(task: Task, tmp_path: Path) -> None:
    assert beacon.read_task(tmp_path) is None
    beacon.write_task(tmp_path, task)
    assert beacon.read_task(tmp_path) == task
    beacon.write_task(tmp_path, None)
    assert beacon.read_task(tmp_path) is None
