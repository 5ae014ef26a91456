"""Adopting and releasing over libvirt's own API, on its test driver: definitions, metadata and autostart are real there, guests are not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import domain_facts, domains
from trimtab_agent.hypervisor.kvm.adoption import Adoption, obstacles
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.consoles import ConsoleSockets
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_controller.core.adoption import HostFacts, NetworkChoice, PoolPlace, plan
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
    with opened.use("leave nothing to the next test", changes=True) as connection:
        for domain in connection.listAllDomains(0):
            if domain.name() != "test":
                remove(domain)
    opened.stop()


def remove(domain: Any) -> None:
    """The test driver's domains are the process's, whichever connection made them."""
    is_persistent = domain.isPersistent()
    if domain.isActive():
        domain.destroy()
    if not is_persistent:
        return
    if domain.hasManagedSaveImage(0):
        domain.managedSaveRemove(0)
    for state in (*domain.listAllSnapshots(0), *domain.listAllCheckpoints(0)):
        state.delete(0)
    domain.undefine()


@pytest.fixture
def spec(tmp_path: Path, connection: Connection) -> DomainSpec:
    """The vm that the domain `legacy` shall be; its disk lies in the pool's directory, and libvirt starts it at boot."""
    pool = PoolSpec(pool_id="pool-a", path=str(tmp_path))
    PoolLayout.of(pool).create_subdirectories()
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    with connection.use("define a stranger", changes=True) as opened:
        opened.defineXML(DEFINITION.format(uuid=UUID, path=tmp_path / "a.img")).setAutostart(1)
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
    with connection.use("look") as opened:
        found = domains.require(opened, "vm-a")
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
    with connection.use("look") as opened:
        assert (opened.lookupByName("legacy").autostart(), domains.find(opened, "vm-a")) == (1, None)


# --- what is refused before anything changes, as the dry run lists it --------------------------------------------------------


class Guest:
    """A domain of the test driver, which knows no jobs: `job` is what libvirt says of the one under way."""

    def __init__(self, domain: Any, job: dict[str, int] | None = None) -> None:
        self._domain, self._job = domain, job or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def jobStats(self, _flags: int) -> dict[str, int]:
        return self._job


MIGRATION = {"operation": libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT, "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED}


def save(domain: Any) -> None:
    domain.create()
    domain.managedSave(0)


def snapshot(domain: Any) -> None:
    for name in ("one", "two"):
        domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>", 0)


def checkpoint(domain: Any) -> None:
    domain.create()
    domain.checkpointCreateXML("<domaincheckpoint><name>daily</name></domaincheckpoint>", 0)
    domain.destroy()


STATES: list[tuple[Callable[[Any], None], str]] = [
    (save, "has a saved memory image; start it, or drop that with `virsh managedsave-remove`"),
    (snapshot, "has 2 snapshots; delete them with `virsh snapshot-delete`"),
    (checkpoint, "has checkpoints of another backup program; delete them with `virsh checkpoint-delete`"),
]


def refusals(adoption: Adoption, spec: DomainSpec, name: str = "legacy") -> list[tuple[str, str]]:
    """Return what the dry run refuses the domain for: code and sentence."""
    place = PoolPlace(id="pool-a", name="fast", path=spec.pools[0].path)
    lan = NetworkChoice("net-a", "lan")
    host = HostFacts(
        name="node1", machines=("pc-q35-7.2",), cpu_model="qemu64", usable_cpu_models=("qemu64",), cpu_features=(),
        lists_all_cpu_features=True, pools=(place,), networks={"br0": lan},
    )  # fmt: skip
    planned = plan(replace(adoption.describe(name, "").live, machine="pc-q35-7.2"), host)
    return [(one.code, one.message) for one in planned.refusals]


@pytest.mark.parametrize(("change", "said"), STATES, ids=[one[0].__name__ for one in STATES])
def test_state_that_libvirt_keeps_beside_the_definition_is_refused(
    connection: Connection, adoption: Adoption, spec: DomainSpec, tmp_path: Path, change: Callable[[Any], None], said: str
) -> None:
    assert refusals(adoption, spec) == []
    with connection.use("have state", changes=True) as opened:
        change(opened.lookupByName("legacy"))
    assert refusals(adoption, spec) == [("domain-not-adoptable", f"domain legacy: it {said}")]
    with pytest.raises(Conflict, match="changed since it was looked at"):
        adoption.adopt(UUID, spec, disks(tmp_path), Stamp(1, 1))
    assert not (tmp_path / "volumes" / "vol-a.raw").exists()


def test_a_domain_without_a_definition_and_one_on_its_way_are_refused(connection: Connection, spec: DomainSpec) -> None:
    with connection.use("run", changes=True) as opened:
        domain = opened.lookupByName("legacy")
        domain.create()
        assert obstacles(Guest(domain)) == ()
        assert obstacles(Guest(domain, MIGRATION)) == ("it is being migrated; wait for the end of that",)
        domain.undefine()
        (said,) = obstacles(Guest(domain))
        assert "it is transient" in said
        assert "virsh define" in said


def test_a_disk_of_another_vm_is_refused_under_each_of_its_names(
    connection: Connection, adoption: Adoption, spec: DomainSpec, tmp_path: Path
) -> None:
    adoption.adopt(UUID, spec, disks(tmp_path), Stamp(1, 1))
    paths = {"own": tmp_path / "a.img", "volume": tmp_path / "volumes" / "vol-a.raw"}
    with connection.use("define strangers on it", changes=True) as opened:
        for number, (name, path) in enumerate(paths.items()):
            xml = DEFINITION.format(uuid=f"{UUID[:-1]}{number}", path=path).replace("<name>legacy", f"<name>{name}")
            opened.defineXML(xml)
    for name in paths:
        ((code, said),) = refusals(adoption, spec, name)
        assert (code, "another name too" in said) == ("disk-not-adoptable", True)
    adoption.release(spec, has_autostart=True)
    assert refusals(adoption, spec, "own") == [], "it is nobody's again"


def test_a_domain_with_a_device_of_its_host_is_refused(connection: Connection, adoption: Adoption, spec: DomainSpec) -> None:
    device = (
        "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0x0000' bus='0x06' slot='0x02' "
        "function='0x0'/></source></hostdev></devices>"
    )
    with connection.use("give it a device", changes=True) as opened:
        domain = opened.lookupByName("legacy")
        opened.defineXML(domain.XMLDesc(0).replace("</devices>", device))
    said = "domain legacy: a device of its host is passed through to it; detach it with `virsh detach-device` first"
    assert refusals(adoption, spec) == [("domain-not-adoptable", said)]


def test_another_vms_domain_and_a_disk_that_changed_are_refused(adoption: Adoption, spec: DomainSpec, tmp_path: Path) -> None:
    elsewhere = [AdoptedDisk(target="vdb", path=str(tmp_path / "b.img"), volume_id="vol-a")]
    with pytest.raises(Conflict, match="look at the domain again"):
        adoption.adopt(UUID, spec, elsewhere, Stamp(1, 1))
    adoption.adopt(UUID, spec, disks(tmp_path), Stamp(1, 1))
    with pytest.raises(Conflict, match="belongs to vm-a"):
        adoption.adopt(UUID, replace(spec, vm_id="vm-b"), disks(tmp_path), Stamp(1, 1))
    with pytest.raises(NotFound):
        adoption.describe("nobody", "")
