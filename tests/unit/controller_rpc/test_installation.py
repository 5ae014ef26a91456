"""`trimtab-controller` as an administrator uses it: init, check, token reset, ca rotate."""

import os
import stat
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from tests.unit.controller_rpc.conftest import Fleet, certificate_request, host_libvirt_key
from trimtab_controller import check, config, installation, main
from trimtab_controller.check import Verdict
from trimtab_controller.clock import SystemClock
from trimtab_controller.config import Settings
from trimtab_controller.services import identity, tokens
from trimtab_controller.store import audit, hosts, schema, upkeep
from trimtab_controller.store import identity as identity_store
from trimtab_controller.store.database import Database
from trimtab_protos.controller.v1 import gateway_service_pb2 as pb
from trimtab_protos.errors import Conflict, TrimtabError


@pytest.fixture(autouse=True)
def own_umask() -> Iterator[None]:
    """The command makes its files private; the other tests of this process keep their umask."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return config.load(data_dir=tmp_path / "d", advertise="127.0.0.1")


@pytest.fixture
def founded(settings: Settings) -> Settings:
    installation.found(settings, SystemClock(), {})
    return settings


@pytest.fixture
def database(founded: Settings) -> Iterator[Database]:
    opened = Database(founded.effective_database_url)
    yield opened
    opened.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_makes_everything_and_tells_the_next_commands(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    result = CliRunner().invoke(
        main.cli, ["init", "--data-dir", str(directory), "--advertise", "192.0.2.1", "--api-port", "9443"]
    )
    assert result.exit_code == 0, result.output
    assert "trimtab-controller all --data-dir" in result.output
    assert "export TRIMTAB_URL=https://192.0.2.1:9443" in result.output
    assert "sha256:" in result.output
    written = tomllib.loads((directory / "controller.toml").read_text())
    assert (written["advertise"], written["api_port"]) == (["192.0.2.1"], 9443)
    assert mode(directory) == 0o700
    assert mode(directory / "admin.token") == 0o600
    assert (directory / "admin.token").read_text().startswith("tt-")
    database = Database(f"sqlite:///{directory}/trimtab.db")
    assert database.read(lambda session: identity_store.find_project(session, "default")) is not None
    assert database.read(lambda session: hosts.find_class(session, "default")) is not None
    assert database.read(identity_store.fleet_admin_ids)
    database.close()


def test_init_refuses_to_run_twice_and_changes_nothing(founded: Settings) -> None:
    before = {path.name: path.read_bytes() for path in founded.pki_dir.iterdir()}
    with pytest.raises(Conflict, match="founded once"):
        installation.found(founded, SystemClock(), {})
    assert {path.name: path.read_bytes() for path in founded.pki_dir.iterdir()} == before


def test_processes_refuse_a_directory_without_a_fleet(settings: Settings) -> None:
    with pytest.raises(Conflict, match="trimtab-controller init"):
        installation.require_founded(settings)


def test_processes_refuse_an_old_database(founded: Settings, database: Database) -> None:
    installation.require_schema(founded)
    import sqlalchemy as sa

    database.write(lambda session: session.execute(sa.text("DELETE FROM alembic_version")))
    with pytest.raises(Conflict, match="trimtab-controller migrate"):
        installation.require_schema(founded)


def test_a_reset_ends_the_older_tokens(founded: Settings, database: Database) -> None:
    first = founded.admin_token_path.read_text()
    admin = database.read(lambda session: identity.find(session, "admin"))
    other = database.write(
        lambda session: tokens.create(session, admin, name="laptop", lifetime=timedelta(days=1), now=SystemClock().now())
    )
    installation.reset_token(founded, SystemClock())
    assert founded.admin_token_path.read_text() != first
    assert mode(founded.admin_token_path) == 0o600
    live = database.read(lambda session: identity_store.tokens_of(session, admin.id))
    assert len(live) == 1
    assert live[0].id != other.token.id


def test_errors_become_one_line_and_a_stable_exit_status(founded: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main.main(arguments)
        return int(caught.value.code or 0), capsys.readouterr().err

    directory = str(founded.data_dir)
    status, message = run("init", "--data-dir", directory)
    assert status == 5
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert run("check", "--data-dir", directory, "--api-port", "0")[0] == 2
    assert run("ca", "rotate", "finish", "--data-dir", directory)[0] == 5


# --- check -----------------------------------------------------------------------------------------------------------------------------


def verdicts(settings: Settings) -> dict[str, Verdict]:
    """The worst verdict of each part."""
    found: dict[str, Verdict] = {}
    order = list(Verdict)
    for one in check.findings(settings, SystemClock()):
        found[one.part] = max(found.get(one.part, Verdict.OK), one.verdict, key=order.index)
    return found


def test_a_fresh_installation_has_no_failure(founded: Settings) -> None:
    found = verdicts(founded)
    assert set(found) == {
        "settings",
        "data directory",
        "certificates",
        "database",
        "audit",
        "redis",
        "clock",
        "disk space",
        "ports",
    }
    failed = [part for part, verdict in found.items() if verdict is Verdict.FAIL and part != "ports"]
    assert failed == []


def test_check_finds_what_is_broken(founded: Settings) -> None:
    (founded.pki_dir / "ca-signing.pem").chmod(0o644)
    founded.uploads_dir.chmod(0o755)
    founded.file.unlink()
    found = verdicts(founded)
    assert found["certificates"] is Verdict.FAIL
    assert found["data directory"] is Verdict.FAIL
    assert found["settings"] is Verdict.FAIL


def test_check_finds_a_database_that_is_gone(founded: Settings) -> None:
    gone = config.load(
        data_dir=founded.data_dir, database_url="postgresql+psycopg://nobody@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1"
    )
    found = verdicts(gone)
    assert found["database"] is Verdict.FAIL
    assert found["redis"] is Verdict.WARN  # work goes on without it


def test_check_finds_a_row_of_the_audit_trail_that_was_changed(founded: Settings) -> None:
    database = Database(founded.effective_database_url)
    try:
        for number in range(3):
            who = {"actor": "alice", "request_id": "r-1", "project_id": ""}
            what = {"verb": "vm.stop", "resource": f"web{number}", "outcome": "accepted"}
            database.write(partial(audit.append, at=SystemClock().now(), **who, **what))
        database.write(partial(upkeep.seal_audit, before=SystemClock().now() + timedelta(seconds=1), limit=10))
        assert verdicts(founded)["audit"] is Verdict.OK
        rows = database.read(lambda session: session.execute(sa.select(schema.audit.c.seq).order_by(schema.audit.c.seq)).all())
        forged = schema.audit.update().where(schema.audit.c.seq == rows[-1].seq).values(resource="web9")
        database.write(lambda session: session.execute(forged))
        assert database.read(partial(upkeep.verify_audit, page=1)) == rows[-1].seq
    finally:
        database.close()
    assert verdicts(founded)["audit"] is Verdict.FAIL


def test_check_finds_a_port_that_is_taken(founded: Settings) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = config.load(data_dir=founded.data_dir, bind_address="127.0.0.1", api_port=port)
        messages = [one.message for one in check.findings(busy, SystemClock()) if one.part == "ports"]
    assert any(f"port {port} (api)" in message for message in messages)


def test_check_ends_with_status_3_where_something_fails(founded: Settings) -> None:
    founded.pki_dir.chmod(0o755)
    result = CliRunner().invoke(main.cli, ["check", "--data-dir", str(founded.data_dir)])
    assert result.exit_code == 3
    assert "fail  data directory" in result.output


# --- rotation of the CA ------------------------------------------------------------------------------------------------------------------


async def test_a_rotation_waits_for_every_host_and_names_those_that_are_behind(fleet: Fleet) -> None:
    machine = await fleet.member("node1")
    gone = await fleet.member("node2")
    settings, clock = fleet.settings, fleet.clock
    installation.begin_rotation(settings, clock)
    with pytest.raises(Conflict, match="node1, node2"):
        installation.advance_rotation(settings, clock)
    fleet.database.write(lambda session: hosts.mark_deleted(session, gone.host_id, now=clock.now()))

    async def renew() -> None:
        response = await machine.stub().RenewCertificates(
            pb.RenewCertificatesRequest(
                agent_csr_pem=certificate_request(machine.key), libvirt_csr_pem=certificate_request(host_libvirt_key())
            ),
            timeout=10,
        )
        machine.certificate_pem, machine.ca_pem = response.agent_certificate_pem.encode(), response.ca_bundle_pem.encode()

    await renew()
    assert installation.advance_rotation(settings, clock) == "switched"
    with pytest.raises(TrimtabError, match="node1"):
        installation.advance_rotation(settings, clock)
    await renew()
    assert installation.advance_rotation(settings, clock) == "none"
    stream, _welcome = await machine.open()
    assert (await stream.beat()).is_granted
