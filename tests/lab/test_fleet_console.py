"""A real fleet: operators sit at the serial console and the screen of real guests, through the controller, and are told why it ends."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.fleet_kit import PATIENCE_S, Fleet, wait_until
from tests.lab.screens import screenshot
from tests.lab.seats import Seat, seat

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


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
