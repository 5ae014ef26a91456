"""Images, volumes and pools through the whole stack: what is refused leaves nothing; encrypted disks; pools of block devices."""

import base64
import contextlib
import hashlib
import http.server
import ipaddress
import shutil
import sqlite3
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.lab.fleet_kit import HOSTS, PATIENCE_S, Fleet, wait_until
from tests.lab.guest_view import disk_mib, guest_says
from trimtab_controller.secret_box import SecretBox
from trimtab_lab.guest import build_guest_image

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

SMALL_DISK = 1 << 20


def files_in_pools(fleet: Fleet) -> set[str]:
    """Return every file of every pool, those of running guests' state aside."""
    listing = "find /srv/trimtab-shared /srv/trimtab-local -type f -printf '%p\\n'"
    return {f"{host}:{line}" for host in HOSTS for line in fleet.sh(host, listing).splitlines()}


# --- where images come from ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mirror:
    """An https server on the machine's address in the lab."""

    url: str
    directory: Path
    held: threading.Event
    """Until it is set, of a file called `held-...` no more than the first half is sent."""

    def put(self, name: str, content: bytes) -> tuple[str, str]:
        (self.directory / name).write_bytes(content)
        return f"{self.url}/{name}", hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def mirror(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    directory = tmp_path_factory.mktemp("mirror")
    certificate, key = new_certificate(fleet.lab.spec.machine_address, directory)
    trust(fleet, certificate)

    held = threading.Event()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            content = source.read()
            half = len(content) // 2
            outputfile.write(content[:half])
            if "/held-" in self.path:
                held.wait(PATIENCE_S)
            with contextlib.suppress(OSError):  # whoever asked may be gone
                outputfile.write(content[half:])

    server = http.server.ThreadingHTTPServer((fleet.lab.spec.machine_address, 0), partial(Quiet, directory=str(directory)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Mirror(f"https://{fleet.lab.spec.machine_address}:{server.server_port}", directory, held)
    finally:
        held.set()
        server.shutdown()
        thread.join()
        server.server_close()


def new_certificate(address: str, directory: Path) -> tuple[Path, Path]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mirror")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory.parent / "mirror.pem", directory.parent / "mirror.key"
    certificate_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    encoding, private_format = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key_path.write_bytes(key.private_bytes(encoding, private_format, serialization.NoEncryption()))
    return certificate_path, key_path


def trust(fleet: Fleet, certificate: Path) -> None:
    """Let every host trust the mirror as an operator would: in the host's own list of CAs."""
    for host in HOSTS:
        with fleet.lab.spec.host(host).path_on_machine("/etc/ssl/certs/ca-certificates.crt").open("a") as bundle:
            bundle.write("\n" + certificate.read_text())


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disks") / "small.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SMALL_DISK)], check=True)
    return path


def test_an_image_is_fetched_from_an_https_url_and_its_checksum_is_held_to(
    fleet: Fleet, mirror: Mirror, small_disk: Path
) -> None:
    url, sha256 = mirror.put("small.qcow2", small_disk.read_bytes())
    fleet.ok("image", "import", "by-url", url, "--sha256", sha256, "--pool", "shared", "--wait")
    made = fleet.ok("image", "get", "by-url", "-o", "json").json()
    assert (made["state"], made["virtual_size_bytes"], made["source_sha256"]) == ("ready", SMALL_DISK, sha256)
    before = files_in_pools(fleet)
    refused = fleet.trimtab("image", "import", "by-url2", url, "--sha256", "0" * 64, "--pool", "shared", "--wait")
    assert refused.code == 2
    assert "image-checksum-mismatch" in refused.err
    assert fleet.trimtab("image", "get", "by-url2").code == 4, "the name of a failed import is free again"
    assert files_in_pools(fleet) == before
    fleet.ok("image", "delete", "by-url", "--yes", "--wait")


