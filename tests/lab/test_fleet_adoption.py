"""A guest of somebody's comes under control, moves, is defined anew at its next stop and goes back: its counter tells what it noticed."""

import ipaddress
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.lab.fleet_kit import TICK, Fleet, wait_until
from tests.lab.guest_view import guest_says
from tests.unit.cli.test_imports import OVF
from trimtab_lab.commands import own_programs, run
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


SECOND = "what-the-second-disk-holds"


def two_disks(first: str, capacity_mib: int, second: str) -> str:
    """Return the descriptor of a machine with two disks, the second of 4 MiB."""
    text = OVF.format(href=first, capacity=capacity_mib)
    for begin, more in (
        ('<File ovf:href="', f'<File ovf:href="{second}" ovf:id="file2"/>'),
        (
            '<Disk ovf:capacity="',
            '<Disk ovf:capacity="4" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d2" ovf:fileRef="file2"/>',
        ),
    ):
        at = text.index("/>", text.index(begin)) + 2
        text = text[:at] + more + text[at:]
    item = "<Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>"
    return text.replace(item, item + item.replace("/d1", "/d2"))


def sees_its_second_disk(fleet: Fleet, name: str) -> None:
    vm = fleet.vm(name)
    serial = next(one["id"] for one in fleet.ok("volume", "list", "-o", "json").json() if one["name"] == f"{name}-disk1")[-20:]
    read = (
        f'for d in /sys/block/*; do [ "$(cat $d/serial 2>/dev/null)" = {serial} ] && head -c {len(SECOND)} /dev/${{d##*/}}; done'
    )
    wait_until(lambda: guest_says(fleet.lab, vm["host"], vm["id"], read) == SECOND, "the guest to read its second disk")


def test_a_machine_of_an_ova_is_imported_and_counts(fleet: Fleet, tmp_path: Path) -> None:
    """Its disk is unpacked on the operator's machine, sent, and cloned; a broken archive leaves nothing behind."""
    disk = tmp_path / "shop-disk1.vmdk"
    raw = build_guest_image().raw
    run(["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(disk)], timeout_s=120)
    second = tmp_path / "shop-disk2.vmdk"
    (plain := tmp_path / "second.raw").write_bytes(SECOND.encode().ljust(4 << 20, b"\0"))
    run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(plain), str(second)],
        timeout_s=60,
    )
    (descriptor := tmp_path / "shop.ovf").write_text(two_disks(disk.name, raw.stat().st_size >> 20, second.name))
    archive = tmp_path / "shop.ova"
    with tarfile.open(archive, "w:") as made:
        for member in (descriptor, disk, second):
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
    sees_its_second_disk(fleet, "shop")

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


# --- of a libvirt host that is in no fleet ---------------------------------------------------------------------------------

OUTSIDER = "node4"
FAR = """
<domain type='qemu'><name>far-db</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os><features><acpi/></features>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/trimtab-local/far/root.qcow2'/>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/trimtab-local/far/second.raw'/>
<target dev='vdb' bus='virtio'/></disk>
<interface type='bridge'><mac address='52:54:00:0f:0a:21'/><source bridge='br-guest'/><model type='virtio'/></interface>
</devices></domain>
"""


@pytest.fixture
def outsider(fleet: Fleet, tmp_path: Path) -> Iterator[str]:
    """A host of nobody's fleet with a domain that is off, its libvirt reached over TLS by the URI that is lent.

    Its /etc has the client's keys too.
    """
    fleet.lab.up(hosts=4)
    host = fleet.lab.spec.host(OUTSIDER)
    pki = host.path_on_machine("/etc/pki")
    issue_certificates(pki, host.address)
    raw = Path(shutil.copy(build_guest_image().raw, tmp_path))
    (tmp_path / "far.xml").write_text(FAR)
    (tmp_path / "second.raw").write_bytes(SECOND.encode().ljust(4 << 20, b"\0"))
    settings, far = "/etc/libvirt/libvirtd.conf", "/srv/trimtab-local/far"
    try:
        fleet.sh(
            OUTSIDER,
            f"mkdir -p {far}; qemu-img convert -f raw -O qcow2 {raw} {far}/root.qcow2; cp {tmp_path}/second.raw {far}\n"
            f"virsh define {tmp_path}/far.xml; virsh pool-create-as far dir --target {far}\n"
            f"cp {settings} {settings}.before; echo 'listen_tls = 1' >>{settings}; systemctl restart libvirtd\n",
        )
        yield f"qemu+tls://{host.address}/system"
    finally:
        undo = f"virsh undefine far-db; virsh pool-destroy far; mv {settings}.before {settings}; rm -r /etc/pki {far}"
        fleet.sh(OUTSIDER, undo, check=False)
        fleet.lab.crash(OUTSIDER)


def issue_certificates(pki: Path, address: str) -> None:
    """Lay down a CA of its own and a certificate that both ends show: RSA, as libvirt wants."""
    now = datetime.now(UTC)
    (ca_key, key) = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])

    def certificate(of: rsa.RSAPrivateKey, name: str) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(of.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
        return made.not_valid_after(now + timedelta(hours=1))

    authority = certificate(ca_key, "somebody").add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    shown = certificate(key, address).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    files = {"CA/cacert.pem": authority.sign(ca_key, hashes.SHA256()).public_bytes(pem)}
    for end in ("server", "client"):
        files[f"libvirt/{end}cert.pem"] = shown.sign(ca_key, hashes.SHA256()).public_bytes(pem)
        files[f"libvirt/private/{end}key.pem"] = secret
    for name, content in files.items():
        (pki / name).parent.mkdir(parents=True, exist_ok=True)
        (pki / name).write_bytes(content)


def test_a_domain_of_a_host_in_no_fleet_is_copied_over_tls_with_both_its_disks_and_boots_here(
    fleet: Fleet, outsider: str
) -> None:
    before = fleet.sh(OUTSIDER, "virsh dumpxml far-db; sha256sum /srv/trimtab-local/far/*")
    place = (
        "vm",
        "import",
        "near-db",
        "--from-libvirt",
        f"{outsider}/far-db",
        "--network",
        "br-guest=default",
        "--pool",
        "shared",
    )
    # The operator's machine with the certificates that let it in: where this one has none.
    etc = fleet.lab.spec.host(OUTSIDER).path_on_machine("/etc")
    seat = ["unshare", "-m", "sh", "-c", f'mount --bind {etc} /etc && exec "$@"', "sh"]
    wait_until(lambda: run([*seat, "virsh", "-c", outsider, "list"], check=False).returncode == 0, "libvirt to answer over TLS")
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", **fleet.plane.cli_environment()}
    imported = run([*seat, str(own_programs() / "trimtab"), *place], check=False, timeout_s=200, environment=environment)
    assert imported.returncode == 0, imported.stderr
    fleet.wait_for_ticks("near-db", 1)
    sees_its_second_disk(fleet, "near-db")
    assert fleet.vm("near-db")["nics"][0]["mac"] == "52:54:00:0f:0a:21"
    assert fleet.sh(OUTSIDER, "virsh dumpxml far-db; sha256sum /srv/trimtab-local/far/*") == before, (
        "what it was copied from is as it was"
    )
    fleet.delete("near-db")
