"""A real fleet, end to end: three libvirt hosts, the control plane in its embedded default, guests that count.

One lab for the whole file. Tests make vms of their own and say with their names what is promised.
"""

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, answers_ping, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shared_vm(fleet: Fleet) -> str:
    fleet.create("shared1", pool="shared", index=11, to="node1")
    return "shared1"


@pytest.fixture(scope="module")
def local_vm(fleet: Fleet) -> str:
    fleet.create("local1", pool="local", index=12, to="node1")
    return "local1"


def test_every_host_says_what_it_is(fleet: Fleet) -> None:
    host = fleet.ok("host", "get", "node1", "-o", "json").json()
    assert host["inventory"]["accelerator"] in {"tcg", "kvm"}
    assert {one["purpose"] for one in host["certificates"]} == {"agent", "libvirt"}


def test_a_guest_runs_where_the_decision_says_and_the_reason_names_every_host(fleet: Fleet, shared_vm: str) -> None:
    decision = fleet.ok("vm", "explain", shared_vm, "-o", "json").json()
    assert decision["host"] == fleet.vm(shared_vm)["host"] == "node1"
    assert {verdict["host"] for verdict in decision["verdicts"]} == {"node1", "node2", "node3"}
    assert "node3" in fleet.ok("vm", "explain", shared_vm, "--why-not", "node3").out
    fleet.wait_for_ticks(shared_vm, 1)


@pytest.mark.parametrize("pool", ["shared", "local"])
def test_a_live_migration_never_restarts_the_guest(fleet: Fleet, shared_vm: str, local_vm: str, pool: str) -> None:
    name = {"shared": shared_vm, "local": local_vm}[pool]
    counted, uptime = fleet.wait_for_ticks(name, 2)
    before = fleet.vm(name)
    fleet.ok("vm", "migrate", name, "--wait")
    after = fleet.vm(name)
    assert after["host"] != before["host"]
    assert after["epoch"] == before["epoch"] + 1
    assert fleet.hosts_that_define(after["id"]) == [after["host"]]
    later_count, later_uptime = fleet.wait_for_ticks(name, counted + 3)
    assert later_uptime > uptime, "a restarted guest would count its uptime from zero"
    assert later_count > counted


def test_guests_on_one_network_reach_each_other_across_hosts(fleet: Fleet, shared_vm: str, local_vm: str) -> None:
    fleet.wait_for_ticks(shared_vm, 1)
    fleet.wait_for_ticks(local_vm, 1)
    for index in (11, 12):
        address = f"{fleet.lab.spec.guest_prefix}.{index}"
        wait_until(partial(answers_ping, fleet, address), f"{address} to answer from the guests' network")


def test_a_stopped_guest_goes_on_counting_from_its_disk(fleet: Fleet, shared_vm: str) -> None:
    counted, _uptime = fleet.wait_for_ticks(shared_vm, 3)
    fleet.ok("vm", "stop", shared_vm, "--wait")
    assert fleet.vm(shared_vm)["observed"]["state"] == "stopped"
    fleet.ok("vm", "start", shared_vm, "--wait")
    fleet.wait_for_ticks(shared_vm, counted + 1)


def test_pause_and_resume_are_seen(fleet: Fleet, local_vm: str) -> None:
    fleet.ok("vm", "pause", local_vm, "--wait")
    assert fleet.vm(local_vm)["observed"]["state"] == "paused"
    fleet.ok("vm", "resume", local_vm, "--wait")
    assert fleet.vm(local_vm)["observed"]["state"] == "running"


def test_a_deleted_vm_comes_back_with_its_disk(fleet: Fleet) -> None:
    vm = fleet.create("gone1", pool="shared", index=21)
    fleet.wait_for_ticks("gone1", 2)
    fleet.ok("vm", "delete", "gone1", "--yes", "--wait")
    assert fleet.trimtab("vm", "get", "gone1").code == 4
    assert fleet.hosts_that_define(vm["id"]) == []
    fleet.ok("vm", "undelete", "gone1", "--wait")
    fleet.ok("vm", "start", "gone1", "--wait")
    fleet.wait_for_ticks("gone1", 3)
    fleet.ok("vm", "delete", "gone1", "--yes", "--wait")


