"""What a stranger's definition is said to be, and the names that its files get and lose."""

import os
from pathlib import Path

import pytest

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import adoption_files, description, domain_facts
from trimtab_agent.hypervisor.kvm.domain_xml import METADATA_NAMESPACE
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.stamp_xml import AdoptedMark, stamp_metadata
from trimtab_protos.adoption_messages import DomainDescription
from trimtab_protos.errors import Conflict, InvalidRequest, TrimtabError
from trimtab_protos.messages import DiskFormat, DiskSpec, DomainSpec, DomainState, Firmware, PoolSpec

UUID = "3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d0e"
DISK = DiskSpec(volume_id="vol-a", pool_id="pool-a", format=DiskFormat.QCOW2, index=0)
HEAD = f"<domain type='qemu'><name>legacy</name><uuid>{UUID}</uuid><memory unit='MiB'>96</memory><vcpu>2</vcpu>"


def described(rest: str) -> DomainDescription:
    xml = f"{HEAD}<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>{rest}</domain>"
    return description.describe(xml, state=DomainState.RUNNING, is_persistent=True, has_autostart=False, volumes={}, obstacles=())


def test_what_no_field_says_is_listed_and_nothing_else() -> None:
    seen = described(
        "<cputune/><devices><emulator>q</emulator><watchdog model='i6300esb'/><sound model='ich9'/><graphics type='spice'/>"
        "<graphics type='vnc'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        "<channel type='spicevmc'/><filesystem type='mount'/></devices>"
    )
    assert seen.kept == (
        "cputune",
        "devices/channel (spicevmc)",
        "devices/filesystem (mount)",
        "devices/graphics (spice)",
        "devices/sound (ich9)",
        "devices/watchdog (i6300esb)",
    )
    assert (seen.vcpus, seen.memory_mib, seen.firmware, seen.obstacles) == (2, 96, Firmware.BIOS, ())


@pytest.mark.parametrize(
    ("devices", "word"),
    [
        ("<hostdev mode='subsystem' type='pci'/>", "passed through"),
        ("<interface type='hostdev'/>", "passed through"),
        ("<interface type='user'><mac address='52:54:00:00:00:01'/></interface>", "type user"),
    ],
)
def test_what_cannot_be_taken_over_is_an_obstacle(devices: str, word: str) -> None:
    assert word in described(f"<devices>{devices}</devices>").obstacles[0]


@pytest.mark.parametrize(
    ("disk", "word"),
    [
        ("<disk type='block' device='disk'><source dev='/dev/sda'/><target dev='vda'/></disk>", "type block"),
        ("<disk type='file' device='disk'><source file='/a'/><shareable/><target dev='vda'/></disk>", "shareable"),
        (
            "<disk type='file' device='disk'><source file='/a'/><backingStore type='file'><source file='/b'/></backingStore></disk>",
            "backing file",
        ),
    ],
)
def test_a_disk_that_cannot_be_a_volume_says_why(disk: str, word: str) -> None:
    assert word in described(f"<devices>{disk}</devices>").disks[0].problem


def test_a_domain_is_ours_by_its_uuid_whatever_it_is_called_and_its_clone_is_not() -> None:
    mark = stamp_metadata(
        "vm-a", name="db", project="p", stamp=Stamp(3, 4), boot_id="", restarts_elsewhere=False,
        adopted=AdoptedMark(UUID, {"vdb": "vol-a"}),
    )  # fmt: skip
    inner = mark.replace("<domain>", f"<domain xmlns='{METADATA_NAMESPACE}'>")
    ours = domain_facts.read(f"{HEAD}<metadata>{inner}</metadata></domain>")
    assert (ours.vm_id, ours.epoch, ours.turn, ours.adopted_disks) == ("vm-a", 3, 4, {"vdb": "vol-a"})
    clone = f"{HEAD}<metadata>{inner}</metadata></domain>".replace(f"<uuid>{UUID}", "<uuid>00000000-0000-4000-8000-000000000000")
    assert domain_facts.read(clone).vm_id == ""


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> PoolLayout:
    layout = PoolLayout.of(PoolSpec(pool_id="pool-a", path=str(tmp_path)))
    layout.create_subdirectories()
    return layout


