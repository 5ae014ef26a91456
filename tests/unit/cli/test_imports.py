"""Machines of other systems: what is read of their files, what is refused of hostile ones, and what is made of them in which order."""

import contextlib
import hashlib
import io
import signal
import struct
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cli.conftest import Program, Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, Seen, operation, problem, vm
from trimtab_controller.cli.errors import CommandFailed
from trimtab_controller.cli.imports import libvirt_domain, ova, proxmox, vmdk, xml_safe
from trimtab_controller.cli.imports.qcow2 import CLUSTER_BYTES, Qcow2Writer

MIB = 1 << 20
OVF = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vmw="http://www.vmware.com/schema/ovf">
<References><File ovf:href="{href}" ovf:id="file1"/></References>
<DiskSection><Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="d1" ovf:fileRef="file1"/></DiskSection>
<VirtualSystem ovf:id="shop"><Name>shop</Name>
<OperatingSystemSection ovf:id="96"><Description>Debian GNU/Linux</Description></OperatingSystemSection>
<VirtualHardwareSection>
<Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType>
<rasd:VirtualQuantity>512</rasd:VirtualQuantity></Item>
<Item><rasd:ResourceType>6</rasd:ResourceType></Item>
<Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
<Item><rasd:Connection>VM Network</rasd:Connection><rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
<rasd:ResourceType>10</rasd:ResourceType></Item>
<Item><rasd:ElementName>sound</rasd:ElementName><rasd:ResourceType>35</rasd:ResourceType></Item>
<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
</VirtualHardwareSection></VirtualSystem></Envelope>
"""


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A raw disk of 9 MiB, most of it never written."""
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as target:
        target.truncate(9 * MIB)
        for at, text in ((0, b"first" * 3000), (5 * MIB + 4096, b"middle" * 30_000), (9 * MIB - 512, b"last".ljust(512, b"."))):
            target.seek(at)
            target.write(text)
    return raw


def as_vmdk(raw: Path, kind: str) -> Path:
    made = raw.with_name(f"{kind}.vmdk")
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={kind}", str(raw), str(made)], check=True, timeout=60
    )
    return made


def make_ova(path: Path, members: dict[str, bytes], **changes: Any) -> Path:
    with tarfile.open(path, "w:") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(body))
    return path


def shop(content: Path, *, manifest: bool = True, capacity: int = 9, href: str = "shop-disk1.vmdk") -> dict[str, bytes]:
    disk = as_vmdk(content, "streamOptimized").read_bytes()
    descriptor = OVF.format(href=href, capacity=capacity).encode()
    members = {"shop.ovf": descriptor, "shop-disk1.vmdk": disk}
    if manifest:
        lines = [f"SHA256({name})= {hashlib.sha256(body).hexdigest()}" for name, body in members.items()]
        members["shop.mf"] = "\n".join(lines).encode()
    return members


def silent(_done: int, _total: int) -> None:
    pass


@pytest.mark.parametrize("kind", ["streamOptimized", "monolithicSparse"])
def test_a_disk_of_vmware_is_the_same_disk_as_qcow2(tmp_path: Path, content: Path, kind: str) -> None:
    made, said = tmp_path / "made.qcow2", []
    with as_vmdk(content, kind).open("rb") as source, made.open("wb") as target:
        vmdk.convert(source, target, "disk", lambda done, total: said.append((done, total)))
    subprocess.run(["qemu-img", "check", "-f", "qcow2", str(made)], check=True, timeout=60, capture_output=True)
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(content), str(made)], check=True, timeout=60)
    assert made.stat().st_size < 2 * MIB, "what was never written takes no room"
    assert said[-1] == (9 * MIB, 9 * MIB)


def test_a_disk_that_was_written_as_a_stream_has_its_directory_told_at_the_end(tmp_path: Path, content: Path) -> None:
    """As VMware's own export does it; QEMU's tells it at the beginning."""
    disk = bytearray(as_vmdk(content, "streamOptimized").read_bytes())
    disk += bytes(-len(disk) % 512)
    footer = bytes(disk[:512])
    poke(56, b"\xff" * 8)(disk)
    made = tmp_path / "made.qcow2"
    with made.open("wb") as target:
        vmdk.convert(io.BytesIO(bytes(disk) + bytes(512) + footer + bytes(512)), target, "disk", silent)
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(content), str(made)], check=True, timeout=60)


