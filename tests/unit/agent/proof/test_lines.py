"""Lines are joined once, kept while somebody asks, and joined anew when the guest's side is gone."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from tests.unit.agent.kvm import factories as make
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import wires
from trimtab_agent.hypervisor.kvm.domain_xml import HostTraits, build
from trimtab_agent.hypervisor.simulated_domains import SimulatedDomain
from trimtab_agent.hypervisor.simulated_wire import join as join_simulated
from trimtab_agent.proof import lines
from trimtab_agent.proof.lines import Lines
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound, Unavailable
from trimtab_protos.messages import DomainState, NetworkKind

WIRE = make.bridge_network(network_id="net-wire", kind=NetworkKind.WIRE, name="wire", bridge="")
CARDS = tuple(make.nic(i, network_id="net-wire", addresses=(f"10.20.{i}.5/24",)) for i in range(2))
SPEC = make.domain(nics=CARDS, networks=(WIRE,))


@dataclass(slots=True)
class Guest:
    """Cards of a simulated guest, and how often each was joined."""

    domain: SimulatedDomain = field(
        default_factory=lambda: SimulatedDomain(SPEC, Stamp(epoch=1, turn=1), state=DomainState.RUNNING)
    )
    joined: list[str] = field(default_factory=list)

    def open_wire(self, _vm_id: str, nic_id: str) -> socket.socket:
        self.joined.append(nic_id)
        return join_simulated(self.domain, nic_id)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    hang_up(made)


def hang_up(guest: Guest) -> None:
    """End the guest's side of every line, and wait until the agent's side has noticed."""
    for line in guest.domain.open_consoles:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
    for thread in threading.enumerate():
        if thread.name == "proof-line":
            thread.join(30)


def test_a_port_is_found_on_whichever_card_it_answers_and_the_line_is_kept(guest: Guest) -> None:
    own = Lines(guest.open_wire)
    assert own.knock("vm-01hweb", CARDS, 22, timeout_s=30).has_answered
    assert own.knock("vm-01hweb", CARDS, 22, timeout_s=30).has_answered
    assert guest.joined == [CARDS[0].nic_id, CARDS[1].nic_id]


def test_a_port_that_refuses_on_each_card_is_told_of_each(guest: Guest) -> None:
    found = Lines(guest.open_wire).knock("vm-01hweb", CARDS, 23, timeout_s=30)
    assert found.problem == ("10.20.0.5 refuses connections to TCP port 23; 10.20.1.5 refuses connections to TCP port 23")


def test_another_port_is_asked_over_a_line_of_its_own(guest: Guest) -> None:
    own = Lines(guest.open_wire)
    assert not own.knock("vm-01hweb", CARDS[:1], 23, timeout_s=30).has_answered
    assert own.knock("vm-01hweb", CARDS[:1], 22, timeout_s=30).has_answered
    assert len(guest.joined) == 2


def test_a_line_that_broke_is_joined_anew(guest: Guest) -> None:
    own = Lines(guest.open_wire)
    own.knock("vm-01hweb", CARDS[:1], 23, timeout_s=30)
    hang_up(guest)
    guest.domain.ports.add(23)
    assert own.knock("vm-01hweb", CARDS[:1], 23, timeout_s=30).has_answered
    assert len(guest.joined) == 2


def test_a_guest_that_does_not_run_is_not_joined(guest: Guest) -> None:
    guest.domain.state = DomainState.STOPPED
    with pytest.raises(Conflict, match="stopped"):
        Lines(guest.open_wire).knock("vm-01hweb", CARDS, 22, timeout_s=30)


def test_a_guest_without_a_card_is_told(guest: Guest) -> None:
    assert Lines(guest.open_wire).knock("vm-01hweb", (), 22, timeout_s=0).problem == "it has no network card"


def test_frames_are_cut_where_they_were_joined_whatever_arrives_together() -> None:
    sent = b"".join(lines.join(frame) for frame in (b"one", b"", b"three"))
    for cut in range(len(sent) + 1):
        first, left = lines.split(sent[:cut])
        second, left = lines.split(left + sent[cut:])
        assert (first + second, left) == ([b"one", b"", b"three"], b"")


def test_a_frame_that_cannot_be_ends_the_line() -> None:
    with pytest.raises(OSError, match="4294967295"):
        lines.split(b"\xff\xff\xff\xffrest")


# --- the card in the domain --------------------------------------------------------------------------------------------------

HOST = HostTraits(accelerator="tcg", console_log="/var/log/x.log", console_socket="/run/trimtab/x.sock")


def test_a_card_on_no_network_is_an_end_of_its_own_on_the_loopback() -> None:
    text = build(SPEC, Stamp(epoch=1, turn=1), HOST)
    assert 'type="bridge"' not in text
    assert "<mtu" not in text
    places = {wires.place(card.nic_id) for card in CARDS}
    assert len(places) == 2
    for address, port in places:
        assert address.startswith("127.")
        assert not address.startswith("127.0.")
        assert 20_000 <= port < 30_000
        assert f'<source address="{address}" port="{port}"' in text


def test_what_is_no_such_card_is_not_joined() -> None:
    text = build(SPEC, Stamp(epoch=1, turn=1), HOST)
    with pytest.raises(NotFound) as absent:
        wires.join(text, "vm-01hweb", "nic-01hother")
    assert absent.value.code == "wire-not-found"
    with pytest.raises(Unavailable) as closed:
        wires.join(text, "vm-01hweb", CARDS[0].nic_id)
    assert closed.value.code == "wire-closed"
    with pytest.raises(InvalidRequest):
        wires.place("nic/../x")


def test_a_card_on_a_network_is_as_it_was() -> None:
    lan = replace(SPEC, nics=(make.nic(),), networks=(make.bridge_network(),))
    assert 'type="bridge"' in build(lan, Stamp(epoch=1, turn=1), HOST)
