"""The definition that travels: the same hardware, the target's paths and bridges."""

from xml.etree import ElementTree

import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import domain_facts
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits, build
from trimtab_agent.hypervisor.kvm.migration_xml import disk_targets, retarget
from trimtab_agent.hypervisor.kvm.resource_xml import read_floor
from trimtab_protos.device_messages import CdromSpec, GuestResources
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DiskFormat, DomainSpec, Firmware

HOST = HostTraits(accelerator="tcg", console_log="/var/log/libvirt/qemu/x.log", console_socket="/run/trimtab/console-x.sock")


def live(spec: DomainSpec) -> str:
    """As libvirt shows a running domain: with the chain behind its disk."""
    root = ElementTree.fromstring(build(spec, Stamp(epoch=1, turn=4), HOST, boot_id="boot-1"))
    disk = root.find("devices/disk")
    if disk is not None:
        ElementTree.SubElement(
            ElementTree.SubElement(disk, "backingStore", type="file"), "source", file="/srv/pools/fast/images/i.qcow2"
        )
    return ElementTree.tostring(root, encoding="unicode")


def test_only_what_differs_between_hosts_changes() -> None:
    spec = make.domain(firmware=Firmware.UEFI)
    target = make.domain(firmware=Firmware.UEFI, pools=(make.pool("/data/vms"),), networks=(make.bridge_network(bridge="br7"),))
    moved = retarget(live(spec), target, Stamp(epoch=2, turn=5))
    facts = domain_facts.read(moved)
    assert (facts.epoch, facts.turn, facts.boot_id) == (2, 5, "")
    assert facts.disk_paths == ("/data/vms/volumes/vol-01hdisk0.qcow2", "/data/vms/vms/vm-01hweb/seed.iso")
    assert facts.nvram_path == "/data/vms/vms/vm-01hweb/nvram.fd"
    wanted = build(target, Stamp(epoch=2, turn=5), HOST)
    assert ElementTree.canonicalize(moved, strip_text=True) == ElementTree.canonicalize(wanted, strip_text=True)


def test_a_disk_or_card_that_the_vm_lacks_is_not_carried_along() -> None:
    two = make.domain(disks=(make.disk(0), make.disk(1, format=DiskFormat.RAW)), nics=(make.nic(0), make.nic(1)))
    with pytest.raises(Conflict) as refused:
        retarget(live(two), make.domain(nics=two.nics), Stamp(epoch=2, turn=5))
    assert refused.value.code == "disk-unknown"
    with pytest.raises(Conflict) as refused:
        retarget(live(two), make.domain(disks=two.disks), Stamp(epoch=2, turn=5))
    assert refused.value.code == "nic-unknown"


def test_shares_of_the_cpus_and_the_balloons_floor_are_the_targets() -> None:
    """Its host may be of a class that gives more or less."""
    was = GuestResources(balloon_min_mib=48, cpu_weight=25, cpu_limit_percent=50)
    for becomes in (GuestResources(balloon_min_mib=64, cpu_weight=400), None):
        target = make.domain(resources=becomes)
        moved = ElementTree.fromstring(retarget(live(make.domain(resources=was)), target, Stamp(epoch=2, turn=5)))
        wanted = ElementTree.fromstring(build(target, Stamp(epoch=2, turn=5), HOST))
        assert [each.text for each in moved.findall("cputune/*")] == [each.text for each in wanted.findall("cputune/*")]
        assert read_floor(moved) == read_floor(wanted)


def test_both_drives_find_their_images_by_the_targets_own_copies() -> None:
    install, drivers = CdromSpec(boot_order=2), CdromSpec(image_id="img-01hvirtio", pool_id="pool-fast")
    target = make.domain(cdrom=install, drivers=drivers, pools=(make.pool("/data/vms"),))
    moved = retarget(live(make.domain(cdrom=install, drivers=drivers)), target, Stamp(epoch=2, turn=5))
    assert domain_facts.read(moved).disk_paths[1:] == ("/data/vms/images/img-01hvirtio.iso", "/data/vms/vms/vm-01hweb/seed.iso")


def test_disks_to_copy_go_by_libvirts_names() -> None:
    spec = make.domain(disks=(make.disk(0), make.disk(2)))
    assert disk_targets(spec, frozenset({"vol-01hdisk2"})) == ["vdc"]


def test_the_medium_in_the_drive_is_found_by_the_targets_own_copy() -> None:
    cdrom = CdromSpec(image_id="img-01hiso", pool_id="pool-fast", boot_order=2)
    target = make.domain(cdrom=cdrom, pools=(make.pool("/data/vms"),))
    moved = retarget(live(make.domain(cdrom=cdrom)), target, Stamp(epoch=2, turn=5))
    assert "/data/vms/images/img-01hiso.iso" in domain_facts.read(moved).disk_paths
    empty = make.domain(cdrom=CdromSpec(boot_order=2))
    assert domain_facts.read(retarget(live(empty), empty, Stamp(epoch=2, turn=5))).disk_paths == (
        "/srv/pools/fast/volumes/vol-01hdisk0.qcow2",
        "/srv/pools/fast/vms/vm-01hweb/seed.iso",
    )