@given(parts=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=9)), max_size=20))
def test_what_is_written_front_to_back_is_read_back(parts: list[tuple[int, bytes]]) -> None:
    target, expected, end = io.BytesIO(), bytearray(4096 * 16), 0
    writer = Qcow2Writer(target, len(expected))
    for at, text in sorted(parts, key=lambda part: part[0]):
        offset = max(at * 16, end)
        writer.write(offset, text[: len(expected) - offset])
        expected[offset : offset + len(text)] = text
        end = min(offset + len(text), len(expected))
    writer.finish()
    assert read_qcow2(target.getvalue()) == bytes(expected[: 4096 * 16])


def read_qcow2(image: bytes) -> bytes:
    (size,), (l1_at,) = struct.unpack_from(">Q", image, 24), struct.unpack_from(">Q", image, 40)
    found = bytearray(size)
    for index in range(-(-size // CLUSTER_BYTES)):
        number, i = divmod(index, CLUSTER_BYTES // 8)
        (table,) = struct.unpack_from(">Q", image, l1_at + 8 * number)
        at = struct.unpack_from(">Q", image, (table & ~(1 << 63)) + 8 * i)[0] & ~(1 << 63) if table else 0
        if at:
            part = image[at : at + CLUSTER_BYTES][: size - index * CLUSTER_BYTES]
            found[index * CLUSTER_BYTES : index * CLUSTER_BYTES + len(part)] = part
    return bytes(found)


def poke(at: int, value: bytes) -> Callable[[bytearray], None]:
    def work(disk: bytearray) -> None:
        disk[at : at + len(value)] = value

    return work


def describe_anew(text: str) -> Callable[[bytearray], None]:
    """Give the disk another descriptor."""

    def work(disk: bytearray) -> None:
        at, length = (struct.unpack_from("<Q", disk, place)[0] * 512 for place in (28, 36))
        disk[at : at + length] = text.encode().ljust(length, b"\0")

    return work


def bomb(disk: bytearray) -> None:
    """The first grain says that it is 64 MiB of zeros."""
    gd_at = struct.unpack_from("<Q", disk, 56)[0] * 512
    gt_at = struct.unpack_from("<I", disk, gd_at)[0] * 512
    grain_at = struct.unpack_from("<I", disk, gt_at)[0] * 512
    packed = zlib.compress(bytes(64 * MIB), 9)
    disk[grain_at + 8 : grain_at + 12] = struct.pack("<I", len(packed))
    disk[grain_at + 12 : grain_at + 12 + len(packed)] = packed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poke(0, b"COWD"), "no sparse VMDK"),
        (poke(12, struct.pack("<Q", 0)), "0 sectors"),  # the capacity that sends QEMU to a descriptor with other files
        (poke(12, struct.pack("<Q", 1 << 60)), "16 TiB"),
        (poke(20, struct.pack("<Q", 1 << 30)), "grains"),
        (poke(36, struct.pack("<Q", 1 << 40)), "descriptor has"),
        (poke(28, struct.pack("<Q", 1 << 63)), "descriptor lies outside"),
        (describe_anew('createType="monolithicFlat"\nRW 18432 FLAT "/etc/shadow" 0\n'), "monolithicFlat"),
        (describe_anew('createType="streamOptimized"\nparentCID=0badcafe\n'), "parent"),
        (describe_anew('createType="streamOptimized"\nparentFileNameHint="/etc/shadow"\n'), "parent"),
        (describe_anew('createType="streamOptimized"\nRW 1 SPARSE "a"\nRW 1 SPARSE "b"\n'), "several files"),
        (bomb, "too long|no possible size"),
    ],
)
def test_a_hostile_disk_is_refused_by_name(
    tmp_path: Path, content: Path, change: Callable[[bytearray], None], words: str
) -> None:
    disk = bytearray(as_vmdk(content, "streamOptimized").read_bytes())
    change(disk)
    with (tmp_path / "made").open("wb") as target, pytest.raises(CommandFailed, match=words):
        vmdk.convert(io.BytesIO(bytes(disk)), target, "evil", silent)


@given(cut=st.floats(0, 0.999), where=st.integers(0, 600), value=st.integers(0, 255))
def test_no_damage_of_a_disk_is_more_than_a_refusal(vmdk_bytes: bytes, cut: float, where: int, value: int) -> None:
    disk = bytearray(vmdk_bytes)
    disk[where] = value
    for damaged in (bytes(disk), vmdk_bytes[: int(len(vmdk_bytes) * cut)]):
        with contextlib.suppress(CommandFailed):
            vmdk.convert(io.BytesIO(damaged), io.BytesIO(), "damaged", silent)