def test_no_host_with_room_is_its_own_error_and_leaves_nothing_behind(fleet: Fleet) -> None:
    refused = fleet.trimtab("vm", "create", "huge", "--image", "micro", "--memory", "900GiB", "--pool", "shared", "--wait")
    assert refused.code == 7
    assert "node1" in refused.err or "memory" in refused.err
    assert fleet.trimtab("vm", "get", "huge").code == 4
    for host in HOSTS:
        assert "huge" not in fleet.domains_of(host)


def test_a_guest_destroyed_by_hand_is_told_from_a_crash_and_not_restarted(fleet: Fleet) -> None:
    vm = fleet.create("victim", pool="shared", index=22, to="node2")
    fleet.lab.run("node2", ["virsh", "destroy", f"trimtab-{vm['id']}"])
    seen = wait_until(lambda: now if (now := fleet.vm("victim"))["problem"] else None, "the drift to be shown")
    assert "destroyed on node2 from outside" in seen["problem"]
    assert seen["observed"]["state"] == "stopped"
    fleet.ok("vm", "start", "victim", "--wait")
    assert fleet.vm("victim")["problem"] == ""


def test_definitions_that_were_undefined_or_left_behind_by_hand_are_mended_under_the_running_guest(fleet: Fleet) -> None:
    vm = fleet.vm("victim")
    domain, run = f"trimtab-{vm['id']}", fleet.sh("node2", f"cat /run/libvirt/qemu/trimtab-{vm['id']}.pid")
    definition = fleet.sh("node2", f"virsh dumpxml --inactive {domain}")
    fleet.sh("node2", f"virsh undefine --nvram {domain} || virsh undefine {domain}")
    fleet.sh("node3", f"cat > /tmp/left.xml <<'END'\n{definition}\nEND\nvirsh define /tmp/left.xml")
    wait_until(lambda: fleet.hosts_that_define(vm["id"]) == ["node2"], "what was left behind on node3 to be removed")
    wait_until(
        lambda: (
            "persistent" in fleet.sh("node2", f"virsh list --persistent --name | grep -q {domain} && echo persistent || true")
        ),
        "the definition on node2 to be put back",
    )
    assert fleet.sh("node2", f"cat /run/libvirt/qemu/{domain}.pid") == run, "the guest ran through it"
    wait_until(lambda: fleet.vm("victim")["problem"] == "", "all to be as wished")
    fleet.ok("vm", "stop", "victim", "--force", "--wait")
    fleet.sh("node2", f"virsh undefine --nvram {domain} || virsh undefine {domain}")
    wait_until(lambda: fleet.hosts_that_define(vm["id"]) == ["node2"], "the stopped vm to be defined again")
    done = {
        one["kind"]
        for one in fleet.ok("op", "list", "--filter", f"subject={vm['id']}", "-o", "json").json()
        if one["state"] == "done"
    }
    assert {"vm.redefine", "vm.clean_copy"} <= done
    fleet.ok("vm", "delete", "victim", "--yes", "--wait")


def test_an_agent_killed_during_a_migration_changes_nothing_about_its_end(fleet: Fleet, shared_vm: str) -> None:
    counted, uptime = fleet.wait_for_ticks(shared_vm, 1)
    before = fleet.vm(shared_vm)
    started = fleet.ok("vm", "migrate", shared_vm, "--bandwidth", "8", "--no-wait", "-o", "json").json()
    operation_id = started.get("operation", started)["id"]
    wait_until(lambda: fleet.ok("op", "get", operation_id, "-o", "json").json()["step"] == "move", "the migration to have begun")
    fleet.lab.signal_service(before["host"], "trimtab-agent", signal.SIGKILL)
    ended = wait_until(
        lambda: now if (now := fleet.ok("op", "get", operation_id, "-o", "json").json())["done"] else None, "the end"
    )
    after = fleet.vm(shared_vm)
    assert ended["state"] in {"done", "failed"}
    assert (after["host"] != before["host"]) == (ended["state"] == "done")
    assert fleet.hosts_that_define(after["id"]) == [after["host"]]
    assert fleet.wait_for_ticks(shared_vm, counted + 2)[1] > uptime


