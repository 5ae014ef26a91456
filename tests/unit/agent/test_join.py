"""Joining and leaving, in a root directory of the test's own, against a small real controller."""

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from tests.unit.agent.join_double import TOKEN, FakeSystemctl, JoinDouble
from trimtab_agent import config, host_setup, warden_state
from trimtab_agent.certificates import IdentityFiles
from trimtab_agent.hypervisor.kvm import uplinks
from trimtab_agent.join import Joiner, JoinOptions, lines_of
from trimtab_agent.leave import leave, stop_units
from trimtab_agent.libvirt_tls import LibvirtCertificates
from trimtab_agent.undo import BLOCK_BEGIN
from trimtab_protos.errors import Conflict, NotFound, PermissionDenied, TrimtabError, Unavailable

MACHINE_ID = "0123456789abcdef0123456789abcdef"
LIBVIRTD = "# the operator's file\nlisten_tls = 0\nmax_clients = 77\n"
QEMU = 'user = "root"\ngroup = "root"\n#keepalive_interval = 5\n'


class Machine:
    """A fresh Debian host below a directory."""

    def __init__(self, root: Path, double: JoinDouble) -> None:
        self.root = root
        self.double = double
        self.systemctl = FakeSystemctl()
        self.told: list[str] = []
        for name, content in {
            "etc/machine-id": MACHINE_ID + "\n",
            "sys/class/dmi/id/product_uuid": "6d0f8fc0-0000-4000-8000-000000000001\n",
            "usr/sbin/libvirtd": "",
            "etc/libvirt/libvirtd.conf": LIBVIRTD,
            "etc/libvirt/qemu.conf": QEMU,
            "etc/default/libvirt-guests": "# defaults\n",
            "etc/libvirt/qemu/autostart/legacy.xml": "<domain/>",
        }.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            os.utime(path, (1_600_000_000, 1_600_000_000))
        (root / "etc/libvirt/libvirtd.conf").chmod(0o640)

    def joiner(self, **given: object) -> Joiner:
        fields: dict[str, object] = {
            "url": self.double.url,
            "token": TOKEN,
            "ca_fingerprint": self.double.ca_fingerprint,
            "root": self.root,
            "agent_port": 18446,
            "metrics_port": 19107,
            "address": "127.0.0.1",
        }
        return Joiner(JoinOptions(**(fields | given)), systemctl=self.systemctl, tell=self.told.append)  # type: ignore[arg-type]

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    def picture(self) -> dict[str, tuple[object, ...]]:
        """Everything below the root: kind, mode, content, time."""
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.root.rglob("*")):
            status = path.lstat()
            name = str(path.relative_to(self.root))
            if path.is_symlink():
                found[name] = ("link", os.readlink(path))
            elif path.is_dir():
                found[name] = ("directory",)
            else:
                found[name] = ("file", stat.S_IMODE(status.st_mode), path.read_bytes(), int(status.st_mtime))
        return found


@pytest.fixture(scope="module")
def running_double() -> Iterator[JoinDouble]:
    double = JoinDouble()
    yield double
    double.stop()


@pytest.fixture
def double(running_double: JoinDouble) -> JoinDouble:
    running_double.refusals, running_double.clock_offset_s = [], 0.0
    running_double.life = timedelta(hours=1)
    running_double.joins.clear()
    running_double.checks.clear()
    return running_double


@pytest.fixture
def machine(tmp_path: Path, double: JoinDouble) -> Machine:
    return Machine(tmp_path / "root", double)


def test_check_lists_every_change_and_makes_none(machine: Machine) -> None:
    before = machine.picture()
    report = machine.joiner().check()
    assert report.refusals == []
    text = "\n".join(lines_of(report))
    for wanted in (
        "/etc/pki/qemu/server-key.pem",
        "listen_tls = 1",
        "/etc/libvirt/libvirtd.conf",
        "migrate_tls_x509_verify = 1",
        "libvirtd-tls.socket",
        "libvirt-guests.service",
        "/etc/systemd/system/trimtab-agent.service",
        "restart libvirtd",
        "domain legacy",
    ):
        assert wanted in text
    assert machine.picture() == before
    assert machine.systemctl.asked == []
    assert machine.double.joins == []


def test_join_makes_a_member_whose_files_are_private(machine: Machine) -> None:
    host_id = machine.joiner().join()
    assert host_id == "host-01abc"
    (request,) = machine.double.joins
    assert (request.facts.machine_id, request.facts.agent_address) == (MACHINE_ID, "127.0.0.1:18446")
    identity = IdentityFiles(machine.root / "etc/trimtab").current()
    names = identity.certificate().extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host_id]
    assert stat.S_IMODE((machine.root / "etc/trimtab/identity.pem").stat().st_mode) == 0o600
    for name in ("etc/pki/libvirt/private/serverkey.pem", "etc/pki/qemu/server-key.pem", "etc/pki/qemu/client-key.pem"):
        path = machine.root / name
        assert path.resolve().is_relative_to(machine.root)
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
        assert "PRIVATE KEY" in path.read_text()
    settings = config.load(machine.root / "var/lib/trimtab/agent.toml")
    assert (settings.host_id, settings.gateway_addresses) == (host_id, ("127.0.0.1:8444",))
    assert settings.listen_address == "0.0.0.0:18446"
    assert settings.lease_fencing == "auto", "nothing that runs ends because the controller does, unless that was asked for"


