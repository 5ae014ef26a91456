"""The definition of a vm: golden files, stable hardware, and nothing that a field's text can smuggle in.

`REGENERATE_GOLDEN=1 pytest tests/unit/agent/kvm/test_domain_xml.py` writes the golden files anew; read the difference.
"""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import cpu_features, domain_facts
from trimtab_agent.hypervisor.kvm.domain_xml import METADATA_NAMESPACE, Export, HostTraits, build
from trimtab_agent.hypervisor.kvm.filling import parse_export
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_controller.core.cpu_features import of_adopted
from trimtab_protos.device_messages import CdromSpec, GuestResources
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskBus, DiskFormat, DomainSpec, Firmware

GOLDEN = Path(__file__).parent / "golden"
TCG = HostTraits(
    accelerator="tcg",
    console_log="/var/log/libvirt/qemu/trimtab-vm-01hweb.serial.log",
    console_socket="/run/trimtab/console-x.sock",
)
KVM = replace(TCG, accelerator="kvm")
STAMP = Stamp(epoch=3, turn=7)

# What somebody's definition has; a vm has no `forbid` and no `force`.
ADOPTED_CPU = """
<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>Nehalem</model><feature policy='require' name='aes'/>
<feature policy='disable' name='vmx'/><feature policy='optional' name='svm'/><feature policy='forbid' name='mpx'/>
<feature policy='force' name='hle'/></cpu>
"""
ADOPTED_FEATURES, _ = of_adopted(cpu_features.described(parse(ADOPTED_CPU)))
CASES: dict[str, tuple[DomainSpec, HostTraits]] = {
    "bios_tcg": (make.domain(), TCG),
    "uefi_secure_kvm": (make.domain(firmware=Firmware.UEFI, has_secure_boot=True), KVM),
    "growing_kvm": (make.domain(vcpus=2, vcpus_max=8, memory_mib=1024, memory_max_mib=4096, cpu_features=("aes", "-vmx")), KVM),
    "adopted_features": (make.domain(cpu_model="Nehalem", cpu_features=ADOPTED_FEATURES), KVM),
    "many_devices": (
        make.domain(
            disks=(
                make.disk(0, boot_order=2),
                make.disk(1, format=DiskFormat.RAW, boot_order=1),
                make.disk(2, bus=DiskBus.SCSI, is_read_only=True, iops_limit=500, bandwidth_limit_bytes_s=100 << 20),
                make.disk(3, bus=DiskBus.SATA),
            ),
            nics=(make.nic(0), make.nic(1, network_id="net-nat", model="e1000e", addresses=("10.20.0.5/24",))),
            networks=(make.bridge_network(mtu=9000), make.nat_network()),
        ),
        KVM,
    ),
    "windows_from_iso": (
        make.domain(
            disks=(make.disk(0, bus=DiskBus.SATA, boot_order=1),),
            nics=(make.nic(0, model="e1000e"),),
            seed=None,
            firmware=Firmware.UEFI,
            has_secure_boot=True,
            cdrom=CdromSpec(image_id="img-01hwin", pool_id="pool-fast", boot_order=2),
            drivers=CdromSpec(image_id="img-01hvirtio", pool_id="pool-fast"),
            has_tpm=True,
            has_local_time_clock=True,
            has_hyperv=True,
        ),
        KVM,
    ),
    "an_empty_drive": (make.domain(cdrom=CdromSpec(boot_order=2), has_hyperv=True), TCG),
    "shared_and_squeezed": (
        make.domain(resources=GuestResources(balloon_min_mib=64, cpu_weight=25, cpu_limit_percent=50)),
        replace(KVM, cpu_shares=100),
    ),
    "without_disks": (make.domain(disks=(), nics=(), networks=(), seed=None), TCG),
}
ALLOWED_DEVICES = {
    *(
        "emulator",
        "controller",
        "disk",
        "interface",
        "serial",
        "console",
        "channel",
        "graphics",
        "video",
        "memballoon",
        "rng",
        "tpm",
        "memory",
    ),
}


def xml_of(spec: DomainSpec, host: HostTraits = TCG) -> str:
    return build(spec, STAMP, host)


@pytest.mark.parametrize("name", CASES)
def test_definition_is_as_reviewed(name: str) -> None:
    spec, host = CASES[name]
    built, golden = xml_of(spec, host), GOLDEN / f"{name}.xml"
    if os.environ.get("REGENERATE_GOLDEN"):
        golden.write_text(built)
    assert built == golden.read_text()


def addresses(xml: str) -> dict[str, str]:
    """Alias → PCI place of every device that the user knows."""
    found = {}
    for device in ElementTree.fromstring(xml).find("devices") or ():
        alias, address = device.find("alias"), device.find("address")
        if alias is not None and address is not None:
            found[alias.get("name", "")] = f"{address.get('bus')}:{address.get('slot')}.{address.get('function')}"
    return found


