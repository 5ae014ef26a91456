"""`--watch`: the list, then changes; over breaks of the stream without losing or repeating any."""

import json
import signal
import time

import pytest

from tests.unit.cli.conftest import Program, Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, host, operation, page, problem, vm
from trimtab_controller.cli.sse import ServerEvent, parse

VMS = "/v1/projects/default/vms"
EVENTS = "/v1/projects/default/events"
END = problem(403, "role-missing", "permission_denied", "your role was taken")


def message(kind: str, document: object, seq: int | None = None) -> bytes:
    head = "" if seq is None else f"id: {seq}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(document)}\n\n".encode()


def stream(*pieces: bytes) -> Answer:
    return Answer(pieces=pieces)


def event(seq: int, text: str = "vm web1 created") -> dict[str, object]:
    subject = {"id": "vm-web1", "name": "web1"}
    return {"seq": seq, "at": "2026-11-20T02:00:00Z", "kind": "vm.created", "subject": subject, "actor": "ann", "message": text}


def test_vms_are_listed_then_shown_as_they_change(trimtab: Trimtab, controller: FakeController) -> None:
    first = stream(
        message("vm", vm("web1")),
        message("vm", vm("web2")),
        message("bookmark", {}, 10),
        b": heartbeat\n\n",
        message("vm", vm("web1", age_s=9.0), 11),  # only older: nothing to tell
        message("vm", vm("web1", state="paused"), 12),
        b"id: 13\nevent: vm\ndata: {",
    )
    second = stream(message("deleted", vm("web2", deleted_at="2026-11-20T02:00:00Z"), 14))
    controller.on("GET", VMS, first, second, END)
    found = trimtab("vm", "list", "--watch")
    assert found.code == 9
    assert [line.split()[:2] for line in found.out.splitlines()] == [
        ["NAME", "STATE"],
        ["web1", "running"],
        ["web2", "running"],
        ["web1", "paused"],
        ["web2", "deleted"],
    ]
    assert [one.headers.get("last-event-id", "") for one in controller.seen] == ["", "12", "14"]
    assert all(one.query["watch"] == "true" for one in controller.seen)
    assert "resuming" in found.err


def test_a_watch_shows_only_what_was_asked_for_and_what_leaves_it(trimtab: Trimtab, controller: FakeController) -> None:
    answer = stream(
        message("vm", vm("web1")),
        message("bookmark", {}, 10),
        message("vm", vm("db1", labels={"tier": "db"}), 11),
        message("vm", vm("web2", state="stopped"), 12),
        message("vm", vm("web1", state="stopped"), 13),
    )
    controller.on("GET", VMS, answer, END)
    found = trimtab("vm", "list", "-w", "-l", "tier=web", "--filter", "state=running", "-o", "name")
    assert found.out.split() == ["web1", "web1"]
    assert controller.seen[0].query["selector"] == "tier=web"


def test_a_position_that_is_no_longer_kept_begins_anew(trimtab: Trimtab, controller: FakeController) -> None:
    expired = problem(410, "events-expired", "conflict", "events up to 90 are no longer kept")
    first = stream(message("vm", vm("web1")), message("bookmark", {}, 10))
    again = stream(message("vm", vm("web1")), message("vm", vm("web3")), message("bookmark", {}, 99))
    controller.on("GET", VMS, first, expired, again, END)
    found = trimtab("vm", "list", "-w", "-o", "json")
    assert [json.loads(line)["name"] for line in found.out.splitlines()] == ["web1", "web3"]
    assert [one.headers.get("last-event-id", "") for one in controller.seen] == ["", "10", "", "99"]
    assert "listing anew" in found.err


def test_events_resume_after_the_last_one_seen(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on(
        "GET",
        EVENTS,
        stream(message("vm.created", event(7), 7), message("error", {"code": "store-down", "kind": "unavailable"})),
        Answer(is_dropped=True),
        stream(message("gap", {}, 7), message("vm.created", event(7), 7), message("vm.created", event(8, "two\x1b[2J"), 8)),
        END,
    )
    found = trimtab("event", "list", "--watch", "--after", "6", "--kind", "vm.")
    rows = found.out.splitlines()
    assert [row.split()[0] for row in rows] == ["SEQ", "7", "8"]
    assert "\x1b" not in found.out
    assert controller.seen[0].query == {"after": "6", "kind": "vm."}
    assert [one.headers.get("last-event-id", "") for one in controller.seen] == ["", "7", "7", "8"]


def test_events_page_by_their_numbers(trimtab: Trimtab, controller: FakeController) -> None:
    pages = [
        Answer({"items": [event(1), event(2)], "next_page_token": "2", "last_seq": 2}),
        Answer({"items": [event(3)], "next_page_token": "", "last_seq": 3}),
    ]
    controller.on("GET", EVENTS, *pages)
    assert [one["seq"] for one in json.loads(trimtab("event", "list", "--after", "0", "-o", "json").out)] == [1, 2, 3]
    assert [one.query["after"] for one in controller.seen] == ["0", "2"]


def test_one_event_is_found_by_its_number(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", EVENTS, Answer({"items": [event(7)], "next_page_token": ""}))
    assert json.loads(trimtab("event", "get", "7", "-o", "json").out)["seq"] == 7
    assert controller.seen[0].query["after"] == "6"
    assert trimtab("event", "get", "6").code == 4


def test_what_has_no_stream_is_asked_for_again(program: Program, controller: FakeController) -> None:
    controller.on("GET", "/v1/hosts", page(host("node1"), host("node2")), page(host("node1", is_cordoned=True)), END)
    found = program("host", "list", "--watch")
    assert found.code == 9
    rows = [line.split()[:2] for line in found.out.splitlines()]
    assert rows == [["NAME", "STATE"], ["node1", "up"], ["node2", "up"], ["node1", "up,"]]
    assert "node2 is gone" in found.err


def test_an_interrupt_ends_a_watch_quietly(program: Program, controller: FakeController) -> None:
    controller.on("GET", "/v1/hosts", page(host("node1")))
    process = program.start("host", "list", "--watch", "-o", "name")
    assert process.stdout is not None
    assert process.stdout.readline() == "node1\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "")


def test_an_interrupt_of_a_wait_says_that_the_operation_goes_on(program: Program, controller: FakeController) -> None:
    path = f"{VMS}/web1:start"
    controller.on("POST", path, Answer({"operation": operation("running")}, status=202))
    controller.on("GET", "/v1/operations/op-01:wait", Answer(operation("running")))
    process = program.start("vm", "start", "web1")
    deadline = time.monotonic() + 20
    while not controller.asked("GET", "/v1/operations/op-01:wait") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "op-01 goes on; wait for it again with `trimtab op wait op-01`" in err


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        (b"data: 1\n\n", [ServerEvent("", "message", "1")]),
        (
            b"id: 4\nevent: a\ndata: 1\ndata: 2\n\ndata:3\r\n\r\n",
            [ServerEvent("4", "a", "1\n2"), ServerEvent("4", "message", "3")],
        ),
        (b": comment\n\nevent: a\n\nid: 9\nretry: 5\n\n", []),
        (b"data: unfinished\n", []),
    ],
)
def test_the_wire_format_is_read(wire: bytes, events: list[ServerEvent]) -> None:
    assert list(parse(wire.splitlines(keepends=True))) == events
