"""The connection: errors leave as ours, a daemon that is not there yet is waited for."""

from pathlib import Path

import libvirt
import pytest

from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_protos.errors import Conflict, NotFound, Unavailable

NODE = "<node><domain type='test'><name>one</name><memory>1024</memory><os><type>hvm</type></os></domain></node>"


def test_nothing_is_done_while_libvirt_is_down() -> None:
    connection = Connection("test:///nowhere/at/all", on_open=lambda _connection: None)
    connection.start()
    assert not connection.is_up
    with pytest.raises(Unavailable) as refused, connection.use("list domains"):
        raise AssertionError("the block must not run")
    assert refused.value.code == "hypervisor-down"
    connection.stop()


def test_it_opens_once_libvirt_is_there(tmp_path: Path) -> None:
    opened: list[str] = []
    connection = Connection(f"test://{tmp_path}/node.xml", on_open=lambda each: opened.append(each.getType()))
    connection.start()
    assert not connection.wait_until_up(0.05)
    (tmp_path / "node.xml").write_text(NODE)
    assert connection.wait_until_up(20)
    assert opened == ["TEST"]
    with connection.use("list domains") as each:
        assert [domain.name() for domain in each.listAllDomains()] == ["one"]
    connection.stop()
    assert not connection.is_up


def test_what_fails_in_on_open_keeps_it_closed() -> None:
    def refuse(_connection: object) -> None:
        raise libvirt.libvirtError("registration failed")

    connection = Connection("test:///default", on_open=refuse)
    connection.start()
    assert not connection.wait_until_up(0.3)
    connection.stop()


def test_libvirts_errors_are_translated_with_what_was_being_done(tmp_path: Path) -> None:
    (tmp_path / "node.xml").write_text(NODE)
    connection = Connection(f"test://{tmp_path}/node.xml", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(10)
    with (
        pytest.raises(NotFound, match="could not observe vm-1: the host has no such domain"),
        connection.use("observe vm-1") as each,
    ):
        each.lookupByName("none")
    with connection.use("stop one", changes=True) as each:
        each.lookupByName("one").destroy()
    with pytest.raises(Conflict) as refused, connection.use("stop one", changes=True) as each:
        each.lookupByName("one").destroy()
    assert refused.value.code == "wrong-domain-state"
    connection.stop()