def test_an_import_that_is_cancelled_while_its_bytes_arrive_leaves_nothing(fleet: Fleet, mirror: Mirror) -> None:
    before = files_in_pools(fleet)
    url, sha256 = mirror.put("held-large.raw", b"half of it arrives" * (4 << 20 >> 4))
    operation_id = fleet.begin("image", "import", "halfway", url, "--format", "raw", "--sha256", sha256, "--pool", "shared")
    wait_until(lambda: (fleet.operation(operation_id)["progress"] or {}).get("done_bytes"), "bytes to arrive")
    assert files_in_pools(fleet) != before, "what arrived is kept somewhere until it was checked"
    fleet.ok("op", "cancel", operation_id, "--no-wait")
    assert fleet.end_of(operation_id)["state"] == "cancelled"
    assert not mirror.held.is_set(), "it ended while the server still held the rest back"
    assert files_in_pools(fleet) == before
    assert fleet.trimtab("image", "get", "halfway").code == 4
    mirror.held.set()
    fleet.ok("image", "import", "halfway", url, "--format", "raw", "--sha256", sha256, "--pool", "shared", "--wait")
    fleet.ok("image", "delete", "halfway", "--yes", "--wait")


def test_an_address_that_the_operator_did_not_allow_is_not_fetched(fleet: Fleet, mirror: Mirror) -> None:
    port = mirror.url.rpartition(":")[2]
    refused = fleet.trimtab(
        "image", "import", "inner", f"https://127.0.0.1:{port}/small.qcow2", "--sha256", "0" * 64, "--pool", "shared", "--wait"
    )
    assert refused.code == 2
    assert "url-host-not-allowed" in refused.err


def test_an_image_comes_from_a_file_in_a_hosts_import_folder(fleet: Fleet, small_disk: Path) -> None:
    folder = fleet.lab.spec.host("node2").path_on_machine("/srv/trimtab-local/import")
    (folder / "by-hand.qcow2").write_bytes(small_disk.read_bytes())
    fleet.ok("image", "import", "by-hand", "by-hand.qcow2", "--on-host", "node2", "--pool", "local", "--wait")
    assert fleet.ok("image", "get", "by-hand", "-o", "json").json()["replicas"][0]["host"] == "node2"
    absent = fleet.trimtab("image", "import", "no-file", "absent.qcow2", "--on-host", "node2", "--pool", "local", "--wait")
    assert absent.code == 4
    assert "import-file-not-found" in absent.err
    fleet.ok("image", "delete", "by-hand", "--yes", "--wait")


@pytest.mark.parametrize("kind", ["backing-file", "other-format", "torn"])
def test_a_bad_image_is_refused_by_name_and_leaves_nothing(fleet: Fleet, tmp_path: Path, small_disk: Path, kind: str) -> None:
    path, code = bad_image(kind, tmp_path, small_disk)
    before = files_in_pools(fleet)
    refused = fleet.trimtab("image", "import", "bad", str(path), "--format", "qcow2", "--pool", "shared", "--wait")
    assert refused.code == 2, refused.err
    assert code in refused.err
    assert fleet.trimtab("image", "get", "bad").code == 4
    assert files_in_pools(fleet) == before


def bad_image(kind: str, directory: Path, small_disk: Path) -> tuple[Path, str]:
    path = directory / f"{kind}.qcow2"
    match kind:
        case "backing-file":
            # What it names is a file of the host: whoever runs a guest on it would read it.
            make = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", str(path), str(SMALL_DISK)]
            subprocess.run(make, check=True)
            return path, "image-has-backing-file"
        case "other-format":
            path.write_bytes(b"KDMV" + b"\0" * SMALL_DISK)
            return path, "image-format-mismatch"
        case _:
            path.write_bytes(small_disk.read_bytes()[:512])
            return path, "image-"


# --- what depends on what --------------------------------------------------------------------------------------------------


