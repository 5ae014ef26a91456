"""Whose pause it is, as marks on disk: the death of this process leaves no guest of a backup's paused, and nobody's own pause is undone.

    mark ── suspend ── hold ── resume ── mark gone
     │ whoever holds the mark's lock lives; once nobody does, a guest that is still paused is let go on
     └ an operator's pause or resume takes the mark away: from then on the pause is theirs

A mark alone proves little: its writer may have died before it paused anything. So it names the running domain, since a guest that was
started anew is another, and it does not outlive its writer by more than seconds, in which only somebody beside Trimtab can pause.

libvirt does not take a pause of a guest that an I/O error has paused already: the reason stays the error. A second mark says that an
operator asked for it, so that what lets guests go on after an error lets that one be.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt

from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import VmLocks
from trimtab_agent.hypervisor.kvm.run_marks import HeldMark, RunMarks


class GuestPauses:
    """The marks of one host. Thread-safe; `directory` is the same for every process of the host."""

    def __init__(self, directory: Path) -> None:
        self._held = RunMarks(directory, "-backup.held")
        self._asked = RunMarks(directory, "-operator.paused")
        self._locks = VmLocks()

    @contextlib.contextmanager
    def paused(self, domain: Any, vm_id: str) -> Iterator[None]:
        """Keep a running guest paused for the block; one that somebody else paused stays so."""
        with self._locks.hold(vm_id):
            mark = self._held.take(domain, vm_id) if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else None
        if mark is None:
            yield
            return
        with contextlib.closing(mark):
            try:
                domain.suspend()
                yield
            finally:
                with self._locks.hold(vm_id):
                    _let_go(domain, mark)

    @contextlib.contextmanager
    def taken_over(self, vm_id: str) -> Iterator[None]:
        """For an operator's pause or resume: nothing else changes it during the block, nor undoes it afterwards."""
        with self._locks.hold(vm_id):
            yield
            self._held.remove(vm_id)

    def keep(self, domain: Any, vm_id: str) -> None:
        """Note that an operator wants this run of the guest paused. Within `taken_over`."""
        self._asked.write(domain, vm_id)

    def give_up(self, vm_id: str) -> None:
        """Note that nobody wants it paused any more: an operator resumes it, or it starts."""
        self._asked.remove(vm_id)

    def resume_unless_kept(self, domain: Any, vm_id: str) -> bool:
        """Let a guest go on that an error paused; tell whether it was: an operator's pause, before the error or after, holds."""
        with self._locks.hold(vm_id):
            if self._asked.names(domain, vm_id):
                return False
            domain.resume()
            return True

    def settle(self, domain: Any, vm_id: str) -> None:
        """Let a guest go on whose holder died. One that is held by somebody who lives is left alone."""
        with self._locks.hold(vm_id):
            mark = self._held.abandoned(vm_id)
            if mark is not None:
                with contextlib.closing(mark):
                    _let_go(domain, mark)

    def settle_all(self, connection: Connection) -> None:
        """Settle what earlier processes left, and put marks of runs away that are over; cheap where there is nothing."""
        for marks, settle in ((self._held, self.settle), (self._asked, self._forget)):
            marks.settle_all(connection, settle)

    def _forget(self, domain: Any, vm_id: str) -> None:
        """Put away what an operator asked of a run that is over: the guest moved, or was started anew."""
        with self._locks.hold(vm_id):
            if not self._asked.names(domain, vm_id):
                self._asked.remove(vm_id)


def _let_go(domain: Any, mark: HeldMark) -> None:
    """Resume and unmark, unless an operator took the pause over, or the mark speaks of another run of the guest."""
    if not mark.is_there():
        return
    try:
        state, reason = domain.state()
        is_paused = state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER
        if is_paused and mark.names(domain):
            domain.resume()
    finally:
        mark.remove()
