"""Whose pause is it? Over libvirt's own API, on its test driver: a backup's pause ends with the backup, an operator's never by a backup."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.consoles import ConsoleSockets
from trimtab_agent.hypervisor.kvm.domains import Domains
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.power import Power
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.messages import PowerAction

DEFINITION = """<domain type='test'><name>trimtab-vm-a</name><uuid>3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d77</uuid>
<metadata><t:domain xmlns:t='urn:trimtab:domain:1'><t:vm id='vm-a' name='db' project='default'/><t:stamp epoch='1' turn='1' boot=''/>
</t:domain></metadata><memory unit='MiB'>96</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os></domain>"""
RUNNING, PAUSED = libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_PAUSED


class Seeing(Observer):
    """The test driver moves no guest and cannot be asked whether it does."""

    def _migration_operation(self, domain: Any, uuid: str) -> int | None:
        return None


class Host:
    """One host with one running guest; `mark` is where a backup says that it pauses it."""

    def __init__(self, connection: Connection, directory: Path) -> None:
        self.connection, self.mark = connection, directory / "trimtab-vm-a-backup.held"
        self.pauses = GuestPauses(directory)
        observer = Seeing("boot")
        domains = Domains(
            connection,
            observer,
            ConsoleLogs(directory / "logs"),
            ConsoleSockets(directory / "run"),
            Firewall(directory / "firewall"),
            accelerator=lambda: "tcg",
            refuse_unfit=lambda _spec: None,
        )
        networks, keys = Networks(connection), VolumeKeys()
        self.power = Power(connection, domains, observer, networks, keys, self.pauses, boot_id="boot")
        with connection.use("define", changes=True) as opened:
            self.domain: Any = opened.defineXML(DEFINITION)
            self.domain.create()

    def state(self) -> int:
        return int(self.domain.state()[0])

    def dies_holding(self) -> None:
        """Leave the mark as a process does that is killed: nobody has its lock."""
        self.mark.write_text(json.dumps({"running_id": self.domain.ID()}))

    def operator(self, action: PowerAction) -> None:
        self.power.change("vm-a", action, Stamp(epoch=1, turn=2))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    opened = Connection("test:///default", on_open=lambda _connection: None, on_up=lambda: None)
    opened.start()
    assert opened.wait_until_up(20)
    found = Host(opened, tmp_path)
    yield found
    found.domain.destroy()
    found.domain.undefine()
    opened.stop()


def test_a_guest_is_let_go_on_after_the_death_of_who_held_it(host: Host) -> None:
    host.dies_holding()
    host.domain.suspend()
    host.pauses.settle_all(host.connection)
    assert (host.state(), host.mark.exists()) == (RUNNING, False)


def test_an_operators_pause_outlives_a_backup_that_died_before_it_paused_anything(host: Host) -> None:
    host.dies_holding()
    host.operator(PowerAction.PAUSE)
    host.pauses.settle(host.domain, "vm-a")
    with host.pauses.paused(host.domain, "vm-a"):
        assert host.state() == PAUSED
    assert (host.state(), host.mark.exists()) == (PAUSED, False)


def test_an_operators_pause_of_a_guest_that_a_dead_backup_left_paused_is_kept(host: Host) -> None:
    host.dies_holding()
    host.domain.suspend()
    host.operator(PowerAction.PAUSE)
    host.pauses.settle_all(host.connection)
    assert host.state() == PAUSED


def test_a_pause_beside_trimtab_is_kept_once_the_mark_of_the_dead_is_settled(host: Host) -> None:
    host.dies_holding()
    host.pauses.settle_all(host.connection)
    assert not host.mark.exists()
    host.domain.suspend()
    host.pauses.settle(host.domain, "vm-a")
    assert host.state() == PAUSED


def test_a_mark_of_an_earlier_run_of_the_guest_resumes_nothing(host: Host) -> None:
    host.dies_holding()
    host.domain.destroy()
    host.domain.create()
    host.domain.suspend()
    host.pauses.settle_all(host.connection)
    assert (host.state(), host.mark.exists()) == (PAUSED, False)


def test_who_lives_and_holds_is_not_disturbed_and_an_operators_word_in_between_stays(host: Host) -> None:
    with host.pauses.paused(host.domain, "vm-a"):
        GuestPauses(host.mark.parent).settle_all(host.connection)
        assert host.state() == PAUSED
    assert (host.state(), host.mark.exists()) == (RUNNING, False)
    with host.pauses.paused(host.domain, "vm-a"):
        host.operator(PowerAction.PAUSE)
    assert host.state() == PAUSED
    host.operator(PowerAction.RESUME)
    with host.pauses.paused(host.domain, "vm-a"):
        host.operator(PowerAction.RESUME)
        assert host.state() == RUNNING
    assert host.state() == RUNNING


def test_an_operators_pause_of_a_guest_that_an_error_had_paused_holds_when_the_error_is_over(host: Host) -> None:
    """libvirt keeps the error as the reason of the pause, so that nothing but the mark tells."""
    host.domain.suspend()
    assert host.pauses.resume_unless_kept(host.domain, "vm-a")
    assert host.state() == RUNNING
    host.domain.suspend()
    host.operator(PowerAction.PAUSE)
    assert not host.pauses.resume_unless_kept(host.domain, "vm-a")
    assert host.state() == PAUSED
    host.operator(PowerAction.RESUME)
    assert host.state() == RUNNING
    host.domain.suspend()
    assert host.pauses.resume_unless_kept(host.domain, "vm-a")


def test_an_operators_pause_is_over_with_the_run_of_the_guest_that_it_was_of(host: Host) -> None:
    host.operator(PowerAction.PAUSE)
    host.domain.destroy()
    host.domain.create()
    host.domain.suspend()
    assert host.pauses.resume_unless_kept(host.domain, "vm-a")


def test_a_mark_of_a_vm_that_is_gone_is_removed(host: Host) -> None:
    other = host.mark.with_name("trimtab-vm-gone-backup.held")
    other.write_text("half")
    host.pauses.settle_all(host.connection)
    assert not other.exists()


def test_what_an_operator_asked_of_a_run_that_is_over_is_put_away_and_of_one_that_goes_on_kept(host: Host) -> None:
    asked, gone = (host.mark.with_name(f"trimtab-{vm}-operator.paused") for vm in ("vm-a", "vm-gone"))
    host.operator(PowerAction.PAUSE)
    gone.write_text(json.dumps({"running_id": 7}))
    host.pauses.settle_all(host.connection)
    assert (asked.exists(), gone.exists()) == (True, False)
    host.domain.destroy()
    host.domain.create()
    host.pauses.settle_all(host.connection)
    assert not asked.exists()