def test_nothing_is_deleted_while_something_depends_on_it(fleet: Fleet) -> None:
    fleet.ok("network", "create", "leaned-on", "--bridge", "br-guest", "--wait")
    fleet.ok(
        "vm", "create", "leaner", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--network", "leaned-on",
        "--no-start", "--wait",
    )  # fmt: skip
    disk = fleet.vm("leaner")["volumes"][0]
    volume = disk["name"]
    for noun, name, code in (
        ("network", "leaned-on", "network-in-use"),
        ("volume", volume, "volume-attached"),
        ("pool", "shared", "pool-not-empty"),
        ("image", "micro", "image-in-use"),
    ):
        refused = fleet.trimtab(noun, "delete", name, "--yes", "--wait")
        assert refused.code == 5, f"{noun}: {refused.err}"
        assert code in refused.err
    fleet.delete("leaner")
    # Deleted vms are kept for a while, with everything that `undelete` needs.
    assert fleet.files_of(disk["id"]) != []
    refused = fleet.trimtab("network", "delete", "leaned-on", "--yes", "--wait")
    assert (refused.code, "trimtab vm purge" in refused.err) == (5, True), refused.err
    fleet.ok("vm", "purge", "leaner", "--yes", "--wait")
    assert fleet.files_of(disk["id"]) == []
    fleet.ok("network", "delete", "leaned-on", "--yes", "--wait")


def test_a_pool_that_is_another_folder_on_each_host_is_not_taken_for_shared(fleet: Fleet) -> None:
    for host in HOSTS:
        fleet.sh(host, "mkdir /srv/lie")
    fleet.ok("pool", "create", "lie", "--path", "/srv/lie", "--shared", "--wait")
    writer, *others = sorted(fleet.ok("pool", "get", "lie", "-o", "json").json()["hosts"], key=lambda one: str(one["problem"]))
    assert (writer["state"], writer["problem"]) == ("ready", "")
    assert [one["state"] for one in others] == ["failed"] * (len(HOSTS) - 1)
    for one in others:
        assert one["problem"] == f"not the same storage: it does not see what {writer['host']} wrote to /srv/lie"
    refused = fleet.trimtab("vm", "create", "liar", "--image", "micro", "--memory", "96MiB", "--pool", "lie", "--wait")
    assert refused.code == 7
    assert "proven to be shared" in refused.err
    assert fleet.trimtab("vm", "get", "liar").code == 4
    fleet.ok("pool", "delete", "lie", "--yes", "--wait")


# --- encrypted -------------------------------------------------------------------------------------------------------------

SECRET_PLACES = "/etc/libvirt /var/lib/libvirt /run/libvirt /var/lib/trimtab /run/trimtab /var/log /etc/trimtab"
"""Where libvirt and the agent keep, log and hand over what they know."""
MARKER = "what-nobody-may-read"


def key_of(fleet: Fleet, volume_id: str) -> str:
    """Return a volume's key, opened as only the controllers can."""
    directory = fleet.plane.data_directory
    with sqlite3.connect(f"file:{directory / 'trimtab.db'}?mode=ro", uri=True) as database:
        (sealed,) = database.execute("SELECT sealed_key FROM volume_key WHERE volume_id = ?", (volume_id,)).fetchone()
    return SecretBox(directory / "pki").open(sealed, place=volume_id)


def hosts_that_show(fleet: Fleet, secret: str) -> list[str]:
    """Return where this text stands, as it is or as libvirt would write it: in files, in arguments, in libvirt's own secrets."""
    texts = f"-e {secret} -e {base64.b64encode(secret.encode()).decode()}"
    found = []
    for host in HOSTS:
        # The text must not stand in the arguments of what searches for it.
        fleet.lab.spec.host(host).path_on_machine("/srv/trimtab-local/secret").write_text(
            texts.replace("-e ", "").replace(" ", "\n")
        )
        search = f"grep -rlaF -f /srv/trimtab-local/secret {SECRET_PLACES} /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null || true"
        found += [f"{host}:{line}" for line in fleet.sh(host, search).splitlines()]
        fleet.sh(host, "rm /srv/trimtab-local/secret")
    return found


