"""What a guest's owner has its applications do around a backup. The agent that is asked is QEMU's own, run beside the test; the guest that
it stands for is libvirt's test driver's."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.agent.kvm.test_freezes import SILENT, Host, fail, housekeeping_of, waits_for_lock
from tests.unit.agent.waiting import until_now
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.source import Hold, Instant, InstantSource
from trimtab_agent.hypervisor.kvm.backup_hooks import GuestHooks
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_protos.errors import Conflict

AGENT = "/usr/sbin/qemu-ga"


class Agent:
    """A guest agent that runs, and what libvirt makes of its answers. `hook` is the program that it is asked to run."""

    def __init__(self, directory: Path, host: Host, *, forbids: str = "") -> None:
        self.directory, self.host = directory, host
        self.hook, self._log = directory / "backup-hook", directory / "hook.log"
        self.is_silent = False
        self._turn = threading.Lock()
        channel = directory / "channel"
        asked = [AGENT, "-m", "unix-listen", "-p", str(channel), "-t", str(directory), "-f", str(directory / "pid")]
        self._process = subprocess.Popen([*asked, *(["-b", forbids] if forbids else [])], stderr=subprocess.DEVNULL)
        until_now(channel.exists)
        self._socket = socket.socket(socket.AF_UNIX)
        until_now(lambda: self._socket.connect_ex(str(channel)) == 0)
        self._lines = self._socket.makefile("rw")
        self.hooks = GuestHooks(host.directory, ask=self.ask, hook=str(self.hook))

    def end(self) -> None:
        self._lines.close()
        self._socket.close()
        self._process.kill()
        self._process.wait(60)

    def ask(self, _domain: object, command: str, **arguments: object) -> Any:
        if self.is_silent:
            fail(SILENT)
        if self.host.guest.is_frozen():
            fail(f"unable to execute QEMU agent command '{command}': Command {command} has been disabled")
        with self._turn:  # as libvirt has it
            self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._lines.flush()
            answer = json.loads(self._lines.readline())
        if "error" in answer:
            fail(f"unable to execute QEMU agent command '{command}': {answer['error']['desc']}")
        return answer["return"]

    def has_hook(self, freeze: str = "", thaw: str = "", *, interpreter: str = "/bin/sh", mode: int = 0o755) -> None:
        """Put a hook into the guest; it notes each half that it ran to its end."""
        noted = f">> {self._log}"
        self.hook.write_text(
            f"#!{interpreter}\necho begins $1 {noted}\ncase $1 in\nfreeze) {freeze or ':'} ;;\nthaw) {thaw or ':'} ;;\nesac\n"
            f"code=$?\necho $1 {noted}\nexit $code\n"
        )
        self.hook.chmod(mode)

    def ran(self) -> list[str]:
        """Return the halves that began and those that ended."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def backed_up(self, hold: Hold | None = None) -> Instant:
        host = self.host
        backups = Backups(cast(Connection, host), instants=cast(InstantSource, None), hooks=self.hooks, socket_dir=host.directory)
        with backups.serve("vm-a", [], checkpoint="tt-1", wants_freeze=True, hold=hold) as instant:
            return instant

    @property
    def mark(self) -> Path:
        return self.host.directory / "trimtab-vm-a-hooked.held"

    def dies_held(self, **noted: int) -> None:
        """Leave the mark as a process does that is killed: nobody has its lock."""
        self.mark.write_text(json.dumps({"running_id": self.host.guest.ID(), **noted}))

    def settle_all(self) -> None:
        """As the host's agent does at its start, and every few seconds from then on."""
        hooks = GuestHooks(self.host.directory, ask=self.ask, hook=str(self.hook))
        hooks.settle_all(cast(Connection, self.host))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    (tmp_path / "guest").mkdir()
    host = Host(tmp_path)
    found = Agent(tmp_path / "guest", host)
    yield found
    found.end()
    host.remove()


WHOLE = ["begins freeze", "freeze", "begins thaw", "thaw"]


def test_applications_are_held_around_the_frozen_instant_under_a_mark(agent: Agent) -> None:
    agent.has_hook()
    seen: dict[str, object] = {}
    agent.host.guest.on_freeze = lambda: seen.update(freeze=(agent.ran(), agent.mark.exists()))
    agent.host.guest.on_instant = lambda: seen.update(instant=(agent.ran(), agent.host.guest.is_frozen()))
    agent.host.guest.on_thaw = lambda: seen.update(thaw=agent.ran())
    instant = agent.backed_up()
    assert seen == {"freeze": (WHOLE[:2], True), "instant": (WHOLE[:2], True), "thaw": WHOLE[:2]}
    assert (instant.consistency, list(instant.notes)) == (Consistency.APPLICATION, ["frozen_ms"])
    assert (agent.ran(), agent.mark.exists()) == (WHOLE, False)


def test_applications_are_not_consistent_in_file_systems_that_are_not(agent: Agent) -> None:
    agent.has_hook()
    agent.host.guest.on_freeze = lambda: fail(SILENT)
    instant = agent.backed_up()
    assert (instant.consistency, agent.ran()) == (Consistency.CRASH, WHOLE)
    assert SILENT in instant.notes["downgrade"]


