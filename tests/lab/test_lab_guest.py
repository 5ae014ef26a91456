"""The lab's guest image by itself, in a bare QEMU: it boots under both firmwares and reads its seed. Needs no root."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trimtab_lab.domains import clone_disk, write_seed
from trimtab_lab.guest import GUEST_FILES, build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

BOOT_TIMEOUT_S = 150.0
UEFI_CODE, UEFI_VARIABLES = Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


@contextmanager
def running(directory: Path, *options: str, memory_mib: int = 96) -> Iterator[Path]:
    """Runs the guest on `directory/disk.qcow2` and gives the file of its serial console."""
    serial = directory / "serial.log"
    serial.unlink(missing_ok=True)
    machine = ["-accel", "tcg", "-machine", "q35", "-m", str(memory_mib), "-nodefaults", "-display", "none"]
    disk = ["-drive", f"file={directory / 'disk.qcow2'},if=virtio,format=qcow2"]
    command = ["qemu-system-x86_64", *machine, "-serial", f"file:{serial}", *disk, *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as guest:
        try:
            yield serial
        finally:
            guest.kill()


def wait_for(serial: Path, words: str) -> str:
    deadline_s = time.monotonic() + BOOT_TIMEOUT_S
    text = ""
    while time.monotonic() < deadline_s:
        text = serial.read_text(errors="replace") if serial.exists() else ""
        if words in text:
            return text
        time.sleep(0.1)
    raise AssertionError(f"no {words!r} within {BOOT_TIMEOUT_S:g} s on the console:\n{text[-2000:]}")


@pytest.fixture
def disk_directory(tmp_path: Path) -> Path:
    clone_disk(build_guest_image().qcow2, tmp_path / "disk.qcow2")
    return tmp_path


def test_guest_reads_its_seed_and_counts_on_after_a_power_cut(disk_directory: Path) -> None:
    mac = "52:54:00:aa:bb:01"
    key = "ssh_authorized_keys:\n - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHq3 user@laptop"
    seed = disk_directory / "seed.iso"
    write_seed(seed, hostname="web1", hardware_address=mac, address="10.99.1.7/24", user_text=f"#trimtab-load: mem16\n{key}")
    options = [
        *("-drive", f"file={seed},if=virtio,format=raw,readonly=on"),
        *("-netdev", "user,id=net,restrict=on", "-device", f"virtio-net-pci,netdev=net,mac={mac}"),
    ]
    with running(disk_directory, *options) as serial:
        first = wait_for(serial, "tick 3 ")
    assert "SEED instance-id=i-web1 hostname=web1 ssh-keys=1" in first
    assert f"NET eth0 {mac} 10.99.1.7/24 dhcp=0" in first
    assert "LOAD mem16" in first
    last = int(first.rstrip().rpartition("tick ")[2].split()[0])
    with running(disk_directory, *options) as serial:
        second = wait_for(serial, "tick ")
        second = wait_for(serial, " host web1")
    assert int(second.partition("tick ")[2].split()[0]) in (last + 1, last + 2)


def test_guest_boots_with_80_mib_and_without_seed(disk_directory: Path) -> None:
    with running(disk_directory, memory_mib=80) as serial:
        text = wait_for(serial, "tick 1 ")
    assert "SEED none" in text
    assert "GUEST UP" in text


def test_the_same_image_boots_under_uefi(disk_directory: Path) -> None:
    variables = shutil.copy(UEFI_VARIABLES, disk_directory / "variables.fd")
    firmware = [
        *("-drive", f"if=pflash,format=raw,readonly=on,file={UEFI_CODE}"),
        *("-drive", f"if=pflash,format=raw,file={variables}"),
    ]
    with running(disk_directory, *firmware, memory_mib=256) as serial:
        assert "GUEST UP" in wait_for(serial, "tick 1 ")


def test_image_is_small() -> None:
    image = build_guest_image()
    assert image.qcow2.stat().st_size < 20_000_000
    assert image.raw.stat().st_size <= 40 * 1024 * 1024


NETWORK_CONFIGURATIONS = {
    "version 2, block style": (
        "version: 2\nethernets:\n  nic0:\n    match:\n      macaddress: '52:54:00:AA:00:01'\n    set-name: eth0\n"
        "    addresses:\n    - 10.1.1.5/24\n    - 10.1.1.6/24\n    routes:\n    - to: 0.0.0.0/0\n      via: 10.1.1.1\n"
        "    nameservers: {addresses: [192.0.2.1]}\n  nic1:\n    match: {macaddress: 52:54:00:aa:00:02}\n"
        "    dhcp4: true\n    mtu: 1450\n",
        [
            "nic0 52:54:00:aa:00:01 0 10.1.1.1 - 10.1.1.5/24 10.1.1.6/24",
            "nic1 52:54:00:aa:00:02 1 - 1450 -",
        ],
    ),
    "version 2, JSON": (
        '{"version":2,"ethernets":{"id0":{"match":{"macaddress":"52:54:00:aa:00:03"},"addresses":["10.1.1.1/24"],'
        '"dhcp4":false,"routes":[{"to":"default","via":"10.1.1.254"}]}}}',
        ["id0 52:54:00:aa:00:03 0 10.1.1.254 - 10.1.1.1/24"],
    ),
    "version 1": (
        "version: 1\nconfig:\n- type: physical\n  name: eth0\n  mac_address: 52:54:00:aa:00:04\n  subnets:\n"
        "  - type: static\n    address: 10.0.0.5\n    netmask: 255.255.255.0\n    gateway: 10.0.0.1\n"
        "- type: nameserver\n  address: 192.0.2.9\n",
        ["eth0 52:54:00:aa:00:04 0 10.0.0.1 - 10.0.0.5/255.255.255.0"],
    ),
}


@pytest.mark.parametrize("style", NETWORK_CONFIGURATIONS)
def test_guest_understands_the_usual_network_configurations(style: str, tmp_path: Path) -> None:
    text, expected = NETWORK_CONFIGURATIONS[style]
    (tmp_path / "network-config").write_text(text)
    command = ["busybox", "awk", "-f", str(GUEST_FILES / "network.awk"), str(tmp_path / "network-config")]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.splitlines() == expected
