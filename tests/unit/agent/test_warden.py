"""The warden as a process of its own, against processes that look like QEMU. Real time, in fractions of a second."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent.waiting import until_now as until
from trimtab_agent import beacon_state, warden, warden_guests, warden_rights, warden_state
from trimtab_agent.warden_guests import Guest, boottime_s
from trimtab_agent.warden_reset import Reset

HOLD = "import signal; signal.pause()"


class Machine:
    """One warden and the guests beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.guests: dict[str, tuple[Guest, subprocess.Popen[bytes]]] = {}
        self.warden = self.start()
        self._sequence = 0

    def start(self, *more: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "trimtab_agent.warden",
            f"--runtime-dir={self.directory}",
            f"--state-dir={self.directory}",
        ]
        return subprocess.Popen([*command, *more], env={**os.environ, **(environment or {})})

    def guest(self, name: str) -> Guest:
        """Start a process that any reader of /proc takes for a QEMU."""
        guest = Guest(name, str(uuid.uuid4()), 1)
        words = ["qemu-system-x86_64", "-c", HOLD, "-name", f"guest={name}", "-uuid", guest.uuid]
        self.guests[name] = (guest, subprocess.Popen(words, executable=sys.executable))
        return guest

    def runs(self, name: str) -> bool:
        return self.guests[name][1].poll() is None

    def dial(self) -> socket.socket:
        path = str(self.directory / warden_state.SOCKET_NAME)
        until(lambda: os.path.exists(path))
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(5)
        connection.connect(path)
        return connection

    def hand(self, guests: list[Guest], *, ends_in_s: float, over: socket.socket | None = None) -> dict[str, Any]:
        """Hand a lease over, as the agent does it, and return what the warden answers."""
        self._sequence += 1
        handed = warden_state.HandOver(self._sequence, boottime_s() + ends_in_s, tuple(guests))
        warden_state.write(self.directory, handed)
        connection = over or self.dial()
        connection.sendall(handed.as_line())
        answer: dict[str, Any] = json.loads(connection.makefile().readline())
        assert answer["seq"] == self._sequence
        return answer

    def stop(self) -> None:
        for _guest, process in self.guests.values():
            process.kill()
            process.wait()
        self.warden.kill()
        self.warden.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_it_kills_exactly_the_guests_of_its_list_when_the_lease_has_ended(machine: Machine) -> None:
    kept, other = machine.guest("vm-kept"), machine.guest("vm-other")
    answer = machine.hand([kept], ends_in_s=2.0)
    assert (answer["armed"], answer["guests"]) == (True, ["vm-kept"])
    until(lambda: not machine.runs("vm-kept"))
    assert machine.runs("vm-other"), other
    killed = machine.directory / warden_state.KILLED_NAME
    until(lambda: killed.exists() and killed.stat().st_size > 0)  # a line comes into the file that was made for it
    assert [line["vm_id"] for line in warden_state.take_killed(killed)] == ["vm-kept"]


def test_a_renewed_lease_kills_nothing(machine: Machine) -> None:
    kept = machine.guest("vm-kept")
    connection = machine.dial()
    began_s = boottime_s()
    while boottime_s() - began_s < 1.5:
        machine.hand([kept], ends_in_s=0.8, over=connection)
    assert machine.runs("vm-kept")


def test_a_guest_that_starts_after_the_lease_has_ended_is_killed_too(machine: Machine) -> None:
    late = Guest("vm-late", str(uuid.uuid4()), 1)
    machine.hand([late], ends_in_s=0.1)
    process = subprocess.Popen(["qemu-system-x86_64", "-c", HOLD, "-uuid", late.uuid], executable=sys.executable)
    machine.guests["vm-late"] = (late, process)
    until(lambda: not machine.runs("vm-late"))


def test_an_agent_that_starts_again_without_a_lease_shortens_none(machine: Machine) -> None:
    kept = machine.guest("vm-kept")
    first = machine.hand([kept], ends_in_s=30.0)
    second = machine.hand([kept], ends_in_s=-boottime_s())
    assert second["deadline"] == first["deadline"]
    assert machine.runs("vm-kept")


