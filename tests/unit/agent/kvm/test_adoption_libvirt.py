"""Adopting and releasing over libvirt's own API, on its test driver: definitions, metadata and autostart are real there, guests are not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import domain_facts, domains
from trimtab_agent.hypervisor.kvm.adoption import Adoption
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.consoles import ConsoleSockets
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.adoption_messages import AdoptedDisk
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import DiskFormat, DiskSpec, DomainSpec, PoolSpec

UUID = "3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d0e"
DEFINITION = """
<domain type='test'><name>legacy</name><uuid>{uuid}</uuid><memory unit='MiB'>96</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='vdb' bus='virtio'/></disk>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/></interface>
</devices></domain>
"""


@pytest.fixture
def connection() -> Iterator[Connection]:
    opened = Connection("test:///default", on_open=lambda _connection: None, on_up=lambda: None)
    opened.start()
    assert opened.wait_until_up(20)
    yield opened
    opened.stop()


@pytest.fixture
def spec(tmp_path: Path, connection: Connection) -> DomainSpec:
    """The vm that the domain `legacy` shall be; its disk lies in the pool's directory, and libvirt starts it at boot."""
    pool = PoolSpec(pool_id="pool-a", path=str(tmp_path))
    PoolLayout.of(pool).create_subdirectories()
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    with connection.use("define a stranger", changes=True) as libvirt:
        libvirt.defineXML(DEFINITION.format(uuid=UUID, path=tmp_path / "a.img")).setAutostart(1)
    return DomainSpec(
        vm_id="vm-a", uuid=UUID, name="db", project="p", machine="pc-q35-7.2", cpu_model="qemu64", vcpus=1, vcpus_max=1,
        memory_mib=96, memory_max_mib=96, pools=(pool,),
        disks=(DiskSpec(volume_id="vol-a", pool_id="pool-a", format=DiskFormat.RAW, index=0),),
    )  # fmt: skip


@pytest.fixture
def adoption(connection: Connection, tmp_path: Path) -> Adoption:
    observer = Observer("boot")
    ours = domains.Domains(
        connection,
        observer,
        ConsoleLogs(tmp_path / "logs"),
        ConsoleSockets(tmp_path / "run"),
        Firewall(tmp_path / "firewall"),
        accelerator=lambda: "tcg",
        refuse_unfit=lambda _spec: None,
    )
    return Adoption(connection, ours, observer, boot_id="boot")


def disks(tmp_path: Path) -> list[AdoptedDisk]:
    return [AdoptedDisk(target="vdb", path=str(tmp_path / "a.img"), volume_id="vol-a")]


def test_a_domain_is_ours_under_its_own_name_and_plain_again(
    connection: Connection, adoption: Adoption, spec: DomainSpec, tmp_path: Path
) -> None:
    described = adoption.describe("legacy", "").live
    assert (described.uuid, described.has_autostart, described.obstacles) == (UUID, True, ())
    assert (described.disks[0].size_bytes, described.disks[0].problem) == (1 << 20, "")
    for turn in (1, 2):
        seen = adoption.adopt(UUID, spec, disks(tmp_path), Stamp(1, turn))
        assert (seen.vm_id, seen.name, seen.epoch, seen.turn) == ("vm-a", "legacy", 1, turn)
    assert (tmp_path / "volumes" / "vol-a.raw").exists()
    with connection.use("look") as libvirt:
        found = domains.require(libvirt, "vm-a")
        assert (found.name(), found.autostart(), domains.is_adopted(found)) == ("legacy", 0, True)
        # A later command's stamp keeps the mark.
        domains.write_stamp(found, domain_facts.read(found.XMLDesc(0)), Stamp(2, 9), boot_id="")
        facts = domain_facts.read(found.XMLDesc(0))
        assert (facts.epoch, facts.adopted_disks) == (2, {"vdb": "vol-a"})
    assert adoption.describe("", "vm-a").live.disks[0].volume_id == "vol-a"
    for _repeat in range(2):
        assert adoption.release(spec, has_autostart=True).vm_id == ""
    assert not (tmp_path / "volumes" / "vol-a.raw").exists()
    assert (tmp_path / "a.img").exists()
    with connection.use("look") as libvirt:
        assert (libvirt.lookupByName("legacy").autostart(), domains.find(libvirt, "vm-a")) == (1, None)


def test_another_vms_domain_and_a_disk_that_changed_are_refused(adoption: Adoption, spec: DomainSpec, tmp_path: Path) -> None:
    elsewhere = [AdoptedDisk(target="vdb", path=str(tmp_path / "b.img"), volume_id="vol-a")]
    with pytest.raises(Conflict, match="look at the domain again"):
        adoption.adopt(UUID, spec, elsewhere, Stamp(1, 1))
    adoption.adopt(UUID, spec, disks(tmp_path), Stamp(1, 1))
    with pytest.raises(Conflict, match="belongs to vm-a"):
        adoption.adopt(UUID, replace(spec, vm_id="vm-b"), disks(tmp_path), Stamp(1, 1))
    with pytest.raises(NotFound):
        adoption.describe("nobody", "")
