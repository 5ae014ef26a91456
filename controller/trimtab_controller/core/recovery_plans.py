"""Recovery plans: what comes back, in which order, and how much of its past each vm loses. Pure.

A run is a value: the groups with what became of each vm. `next_step` says what is to be done; whoever drives it does that, writes
down what came of it, and asks again. So a run goes on from wherever it was cut short.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from trimtab_protos.errors import InvalidRequest

GROUPS_MAX, VMS_MAX = 50, 500
TCP_PORT_MAX = 65535


class Mode(StrEnum):
    TEST = "test"
    """Boot tests: each vm comes up without a network, and nothing of it stays."""
    REAL = "real"
    """The vms come back under their names, where they are not there."""


class Awaits(StrEnum):
    STARTED = "started"
    AGENT = "agent"
    PATTERN = "pattern"


class Outcome(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PRESENT = "present"
    """A vm of its name is here already: it is left as it is, and counts as back."""
    BACK = "back"
    FAILED = "failed"


ENDED = frozenset({Outcome.PRESENT, Outcome.BACK, Outcome.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Vms that come back together; the next group begins once all of them show what is awaited."""

    name: str
    vms: Sequence[str]
    delay_s: int = 0
    """After the group before is back."""
    awaits: Awaits = Awaits.STARTED
    pattern: str = ""
    tcp: int = 0
    """Where its boot test has to be answered too, 1 to 65535; 0 for none. A real run does not ask: there the guest is on its own networks."""
    timeout_s: int = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A backup that a vm may come back from."""

    backup_id: str
    vm_name: str
    taken_at: datetime
    is_damaged: bool
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRun:
    vm: str
    outcome: Outcome = Outcome.WAITING
    backup_id: str = ""
    operation_id: str = ""
    loss_window_s: float = 0.0
    recovery_ms: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRun:
    name: str
    vms: Sequence[VmRun]
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    groups: Sequence[GroupRun] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Bring this group's vms back now."""

    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Nothing to do for so long; or until a vm of the group ended."""

    seconds: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """All is back; or `problem` says which group stopped the run."""

    problem: str = ""


Step = Begin | Pause | Over
POLL_S = 3.0


def check(groups: Sequence[Group]) -> None:
    """Raise InvalidRequest for what no run can follow; names the field."""
    if not 1 <= len(groups) <= GROUPS_MAX:
        raise InvalidRequest(
            "groups-wrong", f"groups: a plan has 1 to {GROUPS_MAX} groups, {len(groups)} were given", field="groups"
        )
    names = [group.name for group in groups]
    vms = [vm for group in groups for vm in group.vms]
    for what, found in (("group", names), ("vm", vms)):
        twice = sorted({one for one in found if found.count(one) > 1})
        if twice:
            raise InvalidRequest("named-twice", f"groups: the {what} {twice[0]} is named twice", field="groups")
    if len(vms) > VMS_MAX:
        raise InvalidRequest("plan-too-large", f"groups: a plan has {VMS_MAX} vms at most, {len(vms)} were given", field="groups")
    for i, group in enumerate(groups):
        _check_group(group, f"groups[{i}]")


def _check_group(group: Group, where: str) -> None:
    if not group.vms:
        raise InvalidRequest("group-empty", f"{where}.vms: group {group.name} has no vm", field=f"{where}.vms")
    if (group.awaits is Awaits.PATTERN) != bool(group.pattern):
        raise InvalidRequest(
            "pattern-unclear",
            f"{where}.pattern: a pattern goes with `awaits: pattern`, and only with it",
            field=f"{where}.pattern",
        )
    if group.tcp and not 1 <= group.tcp <= TCP_PORT_MAX:
        raise InvalidRequest(
            "port-out-of-range",
            f"{where}.tcp: a TCP port is 1 to {TCP_PORT_MAX}, {group.tcp} was given; leave it out where no port is to answer",
            field=f"{where}.tcp",
        )
    try:
        re.compile(group.pattern)
    except re.error as error:
        raise InvalidRequest(
            "pattern-malformed", f"{where}.pattern: no regular expression: {error}", field=f"{where}.pattern"
        ) from error


def choose(copies: Sequence[Copy], vm: str) -> Copy | None:
    """Return the newest copy of the vm that is whole, as far as anybody knows; None where there is none."""
    whole = [copy for copy in copies if copy.vm_name == vm and not copy.is_damaged]
    return max(whole, key=lambda copy: (copy.taken_at, copy.backup_id), default=None)


def begin(groups: Sequence[Group], copies: Sequence[Copy], present: Mapping[str, str], *, mode: Mode, now: datetime) -> Run:
    """Return the run before its first step: which backup each vm comes back from, and what it loses by that.

    `present`: the vms that are here, by name; only a real run leaves them as they are.
    """
    return Run(
        groups=[
            GroupRun(name=group.name, vms=[_vm_run(vm, copies, present, mode=mode, now=now) for vm in group.vms])
            for group in groups
        ]
    )


def _vm_run(vm: str, copies: Sequence[Copy], present: Mapping[str, str], *, mode: Mode, now: datetime) -> VmRun:
    if mode is Mode.REAL and vm in present:
        return VmRun(vm=vm, outcome=Outcome.PRESENT)
    copy = choose(copies, vm)
    if copy is None:
        return VmRun(vm=vm, outcome=Outcome.FAILED, problem="the repository lists no whole backup of it")
    return VmRun(vm=vm, backup_id=copy.backup_id, loss_window_s=max(0.0, (now - copy.taken_at).total_seconds()))


def next_step(groups: Sequence[Group], run: Run, *, now: datetime) -> Step:
    """Return what is to be done next. A group with a vm that did not come back stops a run: what follows relies on it."""
    before: datetime | None = None
    for i, (group, state) in enumerate(zip(groups, run.groups, strict=True)):
        failed = [one for one in state.vms if one.outcome is Outcome.FAILED]
        if any(one.outcome is Outcome.RUNNING for one in state.vms):
            return Pause(seconds=POLL_S, why=f"group {group.name}")
        if any(one.outcome is Outcome.WAITING for one in state.vms):
            due = before + timedelta(seconds=group.delay_s) if before is not None else now
            if due > now:
                return Pause(seconds=(due - now).total_seconds(), why=f"the delay before group {group.name}")
            return Begin(group=i)
        if failed:
            told = "; ".join(f"{one.vm}: {one.problem}" for one in failed)
            return Over(problem=f"group {group.name} is not back, so what follows was not begun: {told}")
        before = state.ended_at or before
    return Over()


def with_vms(run: Run, group: int, vms: Sequence[VmRun], *, now: datetime) -> Run:
    """Return the run after what became of a group's vms; it notes when the last of them ended."""
    has_ended = all(one.outcome in ENDED for one in vms)
    changed = replace(run.groups[group], vms=list(vms), ended_at=run.groups[group].ended_at or (now if has_ended else None))
    return Run(groups=[*run.groups[:group], changed, *run.groups[group + 1 :]])


def failed(one: VmRun, problem: str) -> VmRun:
    return replace(one, outcome=Outcome.FAILED, problem=problem[:400])
