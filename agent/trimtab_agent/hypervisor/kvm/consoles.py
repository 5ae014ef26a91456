"""Joins a guest's consoles: unix sockets on which QEMU listens, and which nobody but it and root reaches. No network is involved.

The serial port's socket has a place of ours, so that it is the same on every host; the screen's is libvirt's own. Both are read from
the running domain, since one that was started by an earlier release of the agent has its serial port on a file.
"""

import socket
from pathlib import Path
from xml.etree.ElementTree import Element

from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import Conflict, Unavailable

_CONNECT_TIMEOUT_S = 2.0


class ConsoleSockets:
    """Where this host's serial ports listen: in the agent's own directory, which is there on hosts of the release before too, so that a
    guest can move to one. `sun_path` holds 107 characters: its name must stay short.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self._directory = runtime_dir

    def serial_path(self, vm_id: str) -> str:
        return str(self._directory / f"console-{check_id(vm_id, 'vm_id')}.sock")

    def prepare(self) -> None:
        """Make the directory; libvirt opens the sockets in it."""
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)

    def remove(self, vm_id: str) -> None:
        Path(self.serial_path(vm_id)).unlink(missing_ok=True)


def join(live_xml: str, vm_id: str, kind: ConsoleKind) -> socket.socket:
    """Return a connected socket of a running domain's console. See `Hypervisor.open_console`."""
    path = socket_of(parse(live_xml), kind)
    if not path:
        raise Conflict(
            "console-absent",
            f"the guest of {vm_id} was started before hosts offered its {kind.value} console: stop and start the vm",
        )
    joined = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        joined.settimeout(_CONNECT_TIMEOUT_S)
        joined.connect(path)
    except OSError as error:
        joined.close()
        raise Unavailable("console-closed", f"the {kind.value} console of {vm_id} does not answer: {error.strerror}") from error
    return joined


def socket_of(root: Element, kind: ConsoleKind) -> str:
    """Return the path of a live definition's console, "" where it has none."""
    if kind is ConsoleKind.SERIAL:
        source = root.find("devices/serial[@type='unix']/source")
        return source.get("path", "") if source is not None else ""
    listen = root.find("devices/graphics[@type='vnc']/listen[@type='socket']")
    return listen.get("socket", "") if listen is not None else ""
