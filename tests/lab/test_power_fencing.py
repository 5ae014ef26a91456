"""Power fencing with Debian's fence_redfish against a device that really kills its host: off is believed only when read back off.

One lab of one host, without a control plane: what is under test is the way from `FenceAgents` to the power of a machine and back.
"""

import os
import time
from collections.abc import Iterator

import pytest

from trimtab_controller.fencing import FenceAgents, FencePath, Power
from trimtab_lab.hosts import Lab
from trimtab_lab.power import PASSWORD, Fault, PowerDevices

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
HOST = "node1"


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PowerDevices]:
    lab = Lab.named(f"power-{os.getpid()}", state_directory=tmp_path_factory.mktemp("power"))
    made = PowerDevices(lab)
    try:
        lab.up(hosts=1)
        made.start()
        yield made
    finally:
        made.stop()
        lab.down()


@pytest.fixture
def path(devices: PowerDevices) -> FencePath:
    devices.lab.boot(HOST)
    devices.fault(HOST, Fault.NONE)
    devices.asked.clear()
    return FencePath(name="bmc", agent="fence_redfish", options=devices.options(HOST), secret=PASSWORD)


def yes() -> bool:
    return True


def test_the_readiness_test_tells_the_state_and_switches_nothing(devices: PowerDevices, path: FencePath) -> None:
    assert FenceAgents().status(path).power is Power.ON
    assert devices.is_on(HOST)
    assert devices.asked == []


def test_a_host_is_off_when_its_status_was_read_back_as_off(devices: PowerDevices, path: FencePath) -> None:
    answer = FenceAgents().switch_off(path, timeout_s=40, may_still=yes)
    assert answer.power is Power.OFF
    assert not devices.is_on(HOST), "its processes are gone"
    assert devices.asked == [(HOST, "ForceOff")]
    again = FenceAgents().switch_off(path, timeout_s=40, may_still=yes)
    assert again.power is Power.OFF, "off is an ensure"


def test_a_device_that_lies_about_what_it_did_is_not_believed(devices: PowerDevices, path: FencePath) -> None:
    devices.fault(HOST, Fault.LYING)
    answer = FenceAgents().switch_off(path, timeout_s=3, may_still=yes)
    assert devices.asked, "it was told to, and said that it did"
    assert answer.power is Power.ON
    assert "status is on" in answer.message
    assert devices.is_on(HOST)


def test_a_slow_device_is_waited_for_and_a_dead_one_is_unknown(devices: PowerDevices, path: FencePath) -> None:
    devices.fault(HOST, Fault.SLOW)
    assert FenceAgents().status(path).power is Power.ON
    devices.fault(HOST, Fault.DEAD)
    began = time.monotonic()
    dead = FenceAgents()._call(path, "status", timeout_s=5)
    assert dead.power is Power.UNKNOWN
    assert time.monotonic() - began < 10
    assert devices.is_on(HOST)


def test_a_wrong_password_is_unknown_and_stands_in_no_message(devices: PowerDevices, path: FencePath) -> None:
    wrong = FencePath(name="bmc", agent="fence_redfish", options=devices.options(HOST), secret="not-the-password")
    answer = FenceAgents().status(wrong)
    assert answer.power is Power.UNKNOWN
    assert "not-the-password" not in answer.message
    assert devices.asked == []


def test_who_does_not_lead_any_more_switches_nothing(devices: PowerDevices, path: FencePath) -> None:
    answer = FenceAgents().switch_off(path, timeout_s=10, may_still=lambda: False)
    assert answer.power is Power.UNKNOWN
    assert devices.asked == []
    assert devices.is_on(HOST)
