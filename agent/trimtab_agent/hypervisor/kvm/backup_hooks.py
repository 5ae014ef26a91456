"""What a guest's owner has its applications do around a backup: one program in the guest, run by its agent, with a mark on disk.

    mark ── `freeze` ── the file systems' freeze, the instant, their thaw ── `thaw` ── mark gone
     │ whoever holds the mark's lock lives; once nobody does, `thaw` is run in the guest by who finds it
     └ while the agent is silent, or the guest's file systems are frozen, it is tried again every few seconds, as long as this run lasts

`thaw` follows each `freeze` that began, whatever became of that one, and never while it still runs: one that takes too long is ended
first, else it would hold its applications after they were let go. It may come twice. The hooks of the agent's own freeze
(`qemu-ga -F`) are run by it alone, and nobody is told how they ended.
"""

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import domain_facts, guest_commands
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.run_marks import Count, HeldMark, RunMarks

log = structlog.get_logger(__name__)

HOOK = "/etc/trimtab/backup-hook"
HOOK_S = 30.0
"""How long either half may take; a database that flushes for longer should begin before its backup."""
_END_S = 5.0
"""How long one that was killed may take to be gone; it waits for a disk then."""
_FIRST_POLL_S, _LAST_POLL_S = 0.02, 0.5
_LINE_MAX = 200
_REFUSED = "unable to execute QEMU agent command"
"""libvirt's words (9.0) for an agent's own refusal: nothing was run."""
_NO_PROGRAM, _ABSENT = "Failed to execute", "No such file or directory"
"""The agent's words for what it cannot run (QEMU 7.2)."""
_FREEZE = "freeze"
"""The half, and what a mark calls the process that runs it."""

Ask = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Hooked:
    """Whether the guest's applications are held; where nothing failed, why nobody was asked."""

    is_held: bool
    not_asked: str = ""
    is_begun: bool = False


