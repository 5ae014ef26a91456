"""`failover`, `fence`, `host confirm-off`: what is sent, what is shown, and how they end."""

from pathlib import Path
from typing import Any

from tests.unit.cli.conftest import Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, host, page

PATHS = "/v1/hosts/node2/fence-paths"
PATH: dict[str, Any] = {
    "host": "node2", "name": "redfish", "order": 1, "agent": "fence_redfish", "options": {"ip": "192.0.2.31"}, "has_secret": True,
    "power": "on", "is_ready": True, "message": "", "tested_at": "2026-01-01T00:00:00+00:00", "is_test_due": False,
}  # fmt: skip
LOSS: dict[str, Any] = {
    "id": "fo-01", "host": "node2", "host_id": "host-2", "state": "fenced", "proof": "power_off",
    "created_at": "2026-01-01T00:00:04+00:00", "fenced_at": "2026-01-01T00:00:06+00:00", "returned_at": None, "vms": {"running": 1},
    "timeline": [
        {"at": "2026-01-01T00:00:00+00:00", "what": "no renewal for 6.1 s", "proof": "", "vm": ""},
        {"at": "2026-01-01T00:00:06+00:00", "what": "switched off by bmc", "proof": "power_off", "vm": ""},
        {"at": "2026-01-01T00:00:11.500+00:00", "what": "db: runs on node3, 5.0 s later", "proof": "", "vm": "db"},
    ],
    "outcomes": [
        {"vm": "db", "vm_id": "vm-1", "state": "running", "why": "", "host": "node3", "operation": "op-1",
         "started_at": "2026-01-01T00:00:06+00:00", "ended_at": "2026-01-01T00:00:11+00:00", "seconds": 5.0},
    ],
}  # fmt: skip


def test_a_secret_goes_from_its_file_into_the_body_and_nowhere_else(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path
) -> None:
    controller.on("GET", PATHS, Answer({"items": [PATH]}))
    controller.on("PUT", PATHS, Answer({"items": [PATH]}))
    secret = tmp_path / "bmc.pass"
    secret.write_text("hunter2\n")
    line = "fence config node2 --agent fence_ipmilan --address 192.0.2.32 --user root --order 1 --secret-file"
    found = trimtab(*line.split(), str(secret))
    assert found.code == 0, found.err
    assert "hunter2" not in found.out + found.err
    sent = controller.asked("PUT", PATHS)[0]
    assert sent.document == {
        "paths": [
            {
                "name": "ipmilan",
                "agent": "fence_ipmilan",
                "options": {"ip": "192.0.2.32", "username": "root"},
                "secret": "hunter2",
            },
            {"name": "redfish", "agent": "fence_redfish", "options": {"ip": "192.0.2.31"}},
        ]
    }
    assert "hunter2" not in sent.path


def test_a_test_waits_for_the_leader_and_ends_with_3_where_a_device_cannot_be_relied_on(
    trimtab: Trimtab, controller: FakeController
) -> None:
    due = PATH | {"is_test_due": True, "is_ready": False, "tested_at": None, "power": ""}
    controller.on("POST", "/v1/hosts/node2:test-fence", Answer({"items": [due]}, status=202))
    controller.on("GET", PATHS, Answer({"items": [due]}), Answer({"items": [PATH]}))
    good = trimtab("fence", "test", "node2")
    assert (good.code, good.err) == (0, "")
    assert "ready" in good.out
    bad = PATH | {"is_ready": False, "power": "unknown", "message": "it did not answer within 30 s"}
    controller.on("POST", "/v1/fence-paths:test", Answer({"items": [bad]}, status=202))
    found = trimtab("fence", "test", "--all")
    assert found.code == 3
    assert "node2 redfish: it did not answer within 30 s" in found.err


