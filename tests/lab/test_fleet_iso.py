"""A real fleet: vms boot from ISO images of real operating systems, as seen on their screens and serial ports."""

import re
from pathlib import Path

import pytest

from tests.lab.fleet_kit import Fleet, answers_ping, wait_until
from tests.lab.os_images import alpine, alpine_shell_cd, data_cd, installer_iso, mach_iso, rescue_iso
from tests.lab.screens import screenshot, text_of
from tests.lab.seats import Seat, seat

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


@pytest.mark.soak
def test_debians_installer_shows_its_first_question_on_the_screen(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ok("image", "import", "installer", str(installer_iso()), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "install1", "--iso", "installer", "--disk", "64MiB", "--os", "linux", "--memory", "384MiB",
        "--pool", "local", "--network", "default", "--to", "node3", "--wait",
    )  # fmt: skip
    shown = wait_until(
        lambda: text if "<Continue>" in (text := text_of(screenshot(fleet, "install1", tmp_path))) else None,
        "the installer's first question",
        patience_s=800,
    )
    # What it asks first where memory is short; the letters are the screen's own, read from the picture.
    assert "so it ?ill enter lo? ?e?ory ?ode" in shown, shown
    assert "<Space> selects; <Enter> acti?ates buttons" in shown, shown
    fleet.ok("vm", "delete", "install1", "--yes", "--wait")


@pytest.mark.soak
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


def label_in_drive(at: Seat, number: int) -> str:
    """Return the label of the medium that the guest's own kernel reads, '' where it finds none.

    The first read after a change fails: by that the drive tells a guest that the medium is another.
    """
    read = "dd if=/dev/sr0 bs=1 skip=32808 count=32 2>/dev/null"
    at.type(f"{read} >/dev/null; echo label $(({number} + 0)) is $({read}), end $(({number} + 0)).\r")
    at.until(f", end {number}.")
    return at.shown.rpartition(f"label {number} is ")[2].partition(",")[0].strip()


def drives_its_card(fleet: Fleet, at: Seat) -> None:
    """The guest's own driver of that card carries packets both ways."""
    own, peer = f"{fleet.lab.spec.guest_prefix}.95", fleet.lab.spec.ctl_guest_address
    at.type("modprobe e1000e; until [ -e /sys/class/net/eth0 ]; do sleep 1; done\r")
    at.type(f"ip link set eth0 up; ip addr add {own}/24 dev eth0; until ping -c 1 -W 2 {peer} >/dev/null; do sleep 1; done\r")
    at.type("echo driven by $(basename $(readlink /sys/class/net/eth0/device/driver)), out $((40 + 3)).\r")
    at.until("driven by e1000e, out 43.")
    wait_until(lambda: answers_ping(fleet, own), "it to answer by that card")


@pytest.mark.soak
def test_a_guest_reads_the_medium_that_was_put_into_its_drive_and_keeps_one_that_it_mounted(fleet: Fleet, tmp_path: Path) -> None:
    """Alpine with a driver of the drive; it boots from the first medium. Its disk is on SATA and its card an e1000e: no virtio."""
    fleet.ok("image", "import", "alpine-again", str(alpine().disk), "--pool", "shared", "--wait")
    media = {
        "alpine-shell": alpine_shell_cd(tmp_path),
        "first": data_cd(tmp_path, "FIRST"),
        "second": data_cd(tmp_path, "SECOND"),
    }
    for name, file in media.items():
        fleet.ok("image", "import", name, str(file), "--kind", "iso", "--pool", "shared", "--wait")
    fleet.ok(
        "vm", "create", "reader1", "--image", "alpine-again", "--os", "generic", "--memory", "192MiB", "--pool", "local",
        "--network", f"default,ip={fleet.lab.spec.guest_prefix}.95/24", "--to", "node2", "--no-start", "--wait",
    )  # fmt: skip
    fleet.ok("vm", "cdrom", "reader1", "--iso", "alpine-shell", "--wait")
    fleet.ok("vm", "start", "reader1", "--wait")
    with seat(fleet, "reader1") as at:
        at.until("up is 42.", keys="\recho up is $((40 + 2)).\r")
        at.type("mount -t proc p /proc; modprobe ahci; modprobe sr_mod; until [ -b /dev/sr0 ]; do sleep 1; done\r")
        drives_its_card(fleet, at)
        assert label_in_drive(at, 1) == "SHELL"
        fleet.ok("vm", "cdrom", "reader1", "--iso", "first", "--wait")
        assert label_in_drive(at, 2) == "FIRST"
        fleet.ok("vm", "cdrom", "reader1", "--iso", "second", "--wait")
        assert label_in_drive(at, 3) == "SECOND"

        at.type("mount -t iso9660 -o ro /dev/sr0 /mnt && echo holds $(cat /mnt/second.txt).\r")
        at.until("holds SECOND.")
        refused = fleet.trimtab("vm", "cdrom", "reader1", "--iso", "first", "--wait")
        assert (refused.code, "locked the drive's tray" in refused.err) == (5, True), refused.err
        assert fleet.vm("reader1")["cdrom"] == "second"
        at.type("umount /mnt && echo holds $((0 + 0)).\r")
        at.until("holds 0.")
        fleet.ok("vm", "cdrom", "reader1", "--iso", "first", "--wait")
        assert label_in_drive(at, 4) == "FIRST"
        fleet.ok("vm", "cdrom", "reader1", "--eject", "--wait")
        assert label_in_drive(at, 5) == ""
    fleet.ok("vm", "delete", "reader1", "--yes", "--wait")


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