class GuestHooks:
    """The hooks of one host's guests. Thread-safe; `directory` is the same for every process of the host."""

    def __init__(self, directory: Path, *, ask: Ask = guest_commands.ask, hook: str = HOOK) -> None:
        self._marks = RunMarks(directory, "-hooked.held")
        self._ask = ask
        self._hook = hook
        self._told: set[str] = set()
        """Of whom the log says that `thaw` is put off: it is tried so often that it is said once."""
        self._count = Count()
        self.wait_until_none = self._count.wait_until_none

    @contextlib.contextmanager
    def held(self, domain: Any, vm_id: str, notes: dict[str, str], *, timeout_s: float = HOOK_S) -> Iterator[Hooked]:
        """Have a running guest's applications held for the block, if its owner has a hook; tell whether they are.

        `notes` gets why they are not where the hook failed (`hook`), and what its other half failed with (`hook_thaw`).
        """
        if not domain_facts.read(domain.XMLDesc(0)).has_guest_agent:
            yield Hooked(is_held=False, not_asked="the guest has no agent that answers")
            return
        with self._count.counted(), contextlib.closing(self._marks.take(domain, vm_id)) as mark:
            hooked = self._freeze(domain, mark, notes, timeout_s)
            try:
                yield hooked
            finally:
                if hooked.is_begun:
                    failed = self._thaw(domain, vm_id, mark)
                    if failed:
                        notes["hook_thaw"] = failed

    def settle(self, domain: Any, vm_id: str) -> None:
        """Run the other half of a hook whose holder died, or could not run it. One that is held by somebody who lives is left alone."""
        mark = self._marks.abandoned(vm_id)
        if mark is not None:
            with contextlib.closing(mark):
                if not self._thaw(domain, vm_id, mark):
                    log.info("the guest's applications are held no more", vm_id=vm_id)

    def settle_all(self, connection: Connection) -> None:
        """Settle what is left of all guests; no guest waits for the hook of another."""
        self._marks.settle_all(connection, self.settle)

    def _freeze(self, domain: Any, mark: HeldMark, notes: dict[str, str], timeout_s: float) -> Hooked:
        try:
            process_id = self._begin(domain, _FREEZE)
        except libvirt.libvirtError as error:
            return self._not_begun(domain, mark, notes, error)
        mark.note(domain, _FREEZE, process_id)
        try:
            ended = self._wait(domain, process_id, timeout_s)
            if ended is None:
                self._end(domain, process_id)
            failed = f"took longer than {timeout_s:g} s and was ended" if ended is None else _failure(ended)
        except libvirt.libvirtError as error:
            failed = f"was not heard of any more: {_said(error)}"
        if failed:
            notes["hook"] = f"the guest's hook {self._hook} {failed}"
        return Hooked(is_held=not failed, is_begun=True)

    def _not_begun(self, domain: Any, mark: HeldMark, notes: dict[str, str], error: libvirt.libvirtError) -> Hooked:
        said = _said(error)
        if _REFUSED not in said and error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            # An agent that falls silent may have begun it.
            notes["hook"] = f"the guest's hook {self._hook} was not heard of: {said}"
            return Hooked(is_held=False, is_begun=True)
        mark.remove()
        if _NO_PROGRAM not in said:
            return Hooked(is_held=False, not_asked=f"the guest's agent does not run {self._hook}: {said}")
        if _ABSENT in said and not self._is_there(domain):
            return Hooked(is_held=False, not_asked=f"the guest has no {self._hook}")
        notes["hook"] = f"the guest's hook {self._hook} is no program that the guest can run: {said}"
        return Hooked(is_held=False)

    def _thaw(self, domain: Any, vm_id: str, mark: HeldMark) -> str:
        """Run the other half and unmark, or return what is wrong with it. The mark stays where it could not be begun."""
        try:
            if not (mark.names(domain) and domain.isActive()):
                mark.remove()
                return ""
            process_id = mark.noted(_FREEZE)
            if process_id and not self._end(domain, process_id):
                return self._put_off(vm_id, "its first half still runs and cannot be ended")
            process_id = self._begin(domain, "thaw")
        except libvirt.libvirtError as error:
            said = _said(error)
            if _REFUSED not in said or _NO_PROGRAM not in said:
                return self._put_off(vm_id, said)
            mark.remove()  # its owner has taken it away meanwhile
            return f"the guest's hook {self._hook} can be run no more: {said}"
        self._told.discard(vm_id)
        try:
            ended = self._wait(domain, process_id, HOOK_S)
            failed = f"still runs after {HOOK_S:g} s" if ended is None else _failure(ended)
        except libvirt.libvirtError as error:
            failed = f"began, and was not heard of any more: {_said(error)}"
        mark.remove()  # not before: a backup that comes now would hold what this half is about to let go
        if failed:
            log.warning("a guest's hook failed to let its applications go on", vm_id=vm_id, problem=failed)
        return f"the guest's hook {self._hook} thaw {failed}" if failed else ""

    def _put_off(self, vm_id: str, said: str) -> str:
        if vm_id not in self._told:
            log.warning("a guest's applications are held until its hook can be run again", vm_id=vm_id, error=said)
        self._told.add(vm_id)
        return f"the guest's hook {self._hook} thaw is tried again, since it could not be run: {said}"

    def _begin(self, domain: Any, half: str) -> int:
        asked = {"path": self._hook, "arg": [half], "capture-output": True}
        return int(self._ask(domain, "guest-exec", **asked)["pid"])

    def _wait(self, domain: Any, process_id: int, timeout_s: float) -> Mapping[str, Any] | None:
        """Return how the process ended, None while it runs after the time."""
        waits, poll_s, deadline = threading.Event(), _FIRST_POLL_S, time.monotonic() + timeout_s
        while True:
            seen: Mapping[str, Any] = self._ask(domain, "guest-exec-status", pid=process_id)
            if seen["exited"]:
                return seen
            if time.monotonic() >= deadline:
                return None
            waits.wait(poll_s)
            poll_s = min(2 * poll_s, _LAST_POLL_S)

    def _end(self, domain: Any, process_id: int) -> bool:
        """Tell whether the process has ended, or could be ended."""
        if self._has_ended(domain, process_id):
            return True
        try:
            self._ask(domain, "guest-exec", path="/bin/kill", arg=["-KILL", str(process_id)])
        except libvirt.libvirtError as error:
            if _REFUSED not in _said(error):
                raise
            return False
        return self._wait(domain, process_id, _END_S) is not None

    def _has_ended(self, domain: Any, process_id: int) -> bool:
        try:
            return self._wait(domain, process_id, 0) is not None
        except libvirt.libvirtError as error:
            said = _said(error)
            if _REFUSED in said and "pid" in said.lower():
                return True  # an agent tells once that it ended, and knows of no such process then
            raise

    def _is_there(self, domain: Any) -> bool:
        """Tell whether the file is there: what its first line names may be what is not."""
        try:
            opened = self._ask(domain, "guest-file-open", path=self._hook, mode="r")
            self._ask(domain, "guest-file-close", handle=opened)
        except libvirt.libvirtError:
            return False
        return True


def _said(error: libvirt.libvirtError) -> str:
    return error.get_error_message() or "libvirt does not say why"


def _failure(ended: Mapping[str, Any]) -> str:
    """Return "" for one that ended well, else its exit code and the last line that it wrote."""
    code = ended.get("exitcode")
    if code == 0:
        return ""
    last = next((lines[-1] for lines in (_lines(ended, "err-data"), _lines(ended, "out-data")) if lines), "")
    how = f"failed with exit code {code}" if code is not None else f"was ended by signal {ended.get('signal')}"
    return f"{how}: {last}" if last else how


def _lines(ended: Mapping[str, Any], stream: str) -> list[str]:
    text = base64.b64decode(ended.get(stream, "")).decode(errors="replace")
    printable = ("".join(char for char in line if char.isprintable()).strip() for line in text.splitlines())
    return [line[:_LINE_MAX] for line in printable if line]
