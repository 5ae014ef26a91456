"""A guest of somebody's comes under control, moves, is defined anew at its next stop and goes back: its counter tells what it noticed."""

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import TICK, Fleet, wait_until
from tests.unit.cli.test_imports import OVF
from trimtab_lab.commands import run
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

DISK = "/srv/trimtab-shared/legacy-db.qcow2"
SERIAL = "/var/log/libvirt/qemu/legacy-db-serial.log"
DEFINITION = f"""
<domain type='qemu'><name>legacy-db</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os><features><acpi/>
<tcg><tb-cache unit='MiB'>16</tb-cache></tcg></features>
<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='{DISK}'/><target dev='vdb' bus='virtio'/></disk>
<interface type='bridge'><mac address='52:54:00:0f:0a:01'/><source bridge='br-guest'/><model type='virtio'/></interface>
<serial type='file'><source path='{SERIAL}' append='on'/></serial>
<watchdog model='i6300esb' action='none'/>
<memballoon model='virtio'/>
</devices></domain>
"""


def ticks(fleet: Fleet, host: str) -> tuple[int, float]:
    """Return the guest's newest (counter, uptime) from the serial log of its own definition."""
    found = TICK.findall(fleet.sh(host, f"tail -c 4000 {SERIAL}", check=False))
    return (int(found[-1][0]), float(found[-1][1])) if found else (0, 0.0)


def counts_on(fleet: Fleet, host: str, since: tuple[int, float], by: int = 2) -> tuple[int, float]:
    """Return a later tick; the guest never started anew, so that its uptime grew, and no number is left out."""
    seen = wait_until(lambda: now if (now := ticks(fleet, host))[0] >= since[0] + by else None, "the guest to count on")
    assert seen[1] > since[1], "it was not restarted"
    return seen