def test_a_warden_that_was_killed_goes_on_from_what_the_agent_left(machine: Machine) -> None:
    kept = machine.guest("vm-kept")
    machine.hand([kept], ends_in_s=1.0)
    machine.warden.kill()
    machine.warden.wait()
    machine.warden = machine.start()
    until(lambda: not machine.runs("vm-kept"))


def test_the_successor_arms_before_its_predecessor_leaves(machine: Machine) -> None:
    kept = machine.guest("vm-kept")
    old = machine.dial()
    machine.hand([kept], ends_in_s=2.0, over=old)
    machine.warden.send_signal(signal.SIGHUP)
    # The predecessor answers until it is told to leave, and then the one at the known place does.
    assert old.recv(1) == b"", "the predecessor closes when it leaves"
    assert machine.warden.wait(5) == 0
    answer = machine.hand([kept], ends_in_s=0.5)
    try:
        assert answer["pid"] != machine.warden.pid
        assert answer["guests"] == ["vm-kept"]
        until(lambda: not machine.runs("vm-kept"))
    finally:
        os.kill(answer["pid"], signal.SIGTERM)


def test_a_second_channel_that_renews_keeps_guests_alive_after_the_first_has_ended(machine: Machine) -> None:
    kept = machine.guest("vm-kept")
    connection = machine.dial()
    machine.hand([kept], ends_in_s=0.5, over=connection)
    beacon = json.dumps({"type": "beacon", "seq": 1, "deadline": boottime_s() + 1.5}).encode() + b"\n"
    connection.sendall(beacon)
    assert json.loads(connection.makefile().readline())["armed"]
    began_s = boottime_s()
    until(lambda: not machine.runs("vm-kept"))
    assert boottime_s() - began_s > 1.2


def test_a_warden_that_starts_anew_knows_what_the_second_channel_renewed(machine: Machine) -> None:
    """With the controllers away for long the first channel's end is long past: its restart must not end the guests."""
    kept = machine.guest("vm-kept")
    machine.warden.kill()
    machine.warden.wait()
    (machine.directory / warden_state.SOCKET_NAME).unlink(missing_ok=True)
    warden_state.write(machine.directory, warden_state.HandOver(1, boottime_s() - 30, (kept,)))
    beacon_state.write_state(machine.directory, beacon_state.State(boottime_s() + 60, boottime_s()))
    machine.warden = machine.start()
    answer = machine.hand([kept], ends_in_s=-30.0)
    assert answer["deadline"] > boottime_s() + 30
    assert machine.runs("vm-kept")


def test_k_and_what_was_not_granted_are_told(machine: Machine) -> None:
    answer = machine.hand([], ends_in_s=5.0)
    assert 0 < answer["kill_ms"] < 3000
    assert any("WATCHDOG_USEC" in word for word in answer["missing"])


def test_a_guest_that_survives_its_kill_resets_the_host_where_that_is_configured_and_disarms_it(tmp_path: Path) -> None:
    trigger = tmp_path / "sysrq-trigger"
    trigger.touch()
    reset = Reset(kind="sysrq", after_s=0.5, trigger=trigger)
    guards = warden.Warden(runtime_dir=tmp_path, killed_path=tmp_path / "killed", reset=reset, watchdog_s=1.0, missing=())
    guards.take({"type": "lease", "seq": 1, "deadline": 1.0, "guests": []})
    assert guards.is_armed
    reset.guests_survive(0.4, ["vm-stuck"])
    assert (trigger.read_text(), guards.is_armed) == ("", True)
    reset.guests_survive(0.6, ["vm-stuck"])
    assert (trigger.read_text(), guards.is_armed) == ("b", False)
    assert guards.kill_ms >= 1500, "the reset and the supervisor's restart are part of K"


