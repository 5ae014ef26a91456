"""What a host says of a guest's agent: it answers, it is not there, or it has its channel open and hangs."""

from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from tests.unit.agent.kvm.test_pauses import DEFINITION, Seeing
from trimtab_agent.hypervisor.kvm.housekeeping import ask_agent

CHANNEL = "<devices><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='{}'/></channel></devices>"


class Guest:
    """A running guest of libvirt's test driver, which has no agents: how its channel is and what its agent answers is the test's."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self.channel = "connected"
        self.answer: dict[str, Any] | int = {"eth0": {"addrs": [{"addr": "10.0.0.5"}]}}
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def XMLDesc(self, flags: int = 0) -> str:
        xml: str = self._domain.XMLDesc(flags)
        return xml.replace("<devices>", CHANNEL.format(self.channel).removesuffix("</devices>"), 1)

    def agentSetResponseTimeout(self, _seconds: int, _flags: int) -> None:
        pass

    def interfaceAddresses(self, _source: int, _flags: int) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.answer, int):
            error = libvirt.libvirtError("no")
            error.err = (self.answer, 10, "no", 2, "", "", "", -1, -1)
            raise error
        return self.answer


@pytest.fixture
def guest() -> Iterator[Guest]:
    connection = libvirt.open("test:///default")
    domain = connection.createXML(DEFINITION)
    yield Guest(domain)
    domain.destroy()
    connection.close()


def test_an_agent_that_answers_is_heard_with_its_addresses(guest: Guest) -> None:
    observer = Seeing("boot")
    assert ask_agent(guest, observer)
    seen = observer.observe(guest)
    assert (seen.has_guest_agent, seen.addresses) == (True, ("10.0.0.5",))


def test_one_that_has_closed_its_channel_is_not_asked_and_not_heard(guest: Guest) -> None:
    observer = Seeing("boot")
    guest.channel = "disconnected"
    ask_agent(guest, observer)
    assert (observer.observe(guest).has_guest_agent, guest.asked) == (False, 0)


def test_one_that_hangs_is_not_heard_until_it_answers_again(guest: Guest) -> None:
    observer = Seeing("boot")
    guest.answer = libvirt.VIR_ERR_AGENT_UNRESPONSIVE
    assert not ask_agent(guest, observer)
    assert not observer.observe(guest).has_guest_agent
    guest.answer = {}
    assert ask_agent(guest, observer)
    assert observer.observe(guest).has_guest_agent


def test_a_refusal_is_an_answer(guest: Guest) -> None:
    observer = Seeing("boot")
    guest.answer = libvirt.VIR_ERR_OPERATION_UNSUPPORTED
    assert not ask_agent(guest, observer)
    assert observer.observe(guest).has_guest_agent
