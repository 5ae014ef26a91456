"""Guests that a backup paused, as marks on disk: the death of this process leaves none of them paused, and nobody's own pause is undone.

    mark ── suspend ── hold ── resume ── mark gone
     │ whoever holds the mark's lock lives; once nobody does, a guest that is still paused is let go on
     └ an operator's pause or resume takes the mark away: from then on the pause is theirs

A mark alone proves little: its writer may have died before it paused anything. So it names the running domain, since a guest that was
started anew is another, and it does not outlive its writer by more than seconds, in which only somebody beside Trimtab can pause.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import VmLocks, require
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_protos.errors import NotFound, TrimtabError

log = structlog.get_logger(__name__)

_PREFIX, _SUFFIX = "trimtab-", "-backup.held"


class GuestPauses:
    """The marks of one host. Thread-safe; `directory` is the same for every process of the host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = VmLocks()

    @contextlib.contextmanager
    def paused(self, domain: Any, vm_id: str) -> Iterator[None]:
        """Keep a running guest paused for the block; one that somebody else paused stays so."""
        with self._locks.hold(vm_id):
            descriptor = self._begin(domain, vm_id) if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else None
        if descriptor is None:
            yield
            return
        try:
            domain.suspend()
            yield
        finally:
            try:
                with self._locks.hold(vm_id):
                    self._let_go(domain, vm_id, descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def taken_over(self, vm_id: str) -> Iterator[None]:
        """For an operator's pause or resume: nothing else changes it during the block, nor undoes it afterwards."""
        with self._locks.hold(vm_id):
            yield
            self._mark(vm_id).unlink(missing_ok=True)

    def settle(self, domain: Any, vm_id: str) -> None:
        """Let a guest go on whose holder died. One that is held by somebody who lives is left alone."""
        with self._locks.hold(vm_id), contextlib.ExitStack() as stack:
            try:
                descriptor = os.open(self._mark(vm_id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):
                return
            self._let_go(domain, vm_id, descriptor)

    def settle_all(self, connection: Connection) -> None:
        """Settle what earlier processes left; cheap where there is nothing."""
        for mark in self._directory.glob(f"{_PREFIX}*{_SUFFIX}"):
            vm_id = mark.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            try:
                with connection.use("let a held guest go on", changes=True) as opened:
                    self.settle(require(opened, vm_id), vm_id)
            except NotFound:
                mark.unlink(missing_ok=True)
            except TrimtabError as error:
                log.info("a held guest is looked at again", vm_id=vm_id, error=str(error))

    def _begin(self, domain: Any, vm_id: str) -> int:
        descriptor = os.open(self._mark(vm_id), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"running_id": domain.ID()}).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _let_go(self, domain: Any, vm_id: str, descriptor: int) -> None:
        """Resume and unmark, unless the mark is somebody else's by now, or speaks of another run of the guest."""
        mark = self._mark(vm_id)
        try:
            if mark.stat().st_ino != os.fstat(descriptor).st_ino:
                return
        except FileNotFoundError:
            return  # an operator took the pause over
        try:
            state, reason = domain.state()
            is_paused = state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER
            if is_paused and _running_id(descriptor) == domain.ID():
                domain.resume()
        finally:
            mark.unlink(missing_ok=True)

    def _mark(self, vm_id: str) -> Path:
        return self._directory / f"{_PREFIX}{check_id(vm_id, 'vm_id')}{_SUFFIX}"


def _running_id(descriptor: int) -> int:
    try:
        return int(json.loads(os.pread(descriptor, 1024, 0))["running_id"])
    except (ValueError, KeyError, TypeError):
        return -1  # its writer died before it paused anything