@pytest.fixture(scope="module")
def legacy(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running domain on node1 that somebody made with virsh, its disk in the folder of a shared pool, started by its host's boot."""
    scratch = tmp_path_factory.mktemp("legacy")
    raw = Path(shutil.copy(build_guest_image().raw, scratch))
    definition = scratch / "legacy-db.xml"
    definition.write_text(DEFINITION)
    fleet.sh("node1", f"qemu-img convert -f raw -O qcow2 {raw} {DISK}")
    fleet.sh("node1", f"virsh define {definition}; virsh start legacy-db; virsh autostart legacy-db")
    wait_until(lambda: ticks(fleet, "node1")[0] >= 1, "the guest to count")
    yield "legacy-db"
    ends = "for d in $(virsh list --all --name); do case $d in legacy*) virsh destroy $d; virsh undefine $d;; esac; done"
    for host in ("node1", "node2"):
        fleet.sh(host, ends, check=False)


def test_a_domain_is_adopted_moved_defined_anew_and_released(fleet: Fleet, legacy: str) -> None:
    before = ticks(fleet, "node1")
    process = fleet.sh("node1", "cat /run/libvirt/qemu/legacy-db.pid")

    shown = fleet.ok("vm", "adopt", f"node1/{legacy}", "--dry-run").out
    assert f"volume: vdb {DISK} in pool shared" in shown
    assert "kept until its next stop, gone after it: devices/watchdog (i6300esb)" in shown
    assert "it can be adopted" in shown
    assert "urn:trimtab" not in fleet.sh("node1", "virsh dumpxml legacy-db"), "a dry run changes nothing"

    adopting = fleet.begin("vm", "adopt", f"node1/{legacy}")
    fleet.sh("node1", "systemctl restart trimtab-agent")
    assert fleet.end_of(adopting)["state"] == "done"
    assert fleet.sh("node1", "cat /run/libvirt/qemu/legacy-db.pid") == process
    assert "disable" in fleet.sh("node1", "virsh dominfo legacy-db | grep Autostart")
    fleet.wait_for_host("node1")
    seen = counts_on(fleet, "node1", before)
    vm = fleet.vm(legacy)
    assert (vm["host"], vm["observed"]["state"]) == ("node1", "running")
    assert json.loads(fleet.ok("vm", "diff", legacy, "-o", "json").out)["differences"] == []

    fleet.ok("vm", "migrate", legacy, "--to", "node2", "--wait")
    seen = counts_on(fleet, "node2", seen)
    assert legacy not in fleet.domains_of("node1")
    assert fleet.sh("node1", f"ls {DISK} || echo gone", check=False).strip() == "gone", "the file has its volume's name alone"

    fleet.ok("vm", "stop", legacy, "--wait")
    fleet.ok("vm", "start", legacy, "--wait")
    fleet.wait_for_ticks(legacy, seen[0] + 1)
    assert fleet.runs_on(vm["id"]) == ["node2"], "it has the standard name from its next stop on"
    assert legacy not in fleet.domains_of("node2")

    by_hand = "--type bridge --source br-guest --model virtio --mac 52:54:00:0f:0a:02 --config"
    fleet.sh("node2", f"virsh attach-interface trimtab-{vm['id']} {by_hand}")
    drifted = json.loads(fleet.ok("vm", "diff", legacy, "-o", "json").out)["differences"]
    assert ("nic 52:54:00:0f:0a:02", "", "", "attached") in [tuple(one.values()) for one in drifted]

    listed = wait_until(lambda: out if "changed by hand" in (out := fleet.ok("vm", "list").out) else "", "the change to be seen")
    assert "nic 52:54:00:0f:0a:02" in listed
    assert f"trimtab vm diff {legacy}" in fleet.trimtab("doctor").out

    process = fleet.sh("node2", f"cat /run/libvirt/qemu/trimtab-{vm['id']}.pid")
    releasing = fleet.begin("vm", "release", legacy)
    fleet.sh("node2", "systemctl restart trimtab-agent")
    assert fleet.end_of(releasing)["state"] == "done"
    assert fleet.trimtab("vm", "get", legacy).code == 4
    assert fleet.sh("node2", f"cat /run/libvirt/qemu/trimtab-{vm['id']}.pid") == process
    left = fleet.sh("node2", f"virsh dumpxml trimtab-{vm['id']}")
    assert "<trimtab:" not in left, "nothing of ours stays in it"
    disk = re.search(r"source file='([^']+)'", left)
    assert disk is not None
    assert fleet.sh("node2", f"test -s {disk[1]} && echo there").strip() == "there"
    fleet.sh("node2", f"virsh destroy trimtab-{vm['id']}; virsh undefine trimtab-{vm['id']}; rm {disk[1]}")


def test_a_machine_of_an_ova_is_imported_and_counts(fleet: Fleet, tmp_path: Path) -> None:
    """Its disk is unpacked on the operator's machine, sent, and cloned; a broken archive leaves nothing behind."""
    disk = tmp_path / "shop-disk1.vmdk"
    raw = build_guest_image().raw
    run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(disk)], timeout_s=120)
    (descriptor := tmp_path / "shop.ovf").write_text(OVF.format(href=disk.name, capacity=raw.stat().st_size >> 20))
    archive = tmp_path / "shop.ova"
    with tarfile.open(archive, "w:") as made:
        for member in (descriptor, disk):
            made.add(member, member.name)
    import_it = (
        "vm",
        "import",
        "shop",
        str(archive),
        "--network",
        "VM Network=default",
        "--memory",
        "96MiB",
        "--firmware",
        "bios",
    )
    refused = fleet.trimtab(*import_it, "--pool", "no-such-pool")
    assert refused.code == 4, refused.err
    assert "shop" not in fleet.ok("image", "list").out + fleet.ok("vm", "list").out
    fleet.ok(*import_it, "--pool", "shared")
    fleet.wait_for_ticks("shop", 1)
    vm = fleet.vm("shop")
    assert vm["image"] == "shop-disk0"
    host, domain = vm["host"], f"trimtab-{vm['id']}"

    fleet.ok("vm", "update", "shop", "--cpu-class", "low", "--balloon-min", "64MiB", "--wait")
    shown = fleet.sh(host, f"virsh dumpxml {domain}")
    assert re.search(r"<shares>(25|256)</shares>", shown), "the running guest has its class"
    assert 'min_mib="64"' in shown or "min_mib='64'" in shown, "and its balloon a floor"

    mac = "52:54:00:0f:0a:07"
    fleet.sh(host, f"virsh blkdeviotune {domain} vda --total-iops-sec 500 --live --config")
    fleet.sh(host, f"virsh attach-interface {domain} bridge br-guest --model virtio --mac {mac} --live")
    changed = [one["field"] for one in fleet.ok("vm", "diff", "shop", "-o", "json").json()["differences"]]
    assert [field.partition(".")[2] for field in changed] == ["iops_limit", "", "model"], changed
    fleet.ok("vm", "reconcile", "shop", "--accept", "--wait")
    fleet.ok("vm", "reconcile", "shop", "--accept", "--wait")
    assert fleet.ok("vm", "diff", "shop", "-o", "json").json()["differences"] == [], "both are the vm's own by now"
    assert mac in [nic["mac"] for nic in fleet.vm("shop")["nics"]]
    assert fleet.sh(host, f"virsh domiflist {domain}").count("52:54:00") == 2, "the guest keeps the card that it has"
    fleet.wait_for_ticks("shop", 2)
    fleet.ok("vm", "delete", "shop", "--yes", "--wait")
