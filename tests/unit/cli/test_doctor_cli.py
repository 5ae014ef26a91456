"""`trimtab doctor`: one screen, and an exit code that scripts rely on."""

import json
from typing import Any

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController

SEVERE: dict[str, Any] = {
    "severity": "severe", "kind": "host-lost", "subject": "host node2", "what": "it is lost: not heard from, and not proven off",
    "since": "2026-01-01T00:00:00+00:00", "cure": "trimtab failover get node2",
}  # fmt: skip
NOTICE: dict[str, Any] = {
    "severity": "notice", "kind": "host-cordoned", "subject": "host node3", "what": "it is cordoned and takes no vms",
    "since": None, "cure": "trimtab host uncordon node3",
}  # fmt: skip


def answer(*items: dict[str, Any], total: int | None = None) -> Answer:
    counts = [{"severity": one["severity"], "kind": one["kind"], "count": 1} for one in items]
    is_well = not any(one["severity"] == "severe" for one in items)
    body = {"is_well": is_well, "items": list(items), "counts": counts, "total": len(items) if total is None else total}
    return Answer(body | {"at": "2026-01-01T01:00:00+00:00"})


def test_something_severe_ends_with_3_and_names_the_first_cure(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/doctor", answer(SEVERE, NOTICE))
    found = trimtab("doctor")
    assert found.code == 3
    lines = found.out.splitlines()
    assert lines[0].startswith("SEVERE   host node2: it is lost")
    assert lines[1].strip() == "trimtab failover get node2"
    assert lines[2].startswith("NOTICE   host node3")
    assert lines[-1] == "1 severe, 1 notice"
    assert "next: trimtab failover get node2" in found.err


def test_nothing_severe_ends_with_0(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/doctor", answer(NOTICE))
    found = trimtab("doctor")
    assert (found.code, found.err) == (0, "")
    controller.on("GET", "/v1/doctor", answer())
    assert trimtab("doctor").out == "nothing found: the fleet is well\n"


def test_json_is_the_whole_answer_and_the_code_is_the_same(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/doctor", answer(SEVERE, NOTICE))
    found = trimtab("doctor", "-o", "json")
    assert found.code == 3
    assert [one["kind"] for one in json.loads(found.out)["items"]] == ["host-lost", "host-cordoned"]


def test_it_is_one_screen_unless_more_is_asked_for(trimtab: Trimtab, controller: FakeController) -> None:
    many = [NOTICE | {"subject": f"host node{i}"} for i in range(30)]
    controller.on("GET", "/v1/doctor", answer(*many, total=1200))
    short = trimtab("doctor").out
    assert short.count("NOTICE") == 20
    assert "and 1180 more: `trimtab doctor -o wide`" in short
    wide = trimtab("doctor", "-o", "wide").out
    assert wide.count("NOTICE") == 30
    assert "and 1170 more: `trimtab doctor -o json`" in wide
