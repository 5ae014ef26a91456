"""`trimtab host check` and `trimtab secgroup`: what is said, and with which exit code."""

import json

import pytest

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, operation

WAIT = "/v1/operations/op-01:wait"
PAIR = {"seen_by": "node1", "peer": "node2", "is_fine": True, "mtu": 9000, "rate_bytes_s": 200 << 20, "clock_ahead_ms": 3}
PROBLEM = {
    "seen_by": "node2", "peer": "node1", "kind": "mtu", "message": "packets of 9000 bytes do not pass", "cure": "ip route get x",
}  # fmt: skip


def checked(controller: FakeController, *problems: object) -> None:
    result = {"problems": list(problems), "pairs": [PAIR], "hosts": 2}
    controller.on("POST", "/v1/hosts:check", Answer({"operation": operation("queued", kind="host.check")}, status=202))
    controller.on("GET", WAIT, Answer(operation("done", kind="host.check", result=result)))


def test_hosts_that_reach_each_other_end_with_0(trimtab: Trimtab, controller: FakeController) -> None:
    checked(controller)
    found = trimtab("host", "check", "--all")
    assert (found.code, found.out) == (0, "1 of 1 ways between 2 hosts are fine\nthe slowest of them carries 200 MiB/s\n")
    assert controller.asked("POST", "/v1/hosts:check")[0].document == {}


@pytest.mark.parametrize("output", ["table", "json"])
def test_what_is_wrong_is_named_with_its_cure_and_ends_with_3(trimtab: Trimtab, controller: FakeController, output: str) -> None:
    checked(controller, PROBLEM)
    found = trimtab("host", "check", "node1", "-o", output)
    assert found.code == 3
    assert controller.asked("POST", "/v1/hosts:check")[0].document == {"host": "node1"}
    if output == "json":
        assert json.loads(found.out)["problems"] == [PROBLEM]
    else:
        assert "node2 → node1: packets of 9000 bytes do not pass\n    cure: ip route get x\n" in found.out


def test_it_is_one_host_or_all(trimtab: Trimtab) -> None:
    assert trimtab("host", "check").code == 2
    assert trimtab("host", "check", "node1", "--all").code == 2


def test_a_group_says_what_may_enter_or_that_nothing_may(trimtab: Trimtab, controller: FakeController) -> None:
    assert trimtab("secgroup", "create", "web").code == 2
    assert trimtab("secgroup", "create", "web", "--allow", "tcp/443", "--closed").code == 2
    path = "/v1/projects/default/secgroups"
    controller.on("POST", path, Answer({"name": "web", "rules": []}, status=201))
    assert trimtab("secgroup", "create", "web", "--closed").code == 0
    assert controller.asked("POST", path)[0].document == {"name": "web", "rules": []}


def test_security_groups_change_by_themselves(trimtab: Trimtab) -> None:
    found = trimtab("vm", "update", "web1", "--secgroup", "web", "--label", "tier=db")
    assert found.code == 2
    assert "--secgroup" in found.err
