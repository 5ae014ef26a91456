"""Processes of the lab that are not hosts: the control plane, the shared directory's file server, NBD servers.

They run in the namespace `ctl` (address .2) and in control groups, by which `down` finds them even after a crash of `up`.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from trimtab_lab import cgroups
from trimtab_lab.networks import NAMESPACE_DIRECTORY
from trimtab_lab.specs import CTL, PLANE_GROUP, STORAGE_GROUP, LabSpec

ENTER_GROUP = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs"; shift; done; shift; exec "$@"'
"""Shell that enters the control groups named before `--`, then becomes the command after it. A shell and not a
`preexec_fn`, which is unsafe in a process with threads."""


def create_ctl_groups(lab: LabSpec) -> None:
    for group in (STORAGE_GROUP, PLANE_GROUP):
        cgroups.create(lab.cgroup(group), controllers=cgroups.PROCESS_CONTROLLERS_V1)


def ctl_command(lab: LabSpec, argv: Sequence[str], *, group: str = STORAGE_GROUP, in_namespace: bool = True) -> list[str]:
    """The command that runs `argv` inside one of ctl's groups and, by default, its network namespace."""
    groups = cgroups.directories(lab.cgroup(group), controllers=cgroups.PROCESS_CONTROLLERS_V1).values()
    enter = [f"--net={NAMESPACE_DIRECTORY / lab.namespace(CTL)}"] if in_namespace else []
    prefix = ["nsenter", *enter, "--"] if enter else []
    return ["sh", "-c", ENTER_GROUP, "sh", *(str(each) for each in groups), "--", *prefix, *argv]


def start_in_ctl(
    lab: LabSpec,
    argv: Sequence[str],
    *,
    log_name: str,
    group: str = STORAGE_GROUP,
    in_namespace: bool = True,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Starts a lasting process in a session of its own that outlives the caller and is nobody's child to wait for.

    Its output is appended to `log/NAME.log`, its pid is in `run/NAME.pid`.
    """
    lab.log_directory.mkdir(exist_ok=True)
    pid_file(lab, log_name).parent.mkdir(exist_ok=True)
    recorded = ["sh", "-c", 'echo $$ > "$1"; shift; exec "$@"', "sh", str(pid_file(lab, log_name)), *argv]
    with (lab.log_directory / f"{log_name}.log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", *ctl_command(lab, recorded, group=group, in_namespace=in_namespace)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(os.environ if environment is None else environment),
            check=True,
            timeout=10,
        )


def pid_file(lab: LabSpec, log_name: str) -> Path:
    return lab.state_directory / "run" / f"{log_name}.pid"


def running_process_id(lab: LabSpec, log_name: str, *, group: str = STORAGE_GROUP) -> int | None:
    """The pid of a process started under that name, if it still runs."""
    try:
        process_id = int(pid_file(lab, log_name).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return process_id if process_id in cgroups.process_ids(lab.cgroup(group)) else None