def test_devices_stay_where_they_are_when_others_come_and_go() -> None:
    few = addresses(xml_of(make.domain()))
    more = addresses(xml_of(make.domain(disks=(make.disk(0), make.disk(3)), nics=(make.nic(0), make.nic(2)), spare_pcie_ports=2)))
    assert few.items() <= more.items()


def test_every_device_has_a_port_of_its_own() -> None:
    spec = make.domain(disks=tuple(make.disk(i) for i in range(6)), nics=tuple(make.nic(i) for i in range(6)))
    root = ElementTree.fromstring(xml_of(spec))
    ports = {element.get("index") for element in root.findall("devices/controller[@model='pcie-root-port']")}
    places = [
        (address.get("bus"), address.get("slot"), address.get("function"))
        for device in root.find("devices") or ()
        for address in device.findall("address[@type='pci']")
    ]
    assert len(set(places)) == len(places)
    assert {str(int(bus or "0", 16)) for bus, _, _ in places} - {"0"} <= ports


def test_facts_read_back_what_was_written() -> None:
    facts = domain_facts.read(build(make.domain(), STAMP, KVM, boot_id="b-1"))
    assert (facts.vm_id, facts.name, facts.project, facts.epoch, facts.turn, facts.boot_id) == (
        "vm-01hweb",
        "web1",
        "default",
        3,
        7,
        "b-1",
    )
    assert (facts.vcpus, facts.memory_mib, facts.macs, facts.accelerator) == (1, 96, ("52:54:00:00:00:01",), "kvm")
    assert facts.disk_paths == ("/srv/pools/fast/volumes/vol-01hdisk0.qcow2", "/srv/pools/fast/vms/vm-01hweb/seed.iso")


def test_a_copied_definition_under_another_name_is_not_ours() -> None:
    copied = xml_of(make.domain()).replace("<name>trimtab-vm-01hweb</name>", "<name>trimtab-vm-other</name>")
    facts = domain_facts.read(copied)
    assert (facts.vm_id, facts.libvirt_name, facts.epoch) == ("", "trimtab-vm-other", 0)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vm_id": "../../etc"}, "vm_id"),
        ({"vm_id": "vm-1\n"}, "vm_id"),
        ({"uuid": "6F1B3C1E-7C1F-5D0A-9A53-0A4B5C6D7E8F"}, "uuid"),
        ({"name": "web<1>"}, "name"),
        ({"project": "a b"}, "project"),
        ({"machine": "q35"}, "machine"),
        ({"machine": "pc-i440fx-7.2"}, "machine"),
        ({"cpu_model": "host,+vmx"}, "cpu_model"),
        ({"cpu_features": ("+x",)}, "cpu_features"),
        ({"cpu_features": ("!x",)}, "cpu_features"),
        ({"arch": "aarch64"}, "arch"),
        ({"vcpus": 2}, "vcpus"),
        ({"vcpus_max": 0, "vcpus": 0}, "vcpus_max"),
        ({"memory_mib": 8}, "memory_mib"),
        ({"memory_max_mib": 64}, "memory_max_mib"),
        ({"has_secure_boot": True}, "has_secure_boot"),
        ({"spare_pcie_ports": 99}, "spare_pcie_ports"),
        ({"disks": (make.disk(0), make.disk(0))}, "disks"),
        ({"disks": (make.disk(24),)}, "disks.index"),
        ({"disks": (make.disk(0, pool_id="pool-other"),)}, "pools"),
        ({"disks": (make.disk(0, volume_id="vol-/x"),)}, "volume_id"),
        ({"disks": (make.disk(0, format=DiskFormat.ISO),)}, "format"),
        ({"nics": (make.nic(0, mac="52:54:00:00:00"),)}, "mac"),
        ({"nics": (make.nic(0, mac="53:54:00:00:00:01"),)}, "mac"),
        ({"nics": (make.nic(0, network_id="net-other"),)}, "networks"),
        ({"nics": (make.nic(0, model="rtl8139"),)}, "model"),
        ({"nics": (make.nic(0, addresses=("10.0.0.5/99",)),)}, "addresses"),
        ({"networks": (make.bridge_network(bridge="br0/../x"),)}, "bridge"),
        ({"pools": (make.pool("/etc/libvirt"),)}, "path"),
        ({"pools": (make.pool("relative"),)}, "path"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        xml_of(make.domain(**changes))
    assert refused.value.context["field"] == field


TEXT_FIELDS = [each.name for each in fields(DomainSpec) if each.type is str or each.type == "str"]
HOSTILE = st.text(st.sampled_from("<>&\"'\0]/.-%;aA0 \n\t\r}{é"), min_size=1, max_size=12) | st.sampled_from(
    ["]]>", "<!ENTITY x SYSTEM 'file:///etc/passwd'>", "&#60;", "&amp;", "a</name><devices>", "x\x00y", "\u202ename"]
)


@given(field=st.sampled_from(TEXT_FIELDS), text=HOSTILE)
def test_no_text_becomes_an_element(field: str, text: str) -> None:
    reviewed = ElementTree.fromstring(xml_of(make.domain()))
    try:
        built = xml_of(make.domain(**{field: text}))
    except InvalidRequest:
        return
    root = ElementTree.fromstring(built)
    assert [element.tag for element in root.iter()] == [element.tag for element in reviewed.iter()]
    assert {device.tag for device in root.find("devices") or ()} <= ALLOWED_DEVICES
    vm = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}vm")
    assert vm is not None
    if field in ("name", "project"):
        assert vm.get(field) == text


