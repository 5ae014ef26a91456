"""Nothing of a guest stays frozen: not when who froze it dies, nor when its agent does not answer. On libvirt's test driver, which counts
what it freezes and thaws."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import libvirt
import pytest

from tests.unit.agent.kvm.factories import domain, pool
from tests.unit.agent.kvm.test_guest_agents import CHANNEL
from tests.unit.agent.kvm.test_pauses import DEFINITION, Seeing
from tests.unit.agent.waiting import until_now
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.source import Hold, Instant, InstantSource
from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.backup_hooks import GuestHooks
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.ballooning import Balloons
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.domains import Domains, VmLocks
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.freezes import GuestFreezes
from trimtab_agent.hypervisor.kvm.housekeeping import Housekeeping, LeftBehind
from trimtab_agent.hypervisor.kvm.layers import Layers
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pull_jobs import PullJobs
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DiskFormat, DiskSpec

SILENT, REFUSED = (
    "Guest agent is not responding: QEMU guest agent is not connected",
    "unable to execute QEMU agent command 'x': no",
)
UUID, OTHER_UUID = "3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d77", "3b0e7a52-1c1c-4f43-8a53-0f0a0b0c0d78"

HOLDER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from trimtab_agent.hypervisor.kvm.run_marks import RunMarks
mark = RunMarks(Path(sys.argv[1]), "-frozen.held").take(SimpleNamespace(ID=lambda: int(sys.argv[2])), "vm-a")
print("held", flush=True)
sys.stdin.read()
"""


class Guest:
    """A running guest of libvirt's test driver, with the channel that it lacks; what its agent does beside its work is the test's."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self.channel = "connected"
        self.on_freeze: Callable[[], None] = lambda: None
        self.on_thaw: Callable[[], None] = lambda: None
        self.on_instant: Callable[[], None] = lambda: None
        self.disks = ""
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._domain, name)

    def XMLDesc(self, flags: int = 0) -> str:
        xml: str = self._domain.XMLDesc(flags)
        return xml.replace("<devices>", CHANNEL.format(self.channel).removesuffix("</devices>") + self.disks, 1)

    def fsFreeze(self) -> int:
        self.asked += 1
        self.on_freeze()
        return int(self._domain.fsFreeze())

    def fsThaw(self) -> int:
        self.asked += 1
        self.on_thaw()
        return int(self._domain.fsThaw())

    # What a backup or a snapshot asks of a domain, and this driver does not answer.

    def jobInfo(self) -> list[int]:
        return [libvirt.VIR_DOMAIN_JOB_NONE]

    def listAllCheckpoints(self) -> list[Any]:
        return []

    def backupBegin(self, *_arguments: object) -> None:
        self.on_instant()

    def snapshotCreateXML(self, *_arguments: object) -> None:
        self.on_instant()

    def is_frozen(self) -> bool:
        """Tell, and leave it as it is."""
        is_frozen = bool(self._domain.fsThaw())
        if is_frozen:
            self._domain.fsFreeze()
        return is_frozen


class Host:
    """One host with one running guest; `mark` is where the agent says that it freezes it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.mark = directory, directory / "trimtab-vm-a-frozen.held"
        self.opened = libvirt.open("test:///default")
        self.freezes = GuestFreezes(directory)
        self.guests: dict[str, Guest] = {}
        self.guest = self.bring(DEFINITION)

    def bring(self, definition: str) -> Guest:
        domain = self.opened.defineXML(definition)
        domain.create()
        guest = self.guests[domain.name()] = Guest(domain)
        return guest

    def remove(self) -> None:
        for guest in self.guests.values():
            guest._domain.fsThaw()  # the driver remembers it for whoever is next
            guest.destroy()
            guest.undefine()
        self.opened.close()

    def restarts_guest(self) -> None:
        self.guest.destroy()
        self.guest.create()

    def dies_frozen(self, vm_id: str = "vm-a") -> None:
        """Leave mark and guest as a process does that is killed: nobody has the mark's lock."""
        guest = self.guests[f"trimtab-{vm_id}"]
        self.directory.joinpath(f"trimtab-{vm_id}-frozen.held").write_text(json.dumps({"running_id": guest.ID()}))
        guest._domain.fsFreeze()

    # --- what is needed of a `Connection` -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(self, _doing: str, *, changes: bool = False) -> Iterator["Host"]:
        yield self

    def lookupByName(self, name: str) -> Guest:
        return self.guests.get(name) or self.opened.lookupByName(name)

    def listAllDomains(self) -> list[Any]:
        return list(self.opened.listAllDomains())

    def settle_all(self) -> None:
        """As the agent does at its start, and every few seconds from then on."""
        GuestFreezes(self.directory).settle_all(cast(Connection, self))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    yield found
    found.remove()


