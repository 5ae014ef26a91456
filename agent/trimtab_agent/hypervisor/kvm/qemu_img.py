"""Runs `qemu-img` where a hostile image can do little: bounded, without network, and for files from outside as nobody, who sees nothing
of the host but programs and libraries. An agent is root and runs it so or not at all; only somebody who is not has less to take away.

Every call names its formats; nothing is ever guessed from content. The caller passes a work directory in which all file names are
plain words chosen by us, so no name from outside reaches QEMU's file name parser (`json:`, `nbd:`).
The wrapper programs come from util-linux; `preexec_fn` was rejected since it may deadlock in a process with threads.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab_agent.hypervisor.kvm.lent_secrets import in_memory
from trimtab_protos.errors import Conflict, DeadlineExceeded, Internal, InvalidRequest, NoCapacity, TrimtabError, Unavailable

ADDRESS_SPACE_BYTES = 1 << 30
_STACK_BYTES = 1 << 20
"""Of each of up to 64 worker threads: with the usual 8 MiB, and an arena of malloc each, they outgrow the address space."""
NOBODY = 65534
KEY_ID = "volume-key"
UNTIMED = "hashing-untimed"
FILE_BYTES = "file_bytes"
"""The `limit` in the context of an error where a file became larger than it may."""
_HIDE = """for place in /boot /etc /home /media /mnt /opt /root /run /srv /tmp /var; do
  [ ! -d "$place" ] || mount -t tmpfs -o ro,size=4k none "$place"
done
exec "$@"
"""
"""Leaves nobody empty directories. The working directory is open and stays, wherever it is."""
_BEYOND_BOUNDS = ("cannot allocate memory", "failed to allocate")
"""What the kernel's refusals sound like, the last in GLib's words."""
_TOO_COSTLY = "the image needs more work, memory or space than it may"
_POLL_S = 0.1
_MAX_OUTPUT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use."""

    timeout_s: float = 60.0
    cpu_s: int = 30
    file_bytes: int = 1 << 40
    """Largest file that it may write; beyond it the kernel kills it."""


def run(
    arguments: Sequence[str],
    *,
    directory: int,
    limits: Limits,
    cancelled: threading.Event | None = None,
    as_nobody: bool = False,
    on_tick: Callable[[], None] | None = None,
    key: bytes | None = None,
) -> str:
    """Run `qemu-img` with `arguments` inside the directory behind descriptor `directory` and return its standard output.

    NoCapacity: the disk is full. InvalidRequest(image-too-costly): it went over its limits. Conflict(image-locked): a guest has a
    disk open; Conflict(job-cancelled).
    `as_nobody`: the files it opens by name belong to `NOBODY`. `key`: the arguments may name it as secret `KEY_ID`; it goes through a
    file in memory that this call alone has.
    """
    deadline = time.monotonic() + limits.timeout_s
    with in_memory(key) as secret:
        command = [*_wrapper(limits, as_nobody=as_nobody), "qemu-img", arguments[0], *_secret_object(secret), *arguments[1:]]
        descriptors = (directory, *([] if secret is None else [secret]))
        return _run(command, directory, descriptors, deadline, cancelled, on_tick)


def _secret_object(descriptor: int | None) -> list[str]:
    return [] if descriptor is None else ["--object", f"secret,id={KEY_ID},file=/proc/self/fd/{descriptor}"]


def _run(
    command: Sequence[str],
    directory: int,
    descriptors: Sequence[int],
    deadline: float,
    cancelled: threading.Event | None,
    on_tick: Callable[[], None] | None,
) -> str:
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # The child enters it before it drops its rights: nobody may lack the right to pass through the pool's parents.
        cwd=f"/proc/self/fd/{directory}",
        pass_fds=tuple(descriptors),
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
        start_new_session=True,
    ) as process:
        try:
            output, complaint = _communicate(process, deadline, cancelled, on_tick)
        except BaseException:
            process.kill()
            raise
    if process.returncode == 0:
        return output
    raise _failure(process.returncode, complaint)


def _communicate(
    process: subprocess.Popen[bytes],
    deadline: float,
    cancelled: threading.Event | None,
    on_tick: Callable[[], None] | None,
) -> tuple[str, str]:
    while True:
        if on_tick is not None:
            on_tick()
        if cancelled is not None and cancelled.is_set():
            raise Conflict("job-cancelled", "the job was cancelled")
        try:
            output, complaint = process.communicate(timeout=_POLL_S)
            return output.decode(errors="replace"), complaint.decode(errors="replace")[-_MAX_OUTPUT:]
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise DeadlineExceeded("image-tool-timeout", "qemu-img did not end in time and was killed") from None


def _failure(code: int, complaint: str) -> TrimtabError:
    # prlimit and setpriv exec, so a signal shows as itself; a shell-like 128+n comes from unshare.
    signal_number = -code if code < 0 else code - 128 if code > 128 else 0
    lowered = complaint.lower()
    if "no space left on device" in lowered or "disk quota exceeded" in lowered:
        return NoCapacity("pool-full", "the pool has no room left", detail=complaint)
    if "unable to get accurate cpu usage" in lowered:
        # It measures how fast it hashes by CPU time, which some kernels count in ticks only, and gives up where it sees none pass.
        return Unavailable(UNTIMED, "qemu-img could not tell how fast this host hashes", detail=complaint)
    if '" lock' in lowered:  # as in hypervisor/kvm/errors.py
        return Conflict("image-locked", "a disk is in use by another QEMU, on this host or on another", detail=complaint)
    if signal_number == signal.SIGXFSZ or "file too large" in lowered:
        return InvalidRequest("image-too-costly", _TOO_COSTLY, limit=FILE_BYTES, detail=complaint)
    if signal_number in {signal.SIGKILL, signal.SIGXCPU} or any(said in lowered for said in _BEYOND_BOUNDS):
        return InvalidRequest("image-too-costly", _TOO_COSTLY, detail=complaint)
    return Internal("image-tool-failed", f"qemu-img failed: {complaint.strip()[:300]}", exit_code=code)


def _wrapper(limits: Limits, *, as_nobody: bool) -> list[str]:
    cpu_s, file_bytes = limits.cpu_s, limits.file_bytes
    wrapper = [
        "prlimit",
        f"--as={ADDRESS_SPACE_BYTES}",
        f"--cpu={cpu_s}:{cpu_s + 1}",
        f"--fsize={file_bytes}",
        "--core=0",
        f"--stack={_STACK_BYTES}",
        "--",
    ]
    if os.geteuid() != 0:
        return wrapper
    if not as_nobody:
        return [*wrapper, "unshare", "--net", "--"]
    wrapper += ["unshare", "--net", "--mount", "--", "sh", "-ec", _HIDE, "sh"]
    identity = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*wrapper, "setpriv", *identity, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"]
