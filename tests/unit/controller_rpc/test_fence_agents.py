"""Debian's own fence-agents, run as the product runs them. No device is asked that is not on this machine.

fence_dummy keeps the power in a file; fence_ipmilan is pointed at a port where nobody answers, fence_virsh at one that takes the
connection and says nothing. A power device that answers: `test_ipmi.py`.
"""

import socket
import stat
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from subprocess import run

import pytest

from trimtab_controller.fencing import AGENT_DIRECTORIES, NEEDED, FenceAgents, FencePath, Power, PowerAnswer, check_path
from trimtab_protos.errors import InvalidRequest

SECRET = "hunter2-of-the-bmc"
BOUND_S, LATE_S = 3.0, 4.0
"""What a call is given here, and what it may take besides on a busy machine."""
TOLD = {
    "fence_ipmilan": {"ip": "192.0.2.1", "ipport": "623", "username": "root", "lanplus": "1"},
    "fence_virsh": {"ip": "192.0.2.1", "ipport": "22", "username": "root", "plug": "node2"},
    "fence_redfish": {"ip": "192.0.2.1", "ipport": "443", "username": "root", "plug": "1", "ssl_insecure": "1"},
    "fence_dummy": {},
}
"""What `fence config` makes of --address, --port, --user, --plug, and what operators give as --option."""


def program(agent: str) -> str:
    return str(next(found for directory in AGENT_DIRECTORIES if (found := directory / agent).is_file()))


def parameters(agent: str) -> dict[str, bool]:
    """Name → whether it is required, as the agent itself lists them."""
    told = run([program(agent), "-o", "metadata"], capture_output=True, text=True, timeout=20, check=True).stdout
    return {one.attrib["name"]: one.attrib["required"] == "1" for one in ET.fromstring(told).iter("parameter")}


@pytest.fixture
def silent_udp() -> Iterator[int]:
    """A port that takes what is sent to it and answers nothing."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as device:
        device.bind(("127.0.0.1", 0))
        yield device.getsockname()[1]


@pytest.fixture
def silent_tcp() -> Iterator[int]:
    with closing(socket.create_server(("127.0.0.1", 0))) as device:
        yield device.getsockname()[1]


def command_lines() -> str:
    """Every argument of every process of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(process.read_bytes())
        except OSError:
            continue  # it ended
    return b"\n".join(found).replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.parametrize("agent", TOLD)
def test_every_option_that_we_give_is_one_that_the_agent_lists(agent: str) -> None:
    listed = parameters(agent)
    assert {*TOLD[agent], "action"} <= set(listed)
    # Where a device has a password it goes by this name, whichever older ones it has besides.
    assert "password" in listed or agent == "fence_dummy"
    check_path(FencePath(name="bmc", agent=agent, options=TOLD[agent], secret=SECRET))


@pytest.mark.parametrize("agent", [one for one in TOLD if one != "fence_dummy"])
def test_each_option_of_an_agent_that_names_a_file_or_program_is_refused(agent: str) -> None:
    named = {one for one in parameters(agent) if one.endswith(("_file", "_script", "_path")) or one.startswith("debug")}
    assert "password_script" in named
    for name in named:
        with pytest.raises(InvalidRequest) as refused:
            check_path(FencePath(name="bmc", agent=agent, options={name: "/etc/shadow"}))
        assert refused.value.context["field"] == "options"


def test_the_dummy_agent_switches_off_and_its_status_is_read_back(tmp_path: Path) -> None:
    power = tmp_path / "power"
    path = FencePath(name="dummy", agent="fence_dummy", options={"status_file": str(power)})
    power.write_text("on")
    assert FenceAgents().status(path).power is Power.ON
    assert FenceAgents().switch_off(path, timeout_s=20, may_still=lambda: False).power is Power.UNKNOWN
    assert power.read_text() == "on"
    assert FenceAgents().switch_off(path, timeout_s=20, may_still=lambda: True).power is Power.OFF
    assert power.read_text() == "off"
    assert FenceAgents().switch_off(path, timeout_s=20, may_still=lambda: True).power is Power.OFF, "off is an ensure"


def test_a_dummy_device_that_does_not_obey_is_not_believed_and_ends_in_time(tmp_path: Path) -> None:
    power = tmp_path / "power"
    power.write_text("on")
    path = FencePath(name="dummy", agent="fence_dummy", options={"status_file": str(power), "type": "fail"})
    began = time.monotonic()
    answer = FenceAgents().switch_off(path, timeout_s=BOUND_S, may_still=lambda: True)
    assert answer.power is not Power.OFF
    assert time.monotonic() - began < BOUND_S + LATE_S


