"""Runs the system's own tools (ip, mount, nsenter ...) with a deadline and readable failures.

Rejected: a netlink library. The lab makes about twenty links per host, once; `ip -batch` does that in milliseconds and
an operator can repeat by hand what a log line shows.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab_lab.errors import LabError

DEFAULT_TIMEOUT_S = 30.0


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    standard_input: str | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Returns the finished process with its output as text; raises LabError when it failed and `check` is set."""
    try:
        finished = subprocess.run(
            list(argv),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            input=standard_input if standard_input is not None else "",
            env=environment,
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed (ops/bootstrap.sh installs what the lab needs)") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{shlex.join(argv)}` gave no answer within {timeout_s:g} s") from error
    if check and finished.returncode != 0:
        raise LabError(f"`{shlex.join(argv)}` ended with {finished.returncode}: {(finished.stderr or finished.stdout).strip()}")
    return finished


def batch_ip(lines: Sequence[str], *, namespace: str | None = None) -> None:
    """Runs several `ip` commands in one process, in the order given; the first failure stops it."""
    prefix = ["ip", "-n", namespace] if namespace else ["ip"]
    run([*prefix, "-batch", "-"], standard_input="\n".join(lines) + "\n")


def wait_until(condition: Callable[[], bool], *, timeout_s: float, interval_s: float = 0.02) -> bool:
    """Says whether the condition came true within the time; polls since cgroups and namespaces give no event."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(interval_s)
    return True


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replaces the file so that a reader, or a crash, sees the old or the new text and never half of one."""
    replacement = path.with_name(f".{path.name}.{os.getpid()}")
    replacement.write_text(text)
    replacement.chmod(mode)
    replacement.replace(path)


def own_programs() -> Path:
    """Where Trimtab's programs are: beside this Python, so that a lab runs the code of its own clone."""
    return Path(sys.executable).parent


def mount_points() -> set[Path]:
    """Where something is mounted. Not `os.path.ismount`, which overlooks a directory bound onto itself."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {Path(line.split()[4].encode().decode("unicode_escape")) for line in lines}