def test_a_guest_without_a_hook_gives_its_file_systems_and_nothing_failed(agent: Agent) -> None:
    instant = agent.backed_up()
    assert (instant.consistency, list(instant.notes)) == (Consistency.FILESYSTEM, ["frozen_ms"])
    assert instant.not_asked == f"the guest has no {agent.hook}"
    assert not agent.mark.exists()


def test_a_guest_whose_agent_runs_no_programs_gives_its_file_systems(tmp_path: Path) -> None:
    host = Host(tmp_path)
    (tmp_path / "guest").mkdir()
    agent = Agent(tmp_path / "guest", host, forbids="guest-exec")
    try:
        agent.has_hook()
        instant = agent.backed_up()
        assert (instant.consistency, list(instant.notes)) == (Consistency.FILESYSTEM, ["frozen_ms"])
        assert "does not run" in instant.not_asked
        assert "disabled" in instant.not_asked
        assert not agent.mark.exists()
    finally:
        agent.end()
        host.remove()


def test_a_guest_without_an_agent_is_not_asked(agent: Agent) -> None:
    agent.has_hook()
    agent.host.guest.channel = "disconnected"
    instant = agent.backed_up()
    assert (instant.consistency, instant.not_asked, agent.ran()) == (Consistency.CRASH, "the guest has no agent that answers", [])


@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        ("echo flushing; echo first >&2; echo the log is full >&2; false", "failed with exit code 1: the log is full"),
        ("echo 'no such'; printf 'table\\033[1m\\n\\n'; sh -c 'exit 7'", "failed with exit code 7: table[1m"),
        ("kill -TERM $$", "was ended by signal 15"),
        ("head -c 900 /dev/zero | tr '\\0' x; false", f"failed with exit code 1: {'x' * 200}"),
    ],
)
def test_a_hook_that_fails_is_told_with_its_code_and_last_line_and_followed_by_its_other_half(
    agent: Agent, freeze: str, said: str
) -> None:
    agent.has_hook(freeze)
    instant = agent.backed_up()
    assert instant.consistency is Consistency.FILESYSTEM
    assert instant.notes["downgrade"] == f"the guest's hook {agent.hook} {said}"
    assert (agent.ran()[-2:], agent.mark.exists()) == (["begins thaw", "thaw"], False)


def test_a_backup_waits_for_the_other_half_of_an_earlier_one(agent: Agent) -> None:
    """Else that half would let go what this backup has just had held."""
    gate = agent.directory / "gate"
    agent.has_hook(thaw=f"until [ -e {gate} ]; do sleep 0.02; done")
    agent.dies_held()
    settling = threading.Thread(target=agent.settle_all)
    settling.start()
    until_now(lambda: agent.ran() == ["begins thaw"])
    backing_up = threading.Thread(target=agent.backed_up)
    backing_up.start()
    until_now(lambda: waits_for_lock(agent.mark))
    assert agent.ran() == ["begins thaw"]
    gate.touch()
    settling.join(60)
    backing_up.join(60)
    assert agent.ran() == ["begins thaw", "thaw", *WHOLE]


@pytest.mark.parametrize(("interpreter", "mode"), [("/bin/missing", 0o755), ("/bin/sh", 0o644)])
def test_a_hook_that_its_guest_cannot_run_is_no_hook_that_is_missing(agent: Agent, interpreter: str, mode: int) -> None:
    agent.has_hook(interpreter=interpreter, mode=mode)
    instant = agent.backed_up()
    assert (instant.consistency, agent.ran(), agent.mark.exists()) == (Consistency.FILESYSTEM, [], False)
    assert "is no program that the guest can run" in instant.notes["downgrade"]


def test_a_hook_that_takes_too_long_is_ended_before_its_other_half_begins(agent: Agent) -> None:
    agent.has_hook("exec sleep 600")
    notes: dict[str, str] = {}
    with agent.hooks.held(agent.host.guest, "vm-a", notes, timeout_s=0.1) as hooked:
        assert not hooked.is_held
        assert not Path(f"/proc/{json.loads(agent.mark.read_text())['freeze']}").exists()
    assert notes == {"hook": f"the guest's hook {agent.hook} took longer than 0.1 s and was ended"}
    assert agent.ran() == ["begins freeze", "begins thaw", "thaw"]


def test_a_backup_that_breaks_off_lets_applications_go_on(agent: Agent) -> None:
    agent.has_hook()

    def break_off() -> None:
        raise Conflict("no-room", "no room")

    agent.host.guest.on_instant = break_off
    with pytest.raises(Conflict, match="no room"):
        agent.backed_up()
    assert (agent.ran(), agent.mark.exists()) == (WHOLE, False)