def fail(message: str) -> None:
    error = libvirt.libvirtError(message)
    error.err = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, 10, message, 2, "", "", "", -1, -1)
    raise error


def test_a_guest_is_frozen_for_the_block_under_a_mark_and_thawed_after_it(host: Host) -> None:
    notes: dict[str, str] = {}
    marked_before: list[bool] = []
    host.guest.on_freeze = lambda: marked_before.append(host.mark.exists())
    with host.freezes.frozen(host.guest, "vm-a", notes) as is_frozen:
        assert (is_frozen, host.guest.is_frozen(), host.mark.exists()) == (True, True, True)
        assert json.loads(host.mark.read_text()) == {"running_id": host.guest.ID()}
    assert marked_before == [True]
    assert (host.guest.is_frozen(), host.mark.exists(), list(notes)) == (False, False, ["frozen_ms"])


def test_a_block_that_is_cancelled_thaws(host: Host) -> None:
    with pytest.raises(Conflict), host.freezes.frozen(host.guest, "vm-a", {}):
        raise Conflict("job-cancelled", "cancelled")
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_a_guest_is_thawed_after_the_death_of_who_froze_it(host: Host) -> None:
    host.dies_frozen()
    host.settle_all()
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_who_lives_and_holds_is_not_disturbed(host: Host) -> None:
    with host.freezes.frozen(host.guest, "vm-a", {}):
        host.settle_all()
        host.freezes.settle(host.guest, "vm-a")
        assert (host.guest.is_frozen(), host.mark.exists()) == (True, True)


def test_a_process_that_holds_a_guest_frozen_keeps_it_so_until_it_is_killed(host: Host) -> None:
    command = [sys.executable, "-c", HOLDER, str(host.directory), str(host.guest.ID())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            host.guest._domain.fsFreeze()
            host.settle_all()
            assert (host.guest.is_frozen(), host.mark.exists()) == (True, True)
        finally:
            holder.kill()
    host.settle_all()
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_a_guest_whose_agent_falls_silent_while_it_is_frozen_is_thawed_once_it_answers(host: Host) -> None:
    host.guest.on_thaw = lambda: fail(SILENT)
    with host.freezes.frozen(host.guest, "vm-a", {}) as is_frozen:
        assert is_frozen
    for _ in range(2):
        host.settle_all()
        assert (host.guest.is_frozen(), host.mark.exists()) == (True, True)
    host.guest.on_thaw = lambda: None
    host.settle_all()
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_a_freeze_that_comes_about_after_nobody_waits_for_it_any_more_is_thawed(host: Host) -> None:
    """The agent is in the midst of its hooks: it answers neither to the freeze nor to the thaw."""
    notes: dict[str, str] = {}
    host.guest.on_freeze = host.guest.on_thaw = lambda: fail(SILENT)
    with host.freezes.frozen(host.guest, "vm-a", notes) as is_frozen:
        assert not is_frozen
    assert SILENT in notes["downgrade"]
    host.guest._domain.fsFreeze()
    host.guest.on_thaw = lambda: None
    host.settle_all()
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_an_agent_that_refuses_to_freeze_leaves_no_mark(host: Host) -> None:
    host.guest.on_freeze = host.guest.on_thaw = lambda: fail(REFUSED)
    with host.freezes.frozen(host.guest, "vm-a", {}) as is_frozen:
        assert not is_frozen
        assert not host.mark.exists()


def test_an_agent_that_refuses_to_freeze_what_is_frozen_and_then_falls_silent_is_asked_to_thaw_it(host: Host) -> None:
    host.dies_frozen()
    host.guest.on_freeze, host.guest.on_thaw = lambda: fail(REFUSED), lambda: fail(SILENT)
    with host.freezes.frozen(host.guest, "vm-a", {}) as is_frozen:
        assert not is_frozen
    host.guest.on_thaw = lambda: None
    host.settle_all()
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)


