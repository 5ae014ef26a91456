"""What an operating system's name decides: disks, cards, clock, firmware. The database is osinfo's own, from Debian's package."""

from pathlib import Path

import pytest

from trimtab_controller import osinfo
from trimtab_controller.core.guest_os import Family, hardware_for, takes_local_time
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskBus, Firmware


@pytest.mark.parametrize(
    ("name", "family", "bus", "model", "firmware"),
    [
        ("linux", Family.LINUX, DiskBus.VIRTIO, "virtio", Firmware.BIOS),
        ("windows", Family.WINDOWS, DiskBus.SATA, "e1000e", Firmware.BIOS),
        ("generic", Family.GENERIC, DiskBus.SATA, "e1000e", Firmware.BIOS),
        ("debian11", Family.LINUX, DiskBus.VIRTIO, "virtio", Firmware.BIOS),
        ("win11", Family.WINDOWS, DiskBus.SATA, "e1000e", Firmware.UEFI),
        ("win10", Family.WINDOWS, DiskBus.SATA, "e1000e", Firmware.BIOS),
        ("freedos1.2", Family.LINUX, DiskBus.SATA, "e1000e", Firmware.BIOS),
        ("freebsd13.1", Family.GENERIC, DiskBus.VIRTIO, "virtio", Firmware.BIOS),
    ],
)
def test_a_system_gets_hardware_that_it_has_drivers_for(
    name: str, family: Family, bus: DiskBus, model: str, firmware: Firmware
) -> None:
    found = osinfo.find(name)
    hardware = hardware_for(found)
    assert (found.family, hardware.disk_bus, hardware.nic_model, hardware.firmware) == (family, bus, model, firmware)


def test_only_windows_takes_the_clock_for_local_time() -> None:
    assert [family for family in Family if takes_local_time(family.value)] == [Family.WINDOWS]


def test_an_unknown_name_is_refused_with_names_that_are_near() -> None:
    with pytest.raises(InvalidRequest, match="win10") as refused:
        osinfo.find("win12")
    assert refused.value.context["field"] == "os"


def test_without_the_database_families_are_known_and_the_refusal_says_what_to_install(tmp_path: Path) -> None:
    assert osinfo.find("windows", tmp_path).family is Family.WINDOWS
    with pytest.raises(InvalidRequest, match="osinfo-db"):
        osinfo.find("debian11", tmp_path)


def test_the_nearest_word_about_a_device_counts(tmp_path: Path) -> None:
    """A system derives from one with virtio and says itself that it has none."""
    place = tmp_path / "os" / "example"
    place.mkdir(parents=True)
    device = '<devices><device id="http://pcisig.com/pci/1af4/1001" supported="{}"/></devices>'
    for name, parent, word in (("first", "", "true"), ("second", "first", "true"), ("third", "second", "false")):
        derives = f'<derives-from id="http://example/{parent}"/>' if parent else "<family>linux</family>"
        (place / f"{name}.xml").write_text(
            f'<libosinfo><os id="http://example/{name}"><short-id>{name}</short-id>{derives}{device.format(word)}</os></libosinfo>'
        )
    assert osinfo.find("second", tmp_path).has_virtio_disk
    assert osinfo.find("third", tmp_path).has_virtio_disk is False
    assert osinfo.find("third", tmp_path).family is Family.LINUX


@pytest.mark.parametrize(
    ("name", "memory_mib"),
    [("linux", 2048), ("windows", 4096), ("generic", 1024), ("win11", 4096), ("ubuntu22.04", 4096), ("freedos1.2", 64)],
)
def test_a_system_wants_the_memory_that_its_makers_recommend_or_its_least(name: str, memory_mib: int) -> None:
    assert osinfo.find(name).memory_mib == memory_mib


@pytest.mark.parametrize(
    ("words", "memory_mib"),
    [
        ('<resources arch="all"><minimum><ram>1073741824</ram></minimum></resources>', 1024),
        ('<resources arch="all"><minimum><ram>1073741824</ram></minimum><recommended><ram>2147483648</ram></recommended></resources>', 2048),
        ('<resources arch="aarch64"><minimum><ram>1073741824</ram></minimum></resources>', 512),
        ('<resources arch="all"><recommended><ram>1048576</ram></recommended></resources>', 16),
        ('<resources arch="all"><minimum><ram>1073741825</ram></minimum></resources>', 1025),
        (
            '<resources arch="all"><minimum><ram>1073741824</ram></minimum></resources>'
            '<resources arch="x86_64"><minimum><ram>2147483648</ram></minimum></resources>',
            2048,
        ),
        ('<resources arch="all" inherit="true"/>', 512),
        ("", 512),
    ],
)  # fmt: skip
def test_memory_is_what_is_said_for_our_machines_nearest_to_the_system(tmp_path: Path, words: str, memory_mib: int) -> None:
    """The system derives from one that recommends 512 MiB."""
    place = tmp_path / "os" / "example"
    place.mkdir(parents=True)
    parent = '<family>linux</family><resources arch="all"><recommended><ram>536870912</ram></recommended></resources>'
    for name, said in (("parent", parent), ("child", f'<derives-from id="http://example/parent"/>{words}')):
        (place / f"{name}.xml").write_text(
            f'<libosinfo><os id="http://example/{name}"><short-id>{name}</short-id>{said}</os></libosinfo>'
        )
    assert osinfo.find("child", tmp_path).memory_mib == memory_mib
