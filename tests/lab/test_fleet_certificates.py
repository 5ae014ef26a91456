"""Certificates through the whole stack: renewed at half life without a restart, a CA rotated, a lapsed host that comes back.

One story, since time passes for all of its parts at once: short lives are set, every host renews, and while node3's agent stands
still until its certificate has lapsed, the others renew again and move a guest between them.
"""

import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from tests.lab.fleet_kit import Fleet, fleet_settings, wait_until
from trimtab_lab.commands import own_programs
from trimtab_lab.controlplane import ControlPlane, join_line
from trimtab_lab.ctl import ctl_command
from trimtab_lab.specs import PLANE_GROUP

pytestmark = [pytest.mark.lab, pytest.mark.soak, pytest.mark.timeout(900)]

LIFE_S = 60
SHORT = {"TRIMTAB_AGENT_CERTIFICATE_HOURS": str(LIFE_S / 3600)}
AWAY = "node3"
STAYING = ("node1", "node2")
SERVED = "/etc/pki/libvirt/servercert.pem"


def restart(fleet: Fleet, settings: dict[str, str]) -> None:
    fleet.plane.stop()
    fleet.plane = ControlPlane(fleet.lab, settings={**fleet_settings(fleet.lab), **settings})
    fleet.plane.start()


@pytest.fixture(scope="module")
def short_lived(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with certificates that live for less than a minute, and a new CA that is trusted besides the present one."""
    fleet.plane.stop()  # while it is up, hosts renew for the new CA at once, and some would do so with long lives
    assert "A new CA is trusted" in rotate(fleet, "begin")
    restart(fleet, SHORT)
    yield fleet
    restart(fleet, {})
    for host in (*STAYING, AWAY):
        wait_until(lambda host=host: is_back(fleet, host), f"{host} to have long-lived certificates again")  # type: ignore[misc]


def is_back(fleet: Fleet, host: str) -> bool:
    """Tell whether the host lives as before; one whose certificate lapsed while the controller started is joined again."""
    if fleet.host(host)["connectivity"] == "up" and expiry_s(fleet, host) > 3600:
        return True
    if "EXPIRED" in fleet.ok("host", "get", host).out:
        rejoin(fleet, host)
    return False


def rotate(fleet: Fleet, verb: str) -> str:
    """Run `trimtab-controller ca rotate VERB` where an administrator does; return what it said, refusals too."""
    program = [str(own_programs() / "trimtab-controller"), "ca", "rotate", verb, "--data-dir", str(fleet.plane.data_directory)]
    command = ctl_command(fleet.lab.spec, program, group=PLANE_GROUP)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return ran.stdout + ran.stderr


def serials(fleet: Fleet, host: str) -> dict[str, str]:
    return {one["purpose"]: one["serial"] for one in fleet.host(host)["certificates"]}


def agents_metrics(fleet: Fleet, host: str) -> str:
    return fleet.sh(host, "busybox wget -q -O - http://127.0.0.1:9107/metrics")


def expiry_s(fleet: Fleet, host: str) -> float:
    """Return for how long the earlier of the host's certificates goes on, by its own metrics."""
    name = "trimtab_agent_certificate_expiry_timestamp_seconds"
    ends = [float(line.split()[-1]) for line in agents_metrics(fleet, host).splitlines() if line.startswith(name + "{")]
    assert len(ends) == 2, "one for the agent, one for libvirt"
    return min(ends) - float(fleet.sh(host, "date +%s"))


def served_certificate(fleet: Fleet, host: str) -> x509.Certificate:
    """Return the certificate that the running libvirtd shows to whoever connects."""
    address = fleet.lab.spec.host(host).address
    shown = fleet.sh(host, f"openssl s_client -connect {address}:16514 </dev/null 2>/dev/null || true")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return x509.load_pem_x509_certificate((begin + shown.partition(begin)[2].partition(end)[0] + end).encode())


def processes(fleet: Fleet, host: str) -> tuple[int | None, int | None]:
    return fleet.lab.service_process_id(host, "trimtab-agent"), fleet.lab.service_process_id(host, "libvirtd")


def trusted(fleet: Fleet, host: str) -> int:
    return fleet.sh(host, "cat /etc/trimtab/ca.pem").count("BEGIN CERTIFICATE")


def rejoin(fleet: Fleet, host: str) -> str:
    line = join_line(fleet.ok("host", "token", "create", host, "--rejoin", "-o", "json").out)
    assert line is not None
    return fleet.lab.run(host, [*fleet.lab.agent_command, *shlex.split(line)[1:]], timeout_s=60).stdout


def test_certificates_renew_a_ca_rotates_and_a_lapsed_host_comes_back(short_lived: Fleet) -> None:
    fleet = short_lived
    kept = fleet.create("stayer", pool="shared", to=AWAY)
    vm = fleet.create("traveller", pool="shared", to="node1")
    for host in (*STAYING, AWAY):
        wait_until(lambda host=host: trusted(fleet, host) == 2, f"{host} to trust both CAs")  # type: ignore[misc]
        assert 0 < expiry_s(fleet, host) <= LIFE_S
    id_before, guest = fleet.host(AWAY)["id"], f"cat /run/libvirt/qemu/trimtab-{kept['id']}.pid"
    process = fleet.sh(AWAY, guest)
    fleet.lab.cut(AWAY)  # a frozen agent would be started anew by its watchdog, and renew

    renewed_without_a_restart(fleet)
    fleet.ok("vm", "migrate", "traveller", "--to", "node2", "--wait")
    assert fleet.vm("traveller")["host"] == "node2"
    shown = fleet.ok("host", "get", "node1").out
    assert "expires in" in shown
    earliest = "trimtab_host_certificates_earliest_expiry_timestamp_seconds "
    assert earliest in fleet.plane.scrape()

    wait_until(lambda: "EXPIRED" in fleet.ok("host", "get", AWAY).out, "the certificate of the host that was cut off to lapse")
    fleet.lab.heal(AWAY)
    assert id_before in rejoin(fleet, AWAY)
    fleet.wait_for_host(AWAY)
    assert fleet.host(AWAY)["id"] == id_before
    fleet.ok("vm", "pause", "stayer", "--wait")
    fleet.ok("vm", "resume", "stayer", "--wait")
    assert fleet.vm("stayer")["id"] == kept["id"]
    assert fleet.sh(AWAY, guest) == process, "the same guest, never restarted"
    fleet.wait_for_ticks("stayer", 1)

    wait_until(lambda: "The new CA signs now" in rotate(fleet, "finish"), "every host to have renewed")
    wait_until(lambda: "The rotation has ended" in rotate(fleet, "finish"), "every certificate to be of the new CA")
    for host in (*STAYING, AWAY):
        wait_until(lambda host=host: trusted(fleet, host) == 1, f"{host} to trust the new CA alone")  # type: ignore[misc]
    fleet.ok("vm", "migrate", "traveller", "--to", AWAY, "--wait")
    after = fleet.vm("traveller")
    assert (after["id"], fleet.runs_on(vm["id"])) == (vm["id"], [AWAY])
    fleet.delete("traveller", "stayer")


def renewed_without_a_restart(fleet: Fleet) -> None:
    before: dict[str, Any] = {host: (serials(fleet, host), processes(fleet, host)) for host in STAYING}
    for host in STAYING:
        old, running = before[host]
        wait_until(
            lambda host=host, old=old: not set(old.values()) & set(serials(fleet, host).values()),  # type: ignore[misc]
            f"{host} to renew both certificates",
        )
        assert processes(fleet, host) == running
        wait_until(
            lambda host=host: f"{served_certificate(fleet, host).serial_number:x}" == serials(fleet, host)["libvirt"],  # type: ignore[misc]
            f"libvirtd of {host} to serve its new certificate",
        )
        assert 0 < expiry_s(fleet, host) <= LIFE_S
