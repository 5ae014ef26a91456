"""Fencing by IPMI over LAN (RMCP+): Debian's fence_ipmilan and ipmitool against OpenIPMI's simulator of a server's power device."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.lab.fleet_kit import wait_until
from tests.unit.controller_rpc.test_fence_agents import command_lines
from trimtab_controller.fencing import FenceAgents, FencePath, Power
from trimtab_controller.ipmitool import without_password

SECRET = "hunter2-of-bmc"
LAN = """
name "bmc"
set_working_mc 0x20
  startlan 1
    addr 127.0.0.1 {port}
    priv_limit admin
    allowed_auths_admin md5
    guid a123456789abcdefa123456789abcdef
  endlan
  chassis_control "{machine} 0x20"
  user 2 true "root" "{secret}" admin 10 md5
"""
CONTROLLER = """
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02
mc_enable 0x20
"""
MACHINE = """#!/bin/sh
# ADDRESS get|set power [0|1]: the machine that the device switches; with a file `stuck` it stays as it is
cd {directory}
case "$2 $3" in
  "get power") echo "power:$(cat power)";;
  "set power") echo "$4" >> asked; [ -e stuck ] || echo "$4" > power;;
esac
"""


class Device:
    """A power device, and the machine behind it that is on."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port
        (directory / "power").write_text("1")

    @property
    def is_machine_on(self) -> bool:
        return (self.directory / "power").read_text().strip() == "1"

    @property
    def was_asked(self) -> list[str]:
        asked = self.directory / "asked"
        return asked.read_text().split() if asked.exists() else []

    def path(self, *, secret: str = SECRET) -> FencePath:
        options = {"ip": "127.0.0.1", "ipport": str(self.port), "username": "root", "lanplus": "1", "cipher": "3"}
        return FencePath(name="bmc", agent="fence_ipmilan", options=options, secret=secret)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Device(tmp_path, port)
    machine = tmp_path / "machine"
    machine.write_text(MACHINE.format(directory=tmp_path))
    machine.chmod(0o700)
    (tmp_path / "lan.conf").write_text(LAN.format(port=port, machine=machine, secret=SECRET))
    (tmp_path / "controller.emu").write_text(CONTROLLER)
    (tmp_path / "state").mkdir()
    command = ["ipmi_sim", "-n", "-c", "lan.conf", "-f", "controller.emu", "-s", "state"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as simulator:
        try:
            wait_until(lambda: FenceAgents().status(found.path()).power is Power.ON, "the device to answer")
            yield found
        finally:
            simulator.kill()


def test_a_machine_is_switched_off_and_its_device_says_so(device: Device) -> None:
    answer = FenceAgents().switch_off(device.path(), timeout_s=30, may_still=lambda: True)
    assert answer.power is Power.OFF
    assert not device.is_machine_on
    assert FenceAgents().status(device.path()).power is Power.OFF


def test_a_device_that_takes_the_order_and_does_not_obey_is_not_believed(device: Device) -> None:
    (device.directory / "stuck").touch()
    answer = FenceAgents().switch_off(device.path(), timeout_s=10, may_still=lambda: True)
    assert "0" in device.was_asked, "it was told to"
    assert answer.power is not Power.OFF


def test_another_password_learns_and_switches_nothing(device: Device) -> None:
    other = device.path(secret="another")
    assert FenceAgents().status(other).power is Power.UNKNOWN
    assert FenceAgents().switch_off(other, timeout_s=3, may_still=lambda: True).power is Power.UNKNOWN
    assert device.was_asked == []
    assert device.is_machine_on


def test_the_password_is_in_no_argument_of_any_process_and_in_no_answer(device: Device) -> None:
    messages: list[str] = []

    def ask() -> None:
        for _time in range(3):
            messages.append(FenceAgents().status(device.path()).message)

    asking = threading.Thread(target=ask)
    asking.start()
    seen = []
    while asking.is_alive():
        seen.append(command_lines())
    assert any(f"-p {device.port}" in one for one in seen), "ipmitool was seen at work"
    assert not any(SECRET in one for one in seen)
    assert not any(SECRET in one for one in messages)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["-I", "lanplus", "-P", "x y", "chassis", "power", "off"], ["-E", "-I", "lanplus", "chassis", "power", "off"]),
        (["-P", "", "chassis"], ["-E", "chassis"]),
        (["chassis", "-P"], ["-E", "chassis"]),
        ([], ["-E"]),
    ],
)
def test_whatever_password_was_given_as_an_argument_is_left_out(given: list[str], kept: list[str]) -> None:
    assert without_password(given) == kept
