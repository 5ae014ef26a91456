"""A real fleet: vms boot from ISO images of real operating systems, as seen on their screens and serial ports."""

import base64

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.os_images import rescue_iso

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

KEYS = {"_": ["KEY_LEFTSHIFT", "KEY_MINUS"], " ": ["KEY_SPACE"], "-": ["KEY_MINUS"], "\n": ["KEY_ENTER"]}


@pytest.fixture(scope="module")
def rescue(fleet: Fleet) -> dict[str, str]:
    """A vm on SATA and e1000e that boots from a CD, since its disk is empty."""
    fleet.ok("image", "import", "rescue", str(rescue_iso()), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "rescue1", "--iso", "rescue", "--disk", "64MiB", "--os", "generic", "--memory", "64MiB",
        "--pool", "local", "--network", "default", "--to", "node2", "--wait",
    )  # fmt: skip
    vm = fleet.vm("rescue1")
    return {"id": vm["id"], "host": vm["host"]}


def screen(fleet: Fleet, host: str, vm_id: str) -> bytes:
    """Return what the guest's screen shows, as a PNG picture; b"" where it shows nothing yet."""
    take = f"virsh screenshot trimtab-{vm_id} /run/screen.png >/dev/null && base64 /run/screen.png"
    taken = fleet.lab.run(host, ["sh", "-c", take], check=False)
    return base64.b64decode(taken.stdout) if taken.returncode == 0 else b""


def type_line(fleet: Fleet, host: str, vm_id: str, line: str) -> None:
    """Press the keys of a line on the guest's own keyboard."""
    for character in line + "\n":
        keys = KEYS.get(character, [f"KEY_{character.upper()}"])
        fleet.lab.run(host, ["virsh", "send-key", f"trimtab-{vm_id}", "--codeset", "linux", *keys])


def test_a_guest_boots_from_the_cd_to_its_first_screen_and_answers_its_keyboard(fleet: Fleet, rescue: dict[str, str]) -> None:
    vm_id, host = rescue["id"], rescue["host"]
    # A picture of an empty screen, or of the BIOS, is half as large as that of GRUB's menu.
    wait_until(lambda: len(screen(fleet, host, vm_id)) > 5_000, "GRUB's menu on the screen")
    fleet.lab.run(host, ["virsh", "send-key", f"trimtab-{vm_id}", "--codeset", "linux", "KEY_C"])
    for line in ("serial", "terminal_output serial", "ls"):
        type_line(fleet, host, vm_id, line)
    wait_until(lambda: "(hd0)" in fleet.ok("vm", "console", "rescue1", "--log").out, "GRUB to list its disks on the serial port")
    assert "(cd" in fleet.ok("vm", "console", "rescue1", "--log").out, "it sees the drive that it booted from"


def test_the_medium_changes_and_goes_under_the_running_guest(fleet: Fleet, rescue: dict[str, str]) -> None:
    fleet.ok("image", "import", "other", str(rescue_iso()), "--kind", "iso", "--pool", "shared", "--wait")
    refused = fleet.trimtab("image", "delete", "rescue", "--yes")
    assert (refused.code, "rescue1's CD-ROM" in refused.err) == (5, True)
    fleet.ok("vm", "cdrom", "rescue1", "--iso", "other", "--wait")
    image_id = fleet.ok("image", "get", "other", "-o", "json").json()["id"]
    shown = fleet.lab.run(rescue["host"], ["virsh", "dumpxml", f"trimtab-{rescue['id']}"]).stdout
    assert image_id in shown
    assert fleet.vm("rescue1")["cdrom"] == "other"
    fleet.ok("vm", "cdrom", "rescue1", "--eject", "--wait")
    shown = fleet.lab.run(rescue["host"], ["virsh", "dumpxml", f"trimtab-{rescue['id']}"]).stdout
    assert image_id not in shown
    fleet.ok("image", "delete", "rescue", "--yes", "--wait")
    fleet.ok("vm", "delete", "rescue1", "--yes", "--wait")


def test_a_disk_image_is_no_iso_and_an_iso_needs_a_disk(fleet: Fleet) -> None:
    refused = fleet.trimtab("vm", "create", "no1", "--iso", "micro", "--disk", "64MiB", "--memory", "64MiB")
    assert (refused.code, "is a disk image" in refused.err) == (2, True)
    refused = fleet.trimtab("vm", "create", "no1", "--iso", "other", "--memory", "64MiB")
    assert (refused.code, "--disk" in refused.err) == (2, True)