def test_an_encrypted_vm_runs_moves_and_grows_and_nothing_but_qemu_knows_its_key(fleet: Fleet) -> None:
    fleet.ok(
        "vm", "create", "vault", "--image", "micro", "--memory", "96MiB", "--pool", "shared", "--to", "node1", "--encrypt", "--wait",
    )  # fmt: skip
    fleet.ok("volume", "create", "strongbox", "--size", "16MiB", "--pool", "shared", "--encrypted", "--wait")
    vm, box = fleet.vm("vault"), fleet.ok("volume", "get", "strongbox", "-o", "json").json()
    root = vm["volumes"][0]
    assert fleet.ok("volume", "get", root["name"], "-o", "json").json()["image"] == "", "it stands alone"
    counted, _uptime = fleet.wait_for_ticks("vault", 1)
    fleet.ok("vm", "attach", "vault", "--volume", "strongbox", "--wait")
    write = f"echo {MARKER} >/data/marker; sync; cat /data/marker"
    assert guest_says(fleet.lab, "node1", vm["id"], write) == MARKER
    serial = box["id"][-20:]
    raw = f'for d in /sys/block/*; do [ "$(cat $d/serial 2>/dev/null)" = {serial} ] && echo {MARKER} >/dev/${{d##*/}}; done; sync'
    guest_says(fleet.lab, "node1", vm["id"], raw)
    files = [f"/srv/trimtab-shared/volumes/{one}.qcow2" for one in (root["id"], box["id"])]
    for path in files:
        assert fleet.sh("node1", f"grep -c {MARKER} {path} || true").strip() == "0", path
        assert "encrypted: yes" in fleet.sh("node1", f"qemu-img info -U -f qcow2 {path}")

    fleet.ok("vm", "migrate", "vault", "--to", "node2", "--wait")
    fleet.ok("volume", "resize", "strongbox", "32MiB", "--wait")
    assert disk_mib(fleet.lab, "node2", vm["id"], serial) == 32
    counted, uptime = fleet.wait_for_ticks("vault", counted + 3)
    assert uptime > 0
    for volume_id in (root["id"], box["id"]):
        key = key_of(fleet, volume_id)
        assert len(key) == 64
        assert hosts_that_show(fleet, key) == []
    for host in ("node1", "node2"):
        assert fleet.lab.run(host, ["virsh", "-q", "secret-list"]).stdout.strip() == "", "libvirt has let go of them"

    # libvirt and agent forget; the next start is given the keys again, and finds the disk as it was left.
    fleet.ok("vm", "stop", "vault", "--wait")
    fleet.sh("node2", "systemctl restart libvirtd; systemctl restart trimtab-agent")
    fleet.wait_for_host("node2")
    fleet.ok("vm", "start", "vault", "--wait")
    fleet.wait_for_ticks("vault", counted + 1)
    home = fleet.vm("vault")["host"]
    wait_until(lambda: guest_says(fleet.lab, home, vm["id"], "cat /data/marker") == MARKER, "the guest's agent to read it back")
    refused = fleet.trimtab("vm", "snapshot", "create", "vault", "before", "--wait")
    assert refused.code == 5
    assert "volume-encrypted" in refused.err
    fleet.delete("vault")


# --- LUNs ------------------------------------------------------------------------------------------------------------------

TARGET = "iqn.2026-01.example:san"
PASSWORD = "chap-that-nobody-reads"
TGTADM = "tgtadm --lld iscsi"
LOOKED_AT_S = 20.0
"""A pool's port is asked every ten seconds; and what a busy machine adds."""


@dataclass(frozen=True, slots=True)
class San:
    """A target in user space on node3; LUN 1 holds the micro guest's system."""

    fleet: Fleet
    portal: str
    root_bytes: int

    def serve(self) -> None:
        run_it = f"tgtd -f --iscsi portal={self.portal} >/run/tgtd.log 2>&1 & echo $! >/run/tgtd.pid"
        self.fleet.lab.run("node3", ["sh", "-c", f"mkdir -p /run/tgtd; rm -f /run/tgtd/*; {run_it}"])
        show = f"{TGTADM} --op show --mode sys"
        wait_until(lambda: self.fleet.lab.run("node3", ["sh", "-c", show], check=False).returncode == 0, "tgtd")
        self.fleet.sh(
            "node3",
            f"{TGTADM} --op new --mode target --tid 1 -T {TARGET}\n"
            f"{TGTADM} --op new --mode logicalunit --tid 1 --lun 1 -b /srv/trimtab-local/lun1.raw\n"
            f"{TGTADM} --op new --mode logicalunit --tid 1 --lun 2 -b /srv/trimtab-local/lun2.raw\n"
            f"{TGTADM} --op new --mode account --user fleet --password {PASSWORD}\n"
            f"{TGTADM} --op bind --mode account --tid 1 --user fleet\n"
            f"{TGTADM} --op bind --mode target --tid 1 -I ALL\n",
        )

    def kill(self) -> None:
        self.fleet.sh("node3", "kill -9 $(cat /run/tgtd.pid)", check=False)


