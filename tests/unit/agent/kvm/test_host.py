"""What the host is and does, from its files and libvirt's documents."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from trimtab_agent.hypervisor.kvm import accel_probe
from trimtab_agent.hypervisor.kvm.host_load import HostLoadReader, MemoryLoad
from trimtab_agent.hypervisor.kvm.huge_pages import sizes_in
from trimtab_agent.hypervisor.kvm.inventory import _machines, _numa_cells, _pci_device
from trimtab_protos.messages import NumaCell, PciDevice


def write_cpu(proc: Path, *, user: int, idle: int, steal: int) -> None:
    (proc / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    made = tmp_path / "proc"
    (made / "pressure").mkdir(parents=True)
    (made / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 2097152 kB\n")
    for resource, avg10 in (("cpu", 12.6), ("memory", 7.35), ("io", 55.0)):
        told = f"some avg10={avg10:.2f} avg60=1.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=1.00 avg300=0.00 total=1\n"
        (made / "pressure" / resource).write_text(told)
    write_cpu(made, user=100, idle=100, steal=0)
    return made


def test_load_is_what_happened_since_the_last_reading(proc: Path, tmp_path: Path) -> None:
    links = tmp_path / "net"
    for name, carrier in (("lo", "1"), ("eth0", "0"), ("vnet0", "1")):
        (links / name).mkdir(parents=True)
        (links / name / "carrier").write_text(carrier)
    reader = HostLoadReader(proc, links)
    write_cpu(proc, user=160, idle=120, steal=20)
    load = reader.read(running_domains=3)
    assert (load.cpu_used_permille, load.cpu_steal_permille, load.running_domains) == (800, 200, 3)
    assert load.memory_available_mib == 2048
    assert (load.cpu_pressure, load.memory_pressure, load.io_pressure) == (1260, 735, 5500), "hundredths of a percent"
    assert reader.read_memory() == MemoryLoad(total_mib=8192, available_mib=2048, pressure_percent=7)
    assert not load.has_uplink_carrier
    (links / "eth0" / "carrier").write_text("1")
    assert reader.read(running_domains=0).has_uplink_carrier
    assert reader.read(running_domains=0).cpu_used_permille == 0


def test_the_probe_is_answered_by_an_accelerator_that_runs_guests_and_by_no_other() -> None:
    assert accel_probe.runs_guests("tcg", timeout_s=30)
    assert not accel_probe.runs_guests("no-such-accelerator")


def test_a_device_that_opens_and_under_which_a_guest_only_spins_is_not_taken(tmp_path: Path) -> None:
    """So KVM is on some nested machines: QEMU starts, libvirt lists it, and nothing ever comes of the guest."""
    firmware, asked = bytearray(accel_probe.firmware_image()), []
    firmware[:2] = bytes.fromhex("ebfe")  # a jump to itself, where the probe's own begins

    def spins(accelerator: str) -> bool:
        asked.append(accelerator)
        return accel_probe.runs_guests("tcg", timeout_s=2, firmware=bytes(firmware))

    opens = tmp_path / "kvm"
    opens.touch()
    assert accel_probe.accelerator(tmp_path, "boot-1", device=opens, runs=spins) == "tcg"
    assert asked == ["kvm"]
    firmware[:2] = accel_probe.firmware_image()[:2]
    assert accel_probe.runs_guests("tcg", timeout_s=30, firmware=bytes(firmware)), "it was the spinning and nothing else"


def test_the_probes_answer_holds_for_one_boot(tmp_path: Path) -> None:
    absent = tmp_path / "no-kvm"
    assert accel_probe.accelerator(tmp_path, "boot-1", device=absent) == "tcg"
    remembered = tmp_path / "accelerator.json"
    remembered.write_text(remembered.read_text().replace("tcg", "kvm"))
    assert accel_probe.accelerator(tmp_path, "boot-1", device=absent) == "kvm"
    assert accel_probe.accelerator(tmp_path, "boot-2", device=absent) == "tcg"


def test_firmware_begins_at_the_reset_vector() -> None:
    image = accel_probe.firmware_image()
    assert len(image) == 65536
    assert image[0xFFF0:0xFFF5] == bytes.fromhex("ea000000f0")


CAPABILITIES = ElementTree.fromstring("""<capabilities><host><topology><cells num="2">
 <cell id="0"><memory unit="KiB">4194304</memory><pages unit="KiB" size="4">1048576</pages><pages unit="KiB" size="2048">16</pages>
  <cpus num="2"><cpu id="0"/><cpu id="2"/></cpus></cell>
 <cell id="1"><memory unit="KiB">2097152</memory><pages unit="KiB" size="2048">0</pages><cpus num="1"><cpu id="1"/></cpus></cell>
</cells></topology></host>
<guest><arch name="i686"><machine>pc-q35-2.0</machine></arch></guest>
<guest><arch name="x86_64"><machine canonical="pc-q35-7.2">q35</machine>
 <machine>pc-q35-7.1</machine><machine>pc-i440fx-7.2</machine></arch></guest>
</capabilities>""")


def test_numa_cells_with_their_huge_pages() -> None:
    assert _numa_cells(CAPABILITIES, 6144, {2048}) == (
        NumaCell(index=0, memory_mib=4096, cpus=(0, 2), huge_pages={2048: 16}),
        NumaCell(index=1, memory_mib=2048, cpus=(1,), huge_pages={}),
    )


def test_pages_that_are_kept_but_not_mounted_are_not_offered() -> None:
    mounts = """proc /proc proc rw,nosuid 0 0
hugetlbfs /dev/hugepages hugetlbfs rw,relatime,pagesize=1024M 0 0
none /mnt/huge hugetlbfs rw,gid=64055,pagesize=2M,size=64M 0 0
"""
    assert sizes_in(mounts) == {2048, 1048576}
    assert sizes_in("tmpfs /run tmpfs rw,size=10M 0 0") == set()
    assert _numa_cells(CAPABILITIES, 6144, set())[0].huge_pages == {}


def test_machines_are_concrete() -> None:
    assert _machines(CAPABILITIES) == ("pc-q35-7.1", "pc-q35-7.2")


def test_a_pci_device() -> None:
    device = ElementTree.fromstring("""<device><name>pci_0000_3b_00_1</name><driver><name>ixgbe</name></driver>
     <capability type='pci'><class>0x020000</class><domain>0</domain><bus>59</bus><slot>0</slot><function>1</function>
     <product id='0x1528'/><vendor id='0x8086'/><iommuGroup number='31'/><numa node='1'/></capability></device>""")
    assert _pci_device(device) == PciDevice(
        address="0000:3b:00.1",
        vendor_id="0x8086",
        product_id="0x1528",
        class_id="0x020000",
        driver="ixgbe",
        iommu_group=31,
        numa_cell=1,
    )
