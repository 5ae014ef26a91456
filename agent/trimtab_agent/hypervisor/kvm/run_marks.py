"""Marks on disk that name a run of a guest, and so mean nothing of a later one, which is another guest.

    take ── do something to the guest ── undo it ── remove
     │ whoever holds a mark's lock lives; one that nobody holds is of the dead, and what it stands for is undone by who finds it

Written before the deed and removed after it is undone, so that no instant at which the process may die is without a mark.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import require
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_protos.errors import NotFound, TrimtabError

log = structlog.get_logger(__name__)

_PREFIX = "trimtab-"
_NO_RUN = -1
"""Libvirt's number of a domain that does not run."""
_PATIENCE_S = 1.0
"""How long the others wait for one guest that is settled, which goes on beside them."""


@dataclass(frozen=True, slots=True)
class HeldMark:
    """A mark whose lock is held until `close`."""

    path: Path
    descriptor: int

    def is_there(self) -> bool:
        """Tell whether it still counts: nobody has taken it away, or put another in its place."""
        try:
            return self.path.stat().st_ino == os.fstat(self.descriptor).st_ino
        except FileNotFoundError:
            return False

    def names(self, domain: Any) -> bool:
        return _names(os.pread(self.descriptor, 1024, 0), domain)

    def note(self, domain: Any, name: str, figure: int) -> None:
        """Add a figure. The mark only grows by it, so that no instant finds it half written."""
        os.pwrite(self.descriptor, _content(domain, **{name: figure}), 0)

    def noted(self, name: str) -> int:
        """Return the figure, 0 for one that was not added."""
        return int(json.loads(os.pread(self.descriptor, 1024, 0)).get(name, 0))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self.descriptor)


class Count:
    """How many guests this process holds just now. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._changed:
            self._held += 1
        try:
            yield
        finally:
            with self._changed:
                self._held -= 1
                self._changed.notify_all()

    def wait_until_none(self, timeout_s: float) -> bool:
        """Tell whether this process holds no guest, or comes to it within the time: one that ends by itself should wait."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held, timeout_s)


class RunMarks:
    """The marks of one kind of one host. Thread-safe; `directory` is the same for every process of the host."""

    def __init__(self, directory: Path, suffix: str) -> None:
        self._directory = directory
        self._suffix = suffix
        self._guarded = GuardedCalls()

    def take(self, domain: Any, vm_id: str) -> HeldMark:
        """Mark the run of the guest and hold the mark; waits for somebody who lives and holds it."""
        while True:
            mark = self._open(vm_id, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(mark.descriptor, fcntl.LOCK_EX)
                if mark.is_there():
                    os.ftruncate(mark.descriptor, 0)
                    os.pwrite(mark.descriptor, _content(domain), 0)
                    return mark
            except BaseException:
                mark.close()
                raise
            mark.close()  # who held it before has removed it meanwhile

    def abandoned(self, vm_id: str) -> HeldMark | None:
        """Return the mark, held, if there is one that nobody else holds."""
        try:
            mark = self._open(vm_id, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(mark.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mark.close()
            return None
        if not mark.is_there():
            mark.close()
            return None
        return mark

    def write(self, domain: Any, vm_id: str) -> None:
        """Mark the run of the guest with a mark that nobody holds."""
        self._path(vm_id).write_bytes(_content(domain))

    def names(self, domain: Any, vm_id: str) -> bool:
        """Tell whether there is a mark of this run of the guest."""
        try:
            return _names(self._path(vm_id).read_bytes(), domain)
        except FileNotFoundError:
            return False

    def remove(self, vm_id: str) -> None:
        self._path(vm_id).unlink(missing_ok=True)

    def vm_ids(self) -> list[str]:
        found = self._directory.glob(f"{_PREFIX}*{self._suffix}")
        return sorted(path.name.removeprefix(_PREFIX).removesuffix(self._suffix) for path in found)

    def settle_all(self, connection: Connection, settle: Callable[[Any, str], None]) -> None:
        """Have every mark settled; cheap where there is none. No guest waits for another whose agent, or whose QEMU, is silent."""
        for vm_id in self.vm_ids():
            with contextlib.suppress(Hung):
                self._guarded.run(vm_id, partial(self.settle, connection, vm_id, settle), timeout_s=_PATIENCE_S)

    def settle(self, connection: Connection, vm_id: str, settle: Callable[[Any, str], None]) -> None:
        """Have the vm's mark settled by `settle`, which gets its domain; a mark of a vm that is gone is removed."""
        try:
            with connection.use(f"settle what is marked of {vm_id}", changes=True) as opened:
                settle(require(opened, vm_id), vm_id)
        except NotFound:
            self.remove(vm_id)
        except TrimtabError as error:
            log.info("a guest's mark is looked at again", vm_id=vm_id, mark=self._suffix, error=str(error))

    def _open(self, vm_id: str, flags: int) -> HeldMark:
        path = self._path(vm_id)
        return HeldMark(path, os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))

    def _path(self, vm_id: str) -> Path:
        return self._directory / f"{_PREFIX}{check_id(vm_id, 'vm_id')}{self._suffix}"


def _content(domain: Any, **noted: int) -> bytes:
    return json.dumps({"running_id": domain.ID(), **noted}).encode()


def _names(mark: bytes, domain: Any) -> bool:
    try:
        running_id = int(json.loads(mark)["running_id"])
    except (ValueError, KeyError, TypeError):
        return False  # its writer died before it did anything
    return bool(running_id == domain.ID() != _NO_RUN)