def spec(pool: PoolLayout) -> DomainSpec:
    return DomainSpec(
        vm_id="vm-a", uuid=UUID, name="db", project="p", machine="pc-q35-7.2", cpu_model="qemu64", vcpus=1, vcpus_max=1,
        memory_mib=96, memory_max_mib=96, disks=(DISK,), pools=(PoolSpec(pool_id="pool-a", path=str(pool.path)),),
    )  # fmt: skip


def test_a_file_gets_its_volumes_name_beside_its_own_and_loses_its_own_last(pool: PoolLayout) -> None:
    own, volume = pool.path / "db.qcow2", pool.path / "volumes" / "vol-a.qcow2"
    own.write_bytes(b"content")
    for _repeat in range(2):
        adoption_files.link(str(own), DISK, pool)
    assert os.stat(own).st_ino == os.stat(volume).st_ino
    adoption_files.drop_names((str(own),), spec(pool))
    assert not own.exists()
    assert volume.read_bytes() == b"content"


def test_a_name_that_became_another_file_is_left_alone(pool: PoolLayout) -> None:
    own = pool.path / "db.qcow2"
    own.write_bytes(b"content")
    adoption_files.link(str(own), DISK, pool)
    own.unlink()
    own.write_bytes(b"somebody's")
    adoption_files.drop_names((str(own),), spec(pool))
    assert own.read_bytes() == b"somebody's"


def test_a_release_removes_a_second_name_only_where_nothing_uses_it_and_the_file_has_another(pool: PoolLayout) -> None:
    own, volume = pool.path / "db.qcow2", pool.path / "volumes" / "vol-a.qcow2"
    own.write_bytes(b"content")
    adoption_files.link(str(own), DISK, pool)
    adoption_files.drop_links(spec(pool), frozenset({str(volume)}))
    assert volume.exists()
    adoption_files.drop_links(spec(pool), frozenset({str(own)}))
    assert (own.exists(), volume.exists()) == (True, False)
    adoption_files.link(str(own), DISK, pool)
    own.unlink()
    adoption_files.drop_links(spec(pool), frozenset())
    assert volume.read_bytes() == b"content", "the last name of a file is never removed"


def test_links_and_strangers_names_are_not_followed(pool: PoolLayout, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.qcow2"
    outside.write_bytes(b"secret")
    (pool.path / "link.qcow2").symlink_to(outside)
    (pool.path / "folder").symlink_to(outside.parent)
    for path in (outside, pool.path / "link.qcow2", pool.path / "folder" / "secret.qcow2", pool.path / ".." / "x.qcow2"):
        with pytest.raises(TrimtabError):
            adoption_files.link(str(path), DISK, pool)
    assert os.listdir(pool.path / "volumes") == []
    taken = pool.path / "volumes" / "vol-a.qcow2"
    taken.write_bytes(b"another vm's")
    (pool.path / "db.qcow2").write_bytes(b"content")
    with pytest.raises(Conflict):
        adoption_files.link(str(pool.path / "db.qcow2"), DISK, pool)
    with pytest.raises(InvalidRequest):
        adoption_files.link(str(outside), DISK, pool)
    assert taken.read_bytes() == b"another vm's"


def test_the_format_is_as_declared_and_never_probed(pool: PoolLayout) -> None:
    evil = pool.path / "evil.img"
    evil.write_bytes(b"QFI\xfb" + bytes(508))
    assert adoption_files.look_at(str(evil), "raw") == (512, "")
    assert adoption_files.look_at(str(evil), "qcow2")[1]
    assert "vmdk" in adoption_files.look_at(str(evil), "vmdk")[1]
