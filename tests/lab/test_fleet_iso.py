"""A real fleet: vms boot from ISO images of real operating systems, as seen on their screens and serial ports."""

import base64

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.guest_view import guest_says
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
    """Return what the guest's screen shows, as a picture; b"" where it shows nothing yet."""
    take = f"virsh screenshot trimtab-{vm_id} /run/screen.ppm >/dev/null && base64 /run/screen.ppm"
    taken = fleet.lab.run(host, ["sh", "-c", take], check=False)
    return base64.b64decode(taken.stdout) if taken.returncode == 0 else b""


def lit_pixels(picture: bytes) -> int:
    """Return how many bytes of a PPM picture are not black."""
    return sum(1 for byte in picture[16:] if byte)


def type_line(fleet: Fleet, host: str, vm_id: str, line: str) -> None:
    """Press the keys of a line on the guest's own keyboard."""
    for character in line + "\n":
        keys = KEYS.get(character, [f"KEY_{character.upper()}"])
        fleet.lab.run(host, ["virsh", "send-key", f"trimtab-{vm_id}", "--codeset", "linux", *keys])


def test_a_guest_boots_from_the_cd_to_its_first_screen_and_answers_its_keyboard(fleet: Fleet, rescue: dict[str, str]) -> None:
    vm_id, host = rescue["id"], rescue["host"]
    wait_until(lambda: lit_pixels(screen(fleet, host, vm_id)) > 5_000, "GRUB's first screen")

    def speaks() -> bool:
        type_line(fleet, host, vm_id, "serial")
        type_line(fleet, host, vm_id, "terminal_output serial")
        type_line(fleet, host, vm_id, "ls")
        return "grub>" in fleet.ok("vm", "console", "rescue1", "--log").out

    wait_until(speaks, "GRUB's prompt on the serial port")
    seen = fleet.ok("vm", "console", "rescue1", "--log").out
    assert "(cd0)" in seen or "(cd" in seen, "it sees the drive that it booted from"
    assert "(hd0)" in seen, "it sees the SATA disk"


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


def test_a_guest_finds_its_tpm_keeps_it_over_a_stop_and_takes_it_along(fleet: Fleet) -> None:
    fleet.ok(
        "vm", "create", "tpm1", "--image", "micro", "--memory", "128MiB", "--pool", "shared", "--tpm",
        "--os", "linux", "--network", "default", "--wait",
    )  # fmt: skip
    vm = fleet.vm("tpm1")
    table = "ls /sys/firmware/acpi/tables"
    wait_until(lambda: "TPM2" in guest_says(fleet.lab, vm["host"], vm["id"], table).split(), "the guest to find its TPM")
    uuid = fleet.lab.run(vm["host"], ["virsh", "domuuid", f"trimtab-{vm['id']}"]).stdout.strip()
    state = ["sha256sum", f"/var/lib/libvirt/swtpm/{uuid}/tpm2/tpm2-00.permall"]
    assert uuid
    fleet.ok("vm", "stop", "tpm1", "--wait")
    kept = fleet.lab.run(vm["host"], state).stdout
    other = next(host.name for host in fleet.lab.spec.hosts() if host.name != vm["host"])
    refused = fleet.trimtab("vm", "start", "tpm1", "--to", other)
    assert (refused.code, "has a TPM" in refused.err) == (5, True)
    fleet.ok("vm", "start", "tpm1", "--wait")
    assert fleet.vm("tpm1")["host"] == vm["host"]
    assert kept.split()[0], "its state was there while it was off"
    fleet.wait_for_ticks("tpm1", 1)
    fleet.ok("vm", "migrate", "tpm1", "--to", other, "--wait")
    wait_until(lambda: "TPM2" in guest_says(fleet.lab, other, vm["id"], table).split(), "the TPM where the guest went")
    fleet.ok("vm", "delete", "tpm1", "--yes", "--wait")


def test_secure_boot_is_on_where_it_was_asked_for(fleet: Fleet) -> None:
    """The lab's image is not signed for it: the firmware refuses it and says so, which is the proof."""
    fleet.ok(
        "vm", "create", "secure1", "--image", "micro", "--memory", "128MiB", "--pool", "shared", "--secure-boot",
        "--network", "default", "--wait",
    )  # fmt: skip
    assert fleet.vm("secure1")["shape"]["firmware"] == "uefi"
    wait_until(lambda: "Access Denied" in fleet.ok("vm", "console", "secure1", "--log").out, "the firmware to refuse the image")
    assert fleet.ticks("secure1") == (0, 0.0)
    fleet.ok("vm", "delete", "secure1", "--yes", "--wait")
