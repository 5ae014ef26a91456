"""One control group per member of a lab: it finds, freezes and kills everything a member runs, whoever started it.

Works on a machine with the v1 controllers (one directory per controller) and on one with the unified hierarchy. The
group, not a list of remembered pids, is the truth about what runs: it survives a crash of the lab's own process.
"""

import contextlib
import os
import signal
from pathlib import Path

from trimtab_lab.commands import wait_until
from trimtab_lab.errors import LabError

MOUNT = Path("/sys/fs/cgroup")
HOST_CONTROLLERS_V1 = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids")
PROCESS_CONTROLLERS_V1 = ("freezer", "pids")
"""Enough for a member that only runs processes of the control plane."""

RT_RUNTIME_US = 20_000
"""Real-time share of each second for one host: a warden needs far less, and 40 hosts fit into the machine's 950 ms."""


def is_unified() -> bool:
    return (MOUNT / "cgroup.controllers").exists()


def directories(name: str, *, controllers: tuple[str, ...] = HOST_CONTROLLERS_V1) -> dict[str, Path]:
    """Where the group lies, by controller; one entry, `unified`, on a machine without v1 controllers."""
    if is_unified():
        return {"unified": MOUNT / name}
    found = {each: MOUNT / each / name for each in controllers if (MOUNT / each).is_dir()}
    if "freezer" not in found or "pids" not in found:
        raise LabError(f"neither a unified cgroup hierarchy nor the v1 controllers freezer and pids in {MOUNT}")
    return found


def create(name: str, *, controllers: tuple[str, ...] = HOST_CONTROLLERS_V1) -> dict[str, Path]:
    """Makes the group, ready to be entered; idempotent."""
    made = directories(name, controllers=controllers)
    for controller, directory in made.items():
        directory.mkdir(exist_ok=True)
        match controller:
            case "cpuset":
                # An empty cpuset refuses every process; children (one per guest) must inherit the same way.
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (directory / file).write_text((directory.parent / file).read_text())
                (directory / "cgroup.clone_children").write_text("1")
            case "cpu":
                _grant_real_time(directory)
            case "unified":
                _enable_controllers(directory.parent)
    return made


def _grant_real_time(directory: Path) -> None:
    """Lets a warden use SCHED_FIFO: with group scheduling a new group has no real-time share at all."""
    runtime = directory / "cpu.rt_runtime_us"
    if not runtime.exists():
        return  # a kernel without group scheduling for real time asks for nothing
    for share_us in (RT_RUNTIME_US, RT_RUNTIME_US // 10):
        with contextlib.suppress(OSError):
            runtime.write_text(str(share_us))
            return
    # No share left on the machine: hosts run, wardens cannot arm; hostinit reports the share it finds.


def _enable_controllers(root: Path) -> None:
    available = (root / "cgroup.controllers").read_text().split()
    for controller in available:
        with contextlib.suppress(OSError):
            (root / "cgroup.subtree_control").write_text(f"+{controller}")


def process_ids(name: str) -> list[int]:
    """Every process in the group and the groups below it, by the machine's process ids."""
    top = MOUNT / name if is_unified() else MOUNT / "pids" / name
    found: list[int] = []
    for directory, _, files in os.walk(top):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                found += [int(line) for line in (Path(directory) / "cgroup.procs").read_text().split()]
    return found


def set_frozen(name: str, *, frozen: bool) -> None:
    if is_unified():
        (MOUNT / name / "cgroup.freeze").write_text("1" if frozen else "0")
        return
    state = MOUNT / "freezer" / name / "freezer.state"
    wanted = "FROZEN" if frozen else "THAWED"

    def is_so() -> bool:
        # Written each time: a group in which something forks meanwhile may stay FREEZING for ever after one write.
        state.write_text(wanted)
        return state.read_text().strip() == wanted

    if not wait_until(is_so, timeout_s=10):
        raise LabError(f"group {name} did not become {wanted} within 10 s")


def is_frozen(name: str) -> bool:
    if is_unified():
        file = MOUNT / name / "cgroup.freeze"
        return file.exists() and file.read_text().strip() == "1"
    file = MOUNT / "freezer" / name / "freezer.state"
    return file.exists() and file.read_text().strip() != "THAWED"


def kill_all(name: str, *, first: int | None = None) -> None:
    """Kills every process of the group and returns when none is left; `first` (a namespace's init) dies first.

    A frozen group is thawed only after each member has its SIGKILL pending, so that none runs one more instruction.
    """
    if first is not None:
        _kill(first)
    for process_id in process_ids(name):
        _kill(process_id)
    if is_frozen(name):
        set_frozen(name, frozen=False)

    def is_empty() -> bool:
        remaining = process_ids(name)
        for process_id in remaining:
            _kill(process_id)
        return not remaining

    if not wait_until(is_empty, timeout_s=20):
        raise LabError(f"processes {process_ids(name)} of {name} survive SIGKILL (waiting on storage?)")


def _kill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def remove(name: str) -> None:
    """Removes the group everywhere; its processes must be gone. Idempotent."""
    parents = [MOUNT] if is_unified() else [each for each in MOUNT.iterdir() if each.is_dir() and not each.is_symlink()]
    for parent in parents:
        top = parent / name
        if top.is_dir() and not wait_until(lambda top=top: _remove_tree(top), timeout_s=5):  # type: ignore[misc]
            raise LabError(f"control group {top} stays busy")


def _remove_tree(top: Path) -> bool:
    """The kernel lets a group go a moment after its last process: False says to try again."""
    for directory, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return not top.exists()
