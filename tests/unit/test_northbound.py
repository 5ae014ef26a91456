"""OVN's northbound database as we write it: a real one, of a server of the test's own."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.core.test_overlay import APP, WEB
from trimtab_controller.core.overlay import Table, desired
from trimtab_controller.northbound import OvnNorthbound
from trimtab_protos.errors import Unavailable

SCHEMA = "/usr/share/ovn/ovn-nb.ovsschema"


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    database, socket = tmp_path / "nb.db", tmp_path / "nb.sock"
    subprocess.run(["ovsdb-tool", "create", database, SCHEMA], check=True, timeout=10)
    serve = ["ovsdb-server", "--no-chdir", "--unixctl=none", f"--remote=punix:{socket}", str(database)]
    # It ends with its child, which tells that it serves by running.
    with subprocess.Popen([*serve, "--run", f"sh -c 'touch {tmp_path}/up; exec cat'"], stdin=subprocess.PIPE) as server:
        while not (tmp_path / "up").exists():
            assert server.poll() is None, "the database's server ended"
        yield f"unix:{socket}"
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=10)


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
