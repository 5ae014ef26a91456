"""A real fleet, end to end: three libvirt hosts, the control plane in its embedded default, guests that count.

One lab for the whole file. Tests make vms of their own and say with their names what is promised.
"""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fleet_kit import HOSTS, Fleet, wait_until
from tests.lab.guest_view import guest_says

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


# cpus, NUMA cells, PCI devices, kernel, QEMU, libvirt, CPU model, memory in MiB: of the host's own programs.
ASKED_BY_HAND = """
nproc
ls -d /sys/devices/system/node/node[0-9]* | wc -l
virsh nodedev-list --cap pci | grep -c pci_ || true
uname -r
virsh version | sed -n 's/^Running hypervisor: QEMU //p'
virsh version | sed -n 's/^Using library: libvirt //p'
virsh capabilities | sed -n 's:^ *<model>\\(.*\\)</model>$:\\1:p' | head -n 1
awk '/^MemTotal:/ {print int($2 / 1024)}' /proc/meminfo
"""


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
    told = host["inventory"]
    assert told["accelerator"] in {"tcg", "kvm"}
    cpus, cells, pci, kernel, qemu, libvirt, cpu_model, memory_mib = fleet.sh("node1", ASKED_BY_HAND).splitlines()
    assert (told["cpus"], len(told["numa_cells"]), len(told["pci_devices"])) == (int(cpus), int(cells), int(pci))
    assert (told["kernel"], told["qemu_version"], told["libvirt_version"]) == (kernel, qemu, libvirt)
    assert (told["cpu_model"], told["memory_mib"]) == (cpu_model, int(memory_mib))
    assert qemu in told["qemu_build"]
    assert sum(len(cell["cpus"]) for cell in told["numa_cells"]) == told["cpus"]
    assert "br-guest" in {bridge["name"] for bridge in told["bridges"]}
    assert {one["purpose"] for one in host["certificates"]} == {"agent", "libvirt"}


def test_a_guest_runs_where_the_decision_says_and_the_reason_names_every_host(fleet: Fleet, shared_vm: str) -> None:
    decision = fleet.ok("vm", "explain", shared_vm, "-o", "json").json()
    assert decision["host"] == fleet.vm(shared_vm)["host"] == "node1"
    assert {verdict["host"] for verdict in decision["verdicts"]} == {"node1", "node2", "node3"}
    assert "node3" in fleet.ok("vm", "explain", shared_vm, "--why-not", "node3").out
    fleet.wait_for_ticks(shared_vm, 1)


def test_a_live_migration_never_restarts_the_guest(fleet: Fleet, shared_vm: str) -> None:
    migrates_and_counts_on(fleet, shared_vm)


def migrates_and_counts_on(fleet: Fleet, name: str, *more: str) -> None:
    counted, uptime = fleet.wait_for_ticks(name, 2)
    before = fleet.vm(name)
    fleet.ok("vm", "migrate", name, *more, "--wait")
    after = fleet.vm(name)
    assert after["host"] != before["host"]
    assert after["epoch"] == before["epoch"] + 1
    assert fleet.hosts_that_define(after["id"]) == [after["host"]]
    later_count, later_uptime = fleet.wait_for_ticks(name, counted + 3)
    assert later_uptime > uptime, "a restarted guest would count its uptime from zero"
    assert later_count > counted


def test_guests_on_different_hosts_reach_each_other_before_and_after_one_moves_with_its_disk(
    fleet: Fleet, shared_vm: str, local_vm: str
) -> None:
    addresses = {shared_vm: f"{fleet.lab.spec.guest_prefix}.11", local_vm: f"{fleet.lab.spec.guest_prefix}.12"}
    for name in addresses:
        fleet.wait_for_ticks(name, 1)
    homes = [fleet.vm(name)["host"] for name in addresses]
    third = next(host for host in HOSTS if host not in homes)
    reach_each_other(fleet, addresses)
    migrates_and_counts_on(fleet, local_vm, "--to", third)
    reach_each_other(fleet, addresses)


def reach_each_other(fleet: Fleet, addresses: dict[str, str]) -> None:
    """Each guest pings the other from the inside, and they are on different hosts."""
    homes = {name: fleet.vm(name) for name in addresses}
    assert len({vm["host"] for vm in homes.values()}) == len(homes)
    for name, vm in homes.items():
        for address in (address for peer, address in addresses.items() if peer != name):
            wait_until(partial(is_reached_from, fleet, vm, address), f"{name} to reach {address}")


def is_reached_from(fleet: Fleet, vm: dict[str, Any], address: str) -> bool:
    script = f"ping -c 1 -W 5 {address} >/dev/null && echo answered"
    return guest_says(fleet.lab, vm["host"], vm["id"], script) == "answered"


def test_a_stopped_guest_goes_on_counting_from_its_disk(fleet: Fleet, shared_vm: str) -> None:
    counted, _uptime = fleet.wait_for_ticks(shared_vm, 3)
    fleet.ok("vm", "stop", shared_vm, "--wait")
    assert fleet.vm(shared_vm)["observed"]["state"] == "stopped"
    fleet.ok("vm", "start", shared_vm, "--wait")
    fleet.wait_for_ticks(shared_vm, counted + 1)


