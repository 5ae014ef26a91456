"""Small parts: thread pools, settings, credentials on disk, the command line."""

import os
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.agent.factories import host_credentials, new_fleet_authority
from tests.unit.agent.waiting import until_now
from trimtab_agent import config
from trimtab_agent.certificates import IdentityFiles, parse_identity
from trimtab_agent.inventory import digest_of
from trimtab_agent.main import main
from trimtab_agent.undo import with_block, without_block
from trimtab_agent.workers import WorkerPool
from trimtab_protos import tls
from trimtab_protos.errors import Internal, InvalidRequest, Unavailable
from trimtab_protos.messages import Inventory, PoolObservation

# --- thread pools --------------------------------------------------------------------------------------------------------


def test_a_pool_runs_as_many_calls_as_it_has_threads_and_refuses_a_flood() -> None:
    pool = WorkerPool("test", threads=2, max_queued=1)
    gate, running = threading.Event(), threading.Semaphore(0)

    def call() -> str:
        running.release()
        gate.wait(10)
        return "done"

    futures = [pool.submit(call) for _ in range(3)]
    assert running.acquire(timeout=10)
    assert running.acquire(timeout=10)
    assert not running.acquire(blocking=False)
    with pytest.raises(Unavailable) as caught:
        pool.submit(call)
    assert caught.value.code == "agent-busy"
    gate.set()
    assert [future.result(10) for future in futures] == ["done"] * 3
    until_now(lambda: pool.unfinished == 0)
    pool.close()


def test_an_error_in_a_pool_reaches_the_caller_and_the_thread_goes_on() -> None:
    pool = WorkerPool("test", threads=1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(10)
    assert pool.submit(lambda: 2).result(10) == 2
    pool.close()


# --- settings ------------------------------------------------------------------------------------------------------------

VALUES = {
    "host_id": "host-1",
    "gateway_addresses": ["192.0.2.1:8444"],
    "agent_address": "192.0.2.11:8446",
    "migration_address": "192.0.2.11",
}


def write(path: Path, **changes: object) -> Path:
    path.write_text(config.render({**VALUES, **changes}))
    return path


def test_settings_are_read_from_what_the_join_renders(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path / "agent.toml"))
    assert (settings.host_id, settings.gateway_addresses) == ("host-1", ("192.0.2.1:8444",))
    assert settings.listen_address == "0.0.0.0:8446"


def test_flags_go_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "agent.toml", log_level="info", imports_at_once=3)
    monkeypatch.setenv("TRIMTAB_LOG_LEVEL", "debug")
    monkeypatch.setenv("TRIMTAB_IMPORTS_AT_ONCE", "4")
    assert config.load(path).imports_at_once == 4
    assert config.load(path, log_level="error", hypervisor=None).log_level == "error"


@pytest.mark.parametrize(
    "changes",
    [{"host_id": "node1"}, {"agent_address": "no port"}, {"hypervisor": "xen"}, {"imports_at_once": 0}, {"unknown": 1}],
    ids=str,
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        config.load(write(tmp_path / "agent.toml", **changes))
    assert caught.value.context["field"] == next(iter(changes))


def test_gateways_that_were_told_outlive_the_agent(tmp_path: Path) -> None:
    settings = config.load(write(tmp_path / "agent.toml", state_dir=str(tmp_path)))
    assert config.known_gateways(settings) == ("192.0.2.1:8444",)
    config.remember_gateways(settings, ("192.0.2.2:8444", "192.0.2.3:8444"))
    assert config.known_gateways(settings) == ("192.0.2.2:8444", "192.0.2.3:8444")
    config.remember_gateways(settings, ())
    assert len(config.known_gateways(settings)) == 2


# --- credentials ---------------------------------------------------------------------------------------------------------


def test_an_identity_is_kept_privately_and_read_again_when_it_changed(tmp_path: Path) -> None:
    authority = new_fleet_authority()
    files = IdentityFiles(tmp_path / "trimtab")
    assert not files.exists()
    for life in (timedelta(hours=1), timedelta(hours=2)):
        credentials = host_credentials(authority, "host-1", life=life)
        files.replace(credentials)
        assert files.current().certificate() == credentials.certificate()
    assert os.stat(tmp_path / "trimtab/identity.pem").st_mode & 0o777 == 0o600
    assert IdentityFiles(tmp_path / "trimtab").current().ca_bundle_sha256 == files.current().ca_bundle_sha256


def test_a_key_of_another_certificate_is_noticed() -> None:
    authority = new_fleet_authority()
    first, second = host_credentials(authority, "host-1"), host_credentials(authority, "host-1")
    with pytest.raises(Internal):
        parse_identity(first.ca_pem, first.key_pem + second.certificate_pem)
    with pytest.raises(InvalidRequest):
        parse_identity(first.ca_pem, b"nonsense")


def test_a_bundle_of_two_cas_has_both_fingerprints() -> None:
    first, second, third = new_fleet_authority(), new_fleet_authority(), new_fleet_authority()
    bundle = host_credentials(first, "host-1").ca_pem + host_credentials(second, "host-1").ca_pem
    assert tls.bundle_has_fingerprint(bundle, first.fingerprint)
    assert tls.bundle_has_fingerprint(bundle, second.fingerprint.upper())
    assert not tls.bundle_has_fingerprint(bundle, third.fingerprint)


# --- inventory -----------------------------------------------------------------------------------------------------------


def test_the_digest_looks_away_from_free_space_and_at_everything_else() -> None:
    def inventory(**pool: object) -> Inventory:
        seen = PoolObservation(pool_id="pool-1", capacity_bytes=100, **pool)  # type: ignore[arg-type]
        words = ("hostname", "arch", "machine_id", "smbios_uuid", "boot_id", "kernel", "agent_version", "libvirt_version")
        words += ("qemu_version", "accelerator", "cpu_vendor", "cpu_model")
        return Inventory(**dict.fromkeys(words, "x"), cpus=1, memory_mib=1, pools=(seen,))  # type: ignore[arg-type]

    assert digest_of(inventory(available_bytes=1)) == digest_of(inventory(available_bytes=2, observed_at_ms=5))
    assert digest_of(inventory(is_responsive=True)) != digest_of(inventory(is_responsive=False))
    assert digest_of(inventory()) != digest_of(replace(inventory(), cpus=3))


# --- marked blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a = 1\n", "a = 1", "\n\n# x\n", "a\r\nb\n"])
@pytest.mark.parametrize("is_at_top", [True, False])
def test_a_block_goes_in_and_out_without_a_trace(text: str, is_at_top: bool) -> None:
    once = with_block(text, ["x = 1"], is_at_top=is_at_top)
    assert "x = 1" in once
    assert with_block(once, ["x = 1"], is_at_top=is_at_top) == once
    assert without_block(once) == text


# --- command line --------------------------------------------------------------------------------------------------------


def test_a_host_that_is_no_member_is_told_how_to_become_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--config", str(tmp_path / "agent.toml")])
    assert result.exit_code == 2
    assert "trimtab-agent join" in result.stderr


def test_leaving_a_fleet_one_is_not_in_is_not_found(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["leave", "--yes", "--root", str(tmp_path)])
    assert (result.exit_code, "in no fleet" in result.stderr) == (4, True)


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(main, ["version"])
    assert (result.exit_code, bool(result.stdout.strip())) == (0, True)