def test_a_hardware_watchdog_is_fed_while_the_lease_lives_and_starves_once_a_guest_survives_its_kill(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    reset = Reset(kind="watchdog", after_s=0.5, device=device, order=lambda _descriptor, _seconds: 20.0)
    guards = warden.Warden(runtime_dir=tmp_path, killed_path=tmp_path / "killed", reset=reset, watchdog_s=1.0, missing=())
    guards.take({"type": "lease", "seq": 1, "deadline": 1.0, "guests": []})
    reset.feed()
    reset.feed()
    assert device.read_bytes() == b"\0\0"
    assert guards.kill_ms >= 21_500, "K counts what the device really waits, not what was asked for"
    reset.guests_survive(0.6, ["vm-stuck"])
    reset.feed()
    reset.leave()
    assert device.read_bytes() == b"\0\0", "neither fed nor told that it was meant: the machine is reset"
    assert not guards.is_armed
    reset.settle()
    reset.feed()
    reset.leave()
    assert device.read_bytes() == b"\0\0\0V"


def test_a_successor_takes_the_watchdog_over_from_its_predecessor_and_no_machine_is_reset_by_an_upgrade(tmp_path: Path) -> None:
    device, said = tmp_path / "watchdog", list[str]()
    successor = Reset(kind="watchdog", device=device, order=lambda _descriptor, seconds: seconds, say=said.append)
    successor.feed()
    assert list(successor.missing) == said == [f"no reset ({device}: No such file or directory)"], (
        "it cannot be opened yet, as while it is held"
    )
    successor.feed()
    assert len(said) == 1, "told once"
    device.touch()
    successor.feed()
    assert (successor.missing, device.read_bytes()) == ((), b"\0")


def test_a_device_that_does_not_say_how_long_it_waits_is_reckoned_with_at_the_longest(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()  # a file: it takes no orders
    reset = Reset(kind="watchdog", after_s=5.0, device=device)
    reset.feed()
    assert reset.takes_s == 65.0
    assert "does not say how long it waits" in reset.missing[0]


def test_a_clock_that_is_bent_more_than_the_wait_allows_for_disarms_it_until_it_runs_even(tmp_path: Path) -> None:
    raw = bent = 1000.0
    rate = warden_rights.ClockRate(lambda: (bent, raw))
    reset = Reset(after_s=0.5)
    guards = warden.Warden(
        runtime_dir=tmp_path, killed_path=tmp_path / "killed", reset=reset, watchdog_s=1.0, missing=(), rate=rate
    )

    def hear(seconds: float, *, speed: float = 1.0) -> dict[str, Any]:
        nonlocal raw, bent
        answer: dict[str, Any] = {}
        for _second in range(int(seconds)):
            raw, bent = raw + 1.0, bent + speed
            answer = guards.take({"type": "lease", "seq": 1, "deadline": 1.0, "guests": []})
        return answer

    even = hear(60, speed=1.0004)
    assert (even["armed"], even["rate_ppm"], even["missing"]) == (True, 400, [])
    slewed = hear(12, speed=0.95)
    assert not slewed["armed"], "a twentieth slow, its guests would outlive their lease"
    assert "bent by -" in slewed["missing"][0]
    assert hear(45)["armed"]


def test_a_clock_is_read_beside_the_bare_one_at_the_same_instant() -> None:
    bent, raw = warden_rights._both_clocks()
    later_bent, later_raw = warden_rights._both_clocks()
    assert 0 <= later_bent - bent < 60
    assert abs((later_bent - bent) - (later_raw - raw)) < 0.01


def test_it_imports_nothing_but_the_standard_library() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, trimtab_agent.warden; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    roots = {name.partition(".")[0] for name in listed} - set(sys.stdlib_module_names)
    # Editable installs bring a finder of their own.
    assert {name for name in roots if not name.startswith(("_", "sitecustomize"))} == {"trimtab_agent"}


def test_a_process_that_only_names_a_guest_is_none(tmp_path: Path) -> None:
    guest = Guest("vm-kept", str(uuid.uuid4()), 1)
    reader = subprocess.Popen(["less", "-c", HOLD, "-uuid", guest.uuid], executable=sys.executable)
    try:
        assert warden_guests.find([guest]) == []
    finally:
        reader.kill()
        reader.wait()