def test_a_guest_that_ignores_the_wish_is_off_by_force_once_its_grace_is_over(fleet: Fleet, local_vm: str) -> None:
    vm = fleet.vm(local_vm)
    counted, _uptime = fleet.wait_for_ticks(local_vm, 1)
    # Its agent takes the wish and does nothing, and nobody hears its power button.
    deaf = "echo '#!/bin/sh' > /sbin/shutdown; rm /etc/acpi/PWRF/00000080; echo deaf"
    wait_until(lambda: guest_says(fleet.lab, vm["host"], vm["id"], deaf) == "deaf", "the guest to hear no more")
    asked_at = time.monotonic()
    operation_id = fleet.begin("vm", "stop", local_vm, "--grace", "5s")
    ended = fleet.end_of(operation_id)
    assert 5 <= time.monotonic() - asked_at < 30
    assert (ended["state"], ended["result"]["was_forced"]) == ("done", True)
    assert fleet.vm(local_vm)["observed"]["state"] == "stopped"
    assert fleet.runs_on(vm["id"]) == []
    fleet.ok("vm", "start", local_vm, "--wait")
    fleet.wait_for_ticks(local_vm, counted + 1)


def test_pause_and_resume_are_seen(fleet: Fleet, local_vm: str) -> None:
    fleet.ok("vm", "pause", local_vm, "--wait")
    assert fleet.vm(local_vm)["observed"]["state"] == "paused"
    fleet.ok("vm", "resume", local_vm, "--wait")
    assert fleet.vm(local_vm)["observed"]["state"] == "running"


def test_a_deleted_vm_comes_back_with_its_disk(fleet: Fleet) -> None:
    vm = fleet.create("gone1", pool="shared")
    fleet.wait_for_ticks("gone1", 2)
    fleet.ok("vm", "delete", "gone1", "--yes", "--wait")
    assert fleet.trimtab("vm", "get", "gone1").code == 4
    assert fleet.hosts_that_define(vm["id"]) == []
    fleet.ok("vm", "undelete", "gone1", "--wait")
    fleet.ok("vm", "start", "gone1", "--wait")
    fleet.wait_for_ticks("gone1", 3)
    fleet.ok("vm", "delete", "gone1", "--yes", "--wait")


def test_no_host_with_room_is_its_own_error_and_leaves_nothing_behind(fleet: Fleet) -> None:
    before, claimed = {host: fleet.domains_of(host) for host in HOSTS}, claims_of(fleet)
    refused = fleet.trimtab("vm", "create", "huge", "--image", "micro", "--memory", "900GiB", "--pool", "shared", "--wait")
    assert refused.code == 7
    assert "node1" in refused.err or "memory" in refused.err
    assert fleet.trimtab("vm", "get", "huge").code == 4
    assert {host: fleet.domains_of(host) for host in HOSTS} == before, "domains are named after ids: none may be new"
    assert claims_of(fleet) == claimed


def claims_of(fleet: Fleet) -> dict[str, object]:
    """Return what every host and every pool has promised to vms."""
    hosts, pools = (fleet.ok(noun, "list", "-o", "json").json() for noun in ("host", "pool"))
    return {
        **{one["name"]: (one["vcpus"]["claimed"], one["memory_mib"]["claimed"], one["vms"]) for one in hosts},
        **{one["name"]: one["space"]["claimed_bytes"] for one in pools},
    }


@contextmanager
def at_every_start(fleet: Fleet, host: str, script: str) -> Iterator[None]:
    """Let libvirt of a host do this before a guest starts: by a hook, which it looks for when it starts itself."""
    hook = "/etc/libvirt/hooks/qemu"
    content = f"#!/bin/sh\ntest $2 = prepare || exit 0\ntouch /run/starting\n{script}"
    fleet.sh(host, f"mkdir /etc/libvirt/hooks; cat > {hook} <<'END'\n{content}\nEND\nchmod +x {hook}; systemctl restart libvirtd")
    try:
        yield
    finally:
        fleet.sh(host, "rm -rf /etc/libvirt/hooks /run/starting /run/held; systemctl restart libvirtd")


