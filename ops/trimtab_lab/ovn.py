"""OVN in a lab: its two databases and northd in ctl, an ovn-controller on each host that has Open vSwitch.

Tunnels go between the addresses that br0 has in the guests' network, so that `cut --network guest` cuts them.
"""

import os
import signal
from pathlib import Path

from trimtab_lab import open_vswitch
from trimtab_lab.commands import run, wait_until
from trimtab_lab.ctl import running_process_id, start_in_ctl
from trimtab_lab.errors import LabError
from trimtab_lab.specs import CTL, HostSpec, LabSpec

NORTHBOUND_PORT, SOUTHBOUND_PORT = 6641, 6642
ENABLED = Path("/etc/ovn/enabled")
"""On a host: its ovn-controller runs."""
_SCHEMAS = Path("/usr/share/ovn")


def northbound(lab: LabSpec) -> str:
    return f"tcp:{lab.ctl_address}:{NORTHBOUND_PORT}"


def southbound(lab: LabSpec) -> str:
    return f"tcp:{lab.ctl_address}:{SOUTHBOUND_PORT}"


def controller_command() -> list[str]:
    Path("/run/ovn").mkdir(exist_ok=True)
    return ["/usr/bin/ovn-controller", f"unix:{open_vswitch.SOCKET}", "--pidfile", "--no-chdir"]


def start_central(lab: LabSpec) -> None:
    """Serve the databases from ctl. Idempotent; they end with the lab, and what they hold goes with its state.

    Ctl is a neighbour of the guests' network too, and Open vSwitch in user space takes no packet whose checksum is left to hardware.
    """
    if not (_SCHEMAS / "ovn-nb.ovsschema").exists():
        raise LabError("OVN is not installed; `ops/bootstrap.sh` brings it")
    run(["ip", "netns", "exec", lab.namespace(CTL), "ethtool", "-K", "eth1", "tx", "off"])
    directory = lab.state_directory / "ovn"
    directory.mkdir(exist_ok=True)
    for name, port in (("nb", NORTHBOUND_PORT), ("sb", SOUTHBOUND_PORT)):
        if running_process_id(lab, f"ovn-{name}") is not None:
            continue
        database = directory / f"{name}.db"
        if not database.exists():
            run(["ovsdb-tool", "create", str(database), str(_SCHEMAS / f"ovn-{name}.ovsschema")])
        remote = f"--remote=ptcp:{port}:{lab.ctl_address}"
        start_in_ctl(lab, ["ovsdb-server", "--no-chdir", "--unixctl=none", remote, str(database)], log_name=f"ovn-{name}")
    if running_process_id(lab, "ovn-northd") is None:
        ends = [f"--ovnnb-db={northbound(lab)}", f"--ovnsb-db={southbound(lab)}"]
        start_in_ctl(lab, ["ovn-northd", "--no-chdir", f"--unixctl={directory}/northd.ctl", *ends], log_name="ovn-northd")


def lose_northbound(lab: LabSpec) -> None:
    """Let the northbound database be lost with all that it holds; `start_central` serves an empty one in its place."""
    process_id = running_process_id(lab, "ovn-nb")
    if process_id is not None:
        os.kill(process_id, signal.SIGKILL)
        wait_until(lambda: running_process_id(lab, "ovn-nb") is None, timeout_s=10, interval_s=0.05)
    (lab.state_directory / "ovn" / "nb.db").unlink(missing_ok=True)


def install(host: HostSpec, inside: open_vswitch.Inside) -> None:
    """Start ovn-controller on a host that has Open vSwitch, as OVN's chassis of the host's name. Idempotent."""
    settings = {
        "system-id": host.name,
        "ovn-remote": southbound(host.lab),
        "ovn-encap-type": "geneve",
        "ovn-encap-ip": open_vswitch.address_of(host),
        "ovn-bridge-datapath-type": "netdev",
    }
    words = [f'external_ids:{name}="{value}"' for name, value in settings.items()]
    inside(["ovs-vsctl", "--timeout=20", "set", "Open_vSwitch", ".", *words])
    inside(["sh", "-ec", f"mkdir -p {ENABLED.parent}; touch {ENABLED}"])
    inside(["systemctl", "start", "ovn-controller"])
    if not wait_until(lambda: _is_connected(inside), timeout_s=30, interval_s=0.1):
        raise LabError(f"ovn-controller of {host.name} does not connect to {southbound(host.lab)}")


def _is_connected(inside: open_vswitch.Inside) -> bool:
    try:
        inside(["sh", "-c", 'test "$(ovn-appctl -t ovn-controller connection-status)" = connected && ovs-vsctl br-exists br-int'])
    except LabError:
        return False
    return True