@pytest.fixture
def san(fleet: Fleet) -> Iterator[San]:
    node = fleet.lab.spec.host("node3")
    image = build_guest_image().raw
    shutil.copyfile(image, node.path_on_machine("/srv/trimtab-local/lun1.raw"))
    fleet.sh("node3", "truncate -s 16M /srv/trimtab-local/lun2.raw")
    made = San(fleet, f"{node.address}:3260", image.stat().st_size)
    try:
        made.serve()
        yield made
    finally:
        made.kill()
        fleet.sh("node3", "rm -f /srv/trimtab-local/lun*.raw", check=False)


@pytest.mark.soak
def test_a_guest_runs_on_a_lun_and_moves_live_between_hosts_that_no_one_told_its_password(
    fleet: Fleet, san: San, tmp_path: Path
) -> None:
    where = ("--type", "iscsi", "--portal", san.portal, "--target", TARGET, "--chap-user", "fleet", "--secret-file")
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.write_text("another-password\n")
    right.write_text(f"{PASSWORD}\n")
    root = ("volume", "create", "san-root", "--pool", "san", "--lun", "1", "--size", f"{san.root_bytes >> 20}MiB", "--wait")
    fleet.ok("pool", "create", "san", *where, str(wrong), "--wait")
    refused = fleet.trimtab(*root)
    assert (refused.code, "pool-refused" in refused.err) == (5, True), refused.err
    fleet.ok("pool", "delete", "san", "--yes", "--wait")
    fleet.ok("pool", "create", "san", *where, str(right), "--wait")
    small = fleet.trimtab("volume", "create", "san-root", "--pool", "san", "--lun", "1", "--size", "1MiB", "--wait")
    assert str(san.root_bytes) in small.err, "it says the size that the LUN has"
    fleet.ok(*root)
    fleet.ok("volume", "create", "san-data", "--pool", "san", "--lun", "2", "--size", "16MiB", "--wait")
    fleet.ok("vm", "create", "rover", "--volume", "san-root", "--memory", "96MiB", "--to", "node1", "--wait")
    vm = fleet.vm("rover")
    counted, uptime = fleet.wait_for_ticks("rover", 1)
    fleet.ok("vm", "attach", "rover", "--volume", "san-data", "--wait")
    serial = fleet.ok("volume", "get", "san-data", "-o", "json").json()["id"][-20:]
    assert disk_mib(fleet.lab, "node1", vm["id"], serial) == 16

    fleet.ok("vm", "migrate", "rover", "--to", "node2", "--wait")
    assert fleet.runs_on(vm["id"]) == ["node2"]
    _later, later_uptime = fleet.wait_for_ticks("rover", counted + 3)
    assert later_uptime > uptime, "the guest went on, it was not started anew"
    assert hosts_that_show(fleet, PASSWORD) == []
    for host in ("node1", "node2"):
        assert fleet.lab.run(host, ["virsh", "-q", "secret-list"]).stdout.strip() == ""

    is_backed_up_and_comes_back_as_a_file(fleet, vm["id"], tmp_path)

    does_not_move_between_pools(fleet)
    counted, uptime = fleet.ticks("rover")
    fails_and_comes_back(fleet, san)
    _later, later_uptime = fleet.wait_for_ticks("rover", counted + 3)
    assert later_uptime > uptime, "it waited for its disk, and was not started anew"
    assert fleet.vm("rover")["observed"]["state"] == "running"
    fleet.ok("vm", "stop", "rover", "--force", "--wait")
    fleet.delete("rover")