def test_a_manual_acknowledgement_is_no_device_and_answers_nothing_for_us() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_path(FencePath(name="manual", agent="fence_ack_manual", options={}))
    assert refused.value.code == "fence-agent-invalid"
    # Even run as one it confirms nothing: it wants a word on its standard input that no path can give.
    path = FencePath(name="manual", agent="fence_ack_manual", options={})
    assert FenceAgents().status(path).power is Power.UNKNOWN
    assert FenceAgents().switch_off(path, timeout_s=BOUND_S, may_still=lambda: True).power is Power.UNKNOWN


def unanswered(path: FencePath, action: str) -> tuple[PowerAnswer, list[str]]:
    """Ask a device that stays silent; return the answer, which must come in time, and what ran meanwhile."""
    answers, seen, began = list[PowerAnswer](), list[str](), time.monotonic()
    asking = threading.Thread(target=lambda: answers.append(FenceAgents()._call(path, action, timeout_s=BOUND_S)))
    asking.start()
    while asking.is_alive():
        seen.append(command_lines())
        asking.join(0.1)
    assert time.monotonic() - began < BOUND_S + LATE_S
    assert answers[0].power is Power.UNKNOWN
    return answers[0], seen


def test_an_ipmi_device_that_does_not_answer_ends_within_the_bound_as_unknown_with_the_program_that_asked(
    silent_udp: int,
) -> None:
    options = {"ip": "127.0.0.1", "ipport": str(silent_udp), "username": "root", "lanplus": "1"}
    path = FencePath(name="bmc", agent="fence_ipmilan", options=options, secret=SECRET)
    answer, seen = unanswered(path, "off")
    assert "fence_ipmilan did not answer within 3 s" in answer.message
    assert SECRET not in answer.message
    asked = f"-p {silent_udp}"
    assert any("ipmitool" in one and asked in one for one in seen), "its ipmitool was seen at work"
    assert asked not in command_lines()
    assert not any(SECRET in one for one in seen), "the agent would give it to ipmitool as an argument"


def test_a_libvirt_host_that_says_nothing_ends_within_the_bound_and_its_password_is_in_no_argument(silent_tcp: int) -> None:
    options = {"ip": "127.0.0.1", "ipport": str(silent_tcp), "username": "root", "plug": "node2"}
    path = FencePath(name="virsh", agent="fence_virsh", options=options, secret=SECRET)
    answer, seen = unanswered(path, "status")
    assert "fence_virsh" in answer.message
    assert any(f"-p {silent_tcp}" in one for one in seen), "its ssh was seen at work"
    assert not any(SECRET in one for one in seen)


def test_an_ipmi_agent_without_ipmitool_says_what_to_install_and_each_one_that_calls_it_is_known(tmp_path: Path) -> None:
    path = FencePath(name="bmc", agent="fence_ipmilan", options={"ip": "127.0.0.1", "username": "root"}, secret=SECRET)
    answer = FenceAgents(programs=tmp_path).status(path)
    assert answer.power is Power.UNKNOWN
    assert answer.message == "fence_ipmilan needs ipmitool, which is not installed here; apt install ipmitool"
    agents = [one for directory in AGENT_DIRECTORIES for one in directory.glob("fence_*")]
    assert {one.name for one in agents if "/ipmitool" in one.read_text(errors="replace")} == {
        agent for agent, needed in NEEDED.items() if needed == "ipmitool"
    }


def test_an_agent_that_leaves_a_program_behind_is_not_waited_for_beyond_the_bound_and_takes_it_along(tmp_path: Path) -> None:
    agent = tmp_path / "fence_slow"
    agent.write_text("#!/bin/sh\ncat > /dev/null\nsleep 47.11 &\nwait\n")
    agent.chmod(agent.stat().st_mode | stat.S_IXUSR)
    began = time.monotonic()
    answer = FenceAgents((tmp_path,))._call(FencePath(name="x", agent="fence_slow", options={}), "off", timeout_s=1)
    assert "did not answer within 1 s" in answer.message
    assert time.monotonic() - began < 1 + LATE_S
    assert "sleep 47.11" not in command_lines()
