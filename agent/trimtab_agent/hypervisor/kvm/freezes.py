"""File systems that a guest's agent holds still for an instant, with a mark on disk: the death of this process leaves none frozen.

    mark ── freeze ── the instant ── thaw ── mark gone
     │ whoever holds the mark's lock lives; once nobody does, the guest is thawed
     └ an agent that does not answer to the thaw is asked again every few seconds, for as long as this run of the guest lasts

A freeze that was no longer waited for may come about afterwards, so its mark stays as well until a thaw went through. To thaw what is
not frozen does nothing; whose freeze it is cannot be asked, so that one of somebody beside Trimtab ends with ours.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import domain_facts
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.run_marks import Count, HeldMark, RunMarks

log = structlog.get_logger(__name__)

_GUEST_AGENT_S = 5
"""How long the guest's agent may take to freeze or thaw; libvirt would wait for ever."""
_REFUSED = "unable to execute QEMU agent command"
"""libvirt's words (9.0) for an agent's own refusal. One that refuses to freeze has thawed what it froze until then; where it is
forbidden to thaw too it is not asked again."""


class GuestFreezes:
    """The freezes of one host. Thread-safe; `directory` is the same for every process of the host."""

    def __init__(self, directory: Path) -> None:
        self._marks = RunMarks(directory, "-frozen.held")
        self._told: set[str] = set()
        """Whose agent's silence is in the log: it is asked so often that it is said once."""
        self._count = Count()
        self.wait_until_none = self._count.wait_until_none

    @contextlib.contextmanager
    def frozen(self, domain: Any, vm_id: str, notes: dict[str, str]) -> Iterator[bool]:
        """Hold a running guest's file systems still for the block, if its agent can; tell whether they are.

        `notes` gets how long they were (`frozen_ms`), or why they were not (`downgrade`).
        """
        if not domain_facts.read(domain.XMLDesc(0)).has_guest_agent:
            notes["downgrade"] = "the guest has no agent that answers"
            yield False
            return
        with self._count.counted(), contextlib.closing(self._marks.take(domain, vm_id)) as mark:
            is_frozen = self._freeze(domain, vm_id, mark, notes)
            if is_frozen:
                began = time.monotonic()
                try:
                    yield True
                finally:
                    self._thaw(domain, vm_id, mark)
                    notes["frozen_ms"] = str(int((time.monotonic() - began) * 1000))
        if not is_frozen:
            yield False

    def settle(self, domain: Any, vm_id: str) -> None:
        """Thaw a guest whose holder died, or could not thaw it. One that is held by somebody who lives is left alone."""
        mark = self._marks.abandoned(vm_id)
        if mark is not None:
            with contextlib.closing(mark):
                if not self._thaw(domain, vm_id, mark):
                    log.info("nothing of the guest is frozen any more", vm_id=vm_id)

    def settle_all(self, connection: Connection) -> None:
        """Settle what is left of all guests; no guest waits for the agent of another."""
        self._marks.settle_all(connection, self.settle)

    def _freeze(self, domain: Any, vm_id: str, mark: HeldMark, notes: dict[str, str]) -> bool:
        _bound(domain)
        try:
            domain.fsFreeze()
        except libvirt.libvirtError as error:
            said = error.get_error_message() or ""
            notes["downgrade"] = f"the guest's filesystems were not frozen: {said}"
            # It may have frozen some, or freeze them all once it is no longer waited for.
            if _REFUSED in self._thaw(domain, vm_id, mark) and _REFUSED in said:
                mark.remove()
            return False
        return True

    def _thaw(self, domain: Any, vm_id: str, mark: HeldMark) -> str:
        """Thaw and unmark, or return what stands against it; then the mark stays, no longer than the run of the guest that it names."""
        try:
            if mark.names(domain) and domain.isActive():
                _bound(domain)
                domain.fsThaw()
        except libvirt.libvirtError as error:
            said = error.get_error_message() or "libvirt does not say why"
            if vm_id not in self._told:
                log.warning("a guest could not be thawed and is tried again", vm_id=vm_id, error=said)
            self._told.add(vm_id)
            return said
        self._told.discard(vm_id)
        mark.remove()
        return ""


def _bound(domain: Any) -> None:
    """Whoever asks the agent for addresses leaves it less."""
    with contextlib.suppress(libvirt.libvirtError):
        domain.agentSetResponseTimeout(_GUEST_AGENT_S, 0)
