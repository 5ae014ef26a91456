"""A guest that is alone with the agent comes up and is asked; whatever it sends, the agent goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.agent.proof import guest
from tests.unit.agent.proof.guest import ACK, RST, SYN, Segment
from trimtab_agent.proof.station import ADDRESSES_MAX, Station

OFFER, GRANT, REFUSAL = 2, 5, 6


def syn_of(station: Station) -> Segment:
    [syn] = [Segment(frame) for frame in station.knock() if frame[12:14] == b"\x08\x00"]
    assert (syn.protocol, syn.flags) == (6, SYN)
    return syn


def asked(station: Station) -> list[tuple[bytes, str]]:
    """Return whose MAC the station asks for, with whom it says to be."""
    frames = [frame for frame in station.knock() if frame[12:14] == b"\x08\x06"]
    return [(frame[38:42], ".".join(map(str, frame[28:32]))) for frame in frames]


def test_a_declared_address_is_asked_and_a_listening_port_answers() -> None:
    station = Station(addresses=("fd00::5/64", "10.20.0.5/24"), port=22)
    assert station.finding.problem == "nothing was heard of its card"
    assert asked(station) == [(guest.packed("10.20.0.5"), "10.20.0.1")]
    assert station.hear(guest.arp(2, sender="10.20.0.5", target="10.20.0.1", to=guest.STATION_MAC)) == []
    syn = syn_of(station)
    assert (syn.to, syn.source, syn.target, syn.dport) == (guest.MAC, "10.20.0.1", "10.20.0.5", 22)
    assert not station.finding.is_final
    [reset] = station.hear(
        guest.tcp("10.20.0.5", "10.20.0.1", sport=22, dport=syn.sport, seq=900, ack=syn.sequence + 1, flags=SYN | ACK)
    )
    assert (Segment(reset).flags, Segment(reset).sequence) == (RST, syn.sequence + 1), "the connection is given up at once"
    assert (station.finding.has_answered, station.finding.address) == (True, "10.20.0.5")


def test_a_closed_port_is_told_and_may_open_later() -> None:
    station = Station(addresses=("10.20.0.5/24",), port=22)
    station.hear(guest.arp(2, sender="10.20.0.5", target="10.20.0.1"))
    syn = syn_of(station)
    refused = guest.tcp("10.20.0.5", "10.20.0.1", sport=22, dport=syn.sport, seq=0, ack=syn.sequence + 1, flags=RST | ACK)
    assert station.hear(refused) == []
    assert (station.finding.is_final, station.finding.has_answered) == (True, False)
    assert station.finding.problem == "10.20.0.5 refuses connections to TCP port 22"
    again = syn_of(station)
    assert again.sport != syn.sport
    station.hear(guest.tcp("10.20.0.5", "10.20.0.1", sport=22, dport=again.sport, seq=1, ack=again.sequence + 1, flags=SYN | ACK))
    assert station.finding.has_answered


@pytest.mark.parametrize(
    ("sender", "sport", "late", "flags"),
    [
        ("10.20.0.6", 22, 0, SYN | ACK),  # another address than the one asked
        ("10.20.0.5", 23, 0, SYN | ACK),  # another port
        ("10.20.0.5", 22, 5, SYN | ACK),  # an acknowledgement of something else
        ("10.20.0.5", 22, 0, SYN),
        ("10.20.0.5", 22, 0, ACK),
    ],
)
def test_only_the_acknowledgement_of_its_own_question_counts(sender: str, sport: int, late: int, flags: int) -> None:
    station = Station(addresses=("10.20.0.5/24",), port=22)
    station.hear(guest.arp(2, sender="10.20.0.5", target="10.20.0.1"))
    syn = syn_of(station)
    station.hear(guest.tcp(sender, "10.20.0.1", sport=sport, dport=syn.sport, seq=1, ack=syn.sequence + 1 + late, flags=flags))
    assert not station.finding.is_final


def test_dhcp_gives_the_declared_address_with_its_mask_and_a_gateway() -> None:
    station = Station(addresses=("10.20.0.5/20",), port=22)
    [offer] = map(Segment, station.hear(guest.dhcp(1)))
    assert (offer.given_address(), offer.dhcp_options()[53]) == ("10.20.0.5", bytes([OFFER]))
    [granted] = map(Segment, station.hear(guest.dhcp(3, wished="10.20.0.5")))
    options = granted.dhcp_options()
    assert (options[53], options[1], options[3]) == (bytes([GRANT]), guest.packed("255.255.240.0"), guest.packed("10.20.0.1"))
    assert syn_of(station).target == "10.20.0.5", "it has the address now, though nothing else was heard of it"
    [refused] = map(Segment, station.hear(guest.dhcp(3, wished="10.99.0.5")))
    assert refused.dhcp_options()[53] == bytes([REFUSAL])


@pytest.mark.parametrize(("wished", "given_address"), [("172.16.3.9", "172.16.3.9"), ("", "192.0.2.10")])
def test_dhcp_without_a_declared_address_gives_what_the_guest_had(wished: str, given_address: str) -> None:
    station = Station(addresses=(), port=22)
    [offer] = map(Segment, station.hear(guest.dhcp(1, wished=wished)))
    assert offer.given_address() == given_address


def test_the_gateway_that_a_guest_looks_for_is_there_and_is_who_asks() -> None:
    station = Station(addresses=(), port=22)
    [reply] = station.hear(guest.arp(1, sender="10.7.0.9", target="10.7.0.254"))
    assert (reply[:6], reply[20:22], reply[22:28], reply[28:32]) == (
        guest.MAC, b"\x00\x02", guest.STATION_MAC, guest.packed("10.7.0.254"),
    )  # fmt: skip
    assert syn_of(station).source == "10.7.0.254"


def test_a_guest_that_asks_whether_its_address_is_free_is_told_nothing() -> None:
    station = Station(addresses=(), port=22)
    assert station.hear(guest.arp(1, sender="0.0.0.0", target="10.7.0.9")) == []
    assert station.hear(guest.arp(1, sender="10.7.0.9", target="10.7.0.9")) == []
    assert syn_of(station).target == "10.7.0.9"
    assert station.finding.problem == "10.7.0.9 does not answer on TCP port 22"


def test_what_is_kept_of_a_guest_is_bounded() -> None:
    station = Station(addresses=(), port=22)
    for number in range(3 * ADDRESSES_MAX):
        station.hear(guest.arp(1, sender=f"10.7.{number}.9", target=f"10.7.{number}.1"))
    assert len(asked(station)) == ADDRESSES_MAX


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=300).map(lambda tail: guest.dhcp(1)[:-1] + tail)))
def test_no_frame_breaks_it(frame: bytes) -> None:
    station = Station(addresses=("10.20.0.5/24",), port=22)
    station.hear(frame)
    station.hear(frame[: len(frame) // 2])
    assert not station.finding.has_answered
    station.knock()
