"""OVN's northbound database as we write it: a real one, of a server of the test's own."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.core.test_overlay import APP, WEB
from trimtab_controller.core.firewall import Rule
from trimtab_controller.core.overlay import Table, desired, own_mac
from trimtab_controller.core.overlay_groups import OverlayGroup, group_rows
from trimtab_controller.core.overlay_outside import (
    Floating,
    GatewayHost,
    OuterNetwork,
    OuterSide,
    Outside,
    gateways,
    with_outside,
)
from trimtab_controller.northbound import OvnNorthbound, Papers
from trimtab_protos.errors import Unavailable

INNER = replace(APP, router="edge", project_id="proj-1")
OUTSIDE = Outside(
    networks=(
        OuterNetwork(
            network_id="net-lan",
            subnet="192.0.2.0/24",
            gateway="192.0.2.1",
            hosts=(GatewayHost(chassis="node1"), GatewayHost(chassis="node2", is_cordoned=True), GatewayHost(chassis="node3")),
        ),
    ),
    sides=(OuterSide(project_id="proj-1", router="edge", outer_network_id="net-lan", address="192.0.2.10"),),
    floating=(Floating(floating_id="fip-1", outer_network_id="net-lan", address="192.0.2.100", nic_id="nic-1"),),
)
SCHEMAS = Path("/usr/share/ovn")


@contextmanager
def served(directory: Path, name: str, *more: str) -> Iterator[str]:
    """Serve a database of OVN's and return its endpoint."""
    database, place, up = directory / f"{name}.db", directory / f"{name}.sock", directory / f"{name}.up"
    subprocess.run(["ovsdb-tool", "create", database, SCHEMAS / f"ovn-{name}.ovsschema"], check=True, timeout=10)
    serve = ["ovsdb-server", "--no-chdir", "--unixctl=none", f"--remote=punix:{place}", *more, str(database)]
    # It ends with its child, which tells that it serves by running.
    with subprocess.Popen([*serve, "--run", f"sh -c 'touch {up}; exec cat'"], stdin=subprocess.PIPE) as server:
        while not up.exists():
            assert server.poll() is None, "the database's server ended"
        yield f"unix:{place}"
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=10)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    with served(tmp_path, "nb") as nb:
        yield nb


