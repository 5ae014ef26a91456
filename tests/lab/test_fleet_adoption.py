"""A guest of somebody's comes under control, moves, is defined anew at its next stop and goes back: its counter tells what it noticed."""

import ipaddress
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import guest_says
from tests.lab.ticks import breaks, spoken
from tests.unit.cli.test_imports import OVF
from trimtab_lab.commands import own_programs, run
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

DISK = "/srv/trimtab-shared/legacy-db.qcow2"
SERIAL = "/var/log/libvirt/qemu/legacy-db-serial.log"
WATCHDOG = "<watchdog model='i6300esb'"
DEFINITION = f"""
<domain type='qemu'><name>legacy-db</name><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os><features><acpi/>
<tcg><tb-cache unit='MiB'>16</tb-cache></tcg></features>
<cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model>
<feature policy='disable' name='svm'/><feature policy='optional' name='aes'/></cpu>
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
    return next(iter(reversed(spoken(serial(fleet, host)))), (0, 0.0))


def serial(fleet: Fleet, host: str, path: str = SERIAL) -> str:
    """Return all that the guest said into this file of the host."""
    return fleet.sh(host, f"cat {path} 2>/dev/null", check=False)


def counts_on(read: Callable[[], str], since: int, by: int = 2) -> int:
    """Return a later number; from `since` to it the guest never started anew and left none out. `read`: all that it has said."""

    def later() -> str | None:
        log = read()
        newest = next(iter(reversed(spoken(log))), (0, 0.0))[0]
        return log if newest >= since + by else None

    log = wait_until(later, "the guest to count on")
    newest = spoken(log)[-1][0]
    assert breaks(log, first=since, last=newest) == []
    return newest


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
    ends = "for d in $(virsh list --all --name); do case $d in legacy*) virsh destroy $d || true; virsh undefine $d;; esac; done"
    for host in ("node1", "node2"):
        fleet.sh(host, ends, check=False)


def test_a_domain_is_adopted_moved_defined_anew_and_released(fleet: Fleet, legacy: str) -> None:
    before = ticks(fleet, "node1")[0]
    said_before = len(serial(fleet, "node2"))
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
    assert WATCHDOG in fleet.sh("node1", "virsh dumpxml legacy-db")
    fleet.wait_for_host("node1")
    counts_on(lambda: serial(fleet, "node1"), before)
    vm = fleet.vm(legacy)
    assert (vm["host"], vm["observed"]["state"]) == ("node1", "running")
    assert vm["shape"]["cpu_model"] == "qemu64"
    assert json.loads(fleet.ok("vm", "diff", legacy, "-o", "json").out)["differences"] == []

    fleet.ok("vm", "migrate", legacy, "--to", "node2", "--wait")

    # From before the adoption until after the move, over both hosts' logs: a line may begin on one and end on the other.
    def both() -> str:
        return serial(fleet, "node1") + serial(fleet, "node2")[said_before:]

    counts_on(both, ticks(fleet, "node1")[0])  # on node2 by now
    last = counts_on(both, before)
    assert legacy not in fleet.domains_of("node1")
    assert WATCHDOG in fleet.sh("node2", "virsh dumpxml legacy-db"), "what no field of a vm says has moved with the guest"
    assert fleet.sh("node1", f"ls {DISK} || echo gone", check=False).strip() == "gone", "the file has its volume's name alone"

    fleet.ok("vm", "stop", legacy, "--wait")
    fleet.ok("vm", "start", legacy, "--wait")
    # A number that was stored and not said when its power went is left out here, and only here.
    anew = fleet.wait_for_ticks(legacy, last + 1)[0]
    assert fleet.runs_on(vm["id"]) == ["node2"], "it has the standard name from its next stop on"
    assert legacy not in fleet.domains_of("node2")
    assert WATCHDOG not in fleet.sh("node2", f"virsh dumpxml trimtab-{vm['id']}"), (
        "and is gone after its stop, as was told before"
    )
    stored = fleet.sh("node2", f"virsh dumpxml --inactive trimtab-{vm['id']}")
    assert re.findall(r"<feature policy='(\w+)' name='(\w+)'/>", stored) == [("disable", "svm"), ("optional", "aes")]

    by_hand = "--type bridge --source br-guest --model virtio --mac 52:54:00:0f:0a:02 --config"
    fleet.sh("node2", f"virsh attach-interface trimtab-{vm['id']} {by_hand}")
    drifted = json.loads(fleet.ok("vm", "diff", legacy, "-o", "json").out)["differences"]
    assert ("nic 52:54:00:0f:0a:02", "", "", "attached") in [tuple(one.values()) for one in drifted]

    listed = wait_until(lambda: out if "changed by hand" in (out := fleet.ok("vm", "list").out) else "", "the change to be seen")
    assert "nic 52:54:00:0f:0a:02" in listed
    assert f"trimtab vm diff {legacy}" in fleet.trimtab("doctor").out

    goes_back(fleet, legacy, vm["id"], anew)


def goes_back(fleet: Fleet, legacy: str, vm_id: str, counted: int) -> None:
    """It is a plain domain with its disk, and its guest has noticed nothing."""
    process = fleet.sh("node2", f"cat /run/libvirt/qemu/trimtab-{vm_id}.pid")
    log = re.search(r"<log file='([^']+)'", fleet.sh("node2", f"virsh dumpxml trimtab-{vm_id}"))
    assert log is not None
    releasing = fleet.begin("vm", "release", legacy)
    fleet.sh("node2", "systemctl restart trimtab-agent")
    assert fleet.end_of(releasing)["state"] == "done"
    assert fleet.trimtab("vm", "get", legacy).code == 4
    assert fleet.sh("node2", f"cat /run/libvirt/qemu/trimtab-{vm_id}.pid") == process
    counts_on(lambda: serial(fleet, "node2", log[1]), counted)
    left = fleet.sh("node2", f"virsh dumpxml trimtab-{vm_id}")
    assert "<trimtab:" not in left, "nothing of ours stays in it"
    disk = re.search(r"source file='([^']+)'", left)
    assert disk is not None
    assert fleet.sh("node2", f"test -s {disk[1]} && echo there").strip() == "there"
    fleet.sh("node2", f"virsh destroy trimtab-{vm_id}; virsh undefine trimtab-{vm_id}; rm {disk[1]}")


LIKE_ITS_HOST = """
<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><cpu mode='{mode}'><feature policy='disable' name='vme'/></cpu>
<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/srv/trimtab-shared/{name}.raw'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>
"""


@pytest.mark.parametrize("mode", ["host-model", "host-passthrough"])
def test_a_domain_with_the_cpu_of_its_host_is_told_which_model_it_becomes_and_whether_that_runs_there(
    fleet: Fleet, legacy: str, mode: str
) -> None:
    """Off it becomes what libvirt calls the host; running, what its QEMU was given: libvirt says that of a host-model."""
    name = f"legacy-{mode}"
    (fleet.lab.spec.host("node1").path_on_machine("/var/lib/trimtab") / "like.xml").write_text(
        LIKE_ITS_HOST.format(name=name, mode=mode)
    )
    fleet.sh("node1", f"truncate -s 1M /srv/trimtab-shared/{name}.raw; virsh define /var/lib/trimtab/like.xml")
    inventory = fleet.host("node1")["inventory"]
    shown = fleet.ok("vm", "adopt", f"node1/{name}", "--dry-run", "-o", "json").json()["adoption"]
    model = ElementTree.fromstring(fleet.sh("node1", "virsh capabilities")).findtext("host/cpu/model")
    assert f"CPU {mode} becomes model {model}" in shown["changes_at_next_stop"]
    is_usable = model in inventory["usable_cpu_models"]
    assert [one["code"] for one in shown["refusals"]] == ([] if is_usable else ["cpu-model-unusable"])
    if mode == "host-model":
        runs_as_it_was_started(fleet, name, inventory)
    fleet.sh("node1", f"virsh destroy {name} || true; virsh undefine {name}; rm /srv/trimtab-shared/{name}.raw")


def runs_as_it_was_started(fleet: Fleet, name: str, inventory: dict[str, list[str]]) -> None:
    fleet.sh("node1", f"virsh start {name}")
    model = ElementTree.fromstring(fleet.sh("node1", f"virsh dumpxml {name}")).findtext("cpu/model")
    told = fleet.trimtab("vm", "adopt", f"node1/{name}", "--dry-run", "-o", "json")
    refusals = [one for one in told.json()["adoption"]["refusals"] if one["code"] == "cpu-model-unusable"]
    if model in inventory["usable_cpu_models"]:
        assert refusals == []
        return
    (refusal,) = refusals
    assert f"would get {model}, which host node1 cannot run" in refusal["message"]
    named = re.search(r"`virsh edit [\w-]+`: ([\w., -]+)\)", refusal["message"])
    assert named is not None, refusal
    assert set(named[1].split(", ")) <= set(inventory["usable_cpu_models"]), "and those that are named do run"


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


PROXMOX = """#what an operator wrote
agent: 1
boot: order=virtio1;virtio0
cores: 1
ide2: none,media=cdrom
memory: 96
name: elsewhere
net0: virtio=52:54:00:0F:0A:41,bridge=vmbr0,firewall=1
ostype: l26
scsihw: virtio-scsi-single
virtio0: local-lvm:vm-100-disk-1,size=4M
virtio1: local-lvm:vm-100-disk-0,size=35M
[before-upgrade]
memory: 1
"""


def test_a_machine_of_proxmox_is_imported_and_counts(fleet: Fleet, tmp_path: Path) -> None:
    """Its configuration and a file for each disk, one raw and one qcow2; it boots from the one that is first in its order."""
    (config := tmp_path / "100.conf").write_text(PROXMOX)
    (second := tmp_path / "vm-100-disk-1.raw").write_bytes(SECOND.encode().ljust(4 << 20, b"\0"))
    first = shutil.copy(build_guest_image().qcow2, tmp_path / "vm-100-disk-0.qcow2")
    import_it = (
        "vm",
        "import",
        "prox1",
        str(config),
        "--disk",
        f"virtio1={first}",
        "--network",
        "vmbr0=default",
        "--pool",
        "shared",
    )
    refused = fleet.trimtab(*import_it)
    assert (refused.code, "--disk virtio0=FILE" in refused.err) == (2, True), refused.err
    refused = fleet.trimtab(*import_it[:-1], "no-such-pool", "--disk", f"virtio0={second}")
    assert refused.code == 4, refused.err
    assert "prox1" not in fleet.ok("image", "list").out + fleet.ok("vm", "list").out
    fleet.ok(*import_it, "--disk", f"virtio0={second}")
    fleet.wait_for_ticks("prox1", 1)
    vm = fleet.vm("prox1")
    assert (vm["shape"]["vcpus"], vm["shape"]["memory_mib"], vm["shape"]["firmware"]) == (1, 96, "bios")
    assert [nic["mac"] for nic in vm["nics"]] == ["52:54:00:0f:0a:41"]
    sees_its_second_disk(fleet, "prox1")
    fleet.delete("prox1")


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