def test_a_guest_whose_agent_is_not_there_is_not_asked_and_not_marked(host: Host) -> None:
    notes: dict[str, str] = {}
    host.guest.channel = "disconnected"
    with host.freezes.frozen(host.guest, "vm-a", notes) as is_frozen:
        assert (is_frozen, host.mark.exists()) == (False, False)
    assert (host.guest.asked, notes) == (0, {"downgrade": "the guest has no agent that answers"})


def test_a_mark_of_an_earlier_run_of_the_guest_thaws_nothing(host: Host) -> None:
    host.dies_frozen()
    host.restarts_guest()
    host.settle_all()
    assert (host.guest.asked, host.mark.exists()) == (0, False)


def test_a_mark_of_a_vm_that_is_gone_or_of_none_that_runs_is_removed(host: Host) -> None:
    gone = host.mark.with_name("trimtab-vm-gone-frozen.held")
    gone.write_text("half")
    host.dies_frozen()
    host.guest.destroy()
    host.settle_all()
    assert (gone.exists(), host.mark.exists(), host.guest.asked) == (False, False, 0)
    host.guest.create()


def test_a_guest_whose_agent_hangs_keeps_no_other_one_frozen(host: Host) -> None:
    other = host.bring(DEFINITION.replace("vm-a", "vm-b").replace(UUID, OTHER_UUID))
    answers = threading.Event()
    host.guest.on_thaw = lambda: None if answers.wait(60) else fail(SILENT)
    host.dies_frozen("vm-a")
    host.dies_frozen("vm-b")
    host.settle_all()
    assert (host.guest.is_frozen(), other.is_frozen()) == (True, False)
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "guarded-vm-a":
            thread.join(60)
    assert not host.guest.is_frozen()


def test_a_mark_that_its_holder_removes_while_another_waits_for_it_is_made_anew(host: Host) -> None:
    """A lock on a file that is gone would tell nobody anything."""
    seen: list[bool] = []

    def freeze_next() -> None:
        with host.freezes.frozen(host.guest, "vm-a", {}):
            seen.append(host.mark.exists())

    waiting = threading.Thread(target=freeze_next)
    with host.freezes.frozen(host.guest, "vm-a", {}):
        waiting.start()
        while waits_for_lock(host.mark) is False:
            waiting.join(0.01)
    waiting.join(60)
    assert seen == [True]


def test_an_agent_that_stops_waits_for_the_thaw(host: Host) -> None:
    frozen, ends = threading.Event(), threading.Event()

    def hold() -> None:
        with host.freezes.frozen(host.guest, "vm-a", {}):
            frozen.set()
            ends.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert frozen.wait(60)
    stopper = threading.Thread(target=housekeeping_of(host, cast(Connection, host)).stop)
    stopper.start()
    stopper.join(0.2)
    assert stopper.is_alive()
    ends.set()
    stopper.join(60)
    assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)
    holder.join(60)


def test_an_agent_that_stops_does_not_wait_for_ever(host: Host) -> None:
    with host.freezes.frozen(host.guest, "vm-a", {}):
        assert not host.freezes.wait_until_none(0.01)
    assert host.freezes.wait_until_none(0.01)