@pytest.mark.parametrize(("end", "script"), [("failed", "exit 1"), ("cancelled", "while [ -e /run/held ]; do sleep 0.1; done")])
def test_a_vm_whose_start_fails_or_is_cancelled_is_undone_to_its_last_trace(fleet: Fleet, end: str, script: str) -> None:
    number = len(end)
    host, nic = "node2", f"default,mac=52:54:00:0a:0c:{number:02},ip={fleet.lab.spec.guest_prefix}.{80 + number}/24"
    create = ("vm", "create", "half", "--image", "micro", "--memory", "96MiB", "--pool", "local", "--network", nic, "--to", host)
    # What a vm is made of on a host; the copy of its image is a cache and stays.
    look = "ls /srv/trimtab-local/volumes /srv/trimtab-local/vms /etc/libvirt/qemu/*.xml /var/log/libvirt/qemu/*.serial.* || true"
    claimed, before = claims_of(fleet), fleet.sh(host, look)
    fleet.sh(host, "touch /run/held")
    with at_every_start(fleet, host, script):
        operation_id = fleet.begin(*create)
        vm_id = fleet.operation(operation_id)["subject"]["id"]
        wait_until(lambda: fleet.sh(host, "ls /run/starting 2>/dev/null || true"), "the guest to be about to start")
        if end == "cancelled":
            # libvirt answers nobody about a domain whose hook runs; its files tell.
            made = fleet.sh(host, "ls /etc/libvirt/qemu /srv/trimtab-local/vms /srv/trimtab-local/volumes").split()
            assert {f"trimtab-{vm_id}.xml", vm_id, f"{fleet.vm('half')['volumes'][0]['id']}.qcow2"} <= set(made)
            fleet.ok("op", "cancel", operation_id, "--no-wait")
            fleet.sh(host, "rm /run/held")
        assert fleet.end_of(operation_id)["state"] == end
    assert fleet.hosts_that_define(vm_id) == fleet.files_of(vm_id) == []
    assert fleet.sh(host, look) == before
    assert claims_of(fleet) == claimed
    assert fleet.trimtab("vm", "get", "half").code == 4
    # Its name, MAC and address are free at once.
    fleet.ok(*create, "--no-start", "--wait")
    fleet.delete("half")


def test_a_guest_destroyed_by_hand_is_told_from_a_crash_and_not_restarted(fleet: Fleet) -> None:
    vm = fleet.create("victim", pool="shared", to="node2")
    fleet.lab.run("node2", ["virsh", "destroy", f"trimtab-{vm['id']}"])
    seen = wait_until(lambda: now if (now := fleet.vm("victim"))["problem"] else None, "the drift to be shown")
    assert "destroyed on node2 from outside" in seen["problem"]
    assert seen["observed"]["state"] == "stopped"
    fleet.ok("vm", "start", "victim", "--wait")
    assert fleet.vm("victim")["problem"] == ""


def test_a_second_domain_of_a_vm_that_somebody_started_elsewhere_is_shown_and_nothing_starts_it(fleet: Fleet) -> None:
    vm = fleet.vm("victim")
    domain, empty = f"trimtab-{vm['id']}", "/srv/trimtab-local/stray.qcow2"
    # QEMU's own lock would keep a second guest from the disk: this one has another, as on storage that knows no locks.
    disk = f"/srv/trimtab-shared/volumes/{vm['volumes'][0]['id']}.qcow2"
    definition = fleet.sh("node2", f"virsh dumpxml --inactive {domain}").replace(disk, empty)
    fleet.sh("node3", f"qemu-img create -q -f qcow2 {empty} 64M; chmod 666 {empty}")
    fleet.sh("node3", f"cat > /tmp/stray.xml <<'END'\n{definition}\nEND\nvirsh create --paused /tmp/stray.xml")
    seen = wait_until(
        lambda: now if "also runs" in (now := fleet.vm("victim"))["problem"] else None, "the second one to be shown"
    )
    assert f"it also runs on node3 (epoch {vm['epoch']})" in seen["problem"]
    assert seen["host"] == "node2"
    assert "also runs on node3" in fleet.trimtab("doctor").out
    fleet.ok("vm", "stop", "victim", "--force", "--wait")
    refused = fleet.trimtab("vm", "start", "victim", "--wait")
    assert refused.code == 5, refused.err
    assert "also runs on node3" in refused.err
    assert fleet.runs_on(vm["id"]) == ["node3"], "nobody but its owner ends either of them"
    fleet.sh("node3", f"virsh destroy {domain}; rm {empty} /tmp/stray.xml")
    wait_until(lambda: fleet.vm("victim")["problem"] == "", "all to be as wished")
    fleet.ok("vm", "start", "victim", "--wait")
    assert fleet.runs_on(vm["id"]) == ["node2"]


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


@pytest.mark.soak
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
    assert ended["state"] == "done", "libvirtd drives it, whatever becomes of the agent"
    assert after["host"] != before["host"]
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
    vm = fleet.create("lonely", pool="shared", to="node3")
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
        assert (refused.code, "code: host-not-up" in refused.err) == (10, True)
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


@pytest.mark.usefixtures("shared_vm")
def test_the_image_that_vms_stand_on_cannot_be_deleted(fleet: Fleet) -> None:
    refused = fleet.trimtab("image", "delete", "micro", "--yes")
    assert refused.code == 5
    assert re.search(r"image micro is the base of volumes (\S+-root\S*, )*(and others|\S+-root\S*) \(", refused.err)


def test_no_secret_is_in_a_command_line(fleet: Fleet) -> None:
    secret = fleet.plane.token_file.read_text().strip()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                assert secret.encode() not in (directory / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