@pytest.fixture(scope="module")
def vmdk_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    raw = tmp_path_factory.mktemp("vmdk") / "small.raw"
    raw.write_bytes(b"x" * MIB)
    return as_vmdk(raw, "streamOptimized").read_bytes()


def test_an_ova_says_what_it_is_and_what_cannot_be_said(tmp_path: Path, content: Path) -> None:
    plan = ova.read(make_ova(tmp_path / "shop.ova", shop(content)))
    assert (plan.name, plan.vcpus, plan.memory_mib, plan.firmware, plan.guest_os) == ("shop", 2, 512, "uefi", "linux")
    assert [(disk.label, disk.size_bytes) for disk in plan.disks] == [("shop-disk1.vmdk", 9 * MIB)]
    assert [card.source for card in plan.cards] == ["VM Network"]
    assert plan.unexpressed == ("device sound",)
    file, disk_format = plan.disks[0].unpack(tmp_path, silent)
    assert disk_format == "qcow2"
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(content), str(file)], check=True, timeout=60)


def refusals(content: Path) -> dict[str, tuple[dict[str, bytes], dict[str, Any], str]]:
    good = shop(content)
    plain = shop(content, manifest=False)
    return {
        "a way out": ({"../shop.ovf": good["shop.ovf"]}, {}, "leads out"),
        "an absolute name": ({"/etc/passwd": b"x"}, {}, "leads out"),
        "a link": (good, {"type": tarfile.SYMTYPE, "linkname": "/etc/shadow"}, "no plain file"),
        "a device": (good, {"type": tarfile.CHRTYPE}, "no plain file"),
        "too many": ({f"file{i}": b"" for i in range(65)}, {}, "more than 64 members"),
        "no descriptor": ({"shop-disk1.vmdk": good["shop-disk1.vmdk"]}, {}, "0 OVF descriptors"),
        "a large descriptor": ({**plain, "shop.ovf": b" " * (2 * MIB)}, {}, "1024 KiB"),
        "entities": ({**plain, "shop.ovf": b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'}, {}, "declares"),
        "entities in another encoding": ({**plain, "shop.ovf": OVF.encode("utf-16")}, {}, "not UTF-8"),
        "another file": (shop(content, manifest=False, href="/etc/shadow"), {}, "no member"),
        "another size": (shop(content, manifest=False, capacity=8), {}, "descriptor says"),
        "a changed descriptor": ({**good, "shop.ovf": good["shop.ovf"] + b" "}, {}, "manifest"),
        "two machines": ({**plain, "shop.ovf": b"<a><VirtualSystem/><VirtualSystem/></a>"}, {}, "2 machines"),
    }


def test_a_hostile_ova_is_refused_before_anything_is_unpacked(tmp_path: Path, content: Path) -> None:
    for name, (members, changes, words) in refusals(content).items():
        with pytest.raises(CommandFailed) as refused:
            ova.read(make_ova(tmp_path / "evil.ova", members, **changes))
        assert words in refused.value.message, name
    packed = tmp_path / "packed.ova"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(content, "x")
    with pytest.raises(CommandFailed, match="uncompressed"):
        ova.read(packed)


def test_a_disk_that_is_not_what_the_manifest_says_is_not_unpacked(tmp_path: Path, content: Path) -> None:
    members = shop(content)
    disk = bytearray(members["shop-disk1.vmdk"])
    disk[-700] ^= 1
    plan = ova.read(make_ova(tmp_path / "shop.ova", {**members, "shop-disk1.vmdk": bytes(disk)}))
    with pytest.raises(CommandFailed, match="manifest"):
        plan.disks[0].unpack(tmp_path, silent)


@given(text=st.text(max_size=300))
def test_no_text_is_more_than_a_refusal(text: str) -> None:
    with contextlib.suppress(CommandFailed):
        xml_safe.parse(text.encode("utf-8", "surrogatepass"), "it")


PROXMOX = """name: shop
memory: 2048
cores: 2
sockets: 2
bios: ovmf
ostype: l26
boot: order=scsi1;net0
scsi0: local-lvm:vm-100-disk-1,size=32G
scsi1: local-lvm:vm-100-disk-0,size=9M
ide2: none,media=cdrom
net0: virtio=52:54:00:AA:BB:CC,bridge=vmbr0,tag=20
hostpci0: 0000:41:00.0
efidisk0: local-lvm:vm-100-disk-2,size=4M
[before-upgrade]
memory: 1
"""


def test_a_configuration_of_proxmox_says_what_it_is_and_which_disks_it_wants(tmp_path: Path, content: Path) -> None:
    config = tmp_path / "100.conf"
    config.write_text(PROXMOX)
    with pytest.raises(CommandFailed) as refused:
        proxmox.read(config, {"scsi1": content})
    assert "scsi0 (local-lvm:vm-100-disk-1)" in refused.value.message
    plan = proxmox.read(config, {"scsi0": content, "scsi1": content})
    assert (plan.name, plan.vcpus, plan.memory_mib, plan.firmware, plan.guest_os) == ("shop", 4, 2048, "uefi", "linux")
    assert [disk.label for disk in plan.disks] == ["scsi1", "scsi0"], "it boots from the first"
    assert [(card.source, card.mac) for card in plan.cards] == [("vmbr0.20", "52:54:00:aa:bb:cc")]
    assert [line.partition(":")[0] for line in plan.unexpressed] == ["efidisk0", "hostpci0", "ide2"]
    config.write_text("this is none")
    with pytest.raises(CommandFailed, match="line 1"):
        proxmox.read(config, {})


# --- what is made of it -------------------------------------------------------------------------------------------------------


PROJECT = "/v1/projects/default"


def ready(controller: FakeController, *, image: str = "done", create: str = "done") -> None:
    controller.on("GET", f"{PROJECT}/images/shop-disk0", problem(404, "image-not-found", "not_found", "none"))
    controller.on("POST", f"{PROJECT}/uploads", lambda seen: Answer({"upload_id": "up-1", "sha256": ""}))
    controller.on("POST", f"{PROJECT}/images", Answer({"operation": operation(image, kind="image.import")}, status=202))
    controller.on("POST", f"{PROJECT}/vms", Answer({"operation": operation(create, kind="vm.create")}, status=202))
    controller.on("GET", f"{PROJECT}/vms/shop", Answer(vm("shop")))
    controller.on("DELETE", f"{PROJECT}/images/shop-disk0", Answer({"operation": operation(kind="image.delete")}, status=202))
    controller.on("DELETE", f"{PROJECT}/vms/shop", problem(404, "vm-not-found", "not_found", "none"))


def test_a_dry_run_lists_what_becomes_of_it_and_what_is_lost_and_sends_nothing(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path, content: Path
) -> None:
    archive = make_ova(tmp_path / "shop.ova", shop(content))
    refused = trimtab("vm", "import", "shop", str(archive), "--dry-run")
    assert (refused.code, "'VM Network=NETWORK'" in refused.err) == (2, True), refused.err
    shown = trimtab("vm", "import", "shop", str(archive), "--network", "VM Network=lan", "--dry-run")
    assert shown.code == 0, shown.err
    for line in (
        "shop becomes vm shop: 2 vcpus, 512 MiB",
        "shop-disk1.vmdk: 9 MiB",
        "network lan",
        "gone after the import: device sound",
    ):
        assert line in shown.out, shown.out
    assert controller.seen == []


def test_an_import_sends_the_disk_makes_an_image_and_then_the_vm(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path, content: Path
) -> None:
    ready(controller)
    archive = make_ova(tmp_path / "shop.ova", shop(content))
    done = trimtab("vm", "import", "shop", str(archive), "--network", "VM Network=lan", "--pool", "fast")
    assert (done.code, "vm shop is running" in done.out) == (0, True), done.err
    (image,), (made,) = controller.asked("POST", f"{PROJECT}/images"), controller.asked("POST", f"{PROJECT}/vms")
    assert image.document["format"] == "qcow2"
    wanted = {
        "name": "shop",
        "image": "shop-disk0",
        "vcpus": 2,
        "memory_mib": 512,
        "firmware": "uefi",
        "os": "linux",
        "pool": "fast",
    }
    assert wanted.items() <= made.document.items()
    assert made.document["networks"] == [{"network": "lan"}]
    assert controller.asked("DELETE", f"{PROJECT}/images/shop-disk0") == []


def test_an_import_that_fails_takes_away_what_it_made(
    trimtab: Trimtab, controller: FakeController, tmp_path: Path, content: Path
) -> None:
    ready(controller, create="failed")
    archive = make_ova(tmp_path / "shop.ova", shop(content))
    failed = trimtab("vm", "import", "shop", str(archive), "--no-networks")
    assert failed.code != 0
    assert len(controller.asked("DELETE", f"{PROJECT}/images/shop-disk0")) == 1


def test_a_disk_alone_needs_its_memory_said_and_a_backup_of_proxmox_is_none(
    trimtab: Trimtab, tmp_path: Path, content: Path
) -> None:
    refused = trimtab("vm", "import", "shop", str(content), "--dry-run")
    assert (refused.code, "--memory" in refused.err) == (2, True)
    (backup := tmp_path / "dump.vma").write_bytes(b"VMA")
    refused = trimtab("vm", "import", "shop", str(backup), "--memory", "1GiB", "--dry-run")
    assert (refused.code, "is a backup" in refused.err) == (2, True)


VIRSH = """#!/bin/sh
echo "$@" >>{log}
case "$3" in
domstate) echo "{state}";;
dumpxml) cat {xml};;
vol-download) cp "$5" "$6";;
esac
"""
LEGACY = """<domain type='kvm'><name>legacy-db</name><memory unit='KiB'>524288</memory><vcpu>2</vcpu><os><type>hvm</type></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk><interface type='bridge'><mac address='52:54:00:0F:00:01'/>
<source bridge='br0'/></interface><watchdog model='i6300esb' action='reset'/></devices></domain>
"""


def fake_virsh(tmp_path: Path, content: Path, monkeypatch: pytest.MonkeyPatch, *, state: str = "shut off") -> Path:
    """A virsh that answers for one domain, and remembers what it was asked."""
    log, xml, program = tmp_path / "asked", tmp_path / "legacy.xml", tmp_path / "bin" / "virsh"
    xml.write_text(LEGACY.format(disk=content))
    program.parent.mkdir()
    program.write_text(VIRSH.format(log=log, xml=xml, state=state))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return log


def test_a_domain_of_another_host_is_copied_by_that_hosts_own_libvirt(
    tmp_path: Path, content: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_virsh(tmp_path, content, monkeypatch)
    plan = libvirt_domain.read("qemu+ssh://root@old1/system/legacy-db")
    assert (plan.name, plan.vcpus, plan.memory_mib, plan.firmware) == ("legacy-db", 2, 512, "bios")
    assert [(card.source, card.mac) for card in plan.cards] == [("br0", "52:54:00:0f:00:01")]
    assert plan.unexpressed == ("a cdrom drive; `trimtab vm cdrom` puts an imported ISO in", "devices/watchdog (i6300esb)")
    (scratch := tmp_path / "scratch").mkdir()
    file, disk_format = plan.disks[0].unpack(scratch, silent)
    assert (disk_format, file.read_bytes() == content.read_bytes()) == ("raw", True)
    asked = log.read_text().splitlines()
    assert [line.split()[2] for line in asked] == ["domstate", "dumpxml", "vol-download"], "nothing that would change it"


def test_a_domain_that_runs_and_a_uri_that_could_run_programs_are_refused(
    tmp_path: Path, content: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_virsh(tmp_path, content, monkeypatch, state="running")
    with pytest.raises(CommandFailed, match="is running"):
        libvirt_domain.read("qemu:///system/legacy-db")
    log.unlink()
    for place in (
        "qemu+ssh://old1/system?command=/bin/sh/legacy-db",
        "qemu+ext:///system/x",
        "test:///default/test",
        "qemu:///system/--help",
    ):
        with pytest.raises(CommandFailed, match="URI/DOMAIN"):
            libvirt_domain.read(place)
    assert not log.exists(), "nobody was asked"


def test_an_import_that_is_interrupted_cancels_what_runs_and_takes_away_what_it_made(
    program: Program, controller: FakeController, tmp_path: Path, content: Path
) -> None:
    ready(controller)
    creating = operation("running", id="op-creating", kind="vm.create")
    controller.on("POST", f"{PROJECT}/vms", Answer({"operation": creating}, status=202))
    asked = threading.Event()

    def still(_seen: Seen) -> Answer:
        asked.set()
        return Answer(creating)

    controller.on("GET", "/v1/operations/op-creating", still)
    controller.on("GET", "/v1/operations/op-creating:wait", still)

    def cancel(_seen: Seen) -> Answer:
        ended = Answer(operation("cancelled", id="op-creating", kind="vm.create"))
        controller.on("GET", "/v1/operations/op-creating", ended)
        controller.on("GET", "/v1/operations/op-creating:wait", ended)
        return ended

    controller.on("POST", "/v1/operations/op-creating:cancel", cancel)
    running = program.start("vm", "import", "shop", str(make_ova(tmp_path / "shop.ova", shop(content))), "--no-networks")
    assert asked.wait(30)
    running.send_signal(signal.SIGINT)
    _out, err = running.communicate(timeout=30)
    assert running.returncode != 0, err
    assert len(controller.asked("POST", "/v1/operations/op-creating:cancel")) == 1, err
    assert len(controller.asked("DELETE", f"{PROJECT}/images/shop-disk0")) == 1, err