def test_the_other_half_that_fails_is_told_and_takes_nothing_from_the_instant(agent: Agent) -> None:
    agent.has_hook(thaw="echo still locked >&2; false")
    instant = agent.backed_up()
    assert instant.consistency is Consistency.APPLICATION
    assert instant.notes["hook_thaw"] == f"the guest's hook {agent.hook} thaw failed with exit code 1: still locked"
    assert not agent.mark.exists(), "it was run"


def test_the_other_half_follows_the_death_of_who_held_the_applications(agent: Agent) -> None:
    agent.has_hook()
    agent.dies_held()
    agent.settle_all()
    agent.settle_all()
    assert (agent.ran(), agent.mark.exists()) == (["begins thaw", "thaw"], False)


def test_what_a_dead_holder_began_is_ended_first(agent: Agent) -> None:
    agent.has_hook("exec sleep 600")
    begun = agent.ask(None, "guest-exec", path=str(agent.hook), arg=["freeze"])
    until_now(lambda: agent.ran() == ["begins freeze"])
    agent.dies_held(freeze=begun["pid"])
    agent.settle_all()
    until_now(lambda: not agent.mark.exists())
    assert agent.ran() == ["begins freeze", "begins thaw", "thaw"]
    assert not Path(f"/proc/{begun['pid']}").exists()


def test_the_next_backup_lets_go_on_what_a_dead_holder_left_before_it_holds_it_anew(agent: Agent) -> None:
    agent.has_hook()
    agent.dies_held()
    assert agent.backed_up().consistency is Consistency.APPLICATION
    assert agent.ran() == ["begins thaw", "thaw", *WHOLE]


def test_a_guest_that_a_dead_holder_left_frozen_too_is_thawed_first(agent: Agent) -> None:
    agent.has_hook()
    agent.dies_held()
    agent.host.dies_frozen()
    agent.settle_all()
    assert (agent.ran(), agent.mark.exists()) == ([], True), "its agent runs nothing while it is frozen"
    agent.host.settle_all()
    agent.settle_all()
    assert (agent.ran(), agent.mark.exists()) == (["begins thaw", "thaw"], False)


def test_an_agent_that_falls_silent_is_asked_again_once_it_answers(agent: Agent) -> None:
    agent.has_hook()
    with agent.hooks.held(agent.host.guest, "vm-a", notes := {}) as hooked:
        assert hooked.is_held
        agent.is_silent = True
    assert "is tried again" in notes["hook_thaw"]
    for _ in range(2):
        agent.settle_all()
        assert (agent.ran(), agent.mark.exists()) == (WHOLE[:2], True)
    agent.is_silent = False
    agent.settle_all()
    assert (agent.ran(), agent.mark.exists()) == (WHOLE, False)


def test_an_agent_that_falls_silent_as_it_is_asked_may_have_begun_it(agent: Agent) -> None:
    agent.has_hook()
    agent.is_silent = True
    notes: dict[str, str] = {}
    with agent.hooks.held(agent.host.guest, "vm-a", notes) as hooked:
        assert (hooked.is_held, hooked.is_begun) == (False, True)
        agent.is_silent = False
    assert SILENT in notes["hook"]
    assert agent.ran() == ["begins thaw", "thaw"]


def test_who_lives_and_holds_is_not_disturbed(agent: Agent) -> None:
    agent.has_hook()
    with agent.hooks.held(agent.host.guest, "vm-a", {}):
        agent.settle_all()
        assert (agent.ran(), agent.mark.exists()) == (WHOLE[:2], True)


def test_a_mark_of_an_earlier_run_of_the_guest_or_of_a_hook_that_is_gone_runs_nothing(agent: Agent) -> None:
    agent.dies_held()
    agent.settle_all()
    assert not agent.mark.exists(), "there is no hook any more"
    agent.has_hook()
    agent.dies_held()
    agent.host.restarts_guest()
    agent.settle_all()
    assert (agent.ran(), agent.mark.exists()) == ([], False)


def test_one_of_several_vms_at_one_instant_stands_still_while_its_applications_are_held(agent: Agent) -> None:
    agent.has_hook()

    def hold() -> dict[str, str]:
        return {"held": ",".join(agent.ran())}

    instant = agent.backed_up(hold)
    assert (instant.consistency, instant.notes["held"]) == (Consistency.APPLICATION, "begins freeze,freeze")
    assert agent.ran() == WHOLE


def test_the_agents_housekeeping_lets_applications_go_on_and_its_stop_waits_for_them(agent: Agent) -> None:
    agent.has_hook()
    connection = Connection("test:///default", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(20)
    agent.dies_held()
    housekeeping = housekeeping_of(agent.host, connection, agent.hooks)
    housekeeping.start()
    try:
        until_now(lambda: not agent.mark.exists())
        with agent.hooks.held(agent.host.guest, "vm-a", {}):
            stopper = threading.Thread(target=housekeeping.stop)
            stopper.start()
            stopper.join(0.2)
            assert stopper.is_alive()
        stopper.join(60)
        assert not stopper.is_alive()
    finally:
        housekeeping.stop()
        connection.stop()
    assert agent.ran() == ["begins thaw", "thaw", *WHOLE]
