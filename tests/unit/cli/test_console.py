"""Sitting at a console and finding a guest's address: the command against the real API over TLS, hosts being stood in for."""

import asyncio
import json
import os
import shlex
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from tests.lab.screens import read_png
from tests.unit.cli.conftest import Program, Trimtab
from tests.unit.cli.fake_controller import Answer, FakeController, vm
from tests.unit.cli.test_against_the_api import CREATE, Served, served
from tests.unit.cli.test_terminal import Terminal
from trimtab_controller.cli.errors import CommandFailed
from trimtab_controller.cli.nouns.vm_sessions import address_of
from trimtab_controller.cli.rfb import Picture, photograph
from trimtab_protos.errors import Conflict

__all__ = ["served"]
RED, BLACK = b"\x00\x00\xff\x00", b"\x00\x00\x00\x00"


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of guests are kept below it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def running(served: Served, trimtab: Trimtab) -> Served:
    """An API that shows web1 as running on node1."""
    assert served.api is not None
    assert trimtab(*CREATE).code == 0
    vm_id = json.loads(trimtab("vm", "get", "web1", "-o", "json").out)["id"]
    asyncio.run_coroutine_threadsafe(
        served.api.set_vm(vm_id, host_id=served.api.ids["node1"], observed_state="running"), served.loop
    ).result(30)
    return served


def test_keys_go_to_the_guest_until_the_one_that_leaves(running: Served) -> None:
    at = Terminal(dict(os.environ), "vm", "console", "web1")
    at.until("Ctrl-] leaves it")
    at.type("hello\x03")
    at.until("heard ")
    at.type("\x1d")
    assert at.end() == 0
    assert "hello\x03" in at.shown.replace("heard ", ""), "Ctrl-C too is the guest's"


def test_a_session_that_is_ended_says_why(running: Served) -> None:
    assert running.api is not None
    at = Terminal(dict(os.environ), "vm", "console", "web1")
    at.until("Ctrl-] leaves it")
    at.type("x")
    at.until("heard ")
    running.loop.call_soon_threadsafe(running.api.desk.lines[0].end)
    at.until("stopped, restarted or moved")
    assert at.end() == 5


def test_what_a_host_refuses_is_told_as_any_refusal(running: Served, trimtab: Trimtab) -> None:
    assert running.api is not None
    running.api.desk.refusal = Conflict("console-busy", "the serial console has 1 session open")
    refused = trimtab("vm", "console", "web1")
    assert (refused.code, "1 session open" in refused.err, "console-busy" in refused.err) == (5, True, True)


def screen_of(*updates: bytes, kinds: bytes = b"\x01\x01", width: int = 2) -> list[bytes]:
    """Return what a server says, in awkward pieces."""
    hello = struct.pack(">HH16xI", width, 1, 4) + b"QEMU"
    said = b"RFB 003.008\n" + kinds + b"\0\0\0\0" + hello + b"".join(updates)
    return [said[at : at + 5] for at in range(0, len(said), 5)]


def update(left: int, width: int, pixels: bytes, encoding: int = 0) -> bytes:
    return struct.pack(">BxHHHHHi", 0, 1, left, 0, width, 1, encoding) + pixels


def test_a_picture_is_what_the_screen_shows(tmp_path: Path) -> None:
    sent: list[bytes] = []
    bell_and_clipboard = b"\x02" + struct.pack(">BxxxI", 3, 2) + b"hi"
    picture = photograph(iter(screen_of(bell_and_clipboard, update(0, 2, RED + BLACK))), sent.append)
    assert (picture, picture.colours()) == (Picture(2, 1, b"\xff\0\0\0\0\0"), 2)
    assert sent[0] == b"RFB 003.008\n"
    read = read_png(picture.png())
    assert (read.width, read.height, read.rgb) == (2, 1, picture.rgb)


def test_a_screen_that_changes_its_size_is_asked_again() -> None:
    grown = photograph(iter(screen_of(update(0, 3, b"", -223), update(0, 3, RED * 3))), lambda _: None)
    assert grown == Picture(3, 1, b"\xff\0\0" * 3)


@pytest.mark.parametrize(
    ("pieces", "word"),
    [
        ([b"SSH-2.0-open", b""], "greets"),
        (screen_of(kinds=b"\x01\x02"), "password"),
        (screen_of(update(0, 2, b"", 16)), "encoding 16"),
        (screen_of(update(0, 2, RED)), "went away"),
        (screen_of(b"\x09"), "kind 9"),
        (screen_of(width=20000), "20000 by 1"),
    ],
)
def test_a_screen_that_cannot_be_read_says_why(pieces: list[bytes], word: str) -> None:
    with pytest.raises(CommandFailed, match=word):
        photograph(iter(pieces), lambda _: None)