@pytest.mark.parametrize("name", CASES)
def test_every_disk_says_its_format_and_lies_in_its_pool(name: str) -> None:
    spec, host = CASES[name]
    for element in ElementTree.fromstring(xml_of(spec, host)).findall("devices/disk"):
        driver, source = element.find("driver"), element.find("source")
        assert driver is not None
        assert driver.get("type") in ("qcow2", "raw")
        if element.get("device") == "cdrom" and source is None:
            continue  # an empty drive
        assert source is not None
        assert source.get("file", "").startswith("/srv/pools/fast/")


@pytest.mark.parametrize(
    ("more", "current_mib", "squeezed_mib"),
    [
        ({}, 96, 0),
        ({}, 64, 64),
        ({"resources": GuestResources(balloon_min_mib=64)}, 64, 0),
        ({"memory_max_mib": 224}, 64, 0),
    ],
    ids=["it has everything", "somebody took some", "its floor allows it", "nothing is told of what is plugged"],
)
def test_a_guest_without_a_floor_that_has_less_than_its_memory_was_squeezed(
    more: dict[str, Any], current_mib: int, squeezed_mib: int
) -> None:
    root = ElementTree.fromstring(xml_of(make.domain(memory_mib=96, **({"memory_max_mib": 96} | more))))
    current = root.find("currentMemory")
    current = current if current is not None else ElementTree.SubElement(root, "currentMemory")
    current.set("unit", "MiB")
    current.text = str(current_mib)
    assert domain_facts.read(ElementTree.tostring(root, encoding="unicode")).squeezed_to_mib == squeezed_mib


def test_memory_that_was_plugged_counts_and_room_for_more_does_not() -> None:
    spec = make.domain(memory_mib=96, memory_max_mib=224)
    root = ElementTree.fromstring(xml_of(spec))
    # As libvirt shows it: the device's full size is part of the total, and what the guest has taken is told beside.
    total, target = root.find("memory"), root.find("devices/memory/target")
    assert total is not None
    assert target is not None
    total.text = str(96 + 128)
    ElementTree.SubElement(target, "current", unit="KiB").text = str(64 * 1024)
    assert domain_facts.read(ElementTree.tostring(root, encoding="unicode")).memory_mib == 96 + 64


@pytest.mark.parametrize(("maximum_mib", "room_mib"), [(97, 128), (224, 128), (225, 256), (96, 0)])
def test_room_for_memory_is_whole_blocks_of_the_guests(maximum_mib: int, room_mib: int) -> None:
    root = ElementTree.fromstring(xml_of(make.domain(memory_mib=96, memory_max_mib=maximum_mib)))
    size = root.findtext("devices/memory/target/size")
    assert int(size or 0) == room_mib
    assert root.findtext("maxMemory") == (str(96 + room_mib) if room_mib else None)


def test_a_vm_that_may_be_given_vcpus_can_give_back_all_but_its_first() -> None:
    root = ElementTree.fromstring(xml_of(make.domain(vcpus=2, vcpus_max=3)))
    shown = [(one.get("enabled"), one.get("hotpluggable")) for one in root.findall("vcpus/vcpu")]
    assert shown == [("yes", "no"), ("yes", "yes"), ("no", "yes")]
    assert ElementTree.fromstring(xml_of(make.domain(vcpus=2, vcpus_max=2))).find("vcpus") is None


def test_a_disk_that_reads_from_a_backup_names_its_export_and_pauses_its_guest_where_that_is_away() -> None:
    spec = make.domain()
    volume_id = spec.disks[0].volume_id
    export = parse_export("nbd+unix:///bk-1.vda?socket=/var/lib/libvirt/qemu/trimtab-v.nbd")
    assert export == Export(name="bk-1.vda", socket="/var/lib/libvirt/qemu/trimtab-v.nbd")
    root = ElementTree.fromstring(build(spec, STAMP, TCG, exports={volume_id: export}))
    (disk,) = [one for one in root.findall("devices/disk") if one.find("backingStore/source") is not None]
    driver, source = disk.find("driver"), disk.find("backingStore/source")
    assert driver is not None
    assert source is not None
    assert (driver.get("rerror_policy"), driver.get("error_policy")) == ("stop", "stop")
    assert source.find("reconnect") is None, "libvirt 9.0 drops it: what is relied on is what every libvirt does"
    assert (source.get("protocol"), source.get("name")) == ("nbd", "bk-1.vda")
    assert parse_export("/srv/pool/volumes/base.qcow2") is None
    assert "backingStore" not in build(spec, STAMP, TCG)