@pytest.fixture
def southbound(endpoint: str, tmp_path: Path) -> Iterator[str]:
    """What northd makes of the database."""
    with served(tmp_path, "sb") as sb:
        command = ["ovn-northd", "--no-chdir", f"--unixctl={tmp_path}/northd.ctl", f"--ovnnb-db={endpoint}", f"--ovnsb-db={sb}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as northd:
            yield sb
            northd.terminate()


def ask(endpoint: str, *words: str) -> str:
    done = subprocess.run(["ovn-nbctl", f"--db={endpoint}", *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def test_what_shall_be_there_is_written_once_and_goes_without_a_trace(endpoint: str) -> None:
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        assert len(northbound.apply(desired([APP], [WEB])).create) == 5
        assert not northbound.apply(desired([APP], [WEB])), "nothing is left to do"
        assert ask(endpoint, "lsp-get-port-security", "nic-1") == "52:54:00:00:00:01 10.30.0.5"
        assert ask(endpoint, "lsp-get-dhcpv4-options", "nic-1").endswith("(10.30.0.0/24)")
        moved = northbound.apply(desired([APP], [replace(WEB, chassis="node2")]))
        assert [row.key for row in moved.update] == ["nic-1"]
        assert ask(endpoint, "lsp-get-options", "nic-1") == "requested-chassis=node2"
        assert (Table.PORT, "nic-1") in northbound.apply(desired([APP], [])).delete
        northbound.apply(())
        assert ask(endpoint, "ls-list") == ""
        assert ask(endpoint, "dhcp-options-list") == ""
        assert ask(endpoint, "--columns=_uuid", "list", "DNS") == ""


def test_what_is_somebody_elses_stays(endpoint: str) -> None:
    ask(endpoint, "ls-add", "theirs")
    with (
        closing(OvnNorthbound(endpoint, fleet="fleet-b")) as other,
        closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound,
    ):
        other.apply(desired([replace(APP, network_id="net-other")], []))
        northbound.apply(desired([APP], [WEB]))
        northbound.apply(())
    assert sorted(line.split()[1] for line in ask(endpoint, "ls-list").splitlines()) == ["(net-other)", "(theirs)"]


def test_a_row_that_somebody_changed_by_hand_is_put_right(endpoint: str) -> None:
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        northbound.apply(desired([APP], [WEB]))
        ask(endpoint, "lsp-set-port-security", "nic-1")
        ask(endpoint, "lsp-del", "own-net-app")
        # What was written by another is seen once the replica has it.
        while not (changes := northbound.apply(desired([APP], [WEB]))):
            pass
        while not any(row.key == "own-net-app" for row in changes.create):
            changes = northbound.apply(desired([APP], [WEB]))
        assert ask(endpoint, "lsp-get-port-security", "nic-1") == "52:54:00:00:00:01 10.30.0.5"


def test_a_database_that_is_not_there_is_unavailable_and_found_again(endpoint: str, tmp_path: Path) -> None:
    away, there = tmp_path / "away.sock", Path(endpoint.removeprefix("unix:"))
    with closing(OvnNorthbound(f"unix:{away}", fleet="fleet-a")) as northbound:
        with pytest.raises(Unavailable) as refused:
            northbound.apply(())
        assert refused.value.code == "ovn-northbound-unusable"
        away.symlink_to(there)
        assert len(northbound.apply(desired([APP], [])).create) == 3


def test_one_that_was_lost_is_written_anew_without_anything_being_asked(tmp_path: Path) -> None:
    rows = with_outside(desired([INNER], [WEB]), [INNER], [WEB], OUTSIDE)
    with closing(OvnNorthbound(f"unix:{tmp_path}/nb.sock", fleet="fleet-a", answer_within_s=1)) as northbound:
        with served(tmp_path, "nb"):
            northbound.apply(rows)
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(Unavailable):
            northbound.apply(rows)
        with served(tmp_path, "nb") as nb:
            assert len(northbound.apply(rows).create) == len(rows)
            assert "192.0.2.100" in ask(nb, "lr-nat-list", "router-proj-1-edge")


def traced(southbound: str, network: str, packet: str) -> str:
    """Return what OVN would do with the first packet of a connection."""
    command = ["ovn-trace", f"--db={southbound}", "--minimal", "--ct=new", network, packet]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def test_ovn_takes_it_as_it_is_meant(endpoint: str, southbound: str) -> None:
    web = replace(WEB, chassis="")
    inner = replace(APP, router="inner")
    data = replace(inner, network_id="net-data", subnet="10.31.0.0/24")
    database = replace(
        web, nic_id="nic-2", network_id="net-data", mac="52:54:00:00:00:02", addresses=("10.31.0.5/24",), vm_name="db"
    )
    beside = replace(web, nic_id="nic-3", mac="52:54:00:00:00:03", addresses=("10.30.0.6/24",), vm_name="web2")
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        northbound.apply(desired([inner, data], [web, database, beside]))
    ask(endpoint, "--wait=sb", "--timeout=10", "sync")
    sent = f'inport=="nic-1" && eth.src=={web.mac} && ip4.src==10.30.0.5 && ip.ttl==64 && icmp4 && icmp4.type==8'
    to_beside = f"{sent} && eth.dst=={beside.mac} && ip4.dst==10.30.0.6"
    to_database = f"{sent} && eth.dst=={own_mac('net-app')} && ip4.dst==10.31.0.5"
    assert 'output("nic-3")' in traced(southbound, "net-app", to_beside), "within the network"
    assert 'output("nic-2")' in traced(southbound, "net-app", to_database), "to another by their router"
    for own, stolen in ((web.mac, "52:54:00:00:00:99"), ("ip4.src==10.30.0.5", "ip4.src==10.30.0.99")):
        assert "output" not in traced(southbound, "net-app", to_beside.replace(own, stolen)), "but as itself only"
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        northbound.apply(desired([inner, replace(data, router="")], [web, database, beside]))
    ask(endpoint, "--wait=sb", "--timeout=10", "sync")
    assert "output" not in traced(southbound, "net-app", to_database), "without a router there is no way"


def test_a_floating_address_leads_to_a_guest_and_back_out(endpoint: str, southbound: str) -> None:
    inner, web = INNER, replace(WEB, chassis="")
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        rows = with_outside(desired([inner], [web]), [inner], [web], OUTSIDE)
        northbound.apply(rows)
        assert not northbound.apply(rows), "as it is read back, nothing is left to do"
        ask(endpoint, "--wait=sb", "--timeout=10", "sync")
        router = own_mac("ro-router-proj-1-edge")
        asks = 'inport=="out-net-lan" && eth.src==0a:00:00:00:00:01 && ip4.src==192.0.2.1 && ip.ttl==64 && icmp4 && icmp4.type==8'
        came = traced(southbound, "net-lan", f"{asks} && eth.dst=={router} && ip4.dst==192.0.2.100")
        assert 'output("nic-1")' in came, "what asks for the floating address arrives at the card"
        other = traced(southbound, "net-lan", f"{asks} && eth.dst=={router} && ip4.dst==192.0.2.101")
        assert 'output("nic-1")' not in other, "an address that nobody has leads nowhere"
        chassis = ask(endpoint, "lrp-get-gateway-chassis", "ro-router-proj-1-edge").split()
        assert chassis[0::2] == [
            f"gw-router-proj-1-edge-{one}" for one in gateways("router-proj-1-edge", OUTSIDE.networks[0].hosts)
        ]
        northbound.apply(desired([inner], [web]))
        assert ask(endpoint, "lr-nat-list", "router-proj-1-edge") == ""
        assert ask(endpoint, "lr-route-list", "router-proj-1-edge") == ""
        assert ask(endpoint, "--columns=_uuid", "list", "Gateway_Chassis") == ""
        assert "net-lan" not in ask(endpoint, "ls-list")


def test_a_group_lets_in_what_its_rules_name(endpoint: str, southbound: str) -> None:
    web = replace(WEB, chassis="", vm_id="vm-1")
    beside = replace(web, nic_id="nic-3", mac="52:54:00:00:00:03", addresses=("10.30.0.6/24",), vm_name="web2", vm_id="vm-2")
    group = OverlayGroup(
        group_id="sg-1", rules=(Rule("tcp", 443, 443, "10.30.0.0/16"), Rule("udp", 100, 200), Rule("icmp")), vm_ids=("vm-2",)
    )
    rows = (*desired([APP], [web, beside]), *group_rows([group], [web, beside], moving=["vm-2"]))
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        northbound.apply(rows)
        assert not northbound.apply(rows), "as it is read back, nothing is left to do"
        ask(endpoint, "--wait=sb", "--timeout=10", "sync")
        sent = f'inport=="nic-1" && eth.src=={web.mac} && ip4.src==10.30.0.5 && ip.ttl==64 && eth.dst=={beside.mac} && ip4.dst==10.30.0.6'
        for packet, passes in (
            ("tcp && tcp.dst==443 && tcp.flags==2", True),
            ("tcp && tcp.dst==444 && tcp.flags==2", False),
            ("tcp && tcp.dst==444 && tcp.flags==0x10", True),
            ("udp && udp.dst==150", True),
            ("udp && udp.dst==201", False),
            ("icmp4 && icmp4.type==8", True),
        ):
            assert ('output("nic-3")' in traced(southbound, "net-app", f"{sent} && {packet}")) is passes, packet
        northbound.apply((*desired([APP], [web, beside]), *group_rows([group], [web, beside])))
        ask(endpoint, "--wait=sb", "--timeout=10", "sync")
        under_way = f"{sent} && tcp && tcp.dst==444 && tcp.flags==0x10"
        assert 'output("nic-3")' not in traced(southbound, "net-app", under_way), "only for a while"
        northbound.apply(desired([APP], [web, beside]))
        assert ask(endpoint, "--columns=_uuid", "list", "Port_Group") == ""
        assert ask(endpoint, "--columns=_uuid", "list", "ACL") == ""


def test_ipv6_reaches_guests_as_ipv4_does_and_is_told_to_them(endpoint: str, southbound: str) -> None:
    app = replace(INNER, subnet6="fd00:30::/64")
    data = replace(app, network_id="net-data", subnet="10.31.0.0/24", subnet6="fd00:31::/64", has_dhcp6=True)
    web = replace(WEB, chassis="", vm_id="vm-1", addresses=("10.30.0.5/24", "fd00:30::5054:ff:fe00:1/64"))
    database = replace(
        web, nic_id="nic-2", network_id="net-data", mac="52:54:00:00:00:02", vm_id="vm-2", vm_name="db",
        addresses=("10.31.0.5/24", "fd00:31::5054:ff:fe00:2/64"),
    )  # fmt: skip
    group = OverlayGroup(group_id="sg-1", rules=(Rule("tcp", 443, 443, "fd00:30::/64"), Rule("icmp")), vm_ids=("vm-2",))
    rows = (*desired([app, data], [web, database]), *group_rows([group], [web, database]))
    with closing(OvnNorthbound(endpoint, fleet="fleet-a")) as northbound:
        northbound.apply(rows)
        assert not northbound.apply(rows), "as it is read back, nothing is left to do"
    ask(endpoint, "--wait=sb", "--timeout=10", "sync")
    own = "fd00:30::5054:ff:fe00:1"
    sent = f'inport=="nic-1" && eth.src=={web.mac} && ip6.src=={own} && ip.ttl==64 && eth.dst=={own_mac("net-app")}'
    to_database = f"{sent} && ip6.dst==fd00:31::5054:ff:fe00:2"
    for packet, passes in (
        ("icmp6 && icmp6.type==128", True),
        ("tcp && tcp.dst==443 && tcp.flags==2", True),
        ("tcp && tcp.dst==444 && tcp.flags==2", False),
    ):
        found = traced(southbound, "net-app", f"{to_database} && {packet}")
        assert ('output("nic-2")' in found) is passes, packet
    stolen = f"{to_database} && icmp6 && icmp6.type==128".replace(own, "fd00:30::99")
    assert "output" not in traced(southbound, "net-app", stolen), "but with its own address only"
    # What OVN would answer itself; its tracer does not follow a guest that asks for a router.
    answers = ask_flows(southbound)
    (told,) = [one for one in answers if "put_nd_ra_opts" in one and "fd00:30::" in one]
    assert 'addr_mode = "slaac"' in told
    (told,) = [one for one in answers if "put_nd_ra_opts" in one and "fd00:31::" in one]
    assert 'addr_mode = "dhcpv6_stateful"' in told
    given = [one for one in answers if "put_dhcpv6_opts" in one]
    assert given
    assert all("ia_addr = fd00:31::5054:ff:fe00:2" in one for one in given), "the address that was declared, and where asked for"


def ask_flows(southbound: str) -> list[str]:
    """Return the actions of everything that OVN made of the database."""
    words = ["ovn-sbctl", f"--db={southbound}", "--format=json", "--columns=actions", "list", "Logical_Flow"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    return [str(row[0]) for row in json.loads(done.stdout)["data"]]


def test_one_that_asks_for_a_certificate_is_shown_ours_and_must_show_its_own(tmp_path: Path) -> None:
    ours, others = papers(tmp_path, "ours"), papers(tmp_path, "others")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = [f"--private-key={ours.key}", f"--certificate={ours.certificate}", f"--ca-cert={ours.authority}"]
    with served(tmp_path, "nb", *keys, f"--remote=pssl:{port}:127.0.0.1"):
        endpoint = f"ssl:127.0.0.1:{port}"
        with closing(OvnNorthbound(endpoint, fleet="fleet-a", papers=ours)) as northbound:
            assert len(northbound.apply(desired([APP], [])).create) == 3
        for wrong in (others, Papers(others.certificate, others.key, ours.authority)):
            with closing(OvnNorthbound(endpoint, fleet="fleet-a", papers=wrong)) as northbound, pytest.raises(Unavailable):
                northbound.apply(desired([APP], []))


def papers(directory: Path, name: str) -> Papers:
    """Make a key and a certificate that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    found = Papers(directory / f"{name}.pem", directory / f"{name}.key", directory / f"{name}.pem")
    found.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    found.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return found
