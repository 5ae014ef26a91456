"""How the lab starts a control plane and joins hosts, against stand-ins that record what was asked of them.

The real programs are proven by the fleet's own tests; here it is the lab's side of their command lines.
"""

import json
import os
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from trimtab_lab.controlplane import ControlPlane, join_line
from trimtab_lab.hosts import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

CONTROLLER = """\
#!{python}
import http.server, os, shutil, ssl, sys
from pathlib import Path
verb, data = sys.argv[1], Path(sys.argv[sys.argv.index("--data-dir") + 1])
if verb == "init":
    (data / "pki").mkdir(parents=True)
    shutil.copy("{directory}/ca.pem", data / "pki/ca.pem")
    (data / "advertised").write_text(sys.argv[sys.argv.index("--advertise") + 1])
    (data / "admin.token").write_text("tt-admin\\n")
    sys.exit(0)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
address = (data / "advertised").read_text()
server = http.server.HTTPServer((address, 8443), Health)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("{directory}/ca.pem", "{directory}/key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
(data / "environment").write_text(os.environ.get("TRIMTAB_LEASE_TTL_S", "") + "|" + os.environ.get("TRIMTAB_URL", ""))
server.serve_forever()
"""
CLI = """\
#!{python}
import json, os, sys
open("{directory}/cli.log", "a").write(json.dumps([sys.argv[1:], os.environ["TRIMTAB_URL"], os.environ["TRIMTAB_TOKEN"]]) + "\\n")
line = "trimtab-agent join " + os.environ["TRIMTAB_URL"] + " --token jt-" + sys.argv[4] + " --ca-fingerprint sha256:00"
print(json.dumps({{"id": "join-1", "command": line}}))
"""
AGENT = """\
#!/bin/sh
case $1 in
join)
  echo "$@" > /var/lib/trimtab/joined-with
  echo > /var/lib/trimtab/agent.toml
  exec systemctl enable --now trimtab-agent ;;
run) exec sleep 1000 ;;
esac
exit 2
"""


def write_certificate(directory: Path, address: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    formats = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *formats))


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    import sys

    directory = tmp_path_factory.mktemp("programs")
    for name, text in (("trimtab-controller", CONTROLLER), ("trimtab", CLI), ("trimtab-agent", AGENT)):
        is_python = text.startswith("#!{python}")
        (directory / name).write_text(text.format(python=sys.executable, directory=directory) if is_python else text)
        (directory / name).chmod(0o755)
    spec = Lab.named(f"p{os.getpid()}", state_directory=directory / "state").spec
    lab = Lab(spec, agent_command=[str(directory / "trimtab-agent")])
    try:
        lab.up(hosts=1)
        write_certificate(directory, lab.spec.ctl_address)
        plane = ControlPlane(lab, settings={"TRIMTAB_LEASE_TTL_S": "6"}, programs=directory)
        plane.start()
        yield plane
    finally:
        lab.down()


def test_controller_is_initialised_once_and_reached_from_the_machine(plane: ControlPlane) -> None:
    assert plane.is_healthy()
    first = plane.process_id
    plane.start()
    assert plane.process_id == first
    assert (plane.data_directory / "environment").read_text() == "6|"
    context = ssl.create_default_context(cafile=str(plane.authority_file))
    address = (plane.lab.spec.ctl_address, 8443)
    with socket.create_connection(address, timeout=5) as plain, context.wrap_socket(plain, server_hostname=address[0]):
        assert plane.cli_environment()["TRIMTAB_TOKEN"] == "tt-admin"
    assert f"export TRIMTAB_URL=https://{address[0]}:8443" in plane.shell_environment()
    assert "tt-admin" not in plane.shell_environment()


def test_killed_controller_is_started_again_on_its_data(plane: ControlPlane) -> None:
    before = plane.process_id
    plane.crash()
    assert plane.process_id is None
    assert not plane.is_healthy()
    plane.start()
    assert plane.process_id not in (None, before)


def test_host_joins_by_the_line_that_the_cli_printed(plane: ControlPlane) -> None:
    plane.join_hosts()
    plane.join_hosts()
    url = plane.lab.spec.controller_url
    host = plane.lab.spec.host("node1")
    joined = (host.path_on_machine("/var/lib/trimtab") / "joined-with").read_text().split()
    assert joined[:6] == ["join", url, "--token", "jt-node1", "--ca-fingerprint", "sha256:00"]
    assert joined[6:] == ["--migration-address", host.migration_address], "and with an address for guests"
    assert plane.lab.run("node1", ["systemctl", "is-active", "trimtab-agent"]).stdout.strip() == "active"
    (asked,) = [json.loads(line) for line in (plane.authority_file.parents[3] / "cli.log").read_text().splitlines()]
    assert asked == [["host", "token", "create", "node1", "-o", "json"], url, "tt-admin"]


def test_frozen_control_plane_answers_nobody_until_thawed(plane: ControlPlane) -> None:
    plane.freeze()
    assert not plane.is_healthy()
    plane.thaw()
    assert plane.is_healthy()


def test_paste_line_is_found_wherever_the_cli_puts_it() -> None:
    assert join_line('{"items": [{"id": "x", "line": "trimtab-agent join https://c --token t"}]}') is not None
    assert join_line('{"id": "x", "token": "t"}') is None
