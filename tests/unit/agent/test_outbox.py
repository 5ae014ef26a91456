"""The outbox keeps what was not acknowledged, in order, over restarts, and drops only old domain events."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trimtab_agent.journal import JournalFile
from trimtab_agent.outbox import ItemKind, Outbox

JOB, EVENT = ItemKind.JOB, ItemKind.DOMAIN_EVENT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def file(path: Path) -> Iterator[JournalFile]:
    file = JournalFile(path)
    yield file
    file.close()


def bodies(outbox: Outbox, *, after: int = 0, limit: int = 100) -> list[bytes]:
    return [item.body for item in outbox.read(after=after, limit=limit).result()]


def test_items_are_read_in_order_until_acknowledged(file: JournalFile) -> None:
    outbox = Outbox(file, "host-1")
    for body in (b"a", b"b", b"c"):
        outbox.add(EVENT, body).result()
    items = outbox.read(after=0, limit=2).result()
    assert [item.body for item in items] == [b"a", b"b"]
    assert bodies(outbox, after=items[-1].sequence) == [b"c"]
    outbox.acknowledge(items[-1].sequence).result()
    assert bodies(outbox) == [b"c"]
    assert outbox.stored == 1


def test_items_survive_a_restart_and_sequences_go_on_growing(path: Path) -> None:
    file = JournalFile(path)
    outbox = Outbox(file, "host-1")
    outbox.add(JOB, b"a").result()
    (first,) = outbox.read(after=0, limit=9).result()
    outbox.acknowledge(first.sequence).result()
    outbox.add(JOB, b"b").result()
    file.close()
    again = JournalFile(path)
    outbox = Outbox(again, "host-1")
    assert outbox.stored == 1
    outbox.add(JOB, b"c").result()
    items = outbox.read(after=0, limit=9).result()
    assert [item.body for item in items] == [b"b", b"c"]
    assert all(item.sequence > first.sequence for item in items)
    again.close()


def test_a_full_outbox_drops_the_oldest_events_and_never_a_job(file: JournalFile) -> None:
    outbox = Outbox(file, "host-1", capacity=3)
    for kind, body in ((JOB, b"j1"), (EVENT, b"e1"), (EVENT, b"e2"), (EVENT, b"e3"), (JOB, b"j2")):
        outbox.add(kind, body).result()
    assert bodies(outbox) == [b"j1", b"e3", b"j2"]
    for number in range(5):
        outbox.add(JOB, b"j%d" % number).result()
    assert len(bodies(outbox)) == 7
    assert all(body.startswith(b"j") for body in bodies(outbox))


def test_hosts_that_share_a_file_have_their_own_items(file: JournalFile) -> None:
    first, second = Outbox(file, "host-1"), Outbox(file, "host-2")
    first.add(EVENT, b"a").result()
    second.add(EVENT, b"b").result()
    (item,) = second.read(after=0, limit=9).result()
    second.acknowledge(item.sequence).result()
    assert bodies(first) == [b"a"]
    assert bodies(second) == []


def test_a_listener_hears_of_what_was_committed(file: JournalFile) -> None:
    outbox = Outbox(file, "host-1")
    heard: list[int] = []
    outbox.notify(lambda: heard.append(1))
    outbox.add(EVENT, b"a").result()
    file.submit(lambda _connection: None).result()
    assert heard == [1]
