"""Which guests run another QEMU than is installed, as a real process tells whose program was replaced under it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.agent.waiting import until_now
from trimtab_agent.hypervisor.kvm.guest_qemus import GuestQemus
from trimtab_protos.messages import GuestQemu

QEMU = Path("/usr/bin/qemu-system-x86_64")
MODULES = str(next(Path("/usr/lib").glob("*/qemu/accel-tcg-x86_64.so")).parent)
NEWER = "9.9.9 (Debian 1:9.9+dfsg-1)"

Start = Callable[[str, Path], "subprocess.Popen[bytes]"]


def program(path: Path, says: str) -> Path:
    """Put a program in the place of whatever is there, as a package's upgrade does: another file under the same name."""
    fresh = path.with_suffix(".dpkg-new")
    fresh.write_text(f"#!/bin/sh\n[ -e {path}.asked ] && echo twice >>{path}.asked; echo '{says}'\n")
    fresh.chmod(0o755)
    fresh.replace(path)
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a guest of nothing, whose process libvirt's file names."""
    begun = []

    def run(name: str, path: Path) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "QEMU_MODULE_DIR": MODULES}  # else looked for beside it
        process = subprocess.Popen([str(path), "-M", "none", "-S", "-display", "none", "-nodefaults"], env=environment)
        begun.append(process)
        (tmp_path / f"{name}.pid").write_text(f"{process.pid}\n")
        until_now(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(path), what="the program to run")
        return process

    yield run
    for process in begun:
        process.kill()
        process.wait()


def test_a_guest_whose_program_was_replaced_goes_on_and_is_told_of_until_it_is_started_anew(tmp_path: Path, start: Start) -> None:
    installed = Path(shutil.copy(QEMU, tmp_path / "qemu"))
    qemus, guests = GuestQemus(process_ids=tmp_path), (("vm-1", "one"), ("vm-2", "two"), ("vm-off", "off"))
    one = start("one", installed)
    build, others = qemus.read(installed, guests)
    assert build[0].isdigit()
    assert " (" in build, "with its package"
    assert others == ()
    program(installed, f"QEMU emulator version {NEWER}")
    two = start("two", Path(shutil.copy(QEMU, tmp_path / "another")))
    assert qemus.read(installed, guests) == (NEWER, (GuestQemu(vm_id="vm-1", build=build), GuestQemu(vm_id="vm-2", build=build)))
    assert (one.poll(), two.poll()) == (None, None), "both go on"
    one.kill()
    one.wait()
    assert qemus.read(installed, guests) == (NEWER, (GuestQemu(vm_id="vm-2", build=build),))


def test_each_program_is_asked_once_and_again_after_its_upgrade(tmp_path: Path) -> None:
    installed = program(tmp_path / "qemu", "QEMU emulator version 8.0.0")
    asked = Path(f"{installed}.asked")
    asked.touch()
    qemus = GuestQemus(process_ids=tmp_path)
    assert [qemus.read(installed, ())[0] for _time in range(3)] == ["8.0.0"] * 3
    assert asked.read_text().splitlines() == ["twice"]
    program(installed, f"QEMU emulator version {NEWER}")
    assert qemus.read(installed, ())[0] == NEWER


@pytest.mark.parametrize("says", ["", "Segmentation fault", "version x"])
def test_where_the_installed_one_says_nothing_of_use_nothing_is_told_of_guests(tmp_path: Path, start: Start, says: str) -> None:
    start("one", Path(shutil.copy(QEMU, tmp_path / "another")))
    assert GuestQemus(process_ids=tmp_path).read(program(tmp_path / "qemu", says), (("vm-1", "one"),)) == ("", ())
    assert GuestQemus(process_ids=tmp_path).read(tmp_path / "absent", (("vm-1", "one"),)) == ("", ())
