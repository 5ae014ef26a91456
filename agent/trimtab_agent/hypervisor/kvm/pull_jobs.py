"""Jobs of libvirt's that a backup is read from, with a mark on disk: one whose reader died is ended by whoever finds it.

    mark ── backupBegin ── read ── abortJob, the normal end of a pull job ── mark gone
     │ whoever holds the mark's lock lives; once nobody does, the job is ended

Left alone it would take room until its guest finds none, and keep every other job from the domain.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm.backup_xml import socket_of_job
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import require
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.run_marks import RunMarks
from trimtab_protos.errors import Conflict, TrimtabError

log = structlog.get_logger(__name__)


class PullJobs:
    """The pull jobs of one host. Thread-safe; `directory` is the same for every process of the host, and QEMU binds sockets there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._marks = RunMarks(directory, "-pulled.held")

    def socket(self, vm_id: str) -> Path:
        return self._directory / f"trimtab-{check_id(vm_id, 'vm_id')}-backup.sock"

    @contextlib.contextmanager
    def held(self, connection: Connection, vm_id: str) -> Iterator[None]:
        """Keep the mark for the block, and end the job of the vm after it: a guest that stopped meanwhile has ended it itself."""
        with connection.use("mark the backup") as opened:
            mark = self._marks.take(require(opened, vm_id), vm_id)
        with contextlib.closing(mark):
            try:
                yield
            finally:
                with contextlib.suppress(TrimtabError), connection.use("end the backup", changes=True) as opened:
                    self._end(require(opened, vm_id), vm_id)
                    mark.remove()

    def end_leftover(self, domain: Any, vm_id: str) -> None:
        """End a job of ours that an earlier agent began. Conflict: anything else is under way."""
        if domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return
        log.info("ending a backup job that an earlier agent left", domain=domain.name())
        if not self._end(domain, vm_id):
            message = "another job of this domain is under way, such as a migration; try again when it has ended"
            raise Conflict("vm-busy", message)

    def end_for_room(self, domain: Any, vm_id: str, pauses: GuestPauses) -> bool:
        """End the vm's job; once it is gone, let a guest go on that an error has paused. Tell whether there is nothing left to do."""
        if self._end(domain, vm_id):
            return False
        if not is_paused_by_error(domain):
            return True
        pauses.resume_unless_kept(domain, vm_id)
        return True

    def settle_all(self, connection: Connection) -> None:
        """End the jobs whose readers died."""
        self._marks.settle_all(connection, self._settle)

    def _settle(self, domain: Any, vm_id: str) -> None:
        mark = self._marks.abandoned(vm_id)
        if mark is not None:
            with contextlib.closing(mark):
                if self._end(domain, vm_id):
                    log.info("ended a backup job whose reader died", vm_id=vm_id)
                mark.remove()

    def _end(self, domain: Any, vm_id: str) -> bool:
        """Ask libvirt to end the vm's pull job; False where there is none of ours."""
        if not domain.isActive() or domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return False
        try:
            job = domain.backupGetXMLDesc(0)
        except libvirt.libvirtError:
            return False
        if socket_of_job(job) != str(self.socket(vm_id)):
            return False
        domain.abortJob()
        return True


def is_paused_by_error(domain: Any) -> bool:
    state, reason = domain.state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR)
