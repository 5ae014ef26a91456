"""A real fleet: vms boot from ISO images of real operating systems, as seen on their screens and serial ports."""

import re
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, wait_until
from tests.lab.os_images import alpine, installer_iso, mach_iso, rescue_iso
from tests.lab.screens import screenshot, text_of

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


def type_line(fleet: Fleet, host: str, vm_id: str, line: str) -> None:
    """Press the keys of a line on the guest's own keyboard."""
    for character in line + "\n":
        keys = KEYS.get(character, [f"KEY_{character.upper()}"])
        fleet.lab.run(host, ["virsh", "send-key", f"trimtab-{vm_id}", "--codeset", "linux", *keys])


def test_a_guest_boots_from_the_cd_to_its_first_screen_and_answers_its_keyboard(
    fleet: Fleet, rescue: dict[str, str], tmp_path: Path
) -> None:
    vm_id, host = rescue["id"], rescue["host"]
    # GRUB's menu has a frame and several lines; the BIOS says less.
    wait_until(lambda: screenshot(fleet, "rescue1", tmp_path).ink() > 8_000, "GRUB's menu on the screen")
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


def test_debians_installer_shows_its_first_question_on_the_screen(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ok("image", "import", "installer", str(installer_iso()), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "install1", "--iso", "installer", "--disk", "64MiB", "--os", "linux", "--memory", "384MiB",
        "--pool", "local", "--network", "default", "--to", "node3", "--wait",
    )  # fmt: skip
    shown = wait_until(
        lambda: text if "<Continue>" in (text := text_of(screenshot(fleet, "install1", tmp_path))) else None,
        "the installer's first question",
    )
    # What it asks first where memory is short; the letters are the screen's own, read from the picture.
    assert "so it ?ill enter lo? ?e?ory ?ode" in shown, shown
    assert "<Space> selects; <Enter> acti?ates buttons" in shown, shown
    fleet.ok("vm", "delete", "install1", "--yes", "--wait")


def test_another_distribution_runs_from_its_own_disk_to_its_login_prompt_on_the_screen(fleet: Fleet, tmp_path: Path) -> None:
    """Alpine: its own kernel, C library and init, from a disk image without a boot loader, so with a boot CD in the drive.

    It has no card: before anybody may log in it would wait for an address that nobody gives.
    """
    image = alpine()
    fleet.ok("image", "import", "alpine", str(image.disk), "--pool", "shared", "--wait")
    fleet.ok("image", "import", "alpine-boot", str(image.boot_cd), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "alpine1", "--image", "alpine", "--os", "linux", "--memory", "192MiB", "--pool", "local",
        "--to", "node2", "--no-start", "--wait",
    )  # fmt: skip
    fleet.ok("vm", "cdrom", "alpine1", "--iso", "alpine-boot", "--wait")
    fleet.ok("vm", "start", "alpine1", "--wait")
    shown = wait_until(
        lambda: text if "login:" in (text := text_of(screenshot(fleet, "alpine1", tmp_path))) else None, "Alpine's login prompt"
    )
    # The letters are the screen's own, read from the picture.
    assert "?elco?e to Alpine Linu? 3.23" in shown, shown
    fleet.ok("vm", "delete", "alpine1", "--yes", "--wait")


def test_a_kernel_that_is_no_linux_tells_its_name_on_the_screen(fleet: Fleet, tmp_path: Path) -> None:
    """GNU Mach: without the servers of the Hurd, which no package for this architecture has, it says who it is and that they lack."""
    fleet.ok("image", "import", "mach", str(mach_iso()), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "mach1", "--iso", "mach", "--disk", "64MiB", "--os", "generic", "--memory", "128MiB",
        "--pool", "local", "--network", "default", "--to", "node2", "--wait",
    )  # fmt: skip
    wait_until(lambda: "Mach" in text_of(screenshot(fleet, "mach1", tmp_path)), "GNU Mach on the screen")
    fleet.ok("vm", "delete", "mach1", "--yes", "--wait")


def test_a_windows_vm_has_a_tpm_and_secure_boot_and_takes_both_along(fleet: Fleet, tmp_path: Path) -> None:
    refused = fleet.trimtab(
        "vm", "create", "win1", "--iso", "other", "--disk", "64MiB", "--os", "windows", "--tpm", "--ha", "restart",
        "--memory", "256MiB", "--pool", "shared",
    )  # fmt: skip
    assert (refused.code, "cannot restart elsewhere" in refused.err) == (2, True), refused.err
    fleet.ok(
        "vm", "create", "win1", "--iso", "other", "--drivers-iso", "other", "--disk", "64MiB", "--os", "windows", "--tpm",
        "--secure-boot",
        "--memory", "256MiB", "--pool", "shared", "--network", "default", "--to", "node2", "--wait",
    )  # fmt: skip
    vm = fleet.vm("win1")
    assert (vm["shape"]["firmware"], vm["shape"]["has_secure_boot"], vm["shape"]["has_tpm"]) == ("uefi", True, True)
    wait_until(lambda: screenshot(fleet, "win1", tmp_path).ink() > 0, "the firmware to draw on the screen")
    uuid = fleet.sh("node2", f"virsh domuuid trimtab-{vm['id']}").strip()
    state = f"/var/lib/libvirt/swtpm/{uuid}/tpm2"
    assert fleet.sh("node2", f"ls {state}").strip(), "the TPM keeps its state under the vm's own id"
    fleet.ok("vm", "migrate", "win1", "--to", "node3", "--wait")
    assert fleet.sh("node3", f"ls {state}").strip(), "its state went along"
    shown = fleet.sh("node3", f"virsh dumpxml trimtab-{vm['id']}")
    assert shown.count("device='cdrom'") == 2, "the installer's drive and the one with its drivers"
    assert re.search(r"<source file='[^']*\.iso'[^>]*/>\s*(<backingStore/>)?\s*<target dev='sdy' bus='sata'", shown), shown
    assert fleet.vm("win1")["drivers"] == "other"
    assert fleet.ok("vm", "diff", "win1", "-o", "json").json()["differences"] == [], "what we define is not taken for a change"
    for word in ("secure='yes'", "<smm state='on'/>", "offset='localtime'", "model='tpm-crb'", "OVMF_CODE_4M.ms.fd"):
        assert word in shown, word
    fleet.ok("vm", "delete", "win1", "--yes", "--wait")


def test_a_disk_image_is_no_iso_and_an_iso_needs_a_disk(fleet: Fleet) -> None:
    refused = fleet.trimtab("vm", "create", "no1", "--iso", "micro", "--disk", "64MiB", "--memory", "64MiB")
    assert (refused.code, "is a disk image" in refused.err) == (2, True)
    refused = fleet.trimtab("vm", "create", "no1", "--iso", "other", "--memory", "64MiB")
    assert (refused.code, "--disk" in refused.err) == (2, True)