def test_fencing_by_lease_is_asked_for_at_the_join(machine: Machine) -> None:
    machine.joiner(lease_fencing=True).join()
    assert config.load(machine.root / "var/lib/trimtab/agent.toml").lease_fencing == "on"


def test_libvirts_certificates_fit_what_gnutls_wants(machine: Machine) -> None:
    machine.joiner().join()
    pki = machine.root / "etc/pki"
    output = subprocess.run(
        ["certtool", "--verify", "--load-ca-certificate", pki / "CA/cacert.pem", "--infile", pki / "qemu/server-cert.pem"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "Verified." in output.stdout, output.stdout + output.stderr
    certificate = x509.load_pem_x509_certificate((pki / "libvirt/servercert.pem").read_bytes())
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_libvirts_files_get_a_block_at_the_top_since_the_first_assignment_counts(machine: Machine) -> None:
    machine.joiner().join()
    text = machine.read("etc/libvirt/libvirtd.conf")
    assert text.startswith(BLOCK_BEGIN)
    assert text.endswith(LIBVIRTD)
    assert text.index("listen_tls = 1") < text.index("listen_tls = 0")
    assert "keepalive_interval = 5" in text
    assert stat.S_IMODE((machine.root / "etc/libvirt/libvirtd.conf").stat().st_mode) == 0o640
    assert machine.read("etc/default/libvirt-guests").startswith("# defaults")


def test_a_keepalive_that_notices_sooner_is_left_alone(machine: Machine) -> None:
    path = machine.root / "etc/libvirt/libvirtd.conf"
    path.write_text("keepalive_interval = 1\nkeepalive_count = 3\n")
    machine.joiner().join()
    assert machine.read("etc/libvirt/libvirtd.conf").count("keepalive_interval") == 1
    assert "keepalive_interval = 5" in machine.read("etc/libvirt/qemu.conf")


def test_the_tls_socket_is_opened_while_libvirtd_is_stopped(machine: Machine) -> None:
    machine.systemctl.fails_once = {"start libvirtd-tls.socket"}  # a client woke libvirtd in between
    machine.joiner().join()
    asked = machine.systemctl.asked
    assert asked.count("stop libvirtd.service") == 2
    assert asked.index("stop libvirtd.service") < asked.index("start libvirtd-tls.socket") < asked.index("start libvirtd.service")
    assert asked[-1] == "start trimtab-agent.service"
    assert "stop libvirt-guests.service" not in asked, "stopping it would suspend every guest"
    assert machine.systemctl.words["libvirt-guests.service"] == "disabled"


def test_without_systemds_sockets_libvirtd_listens_itself(machine: Machine) -> None:
    machine.systemctl.words["libvirtd.socket"] = "masked"
    (machine.root / "etc/default/libvirtd").write_text('LIBVIRTD_ARGS="--timeout 120"\n')
    machine.joiner().join()
    text = machine.read("etc/default/libvirtd")
    assert text.index("--timeout") < text.index('LIBVIRTD_ARGS="--listen"')
    assert "restart libvirtd.service" in machine.systemctl.asked


def test_leaving_restores_every_file_bit_for_bit(machine: Machine) -> None:
    before, words = machine.picture(), dict(machine.systemctl.words)
    machine.joiner().join()
    assert machine.picture() != before
    undone = leave(machine.systemctl, root=machine.root)
    assert any("libvirtd.conf restored" in line for line in undone)
    after = machine.picture()
    after.pop("var", None)
    after.pop("var/lib", None)
    assert after == before
    assert {unit: machine.systemctl.words[unit] for unit in words} == words
    with pytest.raises(NotFound):
        leave(machine.systemctl, root=machine.root)


def test_leaving_stops_an_agent_that_is_about_to_be_started_anew(machine: Machine) -> None:
    machine.joiner().join()
    machine.systemctl.active.discard("trimtab-agent.service")  # it was refused, ended, and waits for its restart
    machine.systemctl.asked.clear()
    stop_units(machine.systemctl)
    assert machine.systemctl.asked[-1] == "stop trimtab-agent.service"


def test_leaving_restores_certificates_that_were_there_before(machine: Machine) -> None:
    path = machine.root / "etc/pki/CA/cacert.pem"
    path.parent.mkdir(parents=True)
    path.write_text("the operator's own CA")
    assert any("replace (kept for leaving) /etc/pki/CA/cacert.pem" in change for change in machine.joiner().check().changes)
    machine.joiner().join()
    assert "BEGIN CERTIFICATE" in path.read_text()
    leave(machine.systemctl, root=machine.root)
    assert path.read_text() == "the operator's own CA"


def test_leaving_keeps_what_an_operator_edited_after_the_join(machine: Machine) -> None:
    machine.joiner().join()
    path = machine.root / "etc/libvirt/libvirtd.conf"
    path.write_text(path.read_text() + "max_workers = 30\n")
    undone = leave(machine.systemctl, root=machine.root)
    assert path.read_text() == LIBVIRTD + "max_workers = 30\n"
    assert any("edited since" in line for line in undone)


def test_leaving_may_keep_the_identity_and_then_its_domains_stay_the_fleets(machine: Machine) -> None:
    released: list[str] = []
    machine.joiner().join()
    leave(machine.systemctl, root=machine.root, keep_certificates=True, release=lambda: released.append("all") or ("done",))
    assert released == []
    assert IdentityFiles(machine.root / "etc/trimtab").exists()
    assert not (machine.root / "var/lib/trimtab/agent.toml").exists()


def test_leaving_for_good_releases_the_domains_and_says_so(machine: Machine) -> None:
    machine.joiner().join()
    assert "web1 is plain now" in leave(machine.systemctl, root=machine.root, release=lambda: ("web1 is plain now",))


def test_nothing_that_an_agent_wrote_stays_in_its_directory(machine: Machine) -> None:
    machine.joiner().join()
    state = machine.root / "var/lib/trimtab"
    for name in (uplinks.FILE_NAME, warden_state.KILLED_NAME, "journal.db", "journal.db-wal", "gateways.json", "agent.lock"):
        (state / name).write_text("{}")
    leave(machine.systemctl, root=machine.root)
    assert not state.exists()


def test_a_leave_that_was_cut_is_finished_by_the_next(machine: Machine) -> None:
    before = machine.picture()
    machine.joiner().join()
    undo = machine.root / "var/lib/trimtab/undo.json"
    entries = json.loads(undo.read_text())
    assert len(entries) > 10
    broken = machine.systemctl.set_enablement

    def cut(*_arguments: object, **_named: object) -> None:
        raise Unavailable("systemd-silent", "cut")

    machine.systemctl.set_enablement = cut  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        leave(machine.systemctl, root=machine.root)
    machine.systemctl.set_enablement = broken  # type: ignore[method-assign]
    leave(machine.systemctl, root=machine.root)
    after = machine.picture()
    after.pop("var", None)
    after.pop("var/lib", None)
    assert after == before


def test_a_repeated_join_changes_nothing_and_uses_no_token(machine: Machine) -> None:
    machine.joiner().join()
    before, undo = machine.picture(), machine.read("var/lib/trimtab/undo.json")
    assert machine.joiner(token="jt-2.other").join() == "host-01abc"
    assert len(machine.double.joins) == 1
    assert machine.picture() == before
    assert machine.read("var/lib/trimtab/undo.json") == undo


def test_a_join_that_was_cut_after_the_fleets_answer_is_finished_without_a_token(machine: Machine) -> None:
    original = machine.picture()
    machine.systemctl.fails_once = {"stop libvirtd.service"}
    with pytest.raises(TrimtabError):
        machine.joiner().join()
    assert not (machine.root / "var/lib/trimtab/agent.toml").exists()
    assert machine.joiner(token="jt-used.up").join() == "host-01abc"
    assert len(machine.double.joins) == 1
    assert (machine.root / "var/lib/trimtab/agent.toml").exists()
    leave(machine.systemctl, root=machine.root)
    after = machine.picture()
    after.pop("var", None)
    after.pop("var/lib", None)
    assert after == original


def test_a_lapsed_host_proves_who_it_was_and_keeps_its_id(machine: Machine) -> None:
    machine.double.life = timedelta(seconds=-1)
    machine.joiner().join()
    machine.double.life = timedelta(hours=1)
    lapsed = IdentityFiles(machine.root / "etc/trimtab").current().certificate()
    assert lapsed.not_valid_after_utc.timestamp() < time.time()
    assert machine.joiner().join() == "host-01abc"
    first, second = machine.double.joins
    assert not first.facts.previous_host_id
    assert second.facts.previous_host_id == "host-01abc"
    renewed = IdentityFiles(machine.root / "etc/trimtab").current().certificate()
    assert renewed.not_valid_after_utc.timestamp() > time.time()


def test_whether_a_lapsed_host_was_a_member_is_for_the_controller_to_say_since_its_ca_may_be_a_later_one(
    machine: Machine,
) -> None:
    machine.double.life = timedelta(seconds=-1)
    machine.joiner().join()
    stranger = JoinDouble()
    try:
        with pytest.raises(PermissionDenied, match="refused the caller"):
            machine.joiner(url=stranger.url, ca_fingerprint=stranger.ca_fingerprint).join()
    finally:
        stranger.stop()


def test_a_controller_with_another_ca_is_refused_before_the_token_is_shown(machine: Machine) -> None:
    with pytest.raises(PermissionDenied) as caught:
        machine.joiner(ca_fingerprint="sha256:" + "0" * 64).join()
    assert caught.value.code == "ca-fingerprint-differs"
    assert machine.double.checks == []


@pytest.mark.parametrize("fingerprint", ["", "sha256:12", "md5:" + "0" * 64, "sha256:" + "g" * 64])
def test_a_malformed_fingerprint_is_named(machine: Machine, fingerprint: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        machine.joiner(ca_fingerprint=fingerprint).check()
    assert caught.value.code == "fingerprint-malformed"


def test_the_controllers_refusals_stop_the_join(machine: Machine) -> None:
    machine.double.refusals = ["host node1 has this machine-id already"]
    before = machine.picture()
    with pytest.raises(Conflict, match="machine-id already"):
        machine.joiner().join()
    assert machine.picture() == before
    assert machine.joiner().check().refusals == ["host node1 has this machine-id already"]


def test_a_clock_that_is_off_is_refused(machine: Machine) -> None:
    machine.double.clock_offset_s = 3.5
    report = machine.joiner().check()
    assert -4.5 < report.skew_s < -2.5
    assert any("clock" in refusal for refusal in report.refusals)
    with pytest.raises(Conflict):
        machine.joiner().join()


def test_a_member_of_another_fleet_must_leave_first(machine: Machine) -> None:
    machine.joiner().join()
    other = JoinDouble()
    try:
        with pytest.raises(Conflict) as caught:
            machine.joiner(url=other.url, ca_fingerprint=other.ca_fingerprint).join()
    finally:
        other.stop()
    assert caught.value.code == "member-of-another-fleet"
    assert "trimtab-agent leave" in caught.value.message


def test_a_machine_without_libvirt_is_refused(machine: Machine) -> None:
    (machine.root / "usr/sbin/libvirtd").unlink()
    assert any("libvirtd is not installed" in refusal for refusal in machine.joiner().check().refusals)


def test_a_port_in_use_is_refused(machine: Machine) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refusals = machine.joiner(agent_port=port).check().refusals
    assert any(f"port {port}" in refusal for refusal in refusals)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "https://"])
def test_only_https_is_spoken(machine: Machine, url: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        machine.joiner(url=url).check()
    assert caught.value.code == "url-malformed"


def test_a_controller_that_is_not_there_is_unavailable(machine: Machine) -> None:
    with pytest.raises(Unavailable):
        machine.joiner(url="https://127.0.0.1:1").check()


def test_renewed_libvirt_certificates_are_exchanged_as_a_pair(machine: Machine) -> None:
    machine.joiner().join()
    libvirt = LibvirtCertificates(machine.root)
    before = libvirt.certificate_pem()
    machine.double.life = timedelta(hours=2)
    agent = machine.double.joins[0]
    from datetime import UTC, datetime

    from trimtab_agent.certificates import new_libvirt_request

    request = new_libvirt_request()
    assert request.csr_pem != agent.libvirt_csr_pem
    issued = machine.double.authority.sign_libvirt(
        request.csr_pem, "host-01abc", "127.0.0.1", now=datetime.now(UTC), life=timedelta(hours=2)
    )
    ca = (machine.root / "etc/trimtab/ca.pem").read_bytes()
    libvirt.install(ca_pem=ca, certificate_pem=issued.pem.encode(), key_pem=request.key_pem)
    assert libvirt.certificate_pem() == issued.pem.encode() != before
    assert (machine.root / "etc/pki/qemu/client-key.pem").read_bytes() == request.key_pem
    assert [report.purpose for report in libvirt.report()] == ["libvirt"]
    for tree in ("libvirt", "qemu"):
        assert len(list((machine.root / "etc/pki" / tree).glob(".trimtab-*"))) == 1


def test_the_packaged_units_are_those_that_a_join_writes() -> None:
    packaged = Path(__file__).parents[3] / "ops" / "systemd"
    places = {"configuration": "/var/lib/trimtab/agent.toml", "state": "/var/lib/trimtab"}
    texts = {
        "trimtab-agent": host_setup.UNIT,
        "trimtab-warden": host_setup.WARDEN_UNIT_TEXT,
        "trimtab-beacon": host_setup.BEACON_UNIT_TEXT,
    }
    for name, text in texts.items():
        assert (packaged / f"{name}.service").read_text() == text.format(program=f"/usr/bin/{name}", **places)