def waits_for_lock(mark: Path) -> bool:
    inode = f":{mark.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def backed_up(host: Host, *, hold: Hold | None = None) -> contextlib.AbstractContextManager[Instant]:
    backups = Backups(cast(Connection, host), instants=cast(InstantSource, None), socket_dir=host.directory)
    return backups.serve("vm-a", [], checkpoint="tt-1", wants_freeze=True, hold=hold)


def test_a_backup_thaws_what_an_earlier_agent_left_and_what_it_freezes_itself(host: Host) -> None:
    frozen: list[bool] = []
    host.dies_frozen()
    host.guest.on_freeze = host.guest.on_instant = lambda: frozen.append(host.guest.is_frozen())
    with backed_up(host) as instant:
        assert (instant.consistency, list(instant.notes)) == (Consistency.FILESYSTEM, ["frozen_ms"])
        assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)
    assert frozen == [False, True]


def test_a_backup_of_several_vms_that_is_cancelled_while_it_holds_the_guest_thaws(host: Host) -> None:
    held: list[bool] = []

    def hold() -> dict[str, str]:
        held.append(host.guest.is_frozen() and host.mark.exists())
        raise Conflict("job-cancelled", "cancelled")

    with pytest.raises(Conflict, match="cancelled"), backed_up(host, hold=hold):
        pass
    assert (held, host.guest.is_frozen(), host.mark.exists()) == ([True], False, False)


def test_a_snapshot_that_breaks_off_within_the_freeze_thaws_and_the_next_one_thaws_what_a_dead_agent_left(host: Host) -> None:
    disk, layer = (host.directory / "volumes" / f"vol-a{name}.qcow2" for name in ("", ".lyr-1"))
    disk.parent.mkdir()
    for command in (["qcow2", str(disk), "1M"], ["qcow2", "-b", str(disk), "-F", "qcow2", str(layer)]):
        subprocess.run(["qemu-img", "create", "-q", "-f", *command], check=True, timeout=60)
    host.guest.disks = f"<disk type='file'><source file='{disk}'/><target dev='vda'/><alias name='ua-vol-a'/></disk>"
    spec = domain(
        vm_id="vm-a",
        disks=(DiskSpec(volume_id="vol-a", pool_id="pool-fast", format=DiskFormat.QCOW2, index=0, layer_id="lyr-1"),),
        pools=(pool(host.directory),),
    )
    frozen: list[bool] = []

    def take() -> None:
        frozen.append(host.guest.is_frozen() and host.mark.exists())
        raise Conflict("no-room", "no room")

    host.guest.on_instant = take
    domains = SimpleNamespace(locks=VmLocks())
    layers = Layers(
        cast(Connection, host), cast(Domains, domains), cast(Networks, None), VolumeKeys(), host.freezes, boot_id="boot"
    )
    for is_left_frozen in (False, True):
        if is_left_frozen:
            host.dies_frozen()
        with pytest.raises(Conflict, match="no room"):
            layers.switch(spec, Stamp(epoch=1, turn=1), wants_freeze=not is_left_frozen)
        assert (host.guest.is_frozen(), host.mark.exists()) == (False, False)
    assert frozen == [True, False]


def housekeeping_of(host: Host, connection: Connection, hooks: GuestHooks | None = None) -> Housekeeping:
    return Housekeeping(
        connection,
        Seeing("boot"),
        ConsoleLogs(host.directory / "logs"),
        Firewall(host.directory / "firewall"),
        cast(Balloons, SimpleNamespace(look=lambda: None)),
        LeftBehind(GuestPauses(host.directory), host.freezes, hooks or GuestHooks(host.directory), PullJobs(host.directory)),
    )


def test_the_agents_housekeeping_thaws_by_itself(host: Host) -> None:
    connection = Connection("test:///default", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(20)
    host.dies_frozen()
    housekeeping = housekeeping_of(host, connection)
    housekeeping.start()
    try:
        until_now(lambda: not host.mark.exists())
    finally:
        housekeeping.stop()
        connection.stop()
    assert not host.guest.is_frozen()
