"""Power devices of lab hosts: a small Redfish service that really kills and boots the host behind it, with faults to switch on.

    devices = PowerDevices(lab)      # one service for all hosts, on the machine's address in the lab; TLS, basic authentication
    devices.start()
    devices.options("node2")         # what `trimtab fence config node2 --agent fence_redfish` is told
    devices.fault("node2", Fault.LYING)
    devices.stop()

    on ─ForceOff→ off ─On→ on        ForceOff cuts the power (`Lab.crash`), On boots (`Lab.boot`)
A device is a part of its host's world and not of its power: it answers while the host is off. Faults:
    dead    the connection is taken and never answered
    slow    each answer takes `SLOW_S`
    lying   it says that it did what it was told, and does nothing; asked for the state, it tells the truth
    false   it says "off", whatever is
Standard library only. `python -m trimtab_lab.power --name LAB` serves until it is interrupted; faults are files, so that any process
may switch them.
"""

import argparse
import base64
import contextlib
import json
import shlex
import ssl
import subprocess
import threading
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trimtab_lab.commands import write_atomically
from trimtab_lab.errors import LabError
from trimtab_lab.hosts import Lab

PORT = 8443
USER, PASSWORD = "lab", "power-of-the-lab"
SYSTEMS = "/redfish/v1/Systems"
SLOW_S = 8.0
DEAD_S = 120.0
_MAKE_CERTIFICATE = "openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=power -keyout - -out -"


class Fault(StrEnum):
    NONE = "none"
    DEAD = "dead"
    SLOW = "slow"
    LYING = "lying"
    FALSE = "false"


class PowerDevices:
    """The devices of one lab. `asked` keeps what each was told, in order."""

    def __init__(self, lab: Lab, *, port: int = PORT) -> None:
        self.lab, self.port = lab, port
        self.asked: list[tuple[str, str]] = []
        self._directory = lab.spec.state_directory / "run" / "power"
        self._server: ThreadingHTTPServer | None = None
        self._stopping = threading.Event()

    @property
    def address(self) -> str:
        return str(self.lab.spec.machine_address)

    def options(self, host: str) -> dict[str, str]:
        """Return the options of fence_redfish for this host's device; its password is `PASSWORD`."""
        return {
            "ip": self.address,
            "ipport": str(self.port),
            "username": USER,
            "systems_uri": f"{SYSTEMS}/{host}",
            "ssl_insecure": "1",
        }

    def fault(self, host: str, fault: Fault) -> None:
        """Switch a fault on, or off with `Fault.NONE`."""
        self.lab.spec.host(host)
        self._directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self._directory / f"{host}.fault", fault.value)

    def fault_of(self, host: str) -> Fault:
        try:
            return Fault((self._directory / f"{host}.fault").read_text().strip())
        except FileNotFoundError:
            return Fault.NONE

    def is_on(self, host: str) -> bool:
        return self.lab.init_process_id(host) is not None

    def start(self) -> None:
        """Serve from threads of this process until `stop`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        devices = self

        class Handler(_Handler):
            power = devices

        self._server = ThreadingHTTPServer((self.address, self.port), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="power", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def pause(self, seconds: float) -> bool:
        """Wait so long; False where the devices are being stopped."""
        return not self._stopping.wait(seconds)

    def reset(self, host: str, kind: str) -> None:
        """Do what a device is told."""
        self.asked.append((host, kind))
        if self.fault_of(host) is Fault.LYING:
            return
        match kind:
            case "ForceOff":
                self.lab.crash(host)
            case "On":
                threading.Thread(target=self.lab.boot, args=(host,), daemon=True).start()
            case "ForceRestart":
                self.lab.crash(host)
                threading.Thread(target=self.lab.boot, args=(host,), daemon=True).start()
            case _:
                raise LabError(f"ResetType {kind}: ForceOff, On or ForceRestart")

    def _certificate(self) -> Path:
        """Return a file with a key and a certificate of its own; devices of this age have no better one."""
        path = self._directory / "device.pem"
        if not path.exists():
            made = subprocess.run(
                shlex.split(_MAKE_CERTIFICATE),
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            write_atomically(path, made.stdout)
            path.chmod(0o600)
        return path


class _Handler(BaseHTTPRequestHandler):
    power: PowerDevices
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        path = self.path.rstrip("/")
        if path == "/redfish/v1":
            self._answer({"Systems": {"@odata.id": SYSTEMS}})
        elif path == SYSTEMS:
            hosts = self.power.lab.spec.hosts()
            self._answer({"Members": [{"@odata.id": f"{SYSTEMS}/{host.name}"} for host in hosts]})
        elif (host := self._host(path)) and self._may_answer(host):
            is_on = self.power.is_on(host) and self.power.fault_of(host) is not Fault.FALSE
            target = {"target": f"{SYSTEMS}/{host}/Actions/ComputerSystem.Reset"}
            self._answer({"Id": host, "PowerState": "On" if is_on else "Off", "Actions": {"#ComputerSystem.Reset": target}})
        elif not host:
            self._answer({"error": "no such resource"}, status=404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._is_allowed():
            return
        host = self._host(self.path.removesuffix("/Actions/ComputerSystem.Reset"))
        if not host:
            self._answer({"error": "no such resource"}, status=404)
        elif self._may_answer(host):
            self.power.reset(host, str(json.loads(body).get("ResetType")))
            self._answer({}, status=202)

    def _host(self, path: str) -> str:
        name = path.rstrip("/").removeprefix(f"{SYSTEMS}/")
        return name if any(host.name == name for host in self.power.lab.spec.hosts()) else ""

    def _may_answer(self, host: str) -> bool:
        match self.power.fault_of(host):
            case Fault.DEAD:
                self.power.pause(DEAD_S)
                self.close_connection = True
                return False
            case Fault.SLOW:
                return self.power.pause(SLOW_S)
            case _:
                return True

    def _is_allowed(self) -> bool:
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {wanted}":
            return True
        self._answer({"error": "unauthorised"}, status=401)
        return False

    def _answer(self, document: dict[str, Any], *, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what was asked is kept in `asked`."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trimtab_lab.power", description="Serve the power devices of a lab.")
    parser.add_argument("--name", default="default")
    parser.add_argument(
        "--fault", nargs=2, metavar=("HOST", "FAULT"), help="Only switch a fault: dead, slow, lying, false, none."
    )
    given = parser.parse_args()
    devices = PowerDevices(Lab.named(given.name))
    if given.fault:
        devices.fault(given.fault[0], Fault(given.fault[1]))
        return
    devices.start()
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    devices.stop()


if __name__ == "__main__":
    main()