def test_a_viewer_is_offered_the_screen_at_a_socket_of_ones_own(running: Served) -> None:
    at = Terminal(dict(os.environ), "vm", "console", "web1", "--vnc", "--once")
    at.until("Ctrl-C ends it")
    path = next(word for word in at.shown.split() if word.endswith(".sock;")).removesuffix(";")
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(30)
        viewer.connect(path)
        viewer.sendall(b"RFB 003.008\n")
        assert viewer.recv(100) == b"heard RFB 003.008\n"
    assert at.end() == 0


DECLARED = [{"id": "nic-1", "network": "n", "mac": "", "addresses": ["10.0.0.5/24"], "index": 0}]


@pytest.mark.parametrize(
    ("observed", "nics", "found"),
    [
        (["127.0.0.1", "fe80::1", "10.0.0.5"], DECLARED, ("10.0.0.5", "declared and seen by its host")),
        (["10.0.0.9"], DECLARED, ("10.0.0.9", "seen by its host (guest agent or DHCP lease)")),
        ([], DECLARED, ("10.0.0.5", "declared; its host has not seen it in the guest")),
    ],
)
def test_the_address_of_a_guest_is_told_with_its_source(observed: list[str], nics: list[object], found: tuple[str, str]) -> None:
    assert address_of(vm(nics=nics, observed={"state": "running", "addresses": observed})) == found


def test_ssh_without_an_address_says_what_to_do(trimtab: Trimtab, controller: FakeController) -> None:
    running = vm(nics=[], observed={"state": "running", "addresses": ["fe80::1"]})
    controller.on("GET", "/v1/projects/default/vms/web1", Answer(running))
    unknown = trimtab("vm", "ssh", "web1", "--print")
    assert (unknown.code, "address-unknown" in unknown.err, "trimtab vm console web1" in unknown.err) == (4, True, True)
    off = vm("web2", nics=[], observed={"state": "stopped", "addresses": []})
    controller.on("GET", "/v1/projects/default/vms/web2", Answer(off))
    stopped = trimtab("vm", "ssh", "web2")
    assert (stopped.code, "trimtab vm start web2" in stopped.err) == (5, True)


def test_ssh_pins_the_guests_key_to_the_vm(trimtab: Trimtab, controller: FakeController) -> None:
    controller.on("GET", "/v1/projects/default/vms/web1", Answer(vm()))
    printed = trimtab("vm", "ssh", "web1", "--user", "debian", "--print", "--", "cat", "a b")
    assert printed.code == 0, printed.err
    assert "HostKeyAlias=vm-web1" in printed.out
    assert "StrictHostKeyChecking=accept-new" in printed.out
    assert printed.out.strip().endswith("-l debian -- 10.0.0.5 cat 'a b'")


def test_ssh_itself_takes_a_guests_first_key_and_refuses_another_under_the_same_id(
    trimtab: Trimtab, controller: FakeController
) -> None:
    """What the real client makes of the command, whatever address the guest has by then, and where it looks for the key."""
    known = set()
    for address in ("10.0.0.5", "10.0.0.6"):
        seen = {"state": "running", "addresses": [address]}
        controller.on("GET", "/v1/projects/default/vms/web1", Answer(vm(nics=[], observed=seen)))
        words = shlex.split(trimtab("vm", "ssh", "web1", "--print").out)
        asked = subprocess.run([words[0], "-G", *words[1:]], capture_output=True, text=True, timeout=20, check=True)
        means = dict(line.split(" ", 1) for line in asked.stdout.splitlines())
        assert (means["hostname"], means["hostkeyalias"]) == (address, "vm-web1")
        assert means["stricthostkeychecking"] == "accept-new", "a changed key is refused, never asked about"
        known.add(means["userknownhostsfile"])
    (place,) = known
    assert Path(place).is_relative_to(os.environ["XDG_CONFIG_HOME"])
    assert Path(place).parent.stat().st_mode & 0o777 == 0o700


def test_ssh_runs_what_it_prints(controller: FakeController, program: Program, tmp_path: Path) -> None:
    controller.on("GET", "/v1/projects/default/vms/web1", Answer(vm()))
    client = tmp_path / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text('#!/bin/sh\nprintf "%s\\n" ssh "$@"\nexit 7\n')
    client.chmod(0o755)
    there = Program({**program.environment, "PATH": f"{client.parent}:{os.environ['PATH']}"})
    line = ("vm", "ssh", "web1", "--port", "2222", "--", "cat", "a b")
    printed = there(*line[:3], "--print", *line[3:])
    ran = there(*line)
    assert (ran.code, ran.out.splitlines()) == (7, shlex.split(printed.out)), "the guest's exit code is the command's"
    assert "web1 is at 10.0.0.5" in ran.err