def is_backed_up_and_comes_back_as_a_file(fleet: Fleet, vm_id: str, tmp_path: Path) -> None:
    """Increments while its QEMU lives; in full after a stop; what comes back counts on from a pool of files."""
    fleet.ok(
        "backup", "repo", "create", "san", "--url", "file:///srv/trimtab-shared/of-luns", "--key-file", str(tmp_path / "key")
    )
    full = fleet.ok("backup", "run", "rover", "--repo", "san", "-o", "json").json()
    assert full["full_reason"] == "vda: first backup; vdb: first backup", full
    guest_says(fleet.lab, "node2", vm_id, f"echo {MARKER} >/data/marker; sync; cat /data/marker")
    increment = fleet.ok("backup", "run", "rover", "--repo", "san", "-o", "json").json()
    assert (increment["base_id"], increment["full_reason"], increment["state"]) == (full["id"], "", "ready"), increment
    assert 0 < increment["read_bytes"] < full["read_bytes"] // 4, (increment, full)
    left = fleet.sh("node2", "find /srv /var/lib/libvirt/qemu -name '*scratch*' -o -name '*backup*.sock'")
    assert left.strip() == ""
    refused = fleet.trimtab("vm", "snapshot", "create", "rover", "before", "--wait")
    assert (refused.code, "trimtab backup run rover" in refused.err) == (5, True), refused.err

    fleet.ok("vm", "stop", "rover", "--force", "--wait")
    stopped = fleet.ok("backup", "run", "rover", "--repo", "san", "-o", "json").json()
    assert "does not run" in stopped["full_reason"], stopped
    fleet.ok("vm", "start", "rover", "--wait")
    home = fleet.vm("rover")["host"]
    after = fleet.ok("backup", "run", "rover", "--repo", "san", "-o", "json").json()
    assert "QEMU has begun anew since" in after["full_reason"], after
    assert fleet.ok("backup", "run", "rover", "--repo", "san", "-o", "json").json()["base_id"] == after["id"]
    fleet.ok("backup", "restore", increment["id"], "--as", "rover2", "--pool", "san=local", "--to", "node1", "--instant")
    again = fleet.vm("rover2")
    wait_until(
        lambda: guest_says(fleet.lab, "node1", again["id"], "cat /data/marker") == MARKER, "what was backed up to be there"
    )
    fleet.delete("rover2")

    # In place: the LUN itself is written over, with what was there when the marker was.
    assert guest_says(fleet.lab, home, vm_id, "echo lost >/data/marker; sync; cat /data/marker") == "lost"
    fleet.ok("vm", "stop", "rover", "--force", "--wait")
    fleet.ok("backup", "restore", increment["id"], "--replace", "rover", "--yes")
    fleet.ok("vm", "start", "rover", "--wait")
    home = fleet.vm("rover")["host"]
    wait_until(lambda: guest_says(fleet.lab, home, vm_id, "cat /data/marker") == MARKER, "what was backed up to be there again")
    if home != "node2":
        fleet.ok("vm", "migrate", "rover", "--to", "node2", "--wait")


def does_not_move_between_pools(fleet: Fleet) -> None:
    """A LUN is its own size and place; its way to files and back is a backup."""
    fleet.ok("volume", "create", "of-files", "--pool", "local", "--size", "16MiB", "--wait")
    for volume, to in (("san-root", "local"), ("of-files", "san")):
        refused = fleet.trimtab("volume", "move", volume, "--to", to, "--wait")
        assert (refused.code, "attach it, and copy in the guest" in refused.err) == (5, True), refused.err
    fleet.ok("volume", "delete", "of-files", "--yes", "--wait")


def fails_and_comes_back(fleet: Fleet, san: San) -> None:
    """The pool that failed names the vm and its way back; the guest is held up as long as the target is away."""
    san.kill()
    failed = wait_until(
        lambda: seen if (seen := pool_on(fleet, "san", "node2"))["state"] == "unresponsive" else None, "the pool to be shown"
    )
    assert "does not answer" in failed["problem"]
    (named,) = fleet.ok("pool", "get", "san", "-o", "json").json()["vms"]
    assert (named["name"], named["host"]) == ("rover", "node2")
    assert named["way_back"]
    san.serve()
    wait_until(lambda: pool_on(fleet, "san", "node2")["state"] == "ready", "the pool to be ready again", patience_s=LOOKED_AT_S)


def pool_on(fleet: Fleet, pool: str, host: str) -> dict[str, str]:
    hosts = fleet.ok("pool", "get", pool, "-o", "json").json()["hosts"]
    return next(dict(one) for one in hosts if one["host"] == host)
