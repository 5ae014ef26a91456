"""A real fleet: operators sit at the serial console and the screen of real guests, through the controller, and are told why it ends."""

import contextlib
import os
import pty
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import PATIENCE_S, Fleet, wait_until
from tests.lab.screens import screenshot
from trimtab_lab.commands import own_programs

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


class Seat:
    """The command line at a pseudo terminal, as a person has it."""

    def __init__(self, fleet: Fleet, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(own_programs() / "trimtab"), "vm", "console", *arguments],
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TERM": "xterm", **fleet.plane.cli_environment()},
            stdin=slave, stdout=slave, stderr=slave,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read(self, timeout_s: float) -> bool:
        """Take what was shown within the time; False at the end."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            piece = os.read(self._master, 65536)
        except OSError:
            return False
        self.shown += piece.decode(errors="replace")
        return bool(piece)

    def until(self, word: str, *, keys: str = "") -> None:
        """Read until the word is shown; `keys` are pressed again while it is not."""
        end_s, again_s = time.monotonic() + PATIENCE_S, time.monotonic()
        while word not in self.shown:
            assert time.monotonic() < end_s, f"no {word!r} in {self.shown[-2000:]!r}"
            if keys and time.monotonic() >= again_s:
                self.type(keys)
                again_s = time.monotonic() + 5
            assert self.read(0.5) or word in self.shown, f"it ended before {word!r}: {self.shown[-2000:]!r}"

    def end(self) -> int:
        while self.process.poll() is None and self.read(0.5):
            pass
        code = self.process.wait(timeout=60)
        while self.read(0.1) and select.select([self._master], [], [], 0.1)[0]:
            pass
        os.close(self._master)
        return code


@contextlib.contextmanager
def seat(fleet: Fleet, *arguments: str) -> Iterator[Seat]:
    made = Seat(fleet, *arguments)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(timeout=60)


@pytest.fixture(scope="module")
def guest(fleet: Fleet) -> Iterator[str]:
    fleet.create("seated1", pool="shared", index=81, to="node1")
    fleet.wait_for_ticks("seated1", 1)
    yield "seated1"
    fleet.delete("seated1")


def compute(at: Seat, left: int, right: int) -> None:
    """Have the guest's shell work something out, so that what is seen is no echo."""
    at.until(f"sum is {left + right}.", keys=f"\recho sum is $(({left} + {right})).\r")


def test_who_types_at_the_serial_console_is_answered_while_its_log_goes_on(fleet: Fleet, guest: str) -> None:
    with seat(fleet, guest) as at:
        at.until("Ctrl-] leaves it")
        compute(at, 40, 2)
        busy = fleet.trimtab("vm", "console", guest)
        assert (busy.code, "console-busy" in busy.err) == (5, True), busy.err
        at.type("\x1d")
        assert at.end() == 0
    assert "sum is 42." in fleet.ok("vm", "console", guest, "--log").out
    before = fleet.ticks(guest)[0]
    fleet.wait_for_ticks(guest, before + 1)


def test_a_viewer_reaches_the_screen_and_a_picture_of_it_is_not_blank(fleet: Fleet, guest: str, tmp_path: Path) -> None:
    with seat(fleet, guest, "--vnc", "--once") as at:
        at.until("Ctrl-C ends it")
        path = next(word for word in at.shown.split() if word.endswith(".sock;")).removesuffix(";")
        with socket.socket(socket.AF_UNIX) as viewer:
            viewer.settimeout(PATIENCE_S)
            viewer.connect(path)
            assert viewer.recv(12, socket.MSG_WAITALL) == b"RFB 003.008\n"
            viewer.sendall(b"RFB 003.008\n")
            kinds = viewer.recv(viewer.recv(1)[0], socket.MSG_WAITALL)
            assert kinds == b"\x01", "no password: who may open the session was asked before"
        assert at.end() == 0
    wait_until(lambda: screenshot(fleet, guest, tmp_path).ink() > 500, "something on the guest's screen")


def test_a_session_ends_with_the_move_of_its_vm_and_a_new_one_reaches_the_new_host(
    fleet: Fleet, guest: str, tmp_path: Path
) -> None:
    with seat(fleet, guest) as at:
        at.until("Ctrl-] leaves it")
        fleet.ok("vm", "migrate", guest, "--to", "node2", "--wait")
        at.until("open its console again")
        assert at.end() == 5
    with seat(fleet, guest) as at:
        compute(at, 50, 5)
        fleet.ok("vm", "stop", guest, "--force", "--wait")
        at.until("was stopped")
        assert at.end() == 5
    off = fleet.trimtab("vm", "console", guest)
    assert (off.code, "trimtab vm start seated1" in off.err) == (5, True), off.err
    nowhere = fleet.trimtab("vm", "console", guest, "--screenshot", str(tmp_path / "no.png"))
    assert nowhere.code == 5


def test_ssh_finds_the_address_of_a_guest(fleet: Fleet, guest: str) -> None:
    printed = fleet.trimtab("vm", "ssh", guest, "--print", "--", "uptime")
    vm = fleet.vm(guest)
    assert printed.code == 0, printed.err
    assert f"{fleet.lab.spec.guest_prefix}.81 uptime" in printed.out
    assert vm["id"] in printed.out