def test_a_cancelled_migration_leaves_the_guest_where_it_was(fleet: Fleet, shared_vm: str) -> None:
    wait_until(lambda: fleet.ok("host", "list", "-o", "json").out.count('"up"') >= 3, "every host to be up again")
    counted, uptime = fleet.wait_for_ticks(shared_vm, 1)
    before = fleet.vm(shared_vm)
    started = fleet.ok("vm", "migrate", shared_vm, "--bandwidth", "1", "--no-wait", "-o", "json").json()
    operation_id = started.get("operation", started)["id"]
    wait_until(lambda: fleet.ok("op", "get", operation_id, "-o", "json").json()["step"] == "move", "the migration to have begun")
    fleet.ok("op", "cancel", operation_id)
    ended = wait_until(
        lambda: now if (now := fleet.ok("op", "get", operation_id, "-o", "json").json())["done"] else None, "the end"
    )
    after = fleet.vm(shared_vm)
    assert ended["state"] == "cancelled"
    assert after["host"] == before["host"]
    assert fleet.hosts_that_define(after["id"]) == [before["host"]]
    assert fleet.wait_for_ticks(shared_vm, counted + 2)[1] > uptime


def test_the_control_plane_may_die_and_work_goes_on(fleet: Fleet) -> None:
    started = fleet.ok(
        "vm", "create", "survivor", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--no-wait", "-o", "json"
    ).json()
    operation_id = started.get("operation", started)["id"]
    fleet.plane.crash()
    fleet.plane.start()
    ended = wait_until(
        lambda: now if (now := fleet.ok("op", "get", operation_id, "-o", "json").json())["done"] else None, "the end"
    )
    assert ended["state"] == "done"
    vm = fleet.vm("survivor")
    assert fleet.hosts_that_define(vm["id"]) == [vm["host"]]
    fleet.ok("vm", "delete", "survivor", "--yes", "--wait")


def test_a_cut_host_is_shown_as_suspect_and_its_vms_keep_their_last_sight(fleet: Fleet) -> None:
    vm = fleet.create("lonely", pool="shared", index=23, to="node3")
    fleet.lab.cut("node3")
    try:
        wait_until(
            lambda: fleet.ok("host", "get", "node3", "-o", "json").json()["connectivity"] in {"suspect", "lost"},
            "node3 to be missed",
        )
        seen = fleet.vm("lonely")
        assert seen["observed"]["state"] in {"running", "unknown"}
        assert seen["observed"]["age_s"] > 0
        refused = fleet.trimtab(
            "vm", "create", "never", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--to", "node3"
        )
        assert refused.code == 7
    finally:
        fleet.lab.heal("node3")
    wait_until(lambda: fleet.ok("host", "get", "node3", "-o", "json").json()["connectivity"] == "up", "node3 to be back")
    assert fleet.vm("lonely")["id"] == vm["id"]
    fleet.ok("vm", "delete", "lonely", "--yes", "--wait")


def test_metrics_tell_hosts_and_vms(fleet: Fleet) -> None:
    scraped = wait_until(
        lambda: text if 'trimtab_hosts{connectivity="up"} 3.0' in (text := fleet.plane.scrape()) else None,
        "three hosts in the metrics",
    )
    assert "trimtab_vms{" in scraped


def test_the_image_that_vms_stand_on_cannot_be_deleted(fleet: Fleet, shared_vm: str) -> None:
    refused = fleet.trimtab("image", "delete", "micro", "--yes")
    assert refused.code == 5
    assert shared_vm in refused.err


def test_no_secret_is_in_a_command_line(fleet: Fleet) -> None:
    secret = fleet.plane.token_file.read_text().strip()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                assert secret.encode() not in (directory / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