def test_a_loss_is_shown_as_a_timeline_and_found_by_its_hosts_name(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/failovers", page(LOSS))
    controller.on("GET", "/v1/failovers/fo-01", Answer(LOSS))
    found = trimtab("failover", "get", "node2")
    assert found.code == 0, found.err
    assert controller.asked("GET", "/v1/failovers")[0].query["filter"] == "host=node2"
    assert "+6.0" in found.out
    assert "+11.5" in found.out
    assert "db: runs on node3, 5.0 s later" in found.out


PROTECTED: dict[str, Any] = {
    "lease_number": 7, "lease_age_s": 1.4, "is_warden_armed": True, "kill_s": 4.0, "clock_rate_ppm": 112,
    "would_kill": ["db", "mail"], "warden_missing": [],
    "beacon_pool": "shared", "beacon_age_s": 2.0, "beacon_problem": "", "fence_intent": None, "best_proof": "power",
    "fence_paths": [PATH, PATH | {"name": "pdu", "order": 2, "agent": "fence_apc", "power": "unknown", "is_ready": False,
                                  "tested_at": None, "message": "it did not answer"}],
}  # fmt: skip


def host_shown(trimtab: Trimtab, controller: FakeController, **protection: Any) -> list[str]:
    """The lines of `host get`, blanks folded."""
    controller.on("GET", "/v1/hosts/node1", Answer(host(boot_id="boot-7", protection=PROTECTED | protection)))
    found = trimtab("host", "get", "node1")
    assert found.code == 0, found.err
    return [" ".join(line.split()) for line in found.out.splitlines()]


def test_a_host_shows_each_line_of_its_protection_and_its_boot(trimtab: Trimtab, controller: FakeController) -> None:
    lines = host_shown(trimtab, controller)
    for expected in (
        "boot id boot-7",
        "lease number 7, renewed 1s ago",
        "warden armed, kills within 4 s, its clock is +112 ppm off",
        "would kill db, mail",
        "beacon in pool shared, renewed 2s ago",
    ):
        assert expected in lines, lines
    devices = [line for line in lines if "fence_" in line]
    assert devices[0].startswith("1 redfish fence_redfish on ready ")
    assert devices[0].split()[-1] != "never", "when it was tested last"
    assert devices[1] == "2 pdu fence_apc unknown NOT READY never it did not answer"


def test_a_host_says_what_of_its_protection_is_not_there(trimtab: Trimtab, controller: FakeController) -> None:
    nothing = {"is_warden_armed": False, "warden_missing": ["its beacon does not renew"], "kill_s": 0, "would_kill": []}
    lines = host_shown(trimtab, controller, **nothing, beacon_pool="", lease_age_s=None, fence_paths=[])
    assert "warden NOT ARMED: only power off or an operator proves this host off (its beacon does not renew)" in lines
    assert "would kill no vm" in lines
    assert "beacon none: away for longer than a lease, the controllers end what the warden would kill" in lines
    forbidden = {"lease_number": 7, "written_at": None, "term": 3, "via_host": "host-2"}
    lines = host_shown(trimtab, controller, beacon_age_s=None, beacon_problem="Input/output error", fence_intent=forbidden)
    told = "beacon in pool shared, not renewed yet; leases up to 7 are forbidden, not durably yet (Input/output error)"
    assert told in lines, lines


def test_status_says_why_failover_stands_still(trimtab: Trimtab, controller: FakeController) -> None:
    status = {
        "is_active": False, "is_paused": False, "frozen": "2 of 5 hosts are lost at once", "silent": [], "released": [],
        "confirmed_off": [{"host": "node2", "by": "ann", "reason": "pulled the plug"}],
        "waiting": [{"vm": "db", "why": "no host can take it"}], "failovers": [LOSS],
    }  # fmt: skip
    controller.on("GET", "/v1/failover", Answer(status))
    found = trimtab("failover", "status")
    assert "FROZEN: 2 of 5 hosts are lost at once" in found.out
    assert "host node2 is confirmed off by ann: pulled the plug" in found.out
    assert "vm db waits: no host can take it" in found.out


def test_status_says_first_that_the_database_is_behind_and_what_ends_that(trimtab: Trimtab, controller: FakeController) -> None:
    words = (
        "this controller's database is older than the fleet (host node2 has session 41, the database 37): stop every controller"
    )
    status = {"is_active": False, "is_paused": True, "database_behind": words, "database_behind_since": "2026-01-01T00:00:00Z"}
    controller.on("GET", "/v1/failover", Answer(status))
    found = trimtab("failover", "status")
    assert found.out.startswith("READ-ONLY (")
    assert words in found.out
    assert "failover is active" not in found.out


def test_to_trust_the_database_is_asked_for_twice(trimtab: Trimtab, controller: FakeController) -> None:
    path = "/v1/failover:trust-database"
    controller.on("POST", path, Answer(None, status=204))
    refused = trimtab("failover", "trust-database", "--reason", "looked at")
    assert (refused.code, "add --yes" in refused.err) == (2, True), refused
    assert controller.asked("POST", path) == []
    said = trimtab("failover", "trust-database", "--reason", "looked at", "--yes")
    assert said.code == 0, said.err
    assert controller.asked("POST", path)[0].document == {"reason": "looked at"}


def test_confirm_off_and_release_ask_and_send_their_reason(trimtab: Trimtab, controller: FakeController) -> None:
    for verb, arguments in (("confirm-off", ("host", "confirm-off")), ("release", ("failover", "release"))):
        path = f"/v1/hosts/node2:{verb}"
        controller.on("POST", path, Answer(None, status=204))
        refused = trimtab(*arguments, "node2", "--reason", "pulled the plug")
        assert refused.code == 2
        assert "add --yes" in refused.err
        assert controller.asked("POST", path) == []
        said = trimtab(*arguments, "node2", "--reason", "pulled the plug", "--yes")
        assert said.code == 0, said.err
        assert controller.asked("POST", path)[0].document == {"reason": "pulled the plug"}


def test_a_real_drill_wants_the_hosts_name_typed_and_shows_what_was_foreseen_beside_what_was_measured(
    trimtab: Trimtab, controller: FakeController
) -> None:
    foreseen = {
        "host": "node2", "fenced_s": 12.0, "proof": "power_off", "score": 100.0, "frozen": "",
        "outcomes": [{"vm": "db", "seconds": 17.0, "why": ""}],
    }  # fmt: skip
    cut = {"at": "2026-01-01T00:00:00Z", "kind": "drill.power_cut"}
    ran = {"vm": "db", "vm_id": "vm-1", "state": "running", "why": "", "host": "node3", "ended_at": "2026-01-01T00:00:14.500Z"}
    loss = LOSS | {"id": "fo-02", "host": "node2", "state": "fenced", "outcomes": [ran]}
    controller.on("GET", "/v1/hosts/node2/loss-drill", Answer(foreseen))
    controller.on("POST", "/v1/hosts/node2:cut-power", Answer(None, status=204))
    controller.on("GET", "/v1/events", Answer({"items": [cut]}))
    controller.on("GET", "/v1/failovers", page(), page(loss))
    controller.on("GET", "/v1/failovers/fo-02", Answer(loss))
    for given in ((), ("--confirm-host", "node3"), ("--yes",)):
        refused = trimtab("drill", "host-loss", "node2", "--mode", "real", *given)
        assert refused.code == 2, refused.err
    assert controller.asked("POST", "/v1/hosts/node2:cut-power") == []
    done = trimtab("drill", "host-loss", "node2", "--mode", "real", "--confirm-host", "node2")
    assert done.code == 0, done.err
    assert controller.asked("POST", "/v1/hosts/node2:cut-power")[0].document == {"confirm": "node2", "force": False}
    assert "17.0s" in done.out
    assert "14.5s" in done.out


def test_a_check_tells_what_vms_on_local_disks_would_lose(trimtab: Trimtab, controller: FakeController) -> None:
    one = {"vm_id": "vm-1", "host": "node1", "backup_at": "2026-01-01T00:00:00+00:00", "loss_window_s": 7500.0}
    local = [
        one | {"vm": "db", "comes_back": True, "why": "its disks come back from backup bk-1, which loses 2 h 5 min of it", "backup": "bk-1"},
        one | {"vm": "cache", "comes_back": False, "why": "its policy does not", "backup": None, "backup_at": None, "loss_window_s": None},
        one | {"vm": "log", "comes_back": False, "why": "it is not kept", "backup": "bk-2"},
    ]  # fmt: skip
    controller.on("GET", "/v1/failover-coverage", Answer({"is_covered": True, "domains": [], "local_vms": local, "at": ""}))
    found = trimtab("failover", "check")
    assert found.code == 0, found.err
    assert "host node1: db has disks on it alone: its disks come back from backup bk-1, which loses 2 h 5 min" in found.out
    assert "cache has disks on it alone: all of it would be lost, there is no whole backup of it" in found.out
    assert (
        "log has disks on it alone: it would not come back by itself: it is not kept; its last whole backup is bk-2" in found.out
    )


def test_a_check_tells_of_every_vm_where_that_is_asked(trimtab: Trimtab, controller: FakeController) -> None:
    vms = [
        {"vm": "db", "coverage": "covered", "reason": "there is room"},
        {"vm": "web", "coverage": "uncovered", "reason": "no host has 64 GiB left"},
        {"vm": "toy", "coverage": "unprotected", "reason": "its ha is none"},
    ]
    lost = {"vm": "web", "reason": "no host has 64 GiB left"}
    host = {"kind": "host", "name": "node1", "is_covered": False, "uncovered": [lost], "unprotected_count": 1}
    answer = {"is_covered": False, "domains": [host], "vms": vms, "local_vms": [], "at": ""}
    controller.on("GET", "/v1/failover-coverage", Answer(answer))
    found = trimtab("failover", "check", "--vms")
    assert controller.seen[0].query == {"vms": "true"}
    assert found.code == 3
    assert found.out.splitlines()[:3] == [
        "db: covered: there is room", "web: not covered: no host has 64 GiB left", "toy: unprotected: its ha is none",
    ]  # fmt: skip


def test_a_rack_that_the_rest_could_not_restart_is_named_with_its_vms_and_ends_with_three(
    trimtab: Trimtab, controller: FakeController
) -> None:
    lost = {"vm": "db", "reason": "no host has 64 GiB left"}
    rack = {"kind": "rack", "name": "r2", "is_covered": False, "uncovered": [lost], "unprotected_count": 0}
    controller.on("GET", "/v1/failover-coverage", Answer({"is_covered": False, "domains": [rack], "local_vms": [], "at": ""}))
    found = trimtab("failover", "check", "-l", "rack=r2")
    assert controller.seen[0].query == {"selector": "rack=r2"}
    assert found.code == 3
    assert "rack r2: db: no host has 64 GiB left" in found.out
    assert "1 vms would not come back: db" in found.err
